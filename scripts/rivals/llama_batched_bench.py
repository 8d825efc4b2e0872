"""llama.cpp's `llama-batched-bench`: prefill and decoding of several sequences at once.

No sampling, no end of text: `--sequences` sequences with a prompt of 100 tokens each go on for 64.
"""

import json
import subprocess

import common


def main():
    parser = common.arguments(__doc__)
    parser.add_argument("--batched-bench", required=True, help="the program")
    parser.add_argument("--sequences", default="1,8,32")
    parser.add_argument("--prompt-tokens", type=int, default=100)
    parser.add_argument("--new-tokens", type=int, default=64)
    args = parser.parse_args()

    most = max(int(n) for n in args.sequences.split(","))
    context = -(-most * (args.prompt_tokens + args.new_tokens) // 2048) * 2048
    done = subprocess.run(
        [args.batched_bench, "-m", args.model, "-c", str(max(context, 10240)), "-npp", str(args.prompt_tokens),
         "-ntg", str(args.new_tokens), "-npl", args.sequences, "-t", str(args.threads),
         "-tb", str(args.threads), "-ngl", "0", "--output-format", "jsonl"],
        check=True, stdout=subprocess.PIPE, text=True)
    measures = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            measures[f"prefill_{row['pl']}_tokens_per_s"] = row["speed_pp"]
            measures[f"decode_{row['pl']}_tokens_per_s"] = row["speed_tg"]
    common.report(measures)


main()
