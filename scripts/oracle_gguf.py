"""Log-probabilities on quantised bases against transformers' dequantised models.

    python3 -m venv venv && venv/bin/pip install torch transformers gguf accelerate
    venv/bin/python scripts/oracle.py MODEL.gguf ORACLE_DIR          # makes smollm2/scores.jsonl
    cargo build --release
    venv/bin/python scripts/oracle_gguf.py target/release/tinylora MODEL.gguf ORACLE_DIR/smollm2 WORK_DIR

MODEL.gguf is written anew in every format that `scripts/quantise.py` knows, transformers widens each
file to f32, and its log-probabilities of the rows are compared with those of `tinylora score` on the
same file, blocks kept as they are. The last column is what the format itself changes, towards the
source: differences are to be seen against it. Fails above 2e-3.
"""
import json
import os
import subprocess
import sys

import torch
from quantise import rewrite
from transformers import AutoModelForCausalLM

LIMIT = 2e-3
FORMATS = ["f32", "bf16", "f16", "q8_0", "q6_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0"]
program, source, rows_folder, work = (os.path.abspath(a) for a in sys.argv[1:5])
os.makedirs(work, exist_ok=True)
rows = [json.loads(line) for line in open(f"{rows_folder}/scores.jsonl")]
texts = f"{work}/rows.jsonl"
with open(texts, "w") as out:
    for row in rows:
        out.write(json.dumps({k: row[k] for k in ("prompt", "completion")}) + "\n")


def ours(model):
    command = [program, "score", "--model", model, texts, "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    scored = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(a["completion_ids"] == b["completion_ids"] for a, b in zip(scored, rows))
    return torch.tensor([x for row in scored for x in row["logprobs"]])


@torch.no_grad()
def theirs(path):
    folder, name = os.path.split(path)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
    scored = []
    for row in rows:
        p, c = row["prompt_ids"], row["completion_ids"]
        logp = torch.log_softmax(model(torch.tensor([p + c])).logits[0].double(), -1)
        scored += [logp[len(p) - 1 + i, t].item() for i, t in enumerate(c)]
    return torch.tensor(scored)


exact = torch.tensor([x for row in rows for x in row["logprobs"]])
print(f"{'format':8}{'file MB':>9}{'largest difference':>20}{'mean':>10}{'of the source, mean':>21}")
worst = 0.0
for kind in FORMATS:
    path = f"{work}/{kind}.gguf"
    if not os.path.exists(path):
        rewrite(source, path, kind)
    own = ours(path)
    difference = (own - theirs(path)).abs()
    worst = max(worst, difference.max().item())
    print(f"{kind:8}{os.path.getsize(path) / 1e6:>9.0f}{difference.max():>20.1e}{difference.mean():>10.1e}"
          f"{(own - exact).abs().mean():>21.1e}", flush=True)
sys.exit(f"a difference is above {LIMIT:g}" if worst > LIMIT else 0)
