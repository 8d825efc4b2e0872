"""Make what `tests/checkpoint/oracle.rs` compares with: token ids by Hugging Face's tokenizers.

    pip install tokenizers transformers gguf
    python scripts/tokenizer_oracle.py ORACLE_DIR DATA_DIR SmolLM2.gguf [NAME=tokenizer.json]...
    TINYLORA_TOKENIZER_ORACLE=ORACLE_DIR cargo test --release --test checkpoint oracle

DATA_DIR holds JSON Lines files whose rows have texts under `problem` or `solution`; random Unicode
text is added. For SmolLM2 the reference is the pipeline of its published tokenizer.json, and what
transformers makes of the GGUF file is compared with it (the differences are printed). For
each NAME=tokenizer.json (NAME is a pre-tokenizer name of GGUF: qwen2 or llama-bpe) both a directory
and a GGUF file with that tokenizer are made.
"""
import glob
import json
import os
import random
import shutil
import sys

import gguf
import numpy
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

HIDDEN = 32
RANGES = [(0x20, 0x7E)] * 12 + [
    (0x09, 0x0D), (0xA0, 0x17F), (0x300, 0x36F), (0x370, 0x5FF), (0x600, 0x6FF), (0x900, 0x97F),
    (0xE00, 0xE7F), (0x1100, 0x11FF), (0x1E00, 0x1FFF), (0x2000, 0x206F), (0x2070, 0x218B),
    (0x2200, 0x22FF), (0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xFF00, 0xFFEF),
    (0x1D400, 0x1D7FF), (0x1F300, 0x1FAFF), (0x20, 0x20), (0x0A, 0x0A), (0x30, 0x39), (0x30, 0x39),
]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<tool_call>", "<think>"]


def texts(data):
    for path in sorted(glob.glob(f"{data}/**/*.jsonl", recursive=True)):
        with open(path) as rows:
            for row in map(json.loads, rows):
                yield from (row[key] for key in ("problem", "solution") if row.get(key))
    rng = random.Random(0)
    for _ in range(3000):
        pieces = []
        for _ in range(rng.randint(1, 12)):
            first, last = rng.choice(RANGES)
            pieces.append("".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 6))))
            if rng.random() < 0.05:
                pieces.append(rng.choice(SPECIAL))
        yield "".join(pieces)


def write_ids(directory, source, tokenizer, data):
    os.makedirs(directory, exist_ok=True)
    with open(f"{directory}/source", "w") as out:
        out.write(source)
    count = 0
    with open(f"{directory}/ids.jsonl", "w") as out:
        for text in texts(data):
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            special = tokenizer.encode(text, add_special_tokens=True).ids
            row = {"text": text, "ids": ids, "extra": len(special) - len(ids),
                   "decoded": tokenizer.decode(ids, skip_special_tokens=True)}
            out.write(json.dumps(row) + "\n")
            count += 1
    print(f"{directory}: {count} texts")


def smollm2(path):
    """The pipeline of SmolLM2's tokenizer.json with the vocabulary of its GGUF file."""
    fields = gguf.GGUFReader(path).fields
    tokens, merges, types = (fields[f"tokenizer.ggml.{key}"].contents()
                             for key in ("tokens", "merges", "token_type"))
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)},
                                     merges=[tuple(m.split(" ")) for m in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, k in zip(tokens, types) if k == 3])
    return tokenizer


def compare_with_transformers(path, tokenizer, data):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(os.path.dirname(path), gguf_file=os.path.basename(path))
    total, different = 0, []
    for text in texts(data):
        total += 1
        if theirs(text, add_special_tokens=False).input_ids != tokenizer.encode(text).ids:
            different.append(text)
    print(f"transformers' GGUF tokenizer differs from SmolLM2's on {len(different)} of {total}")
    for text in different[:5]:
        print("  ", repr(text[:100]))


def write_directory(directory, path, vocab_size):
    os.makedirs(directory, exist_ok=True)
    shutil.copy(path, f"{directory}/tokenizer.json")
    settings = {"model_type": "llama", "hidden_size": HIDDEN, "num_hidden_layers": 1,
                "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": vocab_size,
                "max_position_embeddings": 64, "tie_word_embeddings": True}
    with open(f"{directory}/config.json", "w") as out:
        json.dump(settings, out)


def write_gguf(path, pre, tokenizer):
    """A model without layers worth the name, around the vocabulary of `tokenizer`."""
    description = json.loads(tokenizer.to_str())
    added = {t["id"]: t for t in description["added_tokens"]}
    vocab = {i: t for t, i in description["model"]["vocab"].items()}
    size = max(vocab | added) + 1
    tokens = [added[i]["content"] if i in added else vocab.get(i, f"[PAD{i}]") for i in range(size)]
    types = [(3 if added[i]["special"] else 4) if i in added else 1 if i in vocab else 5
             for i in range(size)]
    merges = [m if isinstance(m, str) else " ".join(m) for m in description["model"]["merges"]]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    bos = tokenizer.encode("", add_special_tokens=True).ids
    if bos:
        writer.add_bos_token_id(bos[0])
    shapes = {"token_embd": (size, HIDDEN), "output_norm": (HIDDEN,), "blk.0.attn_norm": (HIDDEN,),
              "blk.0.ffn_norm": (HIDDEN,)}
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        shapes[f"blk.0.{name}"] = (HIDDEN, HIDDEN)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", numpy.zeros(shape, dtype=numpy.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return size


def main():
    target, data, model, *named = sys.argv[1:]
    os.makedirs(target, exist_ok=True)
    reference = smollm2(model)
    write_ids(f"{target}/smollm2-gguf", os.path.abspath(model), reference, data)
    compare_with_transformers(os.path.abspath(model), reference, data)
    for pre, path in (argument.split("=", 1) for argument in named):
        tokenizer = Tokenizer.from_file(path)
        file = os.path.abspath(f"{target}/{pre}.gguf")
        size = write_gguf(file, pre, tokenizer)
        directory = os.path.abspath(f"{target}/{pre}")
        write_directory(directory, path, size)
        write_ids(f"{target}/{pre}-gguf", file, tokenizer, data)
        write_ids(directory, directory, tokenizer, data)


main()
