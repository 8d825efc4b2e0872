#!/bin/sh
# Fuzzes one of the parsers with libFuzzer on a stable toolchain:
#
#     scripts/fuzz.sh TARGET [SECONDS] [libFuzzer options…]    # default: 600 seconds
#     scripts/fuzz.sh all [SECONDS]                            # each in turn
#
# Targets are the files of fuzz/fuzz_targets. The files of the repository and small ones that the targets
# make (fuzz/src/seeds.rs) are the first inputs; what is found to be new stays in fuzz/corpus, what fails
# in fuzz/artifacts. `all` begins with the parsers of files that strangers write, goes on after a finding,
# and ends with a table.
#
# `cargo fuzz` needs a nightly toolchain for its sanitizers. Safe Rust needs none of them to find a
# panic, a hang or a contradiction, so that the coverage flags alone do; C++ is needed for libFuzzer.
set -eu
cd "$(dirname "$0")/../fuzz"
targets=$(ls fuzz_targets | sed 's/\.rs$//')
name=${1:-}
seconds=${2:-600}
case " $(echo $targets) all " in
*" $name "*) [ -n "$name" ] || set -- ;;
*) set -- ;;
esac
if [ $# -eq 0 ]; then
    echo "usage: scripts/fuzz.sh TARGET [SECONDS] [libFuzzer options…]; targets:" $targets "or all" >&2
    exit 2
fi
shift
[ $# -eq 0 ] || shift
if [ "$name" = all ]; then
    first="safetensors gguf tokenizer model_config adapter peft checkpoint parquet"
    table= failed=0
    for target in $first $(echo "$targets" | grep -vxE "$(echo "$first" | tr ' ' '|')"); do
        log=$(mktemp)
        ../scripts/fuzz.sh "$target" "$seconds" "$@" 2>"$log" && result=ok || { result=FAILED failed=1; }
        cat "$log" >&2
        table="$table$(awk -v target="$target" -v result="$result" '
            / cov: / { for (i = 1; i < NF; i++) if ($i == "corp:") corpus = $(i + 1) }
            /^stat::number_of_executed_units/ { runs = $2 }
            /^stat::peak_rss_mb/ { memory = $2 }
            END { printf "%-13s %9d runs, %s inputs in the corpus, %d MB, %s",
                target, runs, corpus ? corpus : "?", memory, result }' "$log")
"
        rm "$log"
    done
    printf '%s' "$table"
    exit $failed
fi

# The first inputs, where there are none yet. A zero byte parts what are two files.
corpus=corpus/$name
if [ ! -d "$corpus" ]; then
    mkdir -p "$corpus"
    export TINYLORA_FUZZ_SEEDS="$PWD/$corpus"
    fixtures=../tests/fixtures
    both() { # TO FIRST SECOND
        { cat "$2" && printf '\0' && cat "$3"; } >"$corpus/$1"
    }
    case $name in
    adapter | safetensors | peft)
        for file in "$fixtures"/peft/*/adapter_model.safetensors; do
            folder=$(dirname "$file")
            [ "$name" != peft ] || both "$(basename "$folder")" "$folder/adapter_config.json" "$file"
            [ "$name" = peft ] || cp "$file" "$corpus/$(basename "$folder")"
        done
        ;;
    tokenizer)
        printf '{%% for m in messages %%}{{ m.content | trim }}{%% endfor %%}' >"$corpus/template"
        both mini ../data/mini/tokenizer.json "$corpus/template"
        ;;
    model_config) cp ../data/mini/config.json "$corpus" ;;
    config) cp ../configs/*.toml "$corpus" ;;
    rows) head -n 3 ../data/mini/test.jsonl >"$corpus/mini" ;;
    parquet) find "$fixtures/data" -name '*.parquet' | while read -r file; do
        cp "$file" "$corpus/$(echo "$file" | tr / _)"
    done ;;
    esac
fi
dictionary=
[ ! -e "$name.dict" ] || dictionary=-dict=$name.dict
length=65536
[ "$name" != graders ] || length=4096

target=$(rustc -vV | sed -n 's/^host: //p')
export RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Ccodegen-units=1 -Cdebug-assertions \
-Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
-Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares"
# A named target keeps the flags away from build scripts.
cargo build --release --target "$target" --bin "$name"
mkdir -p "artifacts/$name"
# The targets measure processor time; -timeout is by the clock, for what never comes back.
"target/$target/release/$name" "$corpus" $dictionary -artifact_prefix="artifacts/$name/" \
    -max_len=$length -timeout=300 -rss_limit_mb=2048 -max_total_time="$seconds" -print_final_stats=1 "$@"
