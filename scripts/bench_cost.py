#!/usr/bin/env python3
"""How the cost of a step grows: with completions, their length, threads and trained parameters.

    cargo build --release
    python scripts/bench_cost.py target/release/tinylora MODEL.gguf DATA.jsonl \\
        --json cost.json --table cost.md --figures docs

Runs `tinylora bench` with one thing changed at a time, in f32 on the CPU, every group's update computed.
Fits a line through step time against sampled tokens and through peak memory against the group, and
puts every phase below this machine's roofline. DATA.jsonl has rows with `problem` and `answer`, of
which the first four are the prompts. Half an hour of a quiet machine with two cores; `--quick` is five
minutes. Figures need matplotlib, the memory bandwidth numpy (or `--bandwidth`).
"""

import argparse
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import threading
import time

# What is changed, and the values. A step of the middle ones is the base of all series.
FULL = {
    "group": [2, 4, 8, 16, 32],
    "length": [32, 64, 128, 256],
    "threads": [1, 2],
    "parameters": [1, 13, 100, 1000, 10_000],
}
QUICK = {"group": [2, 8], "length": [32, 64], "threads": [1, 2], "parameters": [1, 1000]}
BASE = {"group": 8, "length": 128, "threads": 2, "parameters": 13}
QUICK_BASE = BASE | {"length": 32}
TITLES = {
    "group": "completions of a prompt",
    "length": "most tokens of a completion",
    "threads": "threads",
    "parameters": "trained parameters",
}
# Rows of a forward and backward pass: `grpo.micro_batch_tokens`.
MICRO_BATCH = 2048


# ---- measuring ----

def understands(tinylora, option):
    usage = subprocess.run([tinylora, "bench", "--help"], check=True, capture_output=True, text=True)
    return option in usage.stdout


def bench(args, point, repeats, decode=False):
    """One run of `tinylora bench`: its JSON object."""
    command = [
        args.tinylora, "bench", "--json", "--quiet", "--dtype", "f32", "--device", "cpu",
        "--model", args.model, "--data", args.data, "--prompts", str(args.prompts),
        "--num-generations", str(point["group"]), "--max-tokens", str(point["length"]),
        "--repeats", str(repeats),
    ]
    if args.sizes:
        command += ["--set", f"adapter.u={point['parameters']}", "--set", "adapter.tie=all"]
    if decode:
        command += ["--decode", "1,8,32"]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"RAYON_NUM_THREADS": str(point["threads"])})
    return json.loads(done.stdout)


def points_of(axes, base):
    """Every point once: the base with one thing changed."""
    points = [base | {axis: value} for axis, values in axes.items() for value in values]
    return [point for i, point in enumerate(points) if point not in points[:i]]


def measure(args, axes, base):
    """Medians over rounds. Every round has an order of its own, so that a slow minute hits any point."""
    points = points_of(axes, base)
    runs = [[] for _ in points]
    draw = random.Random(1)
    for round_number in range(args.rounds):
        for i in draw.sample(range(len(points)), len(points)):
            started = time.time()
            runs[i].append(bench(args, points[i], args.repeats))
            print(f"round {round_number + 1}: {points[i]}: {time.time() - started:.0f} s", file=sys.stderr)

    def median(i, of):
        return statistics.median(of(run) for run in runs[i])

    return [
        point | {
            "tokens": median(i, lambda run: run["step"]["tokens"]),
            "step_s": median(i, lambda run: run["step"]["seconds"]),
            "step_s_min": min(run["step"]["seconds_min"] for run in runs[i]),
            "step_s_max": max(run["step"]["seconds_max"] for run in runs[i]),
            "rollout_s": median(i, lambda run: run["rollout"]["seconds"]),
            "update_s": median(i, lambda run: run["step"]["seconds"] - run["rollout"]["seconds"]),
            "share_of_peak": median(i, lambda run: run["step"]["share_of_peak"]),
            "peak_rss_mb": median(i, lambda run: run["peak_rss_mb"]),
        }
        for i, point in enumerate(points)
    ]


def read_bandwidth(threads):
    """Bytes a second of reading an array that no cache holds, the best of a few times, in GB/s."""
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    import numpy

    parts = [numpy.ones(1 << 26, numpy.float32) for _ in range(threads)]

    def read(part):
        numpy.dot(part, part)  # leaves the interpreter's lock to others

    best = 0.0
    for _ in range(8):
        workers = [threading.Thread(target=read, args=(part,)) for part in parts]
        started = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, sum(part.nbytes for part in parts) / (time.perf_counter() - started) / 1e9)
    return best


# ---- what it means ----

