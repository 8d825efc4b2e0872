#!/usr/bin/env bash
# A long run on the embedded mini model, with its memory, open files and speed sampled on the way:
#
#   scripts/soak.sh [STEPS]        # default: 1000
#
# Prints a table, then the change from the second tenth of the run to the last one. Ends with exit code
# 1 when memory or open files grew or steps slowed down by more than a tenth. Needs Linux (/proc).
# The machine should be idle: threads that wait for others spin, so that load costs processor time.
# TINYLORA names the program (default: target/release/tinylora, built if need be).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
steps=${1:-1000}
if [ -z "${TINYLORA:-}" ]; then
    cargo build --quiet --locked --release --manifest-path "$root/Cargo.toml"
    TINYLORA=$root/target/release/tinylora
fi
place=$(mktemp -d)
process=
trap '[ -z "$process" ] || kill $process 2>/dev/null || true; rm -rf "$place"' EXIT

# v stays where it is, so that every step works on completions of the same length.
"$TINYLORA" train --quiet --run-dir "$place/run" --set train.max_steps="$steps" --set eval.limit=8 \
    --set optim.learning_rate=1e-12 --set train.max_dead_steps=0 --set grpo.prompts_per_step=2 &
process=$!

log=$place/run/metrics.jsonl
samples=$place/samples
done_steps() { [ -e "$log" ] && grep -c '"loss"' "$log" || true; }
while kill -0 $process 2>/dev/null; do
    now=$(done_steps)
    memory=$(awk '/^VmRSS/ { print $2 }' /proc/$process/status 2>/dev/null || true)
    cpu=$(awk '{ print $14 + $15 }' /proc/$process/stat 2>/dev/null || true)
    files=$(find /proc/$process/fd -mindepth 1 2>/dev/null | wc -l)
    threads=$(find /proc/$process/task -mindepth 1 -maxdepth 1 2>/dev/null | wc -l)
    if [ -n "$memory" ] && [ -n "$cpu" ] && [ "${now:-0}" -gt 0 ]; then
        echo "$now $memory $files $threads $cpu" >>"$samples"
    fi
    sleep "${INTERVAL:-1}"
done
wait $process

# Speed is processor time a step, which other programs on the machine change less than its time.
python3 - "$samples" "$steps" "$(getconf CLK_TCK)" <<'PYTHON'
import sys

rows = [list(map(int, line.split())) for line in open(sys.argv[1])]
steps, ticks = int(sys.argv[2]), int(sys.argv[3])
print(f"{'step':>6} {'memory MB':>10} {'files':>6} {'threads':>8} {'CPU ms/step':>12}")


def part(low, high):
    inside = [r for r in rows if low * steps <= r[0] <= high * steps]
    if len(inside) < 2 or inside[-1][0] == inside[0][0]:
        sys.exit("too few samples: more STEPS, or a smaller INTERVAL")
    speed = 1000 / ticks * (inside[-1][4] - inside[0][4]) / (inside[-1][0] - inside[0][0])
    return max(r[1] for r in inside) / 1024, max(r[2] for r in inside), max(r[3] for r in inside), speed


parts = [part(i / 10, (i + 1) / 10) for i in range(10)]
for i, (memory, files, threads, speed) in enumerate(parts):
    print(f"{(i + 1) * steps // 10:6} {memory:10.1f} {files:6} {threads:8} {speed:12.2f}")
first, last = parts[1], parts[-1]
names = ("memory", "open files", "threads", "CPU time a step")
# A log that is open for the moment it is written is no growth.
slack = (0, 2, 2, 0)
grown = [name for name, a, b, few in zip(names, first, last, slack) if b > 1.1 * a + few]
print("from the second tenth to the last: " + ", ".join(
    f"{name} {100 * (b / a - 1):+.1f} %" for name, a, b in zip(names, first, last)))
sys.exit(f"grown by more than a tenth: {', '.join(grown)}" if grown else 0)
PYTHON
