"""What the programs in this folder share: options, prompts, and how they report.

Each measures one program in a process of its own and prints one JSON object as its last line:
name → number, seconds unless the name says otherwise. `bench_rivals.py` runs them in turns, measures
their memory, and sets the environment: number of threads, and `RIVAL_STARTED`, the time of the start.
"""

import argparse
import json
import os
import statistics
import time

STARTED = float(os.environ.get("RIVAL_STARTED", time.time()))

# tinylora's prompt `gsm8k`, which is verl's.
INSTRUCTION = ' Let\'s think step by step and output the final answer after "####".'


def arguments(doc):
    """A parser with the options that are the same for every program."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face directory in f32, or a GGUF file")
    parser.add_argument("prompts", help="JSON Lines with `problem` and `answer`: all rows are one step")
    parser.add_argument("--num-generations", type=int, default=8, help="completions of each prompt")
    parser.add_argument("--max-tokens", type=int, default=128, help="most tokens of a completion")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    return parser


def read_problems(path):
    with open(path) as file:
        return [json.loads(line) for line in file if line.strip()]


def chat(problem):
    """The one user turn that every program is asked with."""
    return [{"role": "user", "content": problem + INSTRUCTION}]


def since_start():
    return time.time() - STARTED


def step_measures(steps):
    """Medians over steps with `step_s`, `rollout_s`, `tokens` and `groups_without_gradient` (a share)."""
    def median(of):
        return statistics.median(of(step) for step in steps)

    return {
        "rollout_s": median(lambda step: step["rollout_s"]),
        "rollout_tokens_per_s": median(lambda step: step["tokens"] / step["rollout_s"]),
        "update_s": median(lambda step: step["step_s"] - step["rollout_s"]),
        "step_s": median(lambda step: step["step_s"]),
        "step_ms_per_token": median(lambda step: 1e3 * step["step_s"] / step["tokens"]),
        "step_tokens": median(lambda step: step["tokens"]),
        "groups_without_gradient": statistics.mean(step["groups_without_gradient"] for step in steps),
        "steps": steps,
    }


def report(measures):
    print(json.dumps(measures), flush=True)
