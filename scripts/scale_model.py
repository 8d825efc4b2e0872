#!/usr/bin/env python3
"""The cost model of docs/scale.md: seconds of a GRPO step on 1, 8 and 64 GPUs, and what bounds them.

    scripts/scale_model.py            prints the tables

Counts come from the models' shapes and from docs/gpu.md; figures of devices are the makers'. What is
assumed is in one place each: EFFICIENCY, LAUNCH, the recipe's lengths.
"""

from dataclasses import dataclass

# Shares of the makers' peaks that large products and streaming reads get in practice.
MATH_EFFICIENCY = 0.4
READ_EFFICIENCY = 0.7
# Start of a kernel, and kernels of a decoding pass: a layer's and those around them (docs/gpu.md).
LAUNCH = 4e-6
KERNELS_A_LAYER, KERNELS_AROUND = 48, 50
# Bytes that a rank sends of each of its tokens, to every other rank: measured, see docs/scale.md.
EXCHANGED = 23.0


@dataclass
class Model:
    name: str
    blocks: float  # weights in the blocks
    head: float
    layers: int
    kv_bytes: float  # of one token, all layers


@dataclass
class Device:
    name: str
    flops: float
    bytes: float
    memory: float
    network: float  # bytes a second of its link to other machines


@dataclass
class Recipe:
    name: str
    prompts: int
    samples: int
    prompt: int
    mean: int  # tokens of a completion
    longest: int


QWEN7B = Model("Qwen2.5-7B", 6.53e9, 0.545e9, 28, 57_344)
LLAMA70B = Model("Llama-3.1-70B", 68.45e9, 1.05e9, 80, 327_680)
H100 = Device("H100", 989e12, 3.35e12, 80e9, 50e9)
B200 = Device("B200", 2250e12, 8.0e12, 192e9, 50e9)
GSM8K = Recipe("GSM8K: 64 × 4", 64, 4, 150, 300, 1200)
MATH = Recipe("MATH: 256 × 8", 256, 8, 250, 700, 3072)


def decode_pass(model: Model, device: Device, rows: float, length: float) -> tuple[float, str]:
    """Seconds of one token for `rows` sequences with `length` tokens behind each, and what bounds them."""
    weights = 2 * (model.blocks + model.head)
    parts = {
        "bytes": (weights + rows * length * model.kv_bytes) / (device.bytes * READ_EFFICIENCY),
        "operations": 2 * (model.blocks + model.head) * rows / (device.flops * MATH_EFFICIENCY),
        "kernel starts": (model.layers * KERNELS_A_LAYER + KERNELS_AROUND) * LAUNCH,
    }
    bound = max(parts, key=parts.get)
    return parts[bound], bound


def rollout(model: Model, device: Device, recipe: Recipe, gpus: int) -> tuple[float, str]:
    """All completions: as many passes as the longest has tokens, with ever fewer rows."""
    rows = -(-recipe.prompts // gpus) * recipe.samples
    seconds, bounds = 0.0, {}
    # Lengths fall off exponentially behind the mean, cut at the longest.
    for token in range(recipe.longest):
        alive = max(1.0, rows * 2.718281828 ** (-token / recipe.mean))
        spent, bound = decode_pass(model, device, alive, recipe.prompt + token)
        seconds += spent
        bounds[bound] = bounds.get(bound, 0.0) + spent
    prefill = rows / recipe.samples * recipe.prompt * 2 * model.blocks
    seconds += prefill / (device.flops * MATH_EFFICIENCY)
    return seconds, max(bounds, key=bounds.get)


def update(model: Model, device: Device, recipe: Recipe, gpus: int) -> float:
    """Forward, forward again and backward without gradients of weights: three forward passes."""
    groups = -(-recipe.prompts // gpus)
    rows = groups * (recipe.samples * recipe.mean + recipe.prompt)
    scored = groups * recipe.samples * recipe.mean
    operations = 3 * 2 * (model.blocks * rows + model.head * scored)
    return operations / (device.flops * MATH_EFFICIENCY)


def exchange(device: Device, recipe: Recipe, gpus: int) -> tuple[float, float]:
    """Bytes that a rank receives in a step, and their seconds on the network."""
    received = EXCHANGED * recipe.prompts * recipe.samples * recipe.mean * (gpus - 1) / gpus
    return received, received / device.network


def main() -> None:
    for model, device, recipe in [
        (QWEN7B, H100, GSM8K),
        (QWEN7B, H100, MATH),
        (LLAMA70B, B200, GSM8K),
        (LLAMA70B, B200, MATH),
    ]:
        print(f"\n{model.name}, {device.name}, {recipe.name}\n")
        print("| GPUs | rollout | bound by | update | exchange | step | against one |")
        print("|---|---|---|---|---|---|---|")
        one = None
        for gpus in (1, 8, 64):
            sampling, bound = rollout(model, device, recipe, gpus)
            learning = update(model, device, recipe, gpus)
            size, talking = exchange(device, recipe, gpus)
            step = sampling + learning + talking
            one = one or step
            print(
                f"| {gpus} | {sampling:.1f} s | {bound} | {learning:.2f} s "
                f"| {size / 1e6:.1f} MB, {talking * 1e3:.1f} ms | {step:.1f} s | {one / step:.1f} × |"
            )


if __name__ == "__main__":
    main()
