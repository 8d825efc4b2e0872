#!/usr/bin/env python3
"""Trains a small Qwen2 with PyTorch on a few fixed sequences and writes its losses.

    python scripts/sft_fixture.py        (needs torch, transformers)

Writes tests/fixtures/torch_sft.json. Weights and sequences come from formulas which the Rust test
repeats, so the file holds only what PyTorch found. Everything runs in f64.
"""

import json
import math
from pathlib import Path

import torch
import transformers
from transformers import Qwen2Config, Qwen2ForCausalLM

OUT = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "torch_sft.json"
STEPS, PER_STEP = 12, 3
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 3e-3, 0.1, 1.0


def value(name, i):
    wave = math.sin(0.7 * i + sum(name.encode()))
    return 1 + 0.1 * wave if name.endswith("norm.weight") else 0.2 * wave


def example(n):
    """Prompt and completion number n, token ids below 37."""
    prompt = [(7 * n + 3 * i) % 37 for i in range(3 + n % 4)]
    completion = [(5 * n + 11 * i + 1) % 37 for i in range(2 + n % 5)] + [0]
    return prompt, completion


def main():
    config = Qwen2Config(
        vocab_size=37, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-6,
        rope_theta=10000.0, max_position_embeddings=128, tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config).double()
    decayed, spared = [], []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = [value(name, i) for i in range(parameter.numel())]
            start = torch.tensor(values, dtype=torch.float32).double()
            parameter.copy_(start.view_as(parameter))
            (spared if name.endswith(("norm.weight", ".bias")) else decayed).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": spared, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
    )
    losses, norms = [], []
    for step in range(STEPS):
        total, tokens = 0.0, 0
        for i in range(PER_STEP):
            prompt, completion = example((step * PER_STEP + i) % 7)
            logits = model(torch.tensor([prompt + completion])).logits[0]
            logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            total = total - logps.gather(1, torch.tensor(completion)[:, None]).sum()
            tokens += len(completion)
        loss = total / tokens
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM).item())
        optimizer.step()
        losses.append(loss.item())
    OUT.write_text(json.dumps({
        "versions": {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__},
        "learning_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "max_grad_norm": MAX_GRAD_NORM,
        "examples_per_step": PER_STEP, "losses": losses, "grad_norms": norms,
    }, indent=1) + "\n")
    print(losses, norms)


if __name__ == "__main__":
    main()
