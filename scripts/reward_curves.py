#!/usr/bin/env python3
"""AdamW's learning rates beside the natural gradient, by completions sampled, from finished sweeps.

    tinylora sweep --config sweep-mini-adamw.toml
    tinylora sweep --config sweep-mini-adamw-sizes.toml
    tinylora sweep --config sweep-mini-natural.toml
    python scripts/reward_curves.py runs/sweep-mini-adamw runs/sweep-mini-adamw-sizes runs/sweep-mini-natural \\
        --figure docs/natural-reward.svg

For every size, optimizer, learning rate and length: greedy accuracy and accuracy at temperature 1 of the
first benchmark after training, mean over seeds with its standard error, and the completions after which
the reward has come to the target of its size (median over seeds): its mean over WINDOW steps has reached the
final reward (last sixth of the longest runs, mean over seeds) of AdamW's best rate. The figure shows the
rewards of the first size.
"""
import argparse
import json
import math
import pathlib
from collections import defaultdict
from statistics import mean, median, stdev

WINDOW = 3


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def completions_of_a_step(run):
    keys = {}
    for line in (run / "config.toml").read_text().splitlines():
        name, _, value = line.partition(" = ")
        keys[name] = value
    return int(keys["prompts_per_step"]) * int(keys["num_generations"])


class Curve:
    """The runs that differ in nothing but the seed."""

    def __init__(self, size, optimizer, rate, steps):
        self.size, self.optimizer, self.rate, self.steps = size, optimizer, rate, steps
        self.rewards, self.greedy, self.sampled = [], [], []
        self.each = 0

    def add(self, run, result):
        self.each = completions_of_a_step(run)
        self.rewards.append([row["reward"] for row in lines(run / "metrics.jsonl") if "reward" in row])
        after = next(iter(result["after"].values()))
        names = [n for n in after if "exact_match" in n and not n.endswith("_stderr")]
        strict = [n for n in names if "flexible" not in n and "equiv" not in n]
        self.greedy.append(after[next(n for n in strict if not n.startswith("sampled"))])
        self.sampled.append(after[next(n for n in strict if n.startswith("sampled"))])

    @property
    def name(self):
        return "natural" if self.optimizer == "natural" else f"AdamW {self.rate:g}"

    def final(self):
        last = max(1, self.steps // 6)
        return mean(mean(rewards[-last:]) for rewards in self.rewards)

    def mean(self):
        return [mean(step) for step in zip(*self.rewards)]

    def reached(self, target):
        """Completions until the running mean is at the target; infinite where it never is."""
        return median(self.reached_by(rewards, target) for rewards in self.rewards)

    def reached_by(self, rewards, target):
        for end in range(WINDOW, len(rewards) + 1):
            if mean(rewards[end - WINDOW : end]) >= target:
                return end * self.each
        return math.inf


def read(folders):
    curves = {}
    for folder in folders:
        for result in lines(folder / "results.jsonl"):
            if "diverged" in result:
                continue
            run = folder / "runs" / result["run"]
            optimizer = "adamw" if result["learning_rate"] else "natural"
            key = (result["size"], optimizer, result["learning_rate"], result["steps"])
            curves.setdefault(key, Curve(*key)).add(run, result)
    return list(curves.values())


def spread(values):
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{100 * mean(values):.1f} ± {100 * error:.1f}"


def table(curves):
    print("| size | optimizer | steps | completions | greedy | at T = 1 | reward at the end | target reached after |")
    print("|---|---|---|---|---|---|---|---|")
    sizes = defaultdict(list)
    for curve in curves:
        sizes[curve.size].append(curve)
    for size, own in sizes.items():
        adamw = [c for c in own if c.optimizer == "adamw"]
        target = max((c.final() for c in adamw if c.steps == max(a.steps for a in adamw)), default=1.0)
        for curve in sorted(own, key=lambda c: (-c.steps, c.optimizer, c.rate)):
            after = curve.reached(target)
            after = f"{after:,.0f}" if math.isfinite(after) else "–"
            print(
                f"| {size} | {curve.name} | {curve.steps} | {curve.steps * curve.each:,} | {spread(curve.greedy)} "
                f"| {spread(curve.sampled)} | {100 * curve.final():.1f} | {after} |"
            )


def draw(curves, path):
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "tinylora", "font.size": 9,
                            "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False}
    size = curves[0].size
    own = [curve for curve in curves if curve.size == size]
    longest = max(curve.steps for curve in own if curve.optimizer == "adamw")
    shades = ["#c8c8c8", "#a0a0a0", "#707070", "#404040", "#000000"]
    figure, axes = pyplot.subplots(figsize=(6, 3.2))
    adamw = sorted((c for c in own if c.optimizer == "adamw" and c.steps == longest), key=lambda c: c.rate)
    natural = [c for c in own if c.optimizer == "natural"]
    styles = [(c, shades[i % len(shades)], 1.2) for i, c in enumerate(adamw)]
    styles += [(c, "#d62728", 2.0) for c in natural]
    for curve, colour, width in styles:
        rewards = curve.mean()
        smooth = [mean(rewards[max(0, i - WINDOW + 1) : i + 1]) for i in range(len(rewards))]
        sampled = [(i + 1) * curve.each for i in range(len(smooth))]
        axes.plot(sampled, [100 * x for x in smooth], color=colour, lw=width, label=curve.name)
    axes.set_xlabel("completions sampled")
    axes.set_ylabel("reward, %")
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", type=pathlib.Path, nargs="+")
    parser.add_argument("--figure", type=pathlib.Path, help="SVG of the first size's rewards")
    args = parser.parse_args()
    curves = read(args.sweep)
    table(curves)
    if args.figure:
        draw(curves, args.figure)


if __name__ == "__main__":
    main()
