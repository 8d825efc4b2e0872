"""Make tests/fixtures/peft: what PEFT writes, and what it computes with it.

    venv/bin/pip install torch transformers peft
    venv/bin/python scripts/peft_fixture.py tests/fixtures/peft

`torch_normal.json`: numbers of torch's CPU generator. The directories: adapters of a small random
model whose weights `weight` below defines, each with `products.json`: for every adapted module
ΔW x with x_j = cos(j), by PEFT's own ΔW.
"""
import json
import math
import sys
import warnings

import numpy
import torch
from peft import LoraConfig, TinyLoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

warnings.simplefilter("ignore")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def weight(number, rows, columns):
    """Weight of adapted map `number` of the model: 32-bit hashes as numbers of [-1/2, 1/2)."""
    x = numpy.arange(rows * columns, dtype=numpy.uint32) + numpy.uint32(number << 20)
    for _ in range(2):
        x = (x ^ (x >> numpy.uint32(16))) * numpy.uint32(0x45D9F3B)
    x = x ^ (x >> numpy.uint32(16))
    return torch.tensor(x.astype(numpy.float64) / 2**32 - 0.5, dtype=torch.float32).view(rows, columns)


def model():
    base = LlamaForCausalLM(LlamaConfig(
        vocab_size=37, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8))
    maps = [(n, m) for n, m in base.named_modules() if n.rsplit(".", 1)[-1] in TARGETS]
    with torch.no_grad():
        for number, (_, module) in enumerate(maps):
            module.weight.copy_(weight(number, *module.weight.shape))
    return base


def save(folder, config, dtype=torch.float32):
    torch.manual_seed(1)
    adapted = get_peft_model(model(), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
            if "tinylora_v" in name:
                parameter.normal_(0, 0.5)
            if parameter.requires_grad and dtype != torch.float32:
                parameter.data = parameter.data.to(dtype)
    adapted.save_pretrained(folder)
    adapted.float()
    products = {}
    for name, module in adapted.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            delta = module.get_delta_weight("default").detach().double()
            x = torch.tensor([math.cos(j) for j in range(delta.shape[1])], dtype=torch.float64)
            products[name] = [round(y, 9) for y in (delta @ x).tolist()]
    with open(f"{folder}/products.json", "w") as out:
        json.dump(products, out, indent=0)
        out.write("\n")


def main():
    target = sys.argv[1]
    cases = []
    for seed, n in [(42, 1), (42, 4), (43, 15), (42, 16), (7, 17), (0, 31), (42, 64), (45, 100),
                    (2**32 + 5, 5), (49, 256), (1, 4 * 13), (123456789, 10_000), (50, 1003)]:
        z = torch.normal(mean=0.0, std=1.0, size=(n,), generator=torch.Generator().manual_seed(seed))
        cases.append({"seed": seed, "n": n, "first": z[:20].tolist(), "last": z[-20:].tolist()})
    with open(f"{target}/torch_normal.json", "w") as out:
        out.write("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")

    task = dict(task_type="CAUSAL_LM")
    save(f"{target}/lora", LoraConfig(r=3, lora_alpha=12, target_modules=TARGETS, **task))
    save(f"{target}/lora_patterns", LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "v_proj", "mlp.down_proj"],
        rank_pattern={"v_proj": 2, "layers.1.self_attn.q_proj": 1},
        alpha_pattern={r"layers\.0\..*_proj": 3}, layers_to_transform=[0, 1], **task),
        torch.bfloat16)
    tiny = dict(r=2, u=3, weight_tying=0.8, init_weights="uniform", target_modules=TARGETS, **task)
    save(f"{target}/tinylora", TinyLoraConfig(**tiny))
    save(f"{target}/tinylora_drawn", TinyLoraConfig(
        **{**tiny, "r": 3, "target_modules": "all-linear", "weight_tying": 0.55},
        projection_seed=7, save_projection=False))


main()
