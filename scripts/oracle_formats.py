"""Check every adapter format against the programs that read it, on SmolLM2.

    venv/bin/pip install torch transformers peft gguf accelerate
    venv/bin/python scripts/oracle.py MODEL.gguf ORACLE_DIR          # makes ORACLE_DIR/smollm2
    cargo build --release
    venv/bin/python scripts/oracle_formats.py target/release/tinylora ORACLE_DIR [WORK_DIR]

An adapter of 13 random numbers with large effect is exported in every format. Then
- PEFT's log-probabilities with our `peft` and `lora` directories, and transformers' with our
  `merged` directory, are compared with `tinylora score`;
- adapters that PEFT makes (TinyLoRA with P, without P, LoRA) are scored by both;
- `sigma = split, tie = peft, projection = peft` is compared with what PEFT makes of the same v.
Prints the largest difference of a log-probability for each, and the mean change that the adapter
makes, against which it is to be seen. Fails above 1e-4.
"""
import json
import os
import subprocess
import sys
import warnings

import torch
from peft import LoraConfig, PeftModel, TinyLoraConfig, get_peft_model
from safetensors.torch import load_file, safe_open, save_file
from transformers import AutoModelForCausalLM

warnings.simplefilter("ignore")
LIMIT = 1e-4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
program, oracle = os.path.abspath(sys.argv[1]), os.path.abspath(sys.argv[2])
work = os.path.abspath(sys.argv[3]) if len(sys.argv) > 3 else f"{oracle}/formats"
base_path = f"{oracle}/smollm2"
os.makedirs(work, exist_ok=True)
rows_path = f"{work}/rows.jsonl"
rows = [json.loads(line) for line in open(f"{base_path}/scores.jsonl")]
with open(rows_path, "w") as out:
    for row in rows:
        out.write(json.dumps({k: row[k] for k in ("prompt", "completion")}) + "\n")
failed = False


def tinylora(*arguments):
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"tinylora {' '.join(arguments)}: {done.stderr}")
    return done.stdout


def ours(adapter=None, model=base_path):
    extra = ["--adapter", adapter] if adapter else []
    out = tinylora("score", "--model", model, *extra, rows_path, "--quiet")
    return [json.loads(line) for line in out.splitlines()]


@torch.no_grad()
def theirs(model):
    scored = []
    for row in rows:
        p, c = row["prompt_ids"], row["completion_ids"]
        logp = torch.log_softmax(model(torch.tensor([p + c])).logits[0].double(), -1)
        scored.append([logp[len(p) - 1 + i, t].item() for i, t in enumerate(c)])
    return scored


def flat(scored):
    return torch.tensor([x for row in scored for x in (row["logprobs"] if isinstance(row, dict) else row)])


def compare(what, a, b):
    global failed
    a, b = flat(a), flat(b)
    largest = (a - b).abs().max().item()
    change = (a - base_scores).abs().mean().item()
    failed |= largest > LIMIT
    print(f"{what:44} {largest:.2e}   (the adapter changes {change:.2e} on average)", flush=True)


def fresh():
    return AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32).eval()


def fresh_peft(folder):
    return PeftModel.from_pretrained(fresh(), folder).eval()


def own_adapter(path, numbers, **settings):
    """An adapter file of ours with these numbers: a run of no learning gives the specification."""
    run = f"{path}.run"
    if not os.path.exists(path):
        sets = [f for k, v in settings.items() for f in ("--set", f"adapter.{k}={json.dumps(v)}")]
        tinylora("train", "--config", "smollm2-13p.toml", "--set", f"model.path={base_path}",
                 "--set", "method=sft", "--set", "data.train=mini", "--set", "data.limit=4",
                 "--set", "train.max_steps=1", "--set", "optim.learning_rate=1e-30", "--set", "eval.data=[]",
                 "--set", "adapter.dtype=f32", *sets, "--run-dir", run, "--quiet")
        os.rename(f"{run}/adapter.safetensors", path)
    with safe_open(path, "pt") as file:
        metadata, v = file.metadata(), file.get_tensor("v")
    torch.manual_seed(5)
    save_file({"v": torch.randn(v.shape) * numbers}, path, metadata=metadata)
    return path


base_scores = flat(ours())
compare("base model, transformers", base_scores.tolist() and theirs(fresh()), ours())

