#!/usr/bin/env python3
"""Writes a checkpoint of Qwen2.5-7B's shape with random weights: for memory, loading and speed.

    scripts/make_7b.py models/7b                     a Hugging Face directory in bf16, 15.2 GB
    scripts/make_7b.py models/7b-q4.gguf             a GGUF file, matrices in Q4_0, 4.6 GB
    scripts/make_7b.py models/7b-q4k.gguf --type q4_k
    scripts/make_7b.py models/7b-2 --layers 2        fewer blocks, to try it out

Needs numpy, and for GGUF the gguf package. Memory stays at a few copies of the largest matrix
(2.2 GB each in f32). The tokenizer is that of data/mini, filled up to the vocabulary of 152,064.

A trained matrix has a few singular values far above the rest, and a decomposition relies on the gap
between them; these have, too: Gaussian noise and on top of it sixteen directions of falling weight.
"""
import argparse
import json
import pathlib
import zlib

import numpy as np

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCAB = 3584, 18944, 28, 28, 4, 152_064
HEAD_DIM = HIDDEN // HEADS
STD = 0.02
"""Standard deviation of the noise: its largest singular value is about STD · (√out + √in)."""
DIRECTIONS = 16
MINI = pathlib.Path(__file__).resolve().parent.parent / "data" / "mini"


def tensors(layers: int):
    """(name, shape) of every tensor, in the order of a file; matrices are [out, in]."""
    kv = KV_HEADS * HEAD_DIM
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for layer in range(layers):
        block = f"model.layers.{layer}"
        yield f"{block}.input_layernorm.weight", (HIDDEN,)
        for name, out in [("q", HIDDEN), ("k", kv), ("v", kv)]:
            yield f"{block}.self_attn.{name}_proj.weight", (out, HIDDEN)
            yield f"{block}.self_attn.{name}_proj.bias", (out,)
        yield f"{block}.self_attn.o_proj.weight", (HIDDEN, HIDDEN)
        yield f"{block}.post_attention_layernorm.weight", (HIDDEN,)
        yield f"{block}.mlp.gate_proj.weight", (INTERMEDIATE, HIDDEN)
        yield f"{block}.mlp.up_proj.weight", (INTERMEDIATE, HIDDEN)
        yield f"{block}.mlp.down_proj.weight", (HIDDEN, INTERMEDIATE)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCAB, HIDDEN)


def values(name: str, shape) -> np.ndarray:
    """The tensor in f32: a function of its name alone."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("norm.weight"):
        return np.ones(shape, np.float32)
    if len(shape) == 1:
        return np.zeros(shape, np.float32)
    w = random.standard_normal(shape, np.float32)
    w *= STD
    if "layers" in name:
        out, inner = shape
        edge = STD * (out**0.5 + inner**0.5)
        u = random.standard_normal((out, DIRECTIONS), np.float32) / np.float32(out**0.5)
        v = random.standard_normal((DIRECTIONS, inner), np.float32) / np.float32(inner**0.5)
        s = edge * np.float32(3.0) / np.sqrt(np.arange(1, DIRECTIONS + 1, dtype=np.float32))
        # A slice at a time: the product is as large as the matrix.
        for start in range(0, out, 1024):
            w[start : start + 1024] += (u[start : start + 1024] * s) @ v
    return w


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Bits of the nearest bf16 numbers, ties to even."""
    out = np.empty(x.shape, np.uint16)
    flat, target = x.reshape(-1).view(np.uint32), out.reshape(-1)
    for start in range(0, flat.size, 1 << 24):
        bits = flat[start : start + (1 << 24)]
        target[start : start + (1 << 24)] = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return out


def config(layers: int) -> dict:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": None,
        "eos_token_id": 3,
    }


def tokenizer() -> dict:
    """That of data/mini with tokens that no text gives up to the end of the vocabulary."""
    parts = json.loads((MINI / "tokenizer.json").read_text())
    vocab = parts["model"]["vocab"]
    for token_id in range(len(vocab), VOCAB):
        vocab[f"<unused {token_id}>"] = token_id
    return parts


def write_directory(folder: pathlib.Path, layers: int) -> None:
    """Safetensors files: one for the embedding, one for each block, one for the head and its norm."""
    folder.mkdir(parents=True)
    files: dict[str, list] = {}
    for name, shape in tensors(layers):
        parts = name.split(".")
        last = (layers + 1) * (name != "model.embed_tokens.weight")
        number = int(parts[2]) + 2 if parts[1] == "layers" else 1 + last
        files.setdefault(f"model-{number:05}-of-{layers + 2:05}.safetensors", []).append((name, shape))
    weight_map = {}
    for file, members in files.items():
        # The length of the header, the header, and the tensors one after the other.
        header, end = {}, 0
        for name, shape in members:
            start, end = end, end + 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
            weight_map[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name, shape in members:
                to_bf16(values(name, shape)).tofile(out)
        print(f"{file}: {len(members)} tensors", flush=True)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config(layers), indent=2))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer()))
    for name in ["tokenizer_config.json", "generation_config.json"]:
        (folder / name).write_text((MINI / name).read_text())


def write_gguf(path: pathlib.Path, layers: int, kind: str) -> None:
    """One file; matrices of the blocks in `kind`, embedding and head in Q8_0, the rest in f32."""
    from qwen2_gguf import write

    write(path, "synthetic 7B", config(layers), MINI, tokenizer(), list(tensors(layers)), values, kind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path, help="a new directory, or a .gguf file")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--type", choices=["q4_0", "q4_k"], default="q4_0", help="of a GGUF file's matrices")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} is there already")
    if args.out.suffix == ".gguf":
        write_gguf(args.out, args.layers, args.type)
    else:
        write_directory(args.out, args.layers)


if __name__ == "__main__":
    main()
