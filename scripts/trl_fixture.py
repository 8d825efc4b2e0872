#!/usr/bin/env python3
"""Runs TRL's own GRPO code on fixed small inputs and writes what it returns.

    python scripts/trl_fixture.py        (needs torch, transformers, trl)

Writes tests/fixtures/trl_losses.json (loss, its gradient with respect to every log-prob, metrics),
tests/fixtures/trl_advantages.json (advantages, reward metrics, importance-sampling ratios) and
tests/fixtures/torch_optim.json (AdamW, gradient clipping, learning-rate schedules).
Only the model's forward pass is replaced: it returns the log-probs of the case.
Inputs are f32-representable; TRL computes on them in f64.
"""

import itertools
import json
import os
import random
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import tokenizers
import torch
import transformers
import trl
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures"
VERSIONS = {
    "trl": trl.__version__,
    "torch": torch.__version__.split("+")[0],
    "transformers": transformers.__version__,
}
NUM_GENERATIONS = 4


def tiny_trainer(directory, rewards):
    """A real GRPOTrainer on a random two-layer Qwen2 and a word-level tokenizer."""
    words = ["<pad>", "<eos>", "<unk>"] + [f"w{i}" for i in range(29)]
    raw = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    )
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, eos_token_id=1, pad_token_id=0,
        )
    )
    args = GRPOConfig(
        output_dir=str(directory), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
        per_device_train_batch_size=NUM_GENERATIONS, gradient_accumulation_steps=2,
        num_generations=NUM_GENERATIONS, max_completion_length=9,
    )
    from datasets import Dataset

    return GRPOTrainer(
        model=model, args=args, processing_class=tokenizer, reward_funcs=rewards,
        train_dataset=Dataset.from_dict({"prompt": ["w1 w2", "w3"]}),
    )


def f32(values):
    return torch.tensor(values, dtype=torch.float32).tolist()