def line(points, x, y):
    """Least squares of y against x."""
    xs, ys = [p[x] for p in points], [p[y] for p in points]
    if len(set(xs)) < 2:
        return None
    slope, intercept = statistics.linear_regression(xs, ys)
    r2 = statistics.correlation(xs, ys) ** 2 if len(set(ys)) > 1 else 1.0
    return {"x": x, "y": y, "slope": slope, "intercept": intercept, "r2": r2, "points": len(xs)}


def along(points, base, axis):
    """The points that differ from the base in nothing but `axis`."""
    others = [name for name in base if name != axis]
    return [p for p in points if all(p[name] == base[name] for name in others)]


def fits_of(points, base):
    by_length, by_group = along(points, base, "length"), along(points, base, "group")
    both = by_length + [p for p in by_group if p not in by_length]
    return {
        "step time, longer completions": line(by_length, "tokens", "step_s"),
        "step time, more completions": line(by_group, "tokens", "step_s"),
        "step time, both": line(both, "tokens", "step_s"),
        "rollout time, both": line(both, "tokens", "rollout_s"),
        "update time, both": line(both, "tokens", "update_s"),
        "peak memory, more completions": line(by_group, "group", "peak_rss_mb"),
    }


def decoded_gflop(args, point, run):
    """GFLOP of one decoded token, of a run that timed one step: the rollout's without the prompts'."""
    completions = args.prompts * point["group"]
    rollout, prefill = run["rollout"], run["prefill"]
    # The update has the prompts and all completions but their last tokens.
    prompt_tokens = run["forward"]["tokens"] - (rollout["tokens"] - completions)
    prompts = prompt_tokens * prefill["gflops"] * prefill["seconds"] / prefill["tokens"]
    # The first token of a completion comes out of the prompt.
    return (rollout["gflops"] * rollout["seconds"] - prompts) / (rollout["tokens"] - completions)


def roofline_of(args, base, bandwidth):
    """Every phase as (operations a byte of weights, GFLOP/s).

    A pass over R rows reads the weights (four bytes each) once and computes two operations a weight and
    row: R / 2 operations a byte.
    """
    run, once = bench(args, base, args.repeats), bench(args, base, 1, decode=args.decode)
    phases = {}

    def add(name, rows, gflops):
        phases[name] = {"intensity": rows / 2, "gflops": gflops}

    for name in ("prefill", "forward", "backward"):
        add(name, min(run[name]["tokens"], MICRO_BATCH), run[name]["gflops"])
    gflop = decoded_gflop(args, base, once)
    for entry in once.get("decode", []):
        add(f"decode {entry['sequences']}", entry["sequences"], entry["tokens_per_s"] * gflop)
    peak = max(run["gemm_peak_gflops"], once["gemm_peak_gflops"])
    return {"peak_gflops": peak, "bandwidth_gbytes": bandwidth, "phases": phases, "runs": [run, once]}


# ---- showing it ----

def tables(points, base, axes, fits, roofline):
    lines = []
    for axis in axes:
        series = along(points, base, axis)
        if len(series) < 2:
            continue
        columns = [TITLES[axis], "sampled tokens", "step, s", "min–max", "rollout, s", "update, s", "of peak", "memory, MB"]
        lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for p in sorted(series, key=lambda p: p[axis]):
            lines.append(
                f"| {p[axis]:,} | {p['tokens']:,.0f} | {p['step_s']:.2f} "
                f"| {p['step_s_min']:.2f}–{p['step_s_max']:.2f} | {p['rollout_s']:.2f} | {p['update_s']:.2f} "
                f"| {100 * p['share_of_peak']:.0f} % | {p['peak_rss_mb']:,.0f} |")
        lines.append("")
    lines += ["| line | slope | at 0 | R² | points |", "|---|---|---|---|---|"]
    for name, fit in fits.items():
        if fit is None:
            continue
        seconds = fit["y"].endswith("_s")
        slope = f"{1e3 * fit['slope']:.2f} ms a token" if seconds else f"{fit['slope']:.1f} MB a completion"
        start = f"{fit['intercept']:.2f} s" if seconds else f"{fit['intercept']:,.0f} MB"
        lines.append(f"| {name} | {slope} | {start} | {fit['r2']:.4f} | {fit['points']} |")
    lines += ["", "| phase | operations a byte | GFLOP/s | of the roofline |", "|---|---|---|---|"]
    peak, bandwidth = roofline["peak_gflops"], roofline["bandwidth_gbytes"]
    for name, phase in sorted(roofline["phases"].items(), key=lambda item: item[1]["intensity"]):
        roof = min(peak, bandwidth * phase["intensity"])
        share = 100 * phase["gflops"] / roof
        lines.append(f"| {name} | {phase['intensity']:,.1f} | {phase['gflops']:.1f} | {share:.0f} % |")
    lines.append(f"\nPeak {peak:.0f} GFLOP/s, reading memory {bandwidth:.1f} GB/s.")
    return "\n".join(lines) + "\n"


