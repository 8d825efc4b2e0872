"""Make what `tests/oracle.rs` compares with: log-probabilities by transformers.

    python3 -m venv venv && venv/bin/pip install torch transformers gguf accelerate
    scripts/install-smollm2.sh ORACLE_DIR
    venv/bin/python scripts/oracle.py ORACLE_DIR/SmolLM2-135M-Instruct.Q4_1.gguf ORACLE_DIR
    TINYLORA_ORACLE=ORACLE_DIR cargo test --release --test oracle

In ORACLE_DIR: `smollm2` (the GGUF file dequantised to f32), `qwen2` (random, biases, untied head)
and `llama3` (random, Llama 3.1's rope scaling), each a Hugging Face directory with `scores.jsonl`:
rows {prompt, completion, prompt_ids, completion_ids, logprobs}, logprobs in natural log from f32
logits at temperature 1.
"""
import json
import os
import sys

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

QUESTIONS = [
    ("A baker makes 12 trays of 8 rolls and sells 71 of them. How many are left?",
     "She makes 12 * 8 = 96 rolls. 96 - 71 = 25 rolls are left.\n#### 25"),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Tom has $1,234.50 and spends 15%. What remains?",
     "15% of 1234.5 is 185.175, so $1,049.33 remains."),
    ("Solve $x^2 - 5x + 6 = 0$.", "\\[x = \\frac{5 \\pm 1}{2}\\] so \\boxed{2} and \\boxed{3}."),
    ("Write a haiku about rain.", "Soft drops on the roof\nwhisper to the sleeping town\nmorning smells of earth"),
    ("Name three primes above 100.", "101, 103 and 107."),
]
RAW = [
    ("Once upon a time", ", in a land far away, there lived a small dragon who was afraid of fire."),
    ("def fib(n):\n    if n < 2:\n", "        return n\n    return fib(n - 1) + fib(n - 2)\n"),
    ("Grüße aus Köln — 今日は", " und auf Wiedersehen! 漢字かな交じり文 🦀🚀"),
    ("{\"name\": \"Ada\", \"born\":", " 1815, \"tags\": [\"math\", \"engines\"]}"),
    ("1 2 3 4 5", " 6 7 8 9 10 11 12 1234567890 3.14159"),
    ("   leading spaces\t\ttabs\r\n", "   \n\n\n  trailing spaces   "),
    ("The quick brown fox", " jumps over the lazy dog." * 12),
    ("x", "y"),
    ("I'm sure they'd've gone; we'll see what it's like, won't we?", " You're right -- she'd HATE it!!!"),
    ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Hello! How can I help you today?<|im_end|>"),
    ("A" * 40, "B" * 40),
    ("SELECT name, COUNT(*) FROM users WHERE age >= 18", " GROUP BY name HAVING COUNT(*) > 1 ORDER BY 2 DESC;"),
]


def pairs(tokenizer):
    for question, answer in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        yield prompt, answer
        yield f"Question: {question}\nAnswer:", " " + answer
    yield from RAW


def write(directory, model, tokenizer):
    os.makedirs(directory, exist_ok=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    with open(f"{directory}/scores.jsonl", "w") as out, torch.no_grad():
        for prompt, completion in pairs(tokenizer):
            p = tokenizer(prompt, add_special_tokens=False).input_ids
            c = tokenizer(completion, add_special_tokens=False).input_ids
            logits = model(torch.tensor([p + c])).logits[0].double()
            logp = torch.log_softmax(logits, -1)
            logprobs = [logp[len(p) - 1 + i, t].item() for i, t in enumerate(c)]
            row = {"prompt": prompt, "completion": completion,
                   "prompt_ids": p, "completion_ids": c, "logprobs": logprobs}
            out.write(json.dumps(row) + "\n")


def main():
    gguf, target = sys.argv[1:3]
    folder, name = os.path.split(gguf)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    smollm2 = LlamaForCausalLM(LlamaConfig(**settings))
    smollm2.load_state_dict(loaded.state_dict())
    write(f"{target}/smollm2", smollm2.eval(), tokenizer)

    torch.manual_seed(0)
    sizes = dict(vocab_size=len(tokenizer), hidden_size=96, intermediate_size=200,
                 num_hidden_layers=5, initializer_range=0.15, max_position_embeddings=4096,
                 bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    qwen2 = Qwen2ForCausalLM(Qwen2Config(
        **sizes, num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=False,
        rope_theta=1e6))
    with torch.no_grad():
        for name, parameter in qwen2.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
            if name.endswith("norm.weight"):
                parameter.normal_(1, 0.2)
    write(f"{target}/qwen2", qwen2.eval(), tokenizer)

    llama3 = LlamaForCausalLM(LlamaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=1, head_dim=32,
        tie_word_embeddings=True, rms_norm_eps=1e-5, rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}))
    write(f"{target}/llama3", llama3.eval(), tokenizer)


main()
