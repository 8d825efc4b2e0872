"""TRL's GRPOTrainer with PEFT's TinyLoRA, f32 on the CPU.

`--reward exact` is 1 where the last number is the answer: the data as it comes. `--reward random` is 0
or 1 by chance, never the same for a whole group: every group has a gradient.
"""

import random
import re
import time

import common


def last_number_is_right(completions, answer, **_):
    rewards = []
    for completion, gold in zip(completions, answer):
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", completion[0]["content"])
        rewards.append(float(bool(numbers) and numbers[-1].replace(",", "") == gold.replace(",", "")))
    return rewards


def by_chance(seed, num_generations):
    draw = random.Random(seed)

    def reward(completions, **_):
        assert len(completions) % num_generations == 0, "whole groups"
        half = [float(i % 2) for i in range(num_generations)]
        return [r for _ in range(len(completions) // num_generations)
                for r in draw.sample(half, num_generations)]

    return reward


def main():
    parser = common.arguments(__doc__)
    parser.add_argument("--reward", choices=["exact", "random"], default="exact")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=8, help="completions of one forward and backward")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    args = parser.parse_args()

    import tempfile

    import torch
    from datasets import Dataset
    from peft import TinyLoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    measures = {"import_s": common.since_start()}

    started = time.time()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    measures["load_s"] = time.time() - started
    started = time.time()
    adapter = TinyLoraConfig(r=2, u=13, weight_tying=1.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, adapter)
    measures["svd_s"] = time.time() - started
    measures["trained_parameters"] = model.get_nb_trainable_parameters()[0]

    problems = common.read_problems(args.prompts)
    data = Dataset.from_list(
        [{"prompt": common.chat(p["problem"]), "answer": str(p["answer"])} for p in problems])
    completions = len(problems) * args.num_generations
    reward = {"exact": last_number_is_right, "random": by_chance(args.seed, args.num_generations)}[args.reward]
    folder = tempfile.TemporaryDirectory()
    config = GRPOConfig(
        output_dir=folder.name, use_cpu=True, bf16=False, seed=args.seed, report_to="none",
        save_strategy="no", logging_steps=1, disable_tqdm=True,
        max_steps=args.steps, learning_rate=1e-3, beta=0.0, temperature=1.0, top_p=1.0, top_k=0,
        num_generations=args.num_generations, max_completion_length=args.max_tokens,
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=completions // args.micro_batch,
        gradient_checkpointing=not args.no_checkpointing,
    )
    trainer = GRPOTrainer(
        model=model, reward_funcs=reward, args=config, train_dataset=data, processing_class=tokenizer)

    steps = []
    sample = trainer._generate_and_score_completions

    def timed_sample(*inputs, **options):
        started = time.time()
        batch = sample(*inputs, **options)
        steps[-1]["rollout_s"] = time.time() - started
        steps[-1]["tokens"] = int(batch["completion_mask"].sum())
        # A row for each completion; its prompt is counted once.
        measures["prompt_tokens"] = int(batch["prompt_mask"].sum()) // args.num_generations
        return batch

    trainer._generate_and_score_completions = timed_sample

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            steps.append({"step_s": -time.time()})

        def on_step_end(self, *_, **__):
            steps[-1]["step_s"] += time.time()
            measures.setdefault("first_step_s", common.since_start())

        def on_log(self, _, state, control, logs=None, **__):
            if logs and "reward" in logs:
                steps[-1]["reward"] = logs["reward"]
                steps[-1]["groups_without_gradient"] = logs["frac_reward_zero_std"]
                steps[-1]["grad_norm"] = logs["grad_norm"]

    trainer.add_callback(Clock())
    measures["init_s"] = common.since_start()
    trainer.train()
    if args.reward == "random":
        assert all(step["grad_norm"] > 0 for step in steps), "a step without a gradient"
    common.report(measures | common.step_measures(steps))


main()
