#!/usr/bin/env python3
"""The memory plan of `tinylora train` beside what the process took, over several configurations.

    scripts/memory_table.py                                     the embedded model
    scripts/memory_table.py --model models/SmolLM2-135M-Instruct.Q4_1.gguf --data svamp
    scripts/memory_table.py --model q4_k.gguf q8_0.gguf --data svamp --dtype auto    by format

Each row is a training of one step in a process of its own; the peak is what the system counted
(VmHWM), pages of mapped files included. Completions end only where they must, so that the step is as
large as the plan says it may be.
"""
import argparse
import itertools
import json
import pathlib
import subprocess
import sys
import tempfile


def train(binary: str, settings: dict) -> dict:
    command = [binary, "train", "--json", "--quiet"]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command + ["--run-dir", f"{folder}/run"], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default="target/release/tinylora")
    parser.add_argument("--model", nargs="+", default=["mini"])
    parser.add_argument("--data", default="mini")
    parser.add_argument("--dtype", nargs="+", default=["f32", "bf16"])
    parser.add_argument("--groups", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--prompts", type=int, default=4, help="of a step")
    parser.add_argument("--set", nargs="*", default=[], help="further keys of the configuration")
    args = parser.parse_args()
    width = max(len(pathlib.Path(model).name) for model in args.model) + 1
    print(f"{'model':{width}}{'dtype':6}{'group':>6}{'tokens':>7}{'plan MB':>10}{'peak MB':>10}{'peak/plan':>11}")
    worst = 0.0
    cases = itertools.product(args.model, args.dtype, args.groups, args.lengths)
    for model, dtype, group, length in cases:
        settings = {
            "model.path": model,
            "model.dtype": dtype,
            "data.train": args.data,
            "data.prompt": "plain",
            "eval.data": "[]",
            "grpo.stop": "[]",
            "grpo.temperature": 2.0,
            "grpo.prompts_per_step": args.prompts,
            "grpo.num_generations": group,
            "grpo.max_completion_length": length,
            "train.max_steps": 1,
        } | dict(pair.split("=", 1) for pair in args.set)
        summary = train(args.binary, settings)
        plan, peak = summary["planned_memory_bytes"] / 1e6, summary["peak_memory_bytes"] / 1e6
        worst = max(worst, peak / plan)
        name = pathlib.Path(model).name
        print(f"{name:{width}}{dtype:6}{group:>6}{length:>7}{plan:>10.0f}{peak:>10.0f}{peak / plan:>11.2f}", flush=True)
    print(f"largest: {worst:.2f} of its plan")
    if worst > 1.1:
        sys.exit("a run took more than its plan and a tenth")


if __name__ == "__main__":
    main()