def figures(folder, points, base, fits, roofline):
    import matplotlib

    matplotlib.use("svg")
    # Text as text, and the same bytes for the same numbers.
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "tinylora", "font.size": 9,
                            "axes.spines.top": False, "axes.spines.right": False}
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)

    def save(figure, name):
        figure.tight_layout()
        figure.savefig(folder / name, metadata={"Date": None})

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3.2))
    for axis, marker in (("length", "o"), ("group", "s")):
        series = sorted(along(points, base, axis), key=lambda p: p["tokens"])
        left.plot([p["tokens"] for p in series], [p["step_s"] for p in series], marker, label=f"by {TITLES[axis]}")
    fit = fits["step time, both"]
    ends = [0, max(p["tokens"] for p in points)]
    left.plot(ends, [fit["intercept"] + fit["slope"] * x for x in ends], "-", color="grey", linewidth=1,
              label=f"{1e3 * fit['slope']:.1f} ms a token, R² = {fit['r2']:.3f}")
    left.set(xlabel="sampled tokens of a step", ylabel="seconds a step")
    left.legend(frameon=False)
    series = sorted(along(points, base, "group"), key=lambda p: p["group"])
    right.plot([p["group"] for p in series], [p["peak_rss_mb"] for p in series], "s-")
    right.set(xlabel=TITLES["group"], ylabel="peak memory, MB")
    for axes in (left, right):
        axes.set(xlim=0, ylim=(0, 1.1 * axes.get_ylim()[1]))
    save(figure, "cost.svg")

    figure, axes = pyplot.subplots(figsize=(6, 3.6))
    peak, bandwidth = roofline["peak_gflops"], roofline["bandwidth_gbytes"]
    ridge = peak / bandwidth
    right_end = 3 * max(ridge, *(phase["intensity"] for phase in roofline["phases"].values()))
    axes.loglog([0.25, ridge, right_end], [0.25 * bandwidth, peak, peak], color="black", linewidth=1)
    last = None
    for name, phase in sorted(roofline["phases"].items(), key=lambda item: list(item[1].values())):
        x, y = phase["intensity"], phase["gflops"]
        axes.plot(x, y, "o", color="C0")
        # Below its point; beside it where another one of as many rows lies there.
        offset, side = ((-7, -3), "right") if x == last else ((0, -13), "center")
        axes.annotate(name, (x, y), offset, textcoords="offset points", ha=side)
        last = x
    axes.set(xlabel="operations a byte of weights", ylabel="GFLOP/s", ylim=(None, 1.6 * peak),
             title=f"{peak:.0f} GFLOP/s, {bandwidth:.1f} GB/s")
    save(figure, "roofline.svg")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tinylora", type=os.path.abspath, help="the program, built with --release")
    parser.add_argument("model", help="GGUF file, Hugging Face directory, or `mini`")
    parser.add_argument("data", help="JSON Lines with `problem` and `answer`, or `mini`")
    parser.add_argument("--json", type=pathlib.Path, help="write everything measured")
    parser.add_argument("--table", type=pathlib.Path, help="write the tables (Markdown), which are printed too")
    parser.add_argument("--figures", type=pathlib.Path, help="folder for cost.svg and roofline.svg")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3, help="steps timed in a run, after one that is not")
    parser.add_argument("--rounds", type=int, default=1, help="runs of every point")
    parser.add_argument("--bandwidth", type=float, help="GB/s of reading memory; otherwise measured")
    parser.add_argument("--quick", action="store_true", help="few and short points")
    return parser.parse_args()


def main():
    args = parse_arguments()
    axes, base = (QUICK, QUICK_BASE) if args.quick else (FULL, BASE)
    args.sizes, args.decode = (understands(args.tinylora, option) for option in ("--set", "--decode"))
    if not args.sizes:
        print("this build's bench has no --set: trained parameters are not varied", file=sys.stderr)
        axes = {axis: values for axis, values in axes.items() if axis != "parameters"}
    bandwidth = args.bandwidth or read_bandwidth(base["threads"])
    points = measure(args, axes, base)
    fits, roofline = fits_of(points, base), roofline_of(args, base, bandwidth)
    text = tables(points, base, axes, fits, roofline)
    if args.json:
        report = {"base": base, "points": points, "fits": fits, "roofline": roofline}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.table:
        args.table.write_text(text)
    print(text, end="")
    if args.figures:
        figures(args.figures, points, base, fits, roofline)


main()
