"""The second half of the PEFT check of `tests/oracle.rs`: log-probabilities and the gradient of v.

    venv/bin/pip install peft
    TINYLORA_ORACLE=ORACLE_DIR cargo test --release --test oracle peft   # exports an adapter
    venv/bin/python scripts/oracle_peft.py ORACLE_DIR
    TINYLORA_ORACLE=ORACLE_DIR cargo test --release --test oracle peft   # compares

Loads the exported TinyLoRA directory into PEFT and writes `theirs.json` into it: for the rows of
smollm2/scores.jsonl the log-probabilities of their completions, and the gradient of
L = sum over tokens of (1 + (n mod 3)) * logp, n counting all tokens, by PyTorch's autograd, with
respect to every module's v.
"""
import json
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

folder = sys.argv[1]
base = AutoModelForCausalLM.from_pretrained(f"{folder}/smollm2", dtype=torch.float32)
model = PeftModel.from_pretrained(base, f"{folder}/peft", is_trainable=True).eval()
vs = {n: p for n, p in model.named_parameters() if "tinylora_v" in n}
for name, parameter in model.named_parameters():
    parameter.requires_grad_(name in vs)
logprobs, n = [], 0
for line in open(f"{folder}/smollm2/scores.jsonl"):
    row = json.loads(line)
    p, c = row["prompt_ids"], row["completion_ids"]
    logp = torch.log_softmax(model(torch.tensor([p + c])).logits[0], -1)
    own = torch.stack([logp[len(p) - 1 + i, t] for i, t in enumerate(c)])
    weights = torch.tensor([1.0 + (n + i) % 3 for i in range(len(c))])
    (own * weights).sum().backward()
    n += len(c)
    logprobs.append(own.detach().double().tolist())
gradients = {n.rsplit(".", 1)[-1]: p.grad.double().tolist() for n, p in vs.items()}
json.dump({"logprobs": logprobs, "gradients": gradients}, open(f"{folder}/peft/theirs.json", "w"))
print(f"{len(gradients)} modules, {n} tokens")
