#!/usr/bin/env python3
"""Writes a GGUF model again with its matrices in another number format.

    venv/bin/pip install gguf numpy
    venv/bin/python scripts/quantise.py MODEL.gguf OUT.gguf q8_0

Formats: f32, f16, bf16, q4_0, q4_1, q5_0, q5_1, q8_0, q4_k, q6_k. As in llama.cpp's files the
embedding becomes Q8_0 at most, and rows that are no multiple of 256 values take Q5_0 for Q4_K and
Q8_0 for Q6_K. Scales are the plain ones from the largest values of a block; llama.cpp searches for
better ones.
"""
import argparse
import pathlib

import gguf
import numpy as np

TYPES = gguf.GGMLQuantizationType
NARROW = {TYPES.Q4_K: TYPES.Q5_0, TYPES.Q6_K: TYPES.Q8_0}
"""What rows take that do not divide into blocks of 256."""


def safe(x: np.ndarray) -> np.ndarray:
    """A column of divisors: 1 for 0."""
    return np.where(x != 0, x, 1).astype(np.float32)[:, None]


def q4_k(x: np.ndarray) -> np.ndarray:
    """Q4_K blocks of rows of f32: per 32 values a 6-bit scale and minimum, per 256 two f16 for those."""
    blocks = x.reshape(-1, 8, 32)
    low = np.minimum(blocks.min(axis=2), 0)
    scale, low = (blocks.max(axis=2) - low) / 15, -low
    d, dmin = ((part.max(axis=1) / 63).astype(np.float16) for part in (scale, low))
    s, m = (np.clip(np.rint(part / safe(unit)), 0, 63).astype(np.uint8) for part, unit in ((scale, d), (low, dmin)))
    step = safe(d) * np.maximum(s, 1)
    q = np.rint((blocks + (safe(dmin) * m)[:, :, None]) / step[:, :, None])
    q = np.clip(q, 0, 15).astype(np.uint8).reshape(-1, 4, 2, 32)
    packed = np.empty((len(blocks), 144), np.uint8)
    packed[:, 0:2], packed[:, 2:4] = d[:, None].view(np.uint8), dmin[:, None].view(np.uint8)
    packed[:, 4:8] = s[:, :4] | (s[:, 4:] >> 4 << 6)
    packed[:, 8:12] = m[:, :4] | (m[:, 4:] >> 4 << 6)
    packed[:, 12:16] = (s[:, 4:] & 15) | (m[:, 4:] << 4)
    packed[:, 16:] = (q[:, :, 0] | (q[:, :, 1] << 4)).reshape(len(blocks), 128)
    return packed.reshape(*x.shape[:-1], -1)


def q6_k(x: np.ndarray) -> np.ndarray:
    """Q6_K blocks of rows of f32: per 16 values an 8-bit scale, per 256 an f16 for those."""
    blocks = x.reshape(-1, 16, 16)
    scale = np.abs(blocks).max(axis=2) / 31
    d = (scale.max(axis=1) / 127).astype(np.float16)
    s = np.clip(np.rint(scale / safe(d)), 0, 127).astype(np.int8)
    step = safe(d) * np.maximum(s, 1)
    q = np.clip(np.rint(blocks / step[:, :, None]) + 32, 0, 63).astype(np.uint8)
    q = q.reshape(-1, 2, 4, 32)  # halves of 128 values, of four runs of 32
    packed = np.empty((len(blocks), 210), np.uint8)
    low = (q[:, :, :2] & 15) | (q[:, :, 2:] << 4)
    packed[:, :128] = low.reshape(len(blocks), 128)
    high = sum((q[:, :, run] >> 4) << (2 * run) for run in range(4))
    packed[:, 128:192] = high.reshape(len(blocks), 64)
    packed[:, 192:208] = s.view(np.uint8)
    packed[:, 208:210] = d[:, None].view(np.uint8)
    return packed.reshape(*x.shape[:-1], -1)


def quantise(x: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """A matrix of f32 in `kind`, as bytes by row; a slice at a time, since it makes several copies."""
    own = {TYPES.Q4_K: q4_k, TYPES.Q6_K: q6_k}.get(kind, lambda part: gguf.quants.quantize(part, kind))
    return np.concatenate([own(x[i : i + 1024]) for i in range(0, len(x), 1024)])


def rewrite(source: str, target: str, kind: str) -> None:
    """`source` with its matrices in `kind`."""
    kind = TYPES[kind.upper()]
    reader = gguf.GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, arch)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        value_type = field.types[0]
        inner = field.types[-1] if value_type == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), value_type, sub_type=inner)
    writer.add_file_type(0)
    for tensor in reader.tensors:
        x = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        own = kind
        if x.ndim == 1 or kind == TYPES.F32:
            writer.add_tensor(tensor.name, x)
            continue
        if kind not in (TYPES.F16, TYPES.BF16) and not tensor.name.startswith("blk."):
            own = TYPES.Q8_0
        if own in NARROW and x.shape[-1] % 256:
            own = NARROW[own]
        writer.add_tensor(tensor.name, quantise(x, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("type")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} is there already")
    rewrite(str(args.model), str(args.out), args.type)


if __name__ == "__main__":
    main()
