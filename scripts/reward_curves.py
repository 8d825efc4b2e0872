"""Reward of training by completions sampled, from the runs of a sweep.

    python reward_curves.py runs/sweep-mini-natural

A row for every curve (size, optimizer, learning rate): the mean reward over seeds of each tenth of the
run, and the completions after which the mean over WINDOW steps has first reached the target of its size:
the final reward (last third, mean over seeds) of the best learning rate of AdamW.
"""
import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, median

WINDOW = 3


def rewards(run):
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [line["reward"] for line in lines if "reward" in line]


def completions_of_a_step(run):
    keys = {}
    for line in (run / "config.toml").read_text().splitlines():
        name, _, value = line.partition(" = ")
        keys[name] = value
    return int(keys["prompts_per_step"]) * int(keys["num_generations"])


def reached(curve, target):
    """Steps until the running mean is at the target, or None."""
    for end in range(WINDOW, len(curve) + 1):
        if mean(curve[end - WINDOW : end]) >= target:
            return end
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", type=Path)
    folder = parser.parse_args().sweep
    curves, each = defaultdict(list), None
    for line in (folder / "results.jsonl").read_text().splitlines():
        result = json.loads(line)
        if "diverged" in result:
            continue
        run = folder / "runs" / result["run"]
        each = each or completions_of_a_step(run)
        axes = tuple(str(value) for value in result["axes"].values())
        curves[result["size"], axes, result["learning_rate"]].append(rewards(run))
    final = {key: mean(mean(c[-(len(c) // 3) :]) for c in own) for key, own in curves.items()}
    for size in dict.fromkeys(key[0] for key in curves):
        own = [key for key in curves if key[0] == size]
        target = max(final[key] for key in own if "natural" not in key[1])
        print(f"size {size}: target {100 * target:.1f} %")
        for key in own:
            steps = [reached(curve, target) for curve in curves[key]]
            middle = median(s if s else float("inf") for s in steps)
            length = min(map(len, curves[key]))
            tenths = [
                mean(mean(c[length * i // 10 : length * (i + 1) // 10]) for c in curves[key])
                for i in range(10)
            ]
            shown = " ".join(f"{100 * x:3.0f}" for x in tenths)
            rate = key[2] or "-"
            print(f"  {', '.join(key[1]):20} {rate:>6}  {shown}  reached: {middle * each:.0f}")


main()