adapter = own_adapter(f"{work}/own.safetensors", 0.02)
expected = ours(adapter)
for name in ["peft", "lora", "merged", "gguf-lora"]:
    target = f"{work}/{name}" + (".gguf" if name == "gguf-lora" else "")
    if name == "merged":
        subprocess.run(["rm", "-rf", target], check=True)
    tinylora("export", "--model", base_path, "--adapter", adapter, "--format", name, "--out", target)
compare("our peft directory, PEFT", theirs(fresh_peft(f"{work}/peft")), expected)
compare("our peft directory, read back", ours(f"{work}/peft"), expected)
compare("our lora directory, PEFT", theirs(fresh_peft(f"{work}/lora")), expected)
compare("our lora directory, read back", ours(f"{work}/lora"), expected)
merged = AutoModelForCausalLM.from_pretrained(f"{work}/merged", dtype=torch.float32).eval()
compare("our merged directory (f32), transformers", theirs(merged), expected)
compare("our merged directory (f32), read back", ours(model=f"{work}/merged"), expected)
del merged

task = dict(task_type="CAUSAL_LM", target_modules=TARGETS)
for name, config in {
    "PEFT TinyLoRA": TinyLoraConfig(r=2, u=4, weight_tying=0.93, init_weights="uniform", **task),
    "PEFT TinyLoRA without P": TinyLoraConfig(r=2, u=16, weight_tying=0.5, init_weights="uniform",
                                              save_projection=False, **task),
    "PEFT LoRA (rslora, patterns)": LoraConfig(r=4, lora_alpha=8, use_rslora=True,
                                               rank_pattern={"v_proj": 8}, **task),
}.items():
    torch.manual_seed(3)
    made = get_peft_model(fresh(), config).eval()
    with torch.no_grad():
        for parameter_name, parameter in made.named_parameters():
            if "tinylora_v" in parameter_name:
                parameter.normal_(0, 0.02)
            if "lora_B" in parameter_name and "tinylora" not in parameter_name:
                parameter.normal_(0, 0.01)
    folder = f"{work}/{name.replace(' ', '_').replace('(', '').replace(')', '').replace(',', '')}"
    made.save_pretrained(folder)
    compare(f"{name}, our score", theirs(made), ours(folder))
    del made

# From PEFT's convention: their SVD, their P, their groups, our v.
convention = dict(sigma="split", tie="peft", weight_tying=0.93, projection="peft", u=4)
adapter = own_adapter(f"{work}/convention.safetensors", 0.01, **convention)
v = load_file(adapter)["v"]
made = get_peft_model(fresh(), TinyLoraConfig(r=2, u=4, weight_tying=0.93, **task)).eval()
tinylora("export", "--model", base_path, "--adapter", adapter, "--format", "peft", "--out", f"{work}/convention")
exported = load_file(f"{work}/convention/adapter_model.safetensors")
with torch.no_grad():
    for group, parameter in made.base_model.tinylora_v["default"].items():
        parameter.copy_(v[int(group)])
worst_p, worst, alone, modules = 0.0, 0.0, 0, 0
for name, module in made.base_model.model.named_modules():
    if not hasattr(module, "get_delta_weight"):
        continue
    part = lambda p: exported[f"base_model.model.{name}.tinylora_{p}"].double()
    A, B, P = part("A"), part("B"), part("P")
    worst_p = max(worst_p, (P - module.tinylora_P["default"].double()).abs().max().item())
    R = torch.einsum("i,ijk->jk", v[int(module._tinylora_v_key["default"])].double(), P)
    delta = module.get_delta_weight("default").detach().double()
    signs = torch.sign((A * module.tinylora_A["default"].double()).sum(1))
    relative = lambda ours: ((ours - delta).norm() / delta.norm()).item()
    worst = max(worst, relative(B * signs @ R @ (signs[:, None] * A)))
    alone += relative(B @ R @ A) < 1e-2
    modules += 1
print(f"PEFT's convention, {len(v)} groups: P differs by {worst_p:.1e}; with the signs of its singular "
      f"vectors B R A differs by {worst:.1e} relative in the worst of {modules} modules; {alone} have its signs")
failed |= worst_p > 1e-6 or worst > 1e-2
compare("the same exported as peft, PEFT", theirs(fresh_peft(f"{work}/convention")), ours(adapter))
sys.exit("a difference is above its limit" if failed else 0)
