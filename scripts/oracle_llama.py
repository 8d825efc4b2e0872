"""Check `--format gguf-lora` with llama.cpp: the same greedy text as `tinylora generate`.

    venv/bin/pip install xllamacpp gguf numpy safetensors
    cargo build --release
    venv/bin/python scripts/oracle_llama.py target/release/tinylora MODEL.gguf WORK_DIR [SPREAD]
    venv/bin/python scripts/qwen2_gguf.py data/mini mini.gguf          # the embedded model, a Qwen2
    venv/bin/python scripts/oracle_llama.py target/release/tinylora mini.gguf WORK_DIR 0.5

MODEL.gguf is dequantised to f32 (candle and llama.cpp round quantised products differently) and
gets an adapter of a few normal random numbers (SPREAD: their standard deviation, 0.05) with large
effect. Prints for 20 prompts whether both programs
go on with the same text, and how many texts the adapter changes at all.
"""
import json
import os
import subprocess
import sys

import numpy
import xllamacpp
from quantise import rewrite
from safetensors import safe_open
from safetensors.numpy import save_file

TOKENS = 32
PROMPTS = [
    "Once upon a time", "The capital of France is", "def fibonacci(n):", "Water boils at",
    "A baker makes 12 trays of 8 rolls and sells 71.", "Dear Sir or Madam,", "1, 2, 3, 5, 8,",
    "The three primary colours are", "In 1969, astronauts", "To make a good cup of tea,",
    "Question: What is 7 times 8?\nAnswer:", "The mitochondria is", "My favourite season is",
    "Photosynthesis is the process", "SELECT name FROM users", "A triangle with sides 3, 4 and 5",
    "The opposite of hot is", "Roses are red,", "It was a dark and stormy night", "Newton's second law",
]


def tinylora(*arguments):
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"tinylora {' '.join(arguments)}: {done.stderr}")
    return done.stdout


def llama(model, adapter=None):
    """Texts by llama.cpp, greedy, with keys and values in f32."""
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = 512, 1, 0, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = 1
    params.fit_params = False
    if adapter:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    server = xllamacpp.Server(params)
    texts = []
    for prompt in PROMPTS:
        answer = server.handle_completions({
            "prompt": prompt, "max_tokens": TOKENS, "temperature": 0.0, "top_k": 1, "seed": 1,
            "cache_prompt": False})
        answer = json.loads(answer) if isinstance(answer, (str, bytes)) else answer
        texts.append(answer["choices"][0]["text"])
    return texts


program, source, work = (os.path.abspath(a) for a in sys.argv[1:4])
spread = float(sys.argv[4]) if len(sys.argv) > 4 else 0.05
os.makedirs(work, exist_ok=True)
model, adapter, lora = f"{work}/f32.gguf", f"{work}/llama.safetensors", f"{work}/llama.gguf"
if not os.path.exists(model):
    rewrite(source, model, "f32")
if not os.path.exists(adapter):
    tinylora("train", "--config", "smollm2-13p.toml", "--set", f"model.path={model}", "--set", "method=sft",
             "--set", "data.train=mini", "--set", "data.limit=4", "--set", "train.max_steps=1",
             "--set", "optim.learning_rate=1e-30", "--set", "eval.data=[]", "--run-dir", f"{work}/run", "--quiet")
    with safe_open(f"{work}/run/adapter.safetensors", "numpy") as file:
        metadata = {k: v.replace('"bf16"', '"f32"') for k, v in file.metadata().items()}
        shape = file.get_slice("v").get_shape()
    v = numpy.random.default_rng(5).normal(0, spread, shape).astype(numpy.float32)
    save_file({"v": v}, adapter, metadata=metadata)
tinylora("export", "--model", model, "--adapter", adapter, "--format", "gguf-lora", "--out", lora, "--quiet")
theirs, plain = llama(model, lora), llama(model)
same = 0
for prompt, text in zip(PROMPTS, theirs):
    own = tinylora("generate", "--model", model, "--adapter", adapter, "--prompt", prompt,
                   "--max-tokens", str(TOKENS), "--quiet")
    equal = own.rstrip("\n") == text.rstrip("\n")
    same += equal
    if not equal:
        print(f"{prompt!r}:\n  ours   {own!r}\n  theirs {text!r}", flush=True)
changed = sum(a != b for a, b in zip(theirs, plain))
print(f"the same greedy text ({TOKENS} tokens) on {same} of {len(PROMPTS)} prompts; "
      f"the adapter changes {changed} of them")
sys.exit(same < len(PROMPTS))
