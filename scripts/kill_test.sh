#!/usr/bin/env bash
# Kills training runs at random moments (SIGKILL), resumes them, and compares what they end with, byte
# by byte, with a run that was left alone.
#
#   scripts/kill_test.sh [KILLS] [MODEL]     # default: 200 kills of the embedded mini model
#   scripts/kill_test.sh 10 models/SmolLM2-135M-Instruct.Q4_1.gguf
#
# After every kill each checkpoint must have the checksums it was saved with; every finished run must
# have the same adapter, optimizer state, metrics, completions and evaluations, and nothing half-made.
# TINYLORA names the program (default: target/release/tinylora, built if need be), SEED the moments.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
kills=${1:-200}
RANDOM=${SEED:-1}
if [ -z "${TINYLORA:-}" ]; then
    cargo build --quiet --locked --release --manifest-path "$root/Cargo.toml"
    TINYLORA=$root/target/release/tinylora
fi

settings=(train.max_steps=12 train.eval_steps=4 grpo.prompts_per_step=4 grpo.num_generations=4 eval.limit=16)
if [ $# -gt 1 ]; then
    settings=("model.path=$(realpath "$2")" adapter.n_tie=17 train.max_steps=5 train.eval_steps=2 eval.limit=2
        grpo.prompts_per_step=2 grpo.num_generations=4 grpo.max_completion_length=24)
fi
fresh=(train --quiet)
for setting in "${settings[@]}"; do fresh+=(--set "$setting"); done

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"

now() { date +%s.%N; }

fail() {
    echo "FAILED: $1 (see $place)" >&2
    trap - EXIT
    exit 1
}

# What the clock says, and the page about it, are nobody's result.
compare() {
    local different
    different=$(diff -rq whole "$1" -x .lock -x timings.jsonl -x tensorboard -x report.html -x manifest.json -x SHA256SUMS || true)
    [ -z "$different" ] || fail "$different"
}

check_checkpoints() {
    local sums
    for sums in "$1"/checkpoints/step-*/SHA256SUMS; do
        [ -e "$sums" ] || continue
        (cd "$(dirname "$sums")" && sha256sum --check --quiet SHA256SUMS) || fail "$sums"
    done
}

"$TINYLORA" "${fresh[@]}" --run-dir whole # fills the caches
rm -r whole
began=$(now)
"$TINYLORA" "${fresh[@]}" --run-dir whole
length=$(echo "$(now) - $began" | bc)
echo "a run left alone takes $length s"

killed=0 finished=0 early=0
while [ "$killed" -lt "$kills" ]; do
    run=run-$finished
    # Killed before there was anything to resume, it starts again.
    arguments=(train --quiet --resume "$run")
    [ -e "$run/config.toml" ] || arguments=("${fresh[@]}" --run-dir "$run")
    "$TINYLORA" "${arguments[@]}" 2>stderr.txt &
    process=$!
    sleep "$(echo "$length * $RANDOM / 32768" | bc -l)"
    kill -KILL $process 2>/dev/null || true
    status=0
    wait $process 2>/dev/null || status=$?
    case $status in
    137)
        killed=$((killed + 1))
        compgen -G "$run/checkpoints/step-*" >/dev/null || early=$((early + 1))
        check_checkpoints "$run"
        [ $((killed % 20)) -ne 0 ] || echo "$killed kills, $finished runs finished"
        ;;
    0)
        compare "$run"
        rm -r "$run"
        finished=$((finished + 1))
        ;;
    *) fail "exit code $status: $(cat stderr.txt)" ;;
    esac
done
run=run-$finished
if [ -e "$run/config.toml" ]; then
    "$TINYLORA" train --quiet --resume "$run" || fail "the last resume"
    compare "$run"
    finished=$((finished + 1))
fi
echo "$killed kills ($early before the first checkpoint), $finished runs finished, every byte the same"