def rounded(value):
    """Ten significant digits: far below the tolerance of the tests, and a small file."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    if isinstance(value, float):
        return None if value != value else float(f"{value:.10g}")
    return value


# ---------------------------------------------------------------------------------------------
# losses
# ---------------------------------------------------------------------------------------------

LENGTHS = [5, 3, 7, 1, 4, 6, 2, 7]  # two micro-batches of one group each
ADVANTAGES = f32([1.25, -0.75, 0.0, -0.5, 0.9, -1.4, 0.3, 0.2])
TRUNCATED = [2, 5]


def loss_inputs():
    rng = random.Random(20)
    logps, old, ref, token_ratio, entropies = [], [], [], [], []
    for length in LENGTHS:
        current = [-rng.expovariate(1.0) for _ in range(length)]
        logps.append(f32(current))
        old.append(f32([min(x + rng.gauss(0, 0.35), -1e-3) for x in current]))
        ref.append(f32([min(x + rng.gauss(0, 0.5), -1e-3) for x in current]))
        token_ratio.append(f32([min(max(rng.gauss(1, 0.4), 0.0), 2.0) for _ in current]))
        entropies.append(f32([rng.uniform(0, 2) for _ in current]))
    return {
        "lengths": LENGTHS, "advantages": ADVANTAGES, "truncated": TRUNCATED, "logps": logps,
        "old_logps": old, "ref_logps": ref, "token_ratios": token_ratio,
        "sequence_ratios": f32([rng.uniform(0.2, 2) for _ in LENGTHS]), "entropies": entropies,
    }


def padded(rows, dtype=torch.float64):
    width = max(LENGTHS)
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=dtype)


def run_loss(trainer, data, case):
    """One optimizer step of two micro-batches through GRPOTrainer._compute_loss."""
    trainer.loss_type = case["loss_type"]
    trainer.importance_sampling_level = case["level"]
    trainer.epsilon_low = case["epsilon"]
    trainer.epsilon_high = case["epsilon_high"] if case["epsilon_high"] is not None else case["epsilon"]
    trainer.args.delta = case["delta"]
    trainer.beta = case["beta"]
    trainer.args.use_bias_correction_kl = case["use_bias_correction_kl"]
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = case["ratios"] is not None
    trainer.current_gradient_accumulation_steps = 2
    trainer.args.steps_per_generation = 2 * case["steps_per_generation"]
    trainer.model.train()
    trainer._metrics["train"].clear()

    mask = padded([[1] * n for n in LENGTHS])
    if case["masked"]:
        mask[TRUNCATED] = 0
    total, gradient = 0.0, []
    for rows in (slice(0, 4), slice(4, 8)):
        logps = padded(data["logps"])[rows].requires_grad_(True)
        trainer._get_per_token_logps_and_entropies = lambda *a, **k: (
            logps, padded(data["entropies"])[rows], None,
        )
        inputs = {
            "prompt_ids": torch.ones(4, 1, dtype=torch.long),
            "prompt_mask": torch.ones(4, 1, dtype=torch.long),
            "completion_ids": torch.ones_like(mask[rows], dtype=torch.long),
            "completion_mask": mask[rows],
            "advantages": torch.tensor(ADVANTAGES, dtype=torch.float64)[rows],
            # what _generate_and_score_completions counts over the whole generation batch
            "num_items_in_batch": mask.sum() * case["steps_per_generation"],
        }
        if case["off_policy"]:
            inputs["old_per_token_logps"] = padded(data["old_logps"])[rows]
        if case["beta"] != 0.0:
            inputs["ref_per_token_logps"] = padded(data["ref_logps"])[rows]
        if case["ratios"] == "token":
            inputs["importance_sampling_ratio"] = padded(data["token_ratios"])[rows]
        elif case["ratios"] == "sequence":
            inputs["importance_sampling_ratio"] = torch.tensor(
                data["sequence_ratios"], dtype=torch.float64
            )[rows].unsqueeze(1)
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        total += loss.item()
        for row, length in zip(logps.grad.tolist(), LENGTHS[rows]):
            assert all(x == 0 for x in row[length:])
            gradient.append(row[:length])
    metrics = {name: list(values) for name, values in trainer._metrics["train"].items()}
    return {**case, "loss": total, "gradient": gradient, "metrics": metrics}


def loss_cases():
    base = {
        "loss_type": "dapo", "level": "token", "epsilon": 0.2, "epsilon_high": None, "delta": None,
        "beta": 0.0, "use_bias_correction_kl": True, "masked": False, "off_policy": True,
        "ratios": None, "steps_per_generation": 1,
    }
    losses = ["grpo", "dapo", "bnpo", "dr_grpo", "cispo"]
    for loss, level, beta, masked in itertools.product(
        losses, ["token", "sequence"], [0.0, 0.04, -0.04], [False, True]
    ):
        high = 1.3 if loss == "cispo" else None
        yield {
            **base, "loss_type": loss, "level": level, "masked": masked, "epsilon_high": high,
            "beta": abs(beta), "use_bias_correction_kl": beta >= 0,
        }
    for loss, level in itertools.product(losses, ["token", "sequence"]):
        high = 5.0 if loss == "cispo" else None
        yield {**base, "loss_type": loss, "level": level, "off_policy": False, "epsilon_high": high}
        yield {**base, "loss_type": loss, "level": level, "off_policy": False, "epsilon_high": high, "beta": 0.1}
        for ratios in ["token", "sequence"]:
            yield {**base, "loss_type": loss, "level": level, "epsilon_high": high, "beta": 0.02, "ratios": ratios}
    for level in ["token", "sequence"]:
        for epsilon, high, delta in [(0.2, 0.4, None), (0.05, 0.1, None), (0.2, None, 1.25), (0.1, 0.28, 1.5), (0.2, 0.4, 1.1)]:
            yield {**base, "level": level, "epsilon": epsilon, "epsilon_high": high, "delta": delta}
    for loss in losses:
        yield {**base, "loss_type": loss, "steps_per_generation": 4, "epsilon_high": 5.0 if loss == "cispo" else None}


# ---------------------------------------------------------------------------------------------
# advantages and importance-sampling ratios
# ---------------------------------------------------------------------------------------------

NAN = float("nan")
REWARDS = {
    "plain": [[1, 0, 0, 1, 0, 0, 0, 0, 1, 1, 1, 0]],
    "fractions": [[0.1, 0.1, 0.1, 0.1, 0.3, -0.7, 2.5, 0.25, 1.0, 1.0, 1.0, 1.0]],
    "all_equal": [[1] * 8],
    "two": [[1, 0, 0, 1, 1, 1, 1, 1], [0.5, 0.25, 0.25, 0.0, 0.0, 0.0, 1.0, 0.5]],
    "one_missing": [[1, NAN, 0, 1, 0, 0, 1, 0], [0.5, 0.25, 0.25, NAN, 0.0, 0.0, 1.0, 0.5]],
    "unscorable": [[1, NAN, 0, 1, 0, NAN, NAN, NAN, NAN, NAN, NAN, NAN]],
    "nothing": [[NAN] * 4],
}
WEIGHTS = {"two": [1.0, 0.5], "one_missing": [2.0, -0.3]}


def run_advantages(trainer, name, scale):
    functions = REWARDS[name]
    count = len(functions[0])
    trainer.reward_funcs = [None] * len(functions)
    trainer.reward_func_names = [f"f{i}" for i in range(len(functions))]
    weights = WEIGHTS.get(name, [1.0] * len(functions))
    trainer.reward_weights = torch.tensor(weights)
    trainer._calculate_rewards = lambda *a: torch.tensor(functions, dtype=torch.float32).T
    trainer.scale_rewards = scale
    trainer.use_vllm = False
    trainer.beta = 0.0
    trainer._metrics["train"].clear()
    # completions of 1..count tokens, every third one cut off
    ids = [[5] * i + ([6] if i % 3 == 2 else [1]) for i in range(count)]
    trainer._generate_single_turn = lambda *a, **k: (ids, None)
    out = trainer._generate_and_score_completions([{"prompt": "w1 w2"}] * count)
    metrics = {k: v[-1] for k, v in trainer._metrics["train"].items() if k != "num_tokens"}
    return {
        "name": name, "scale_rewards": scale, "rewards": functions, "weights": weights,
        "completions": [{"length": len(x), "truncated": x[-1] != 1} for x in ids],
        "advantages": out["advantages"].tolist(), "metrics": metrics,
    }


def run_ratios(trainer, data, mode, low, high):
    trainer.reward_funcs, trainer.reward_func_names = [None], ["f0"]
    trainer.reward_weights = torch.ones(1)
    trainer._calculate_rewards = lambda *a: torch.tensor([[1, 0, 0, 1] * 2], dtype=torch.float32).T
    trainer.scale_rewards = "group"
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    trainer.vllm_importance_sampling_mode = mode
    trainer.vllm_importance_sampling_clip_min = low
    trainer.vllm_importance_sampling_clip_max = high
    trainer._metrics["train"].clear()
    ids = [[5] * (n - 1) + [1] for n in LENGTHS]
    trainer._generate_single_turn = lambda *a, **k: (ids, data["old_logps"])
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (padded(data["logps"]), None, None)
    out = trainer._generate_and_score_completions([{"prompt": "w1 w2"}] * 8)
    ratio = out["importance_sampling_ratio"].tolist()
    ratio = [row[:n] for row, n in zip(ratio, LENGTHS)]
    metrics = {k: v[-1] for k, v in trainer._metrics["train"].items() if k.startswith("sampling/")}
    return {"mode": mode, "clip_min": low, "clip_max": high, "ratios": ratio, "metrics": metrics}


# ---------------------------------------------------------------------------------------------
# optimizer
# ---------------------------------------------------------------------------------------------


def optimizer_cases():
    rng = random.Random(7)
    start = f32([rng.gauss(0, 1) for _ in range(5)])
    gradients = [f32([rng.gauss(0, 1) * 10 ** rng.uniform(-6, 1) for _ in range(5)]) for _ in range(12)]
    cases = []
    for betas, eps, decay, max_norm, lr in [
        ((0.9, 0.999), 1e-8, 0.0, 0.0, 1e-2),
        ((0.9, 0.999), 1e-8, 0.01, 1.0, 1e-2),
        ((0.9, 0.95), 1e-6, 0.1, 0.5, 3e-3),
    ]:
        parameter = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
        optimizer = torch.optim.AdamW([parameter], lr=lr, betas=betas, eps=eps, weight_decay=decay)
        norms, values = [], []
        for gradient in gradients:
            parameter.grad = torch.tensor(gradient, dtype=torch.float64)
            if max_norm > 0:
                norms.append(torch.nn.utils.clip_grad_norm_([parameter], max_norm).item())
            optimizer.step()
            values.append(parameter.tolist())
        cases.append({
            "beta1": betas[0], "beta2": betas[1], "epsilon": eps, "weight_decay": decay,
            "max_grad_norm": max_norm, "learning_rate": lr, "grad_norms": norms, "parameters": values,
        })
    schedules = []
    for name, warmup, total in itertools.product(
        ["constant", "constant_with_warmup", "linear", "cosine"], [0, 1, 5], [1, 17]
    ):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
        rates = []
        for _ in range(total + 2):
            rates.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        schedules.append({"name": name, "warmup": warmup, "total": total, "rates": rates})
    return {"versions": VERSIONS, "start": start, "gradients": gradients, "adamw": cases, "schedules": schedules}


def write(name, value):
    path = FIXTURES / name
    path.write_text(json.dumps(value, separators=(",", ":")).replace("},{", "},\n{") + "\n")
    print(path, path.stat().st_size, "bytes")


def main():
    torch.manual_seed(0)
    data = loss_inputs()
    with tempfile.TemporaryDirectory() as directory:
        trainer = tiny_trainer(directory, lambda completions, **k: [0.0] * len(completions))
        trainer.model.train()
        advantages = [
            run_advantages(trainer, name, scale)
            for name in REWARDS
            for scale in ["group", "batch", "none"]
        ]
        original = trainer._get_per_token_logps_and_entropies
        ratios = [
            run_ratios(trainer, data, mode, low, high)
            for mode in ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
            for low, high in [(None, 2.0), (0.8, 1.3)]
        ]
        trainer._get_per_token_logps_and_entropies = original
        losses = [run_loss(trainer, data, case) for case in loss_cases()]
    write("trl_losses.json", {
        "versions": VERSIONS, "max_completion_length": 9, "inputs": data, "cases": rounded(losses),
    })
    write("trl_advantages.json", {
        "versions": VERSIONS, "num_generations": NUM_GENERATIONS,
        "advantages": rounded(advantages),
        "lengths": LENGTHS, "trainer_logps": data["logps"], "sampler_logps": data["old_logps"], "ratios": rounded(ratios),
    })
    write("torch_optim.json", optimizer_cases())


if __name__ == "__main__":
    main()
