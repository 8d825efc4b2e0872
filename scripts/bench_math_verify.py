#!/usr/bin/env python3
"""Verdicts a second of `tinylora grade --reward equiv` and of Math-Verify on the same pairs.

    python scripts/bench_math_verify.py PAIRS.jsonl --tinylora target/release/tinylora

PAIRS.jsonl has rows with `gold` and `pred`. Both sides take turns on the same random pairs, on one
core (run under `taskset -c 0`), so that a busy machine slows both. Needs `pip install math-verify`.
The time of `tinylora` includes its start and the reading and writing of JSON.
"""

import argparse
import json
import random
import statistics
import subprocess
import tempfile
import time


def math_verify_seconds(rows):
    from math_verify import parse, verify

    start = time.perf_counter()
    verdicts = []
    for row in rows:
        try:
            gold = parse("\\boxed{" + row["gold"] + "}", parsing_timeout=None)
            pred = parse("\\boxed{" + row["pred"] + "}", parsing_timeout=None)
            verdicts.append(bool(verify(gold, pred, timeout_seconds=None)))
        except Exception:  # a reference that fails says no
            verdicts.append(False)
    return time.perf_counter() - start, verdicts


def tinylora_seconds(binary, reward, rows):
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        for row in rows:
            file.write(json.dumps({"gold": row["gold"], "pred": row["pred"]}) + "\n")
        file.flush()
        start = time.perf_counter()
        done = subprocess.run(
            [binary, "grade", "--reward", reward, file.name], check=True, capture_output=True, text=True
        )
        seconds = time.perf_counter() - start
    return seconds, [json.loads(line)["correct"] for line in done.stdout.splitlines()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("pairs")
    parser.add_argument("--tinylora", default="target/release/tinylora")
    parser.add_argument("--reward", default="equiv")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=200, help="pairs a round for Math-Verify (x20 for tinylora)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    with open(args.pairs) as file:
        pairs = [json.loads(line) for line in file]
    draw = random.Random(args.seed)
    math_verify_seconds(pairs[:20])  # imports and caches
    ours, theirs, same, count = [], [], 0, 0
    for round_number in range(args.rounds):
        rows = draw.sample(pairs, min(args.rows, len(pairs)))
        their_time, their_verdicts = math_verify_seconds(rows)
        # Twenty times as many for us, so that the start of the process does not decide.
        our_time, our_verdicts = tinylora_seconds(args.tinylora, args.reward, rows * 20)
        ours.append(len(rows) * 20 / our_time)
        theirs.append(len(rows) / their_time)
        same += sum(a == b for a, b in zip(our_verdicts, their_verdicts))
        count += len(rows)
        print(f"round {round_number + 1}: tinylora {ours[-1]:,.0f}/s, Math-Verify {theirs[-1]:,.0f}/s")
    print(f"median: tinylora {statistics.median(ours):,.0f}/s, Math-Verify {statistics.median(theirs):,.0f}/s, "
          f"ratio {statistics.median(ours) / statistics.median(theirs):.0f}, same verdict {100 * same / count:.1f} %")


if __name__ == "__main__":
    main()
