"""llama.cpp's `llama-server`: all completions of all prompts at once, sampled, over HTTP.

A slot for each completion, and nothing cached before the clock starts.
"""

import concurrent.futures
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request

import common


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def wait_until_ready(server, url):
    while True:
        if server.poll() is not None:
            sys.exit(f"llama-server ended with code {server.returncode}")
        try:
            urllib.request.urlopen(url + "/health").close()
            return
        except urllib.error.URLError:  # not there yet, or still loading
            time.sleep(0.1)


def main():
    parser = common.arguments(__doc__)
    parser.add_argument("--server", required=True, help="the program")
    parser.add_argument("--port", type=int, default=18090)
    args = parser.parse_args()

    problems = common.read_problems(args.prompts)
    slots = len(problems) * args.num_generations
    url = f"http://127.0.0.1:{args.port}"
    server = subprocess.Popen(
        [args.server, "-m", args.model, "--host", "127.0.0.1", "--port", str(args.port),
         "-np", str(slots), "-c", str(slots * (args.max_tokens + 512)), "-t", str(args.threads),
         "-tb", str(args.threads), "-ngl", "0"],
        stdout=sys.stderr)
    try:
        wait_until_ready(server, url)
        measures = {"load_s": common.since_start()}
        bodies = [
            {"messages": common.chat(p["problem"]), "max_tokens": args.max_tokens, "temperature": 1.0,
             "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": args.seed + 1000 * i + n}
            for i, p in enumerate(problems) for n in range(args.num_generations)
        ]
        with concurrent.futures.ThreadPoolExecutor(slots) as pool:
            started = time.time()
            answers = list(pool.map(lambda body: post(url + "/v1/chat/completions", body), bodies))
            seconds = time.time() - started
    finally:
        server.terminate()
        server.wait()
    tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
    prompt_tokens = [answer["usage"]["prompt_tokens"] for answer in answers]
    common.report(measures | {
        "prompt_tokens": sum(prompt_tokens) // args.num_generations,
        "rollout_s": seconds,
        "rollout_tokens": tokens,
        "rollout_tokens_per_s": tokens / seconds,
    })


main()
