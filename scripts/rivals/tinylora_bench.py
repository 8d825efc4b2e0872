"""`tinylora bench`: every phase of a step whose groups all have a gradient, and plain decoding."""

import json
import subprocess

import common


def main():
    parser = common.arguments(__doc__)
    parser.add_argument("--tinylora", required=True, help="the program")
    parser.add_argument("--repeats", type=int, default=3, help="steps that are timed, after one that is not")
    parser.add_argument("--dtype", default="f32", help="`auto` keeps the file's")
    parser.add_argument("--sequences", default="1,8,32", help="batches of plain decoding")
    args = parser.parse_args()

    prompts = len(common.read_problems(args.prompts))
    command = [
        args.tinylora, "bench", "--json", "--quiet", "--dtype", args.dtype, "--device", "cpu",
        "--model", args.model, "--data", args.prompts, "--prompts", str(prompts),
        "--num-generations", str(args.num_generations), "--max-tokens", str(args.max_tokens),
        "--repeats", str(args.repeats), "--seed", str(args.seed),
    ]
    usage = subprocess.run([args.tinylora, "bench", "--help"], check=True, capture_output=True, text=True)
    if "--decode" in usage.stdout:
        command += ["--decode", args.sequences]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout)

    phases = {name: value for name, value in result.items() if isinstance(value, dict)}
    rollout, step = phases["rollout"], phases["step"]
    measures = {
        "load_s": result["load_s"],
        "svd_s": result["svd_s"],
        "rollout_s": rollout["seconds"],
        "rollout_tokens_per_s": rollout["tokens_per_s"],
        "update_s": step["seconds"] - rollout["seconds"],
        "step_s": step["seconds"],
        "step_ms_per_token": 1e3 * step["seconds"] / step["tokens"],
        "step_tokens": step["tokens"],
        "gemm_peak_gflops": result["gemm_peak_gflops"],
    }
    for name, phase in phases.items():
        measures[f"{name}_share_of_peak"] = phase["share_of_peak"]
    for entry in result.get("decode", []):
        measures[f"decode_{entry['sequences']}_tokens_per_s"] = entry["tokens_per_s"]
        measures[f"prefill_{entry['sequences']}_tokens_per_s"] = entry["prefill_tokens_per_s"]
    common.report(measures)


main()
