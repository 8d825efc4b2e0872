"""`tinylora train`: steps on the data as it comes, where groups without a gradient cost no update.

The run starts from nothing (no cached decomposition), without evaluation, and leaves nothing behind.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import common

CONFIG = """
method = "grpo"
[model]
path = {model}
dtype = "f32"
device = "cpu"
[data]
train = {prompts}
prompt = "gsm8k"
[adapter]
r = 2
u = 13
tie = "all"
[train]
seed = {seed}
max_steps = {steps}
save_steps = {steps}
max_dead_steps = 0
[grpo]
prompts_per_step = {prompts_per_step}
num_generations = {num_generations}
max_completion_length = {max_tokens}
[reward]
funcs = ["gsm8k-flexible"]
[eval]
data = []
"""


def lines(path):
    """The whole lines of a JSON Lines file that another process may be writing to."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def main():
    parser = common.arguments(__doc__)
    parser.add_argument("--tinylora", required=True, help="the program")
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        config, run = folder / "rivals.toml", folder / "run"
        config.write_text(CONFIG.format(
            model=json.dumps(os.path.abspath(args.model)),
            prompts=json.dumps(os.path.abspath(args.prompts)),
            prompts_per_step=len(common.read_problems(args.prompts)),
            num_generations=args.num_generations,
            max_tokens=args.max_tokens,
            seed=args.seed,
            steps=args.steps,
        ))
        started = time.time()
        process = subprocess.Popen(
            [args.tinylora, "train", "--quiet", "--config", config, "--run-dir", run],
            env=os.environ | {"TINYLORA_CACHE": str(folder / "cache")}, stdout=sys.stderr,
        )
        first_step_s = None
        while process.poll() is None:
            if first_step_s is None and lines(run / "timings.jsonl"):
                first_step_s = time.time() - started
            time.sleep(0.01)
        if process.returncode:
            sys.exit(f"tinylora train ended with code {process.returncode}")

        tokens = {}
        for row in lines(run / "completions.jsonl"):
            tokens[row["step"]] = tokens.get(row["step"], 0) + row["num_tokens"]
        clock = {row["step"]: row for row in lines(run / "timings.jsonl")}
        steps = [
            {
                "step_s": clock[row["step"]]["step_time"],
                "rollout_s": clock[row["step"]]["time/rollout"],
                "tokens": tokens[row["step"]],
                "reward": row["reward"],
                "groups_without_gradient": row["frac_reward_zero_std"],
            }
            for row in lines(run / "metrics.jsonl")
        ]
        # Counts the prompt with each of its completions.
        num_tokens = lines(run / "metrics.jsonl")[0]["num_tokens"]
    common.report({
        "first_step_s": first_step_s,
        "prompt_tokens": (num_tokens - steps[0]["tokens"]) / args.num_generations,
    } | common.step_measures(steps))


main()
