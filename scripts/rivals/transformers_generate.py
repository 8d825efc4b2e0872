"""transformers' `generate`: all completions of all prompts as one padded batch, sampled."""

import time

import common


def main():
    args = common.arguments(__doc__).parse_args()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    measures = {"import_s": common.since_start()}
    started = time.time()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    measures["load_s"] = time.time() - started

    problems = common.read_problems(args.prompts)
    texts = [
        tokenizer.apply_chat_template(common.chat(p["problem"]), tokenize=False, add_generation_prompt=True)
        for p in problems
    ]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    measures["prompt_tokens"] = int(batch.attention_mask.sum())

    def sample(num_generations, max_tokens):
        with torch.inference_mode():
            return model.generate(
                **batch, do_sample=True, temperature=1.0, top_p=1.0, top_k=0,
                num_return_sequences=num_generations, max_new_tokens=max_tokens,
                pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)

    sample(1, 4)  # memory is allocated and kernels are chosen
    started = time.time()
    rows = sample(args.num_generations, args.max_tokens)[:, batch.input_ids.shape[1]:]
    seconds = time.time() - started
    ends = (rows == tokenizer.eos_token_id).int()
    # Up to the first end of a row, which counts as a token; what comes after is padding.
    tokens = int((ends.cumsum(1) - ends == 0).sum())
    common.report(measures | {
        "rollout_s": seconds,
        "rollout_tokens": tokens,
        "rollout_tokens_per_s": tokens / seconds,
    })


main()
