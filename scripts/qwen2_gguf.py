#!/usr/bin/env python3
"""Writes a Hugging Face directory of the Qwen2 family as a GGUF file.

    venv/bin/pip install gguf numpy safetensors torch
    venv/bin/python scripts/qwen2_gguf.py data/mini mini.gguf [f32]

For formats see `scripts/quantise.py`; embedding and head become Q8_0 at most, norms and biases f32.
Tensors are written one after the other, so that memory stays at a few copies of the largest.
"""
import argparse
import json
import pathlib
from typing import Callable

import gguf
import numpy as np
from quantise import TYPES, quantise

WIDE = (TYPES.F32, TYPES.F16, TYPES.BF16)


def write(
    path: pathlib.Path,
    title: str,
    config: dict,
    folder: pathlib.Path,
    tokenizer: dict,
    tensors: list[tuple[str, tuple[int, ...]]],
    values: Callable[[str, tuple[int, ...]], np.ndarray],
    kind: str,
) -> None:
    """`config` and `tokenizer` are the parsed files, `folder` has the others of the tokenizer;
    `tensors` are (name, shape) under the names of Hugging Face, `values` gives one in f32."""
    layers = config["num_hidden_layers"]
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_name(title)
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    special = {token["id"] for token in tokenizer["added_tokens"]}
    vocabulary = tokenizer["model"]["vocab"] | {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.get)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i in special else 1 for i in range(len(tokens))])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(json.loads((folder / "generation_config.json").read_text())["eos_token_id"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(json.loads((folder / "tokenizer_config.json").read_text())["chat_template"])

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, layers)
    wanted = TYPES[kind.upper()]

    def type_of(name, shape):
        if len(shape) == 1:
            return TYPES.F32
        return wanted if "layers" in name or wanted in WIDE else TYPES.Q8_0

    for name, shape in tensors:
        own = type_of(name, shape)
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if own == TYPES.F32:
            writer.add_tensor_info(target, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
        else:
            in_bytes = gguf.quant_shape_to_byte_shape(shape, own)
            writer.add_tensor_info(target, in_bytes, np.dtype(np.uint8), int(np.prod(in_bytes)), own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape in tensors:
        own, x = type_of(name, shape), values(name, shape)
        writer.write_tensor_data(x if own == TYPES.F32 else quantise(x, own))
        print(f"{name}: {own.name}", flush=True)
    writer.close()


def main() -> None:
    from safetensors.torch import load_file

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path, help="a directory with one model.safetensors")
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("type", nargs="?", default="f32")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} is there already")
    read = lambda name: json.loads((args.model / name).read_text())
    loaded = {name: x.float().numpy() for name, x in load_file(args.model / "model.safetensors").items()}
    tensors = [(name, x.shape) for name, x in loaded.items()]
    write(args.out, args.model.name, read("config.json"), args.model, read("tokenizer.json"), tensors,
          lambda name, _: loaded[name], args.type)


if __name__ == "__main__":
    main()
