#!/usr/bin/env python3
"""Eight runs in lockstep beside the same runs one after another: time, and whether the bytes are the same.

    cargo build --release
    python scripts/bench_lockstep.py target/release/tinylora --work WORK                      # embedded model
    python scripts/bench_lockstep.py target/release/tinylora --work WORK \\
        --model models/SmolLM2-135M-Instruct.Q4_1.gguf --data-dir DATA                        # with GSM8K

Two learning rates and four seeds. Sweeps with `--lockstep 1` and `--lockstep 8` take turns; the table has
the median of wall-clock and processor seconds over the rounds. Then every file of every run is compared:
adapter, optimizer, metrics, completions, evaluations, all but clock times.
"""

import argparse
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import time

MINI = """
base = "mini.toml"
seeds = [1, 2, 3, 4]
learning_rates = [0.015, 0.03]
[set]
adapter.dtype = "f32"
train.save_steps = 100
eval.limit = 256
grpo.prompts_per_step = {prompts}
[[method]]
name = "grpo"
set = {{ train.max_steps = {steps} }}
[[size]]
name = "13"
adapter = {{ n_tie = 4 }}
"""

# The smaller reward gives some groups a difference: on problems as hard as these others have none.
REAL = """
base = "smollm2-13p.toml"
seeds = [1, 2, 4, 5]
learning_rates = [0.01, 0.02]
[set]
model.path = "{model}"
data.data_dir = "{data}"
data.train = "gsm8k"
data.prompt = "auto"
data.limit = 500
train.save_steps = 100
eval.data = ["gsm8k"]
eval.limit = 4
eval.max_tokens = 32
eval.sampled = false
grpo.prompts_per_step = {prompts}
grpo.num_generations = 4
grpo.max_completion_length = 64
grpo.stop = []
grpo.reward_weights = [1.0, 0.2]
reward.funcs = ["gsm8k-flexible", "format"]
reward.format_pattern = '\\$[0-9]'
[[method]]
name = "grpo"
set = {{ train.max_steps = {steps} }}
[[size]]
name = "13"
adapter = {{ n_tie = 17 }}
"""

# What the clock or the process id decides, as it does the time stamps in tensorboard/.
CLOCK = {"timings.jsonl", ".lock", "environment.json"}
# Contain lengths and checksums of the former.
OF_CLOCK = {"manifest.json", "SHA256SUMS"}


def sweep(args, description, folder, lockstep):
    """Wall-clock and processor seconds of a sweep."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [args.program, "sweep", "--quiet", "--config", description, "--sweep-dir", folder]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command + ["--lockstep", str(lockstep)], check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, used


def contents(folder):
    """The files of a sweep's runs that the configuration decides."""
    files = {}
    for path in sorted((folder / "runs").rglob("*")):
        of_clock = path.name in CLOCK | OF_CLOCK or path.parent.name == "tensorboard"
        if path.is_file() and not of_clock:
            data = path.read_bytes()
            # Completions of an evaluation are written as they finish.
            if path.parent.name == "evaluations":
                data = b"\n".join(sorted(data.split(b"\n")))
            files[path.relative_to(folder)] = data
    return files


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("program", type=os.path.abspath)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--model", type=os.path.abspath, help="a GGUF file; the embedded model without")
    parser.add_argument("--data-dir", type=os.path.abspath, help="folder with gsm8k/train.jsonl")
    parser.add_argument("--prompts", type=int, help="prompts of a step [2]")
    parser.add_argument("--steps", type=int, help="steps of a run [40, or 3 with --model]")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    text = REAL if args.model else MINI
    text = text.format(
        model=args.model,
        data=args.data_dir,
        prompts=args.prompts or 2,
        steps=args.steps or (3 if args.model else 40),
    )
    description = args.work / "lockstep.toml"
    description.write_text(text)
    folders = {n: args.work / f"lockstep-{n}" for n in (1, 8)}
    times = {n: [] for n in folders}
    for number in range(args.rounds):
        for lockstep, folder in folders.items():
            seconds, used = sweep(args, description, folder, lockstep)
            times[lockstep].append((seconds, used))
            print(f"round {number + 1}, lockstep {lockstep}: {seconds:.1f} s, {used:.1f} s used", file=sys.stderr)
    alone, together = (contents(folder) for folder in folders.values())
    different = [str(p) for p in alone.keys() | together.keys() if alone.get(p) != together.get(p)]
    print("| | wall-clock, s | processors, s |\n|---|---|---|")
    medians = {n: [statistics.median(column) for column in zip(*rows)] for n, rows in times.items()}
    for name, lockstep in (("one after another", 1), ("in lockstep", 8)):
        print("| {} | {:.1f} | {:.1f} |".format(name, *medians[lockstep]))
    ratios = [a / b for a, b in zip(medians[1], medians[8])]
    print("| times less | {:.2f} | {:.2f} |".format(*ratios))
    print(f"\n{len(alone)} files of 8 runs compared, {len(different)} differ")
    for path in different:
        print(path)
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
