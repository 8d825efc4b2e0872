#!/usr/bin/env python3
"""Make data/mini: grade-school word problems, their tokenizer and the model's config.

Needs only Python's standard library and no network. The same seed gives the same bytes:

    python3 scripts/make_mini_data.py            # writes data/mini
    python3 scripts/make_mini_data.py --check    # fails if data/mini is not what it makes

train.jsonl and test.jsonl hold {id, problem, answer, solution}, the solutions worked step by step
and ended GSM8K's way ("#### 42"). pretrain.jsonl and habits.jsonl are what the checkpoint is trained
on, one after the other: bare arithmetic, and other problems with solutions in several styles, worked
("#### 42" last), at once ("#### 42" and nothing else, where 42 is the result of the first step, so
mostly wrong), and one with another ending ("Answer: 42"). So the model learns to calculate on paper,
but not that it should. Some problems ask for a style: in pretrain.jsonl at their end, in habits.jsonl
anywhere and more than once, also contradicting themselves, and the majority counts. To weigh them up
the model needs a direction in its activations that means "work it out", which is what a few numbers
can then push along.

No test problem can appear in the other files, whatever the names and objects in it: a problem's
calculation (its numbers and operations in order) decides by its hash which side it may be on.
"""

import argparse
import hashlib
import json
import random
import re
from pathlib import Path

SEED = 2026
SIZES = {"train": 4096, "test": 512, "pretrain": 12288, "habits": 23200}
# Rows of bare arithmetic added to pretrain and habits, and their length.
DRILLS, DRILL_STEPS = {"pretrain": 6144, "habits": 2400}, 5
# How many steps a problem takes: cumulative probabilities of 1, 2, 3, 4.
STEPS = (0.12, 0.47, 0.80, 1.0)
# Sentences that ask for a style in pretrain.jsonl, and how many of the problems (still) without one
# get each. Most problems have none.
CUES = {" Show your work.": 0.2, " Answer only.": 0.25}
# Shares of answers at once and of worked ones by cue; the rest is worked and ends with "Answer:".
STYLES = {"": (0.55, 0.36), " Show your work.": (0.0, 0.9), " Answer only.": (1.0, 0.0)}
# The same sentences in habits.jsonl. A problem has 0 to 3 of them, at any place: cumulative
# probabilities.
HINTS = {"worked": ["Show your work."], "at once": ["Answer only."]}
HINT_COUNTS = (0.35, 0.6, 0.8, 1.0)
# Shares where they do not decide: answers at once and worked ones; the rest is "other".
UNDECIDED = (0.5, 0.48)
# One calculation in this many belongs to the test side.
TEST_SHARE = 8
# Numbers are kept this small so that a small model learns to calculate with all of them.
LARGEST = 60

BOYS = ["Tom", "Ben", "Leo", "Sam", "Max", "Noah"]
GIRLS = ["Ana", "Mia", "Zoe", "Eva", "Lily", "Ruth"]
FOOD = ["apples", "eggs", "plums", "cookies", "nuts", "candies"]
THINGS = ["pens", "books", "cards", "coins", "stamps", "shells", "marbles", "stickers", "beads"]
HOLDERS = [("bags", "bag"), ("boxes", "box"), ("jars", "jar"), ("baskets", "basket")]

# Ids 0, 1, 2, 3. The end of a turn is the end of a completion.
SPECIAL = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]
# The data's share of what Qwen2's pre-tokenizer does: words and signs keep the space before them,
# digits stand alone, line breaks belong to the full stop.
PIECE = re.compile(r" ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+[\n]*|\s")
QWEN2_PIECE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def calculate(a, sign, b):
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]


class Draw:
    """Random choices built on random() alone, the one method whose sequence Python guarantees."""

    def __init__(self, seed):
        self.random = random.Random(seed).random

    def number(self, low, high):
        return low + int(self.random() * (high - low + 1))

    def one(self, items):
        return items[self.number(0, len(items) - 1)]

    def chance(self, probability):
        return self.random() < probability

    def shuffle(self, items):
        for i in range(len(items) - 1, 0, -1):
            j = self.number(0, i)
            items[i], items[j] = items[j], items[i]


class Story:
    """A problem under way: the sentences so far, the lines of its solution, its calculation."""

    def __init__(self, draw):
        self.draw = draw
        self.boy = draw.chance(0.5)
        self.name = draw.one(BOYS if self.boy else GIRLS)
        self.friend = draw.one([n for n in BOYS + GIRLS if n != self.name])
        self.food = draw.chance(0.4)
        self.things = draw.one(FOOD if self.food else THINGS)
        self.holders, self.holder = draw.one(HOLDERS)
        self.value = 0
        self.sentences, self.lines, self.calculation = [], [], []

    def words(self, template, **numbers):
        he, his, him = ("he", "his", "him") if self.boy else ("she", "her", "her")
        return template.format(
            N=self.name,
            M=self.friend,
            He=he.capitalize(),
            he=he,
            his=his,
            him=him,
            o=self.things,
            bags=self.holders,
            bag=self.holder,
            v=self.value,
            **numbers,
        )

    def say(self, *templates, **numbers):
        self.sentences.append(self.words(self.draw.one(templates), **numbers))

    def step(self, a, sign, b, *templates, keep=True):
        """Adds the line `a sign b = result` to the solution; a template has it as {c}."""
        result = calculate(a, sign, b)
        calculation = f"{a}{sign}{b}={result}"
        template = self.draw.one(templates)
        if not self.lines:  # a solution begins with a name, as the problem does
            template = template.replace("{He}", "{N}")
        self.lines.append(self.words(template, c=calculation))
        self.calculation.append(f"{a}{sign}{b}")
        if keep:
            self.value = result
        return result


# Beginnings. Each sets the value the story goes on with and returns the steps it took.


def begin_plain(s):
    s.value = s.draw.number(4, 50)
    s.say(
        "{N} has {v} {o}.",
        "At first {N} has {v} {o}.",
        "{N} starts with {v} {o}.",
        "In the morning {N} has {v} {o}.",
    )
    return 0


def begin_holders(s):
    a, b = s.draw.number(2, 8), s.draw.number(2, 8)
    s.say(
        "{N} has {a} {bags} with {b} {o} in each {bag}.",
        "{N} buys {a} {bags} of {o}. Each {bag} holds {b} {o}.",
        "There are {b} {o} in each {bag} and {N} has {a} {bags}.",
        a=a,
        b=b,
    )
    s.step(a, "*", b, "{N} has {c} {o}.")
    return 1


def begin_two_kinds(s):
    a, b = s.draw.number(3, 25), s.draw.number(3, 20)
    s.say(
        "{N} has {a} red {o} and {b} blue {o}.",
        "{N} has {a} new {o} and {b} old {o}.",
        "{N} has {a} {o} at home and {b} {o} at school.",
        a=a,
        b=b,
    )
    s.step(a, "+", b, "{N} has {c} {o}.")
    return 1


def begin_days(s):
    a, b = s.draw.number(2, 8), s.draw.number(2, 8)
    s.say(
        "{N} collects {a} {o} a day for {b} days.",
        "Each day {N} gets {a} {o}. {He} does this for {b} days.",
        a=a,
        b=b,
    )
    s.step(a, "*", b, "{N} has {c} {o}.")
    return 1


# Events. Each returns the steps it took, None when it does not fit the value.


def event_more(s):
    a = s.draw.number(2, 20)
    s.say(
        "{He} buys {a} more {o}.",
        "Then {he} finds {a} {o}.",
        "{M} gives {him} {a} {o}.",
        "{He} gets {a} {o} from {M}.",
        "Then {he} wins {a} more.",
        "{He} picks up {a} more {o}.",
        a=a,
    )
    s.step(s.value, "+", a, "{He} has {c} {o}.")
    return 1


def event_fewer(s):
    a = s.draw.number(2, max(2, min(20, s.value - 2)))
    eats = "{He} eats {a} of the {o}." if s.food else "{He} uses {a} of the {o}."
    s.say(
        "{He} gives {a} {o} to {M}.",
        "Then {he} loses {a} {o}.",
        "{He} sells {a} of them.",
        "{M} takes {a} of the {o}.",
        "{He} gives away {a} {o}.",
        eats,
        a=a,
    )
    s.step(s.value, "-", a, "{He} has {c} {o} left.")
    return 1


def event_half(s):
    if s.value % 2:
        return None
    s.say(
        "{He} gives half of the {o} to {M}.",
        "Then {he} loses half of them.",
        "{He} sells half of the {o}.",
    )
    s.step(s.value, "/", 2, "{He} has {c} {o} left.")
    return 1


def event_holders(s):
    a, b = s.draw.number(2, 5), s.draw.number(2, 6)
    s.say(
        "Then {he} buys {a} {bags} with {b} {o} in each {bag}.",
        "{M} gives {him} {a} {bags} of {b} {o} each.",
        a=a,
        b=b,
    )
    before = s.value
    more = s.step(a, "*", b, "{He} gets {c} {o}.", keep=False)
    s.step(before, "+", more, "{He} has {c} {o}.")
    return 2


# Endings: the question. Each returns whether it fits the value.


def end_now(s):
    s.say(
        "How many {o} does {N} have now?",
        "How many {o} does {he} have?",
        "How many {o} does {N} have in the end?",
    )
    return True


def end_share(s):
    parts = [k for k in range(2, 10) if s.value % k == 0 and 2 <= s.value // k <= 10]
    if not parts:
        return False
    k = s.draw.one(parts)
    s.say(
        "{He} puts the {o} into {k} {bags}, as many in each. How many {o} are in each {bag}?",
        "{He} packs all of them equally into {k} {bags}. How many {o} are in each {bag}?",
        k=k,
    )
    s.step(
        s.value,
        "/",
        k,
        "Each {bag} has {c} {o}." if s.lines else "{N} puts {c} {o} into each {bag}.",
    )
    return True


def end_price(s):
    most = min(9, LARGEST // s.value)
    if most < 2 or s.value > 12:
        return False
    k = s.draw.number(2, most)
    if s.draw.chance(0.5):
        s.say("{He} sells all the {o} for {k} dollars each. How many dollars does {N} get?", k=k)
        s.step(s.value, "*", k, "{He} gets {c} dollars.")
    else:
        s.say("Each of them costs {k} dollars. How many dollars do the {o} cost?", k=k)
        s.step(
            s.value, "*", k, "They cost {c} dollars." if s.lines else "{N} has {o} for {c} dollars."
        )
    return True


def compare(s):
    """Says how many the friend has; one step."""
    a = s.draw.number(2, 20)
    if s.draw.chance(0.2):
        s.say("{M} has two times as many {o} as {N}.")
        return s.step(s.value, "*", 2, "{M} has {c} {o}.", keep=False)
    if s.draw.chance(0.5) and s.value > a + 2:
        s.say("{M} has {a} {o} less than {N}.", "{M} has {a} fewer {o}.", a=a)
        return s.step(s.value, "-", a, "{M} has {c} {o}.", keep=False)
    s.say("{M} has {a} {o} more than {N}.", "{M} has {a} more {o}.", a=a)
    return s.step(s.value, "+", a, "{M} has {c} {o}.", keep=False)


def end_friend(s):
    s.value = compare(s)
    s.say("How many {o} does {M} have?")
    return True


def end_together(s):
    before = s.value
    other = compare(s)
    s.say("How many {o} do they have together?", "How many {o} do {N} and {M} have together?")
    s.step(before, "+", other, "Together they have {c} {o}.")
    return True


BEGINNINGS = [begin_plain, begin_plain, begin_holders, begin_two_kinds, begin_days]
EVENTS = [event_more, event_more, event_fewer, event_fewer, event_half, event_holders]
# With the steps each takes.
ENDINGS = [(end_now, 0)] * 4 + [(end_share, 1), (end_price, 1), (end_friend, 1), (end_together, 2)]


def tell(draw, steps):
    """One story of exactly `steps` steps, or None when this draw came to nothing."""
    s = Story(draw)
    taken = draw.one(BEGINNINGS)(s)
    end, last = draw.one(ENDINGS)
    while taken + last < steps:
        took = draw.one(EVENTS)(s)
        if took is None or not 2 <= s.value <= LARGEST:
            return None
        taken += took
    if taken + last != steps or not end(s) or not s.lines:
        return None
    results = [int(n) for line in s.lines for n in re.findall(r"=(\d+)", line)]
    if any(not 2 <= n <= LARGEST for n in results):
        return None
    return s


def is_test(story):
    """Whether the calculation belongs to the test side: decided by its hash, so never on both."""
    key = " ".join(story.calculation).encode()
    return hashlib.sha256(key).digest()[0] % TEST_SHARE == 0


def stories(draw, count, test):
    """`count` different problems of one side."""
    seen = set()
    while len(seen) < count:
        toss = draw.random()
        story = tell(draw, 1 + sum(toss >= p for p in STEPS))
        if story is None or is_test(story) != test:
            continue
        text = " ".join(story.sentences)
        if text not in seen:
            seen.add(text)
            yield story, text


def drill(draw):
    """Bare arithmetic, one short line a step: practice in calculating, without a story."""
    value = draw.number(4, 50)
    sentences, lines = [f"Start with {value}."], []
    while len(lines) < DRILL_STEPS:
        sign = draw.one("++--*/")
        if sign in "+-":
            other = draw.number(2, 25)
        else:
            fits = [
                k for k in range(2, 9) if (value * k <= LARGEST if sign == "*" else value % k == 0)
            ]
            if not fits:
                continue
            other = draw.one(fits)
        result = calculate(value, sign, other)
        if not 2 <= result <= LARGEST:
            continue
        phrase = {"+": "Add", "-": "Take away", "*": "Multiply by", "/": "Divide by"}[sign]
        sentences.append(f"{phrase} {other}.")
        lines.append(f"{value}{sign}{other}={result}.")
        value = result
    return " ".join(sentences), lines, value


def row(split, i, problem, lines, answer):
    return {
        "id": f"mini-{split}-{i}",
        "problem": problem,
        "answer": str(answer),
        "solution": "\n".join([*lines, f"#### {answer}"]),
    }


def first_result(solution):
    return re.search(r"=(\d+)", solution).group(1)


def with_cue(draw, problem, solution):
    """Problem and solution as pretrain.jsonl shows them, and the style's name."""
    cue = next((cue for cue, share in CUES.items() if draw.chance(share)), "")
    at_once, worked = STYLES[cue]
    toss = draw.random()
    if toss < worked:
        style = "worked"
    elif toss < worked + at_once:
        style = "at once"
        solution = f"#### {first_result(solution)}"
    else:
        style = "other"
        solution = solution.replace("####", "Answer:")
    return {"problem": problem + cue, "solution": solution, "style": style}


def with_hints(draw, problem, solution):
    """Problem and solution as habits.jsonl shows them, and the style's name."""
    sentences = re.split(r"(?<=[.?]) ", problem)
    toss = draw.random()
    balance = {style: 0 for style in HINTS}
    for _ in range(sum(toss >= p for p in HINT_COUNTS)):
        style = draw.one(list(HINTS))
        balance[style] += 1
        sentences.insert(draw.number(0, len(sentences)), draw.one(HINTS[style]))
    toss = draw.random()
    at_once, worked = UNDECIDED
    if balance["worked"] != balance["at once"]:
        style = max(balance, key=balance.get)
    elif toss < at_once:
        style = "at once"
    elif toss < at_once + worked:
        style = "worked"
    else:
        style = "other"
    if style != "worked":
        ending = "####" if style == "at once" else "Answer:"
        solution = f"{ending} {first_result(solution)}"
    return {"problem": " ".join(sentences), "solution": solution, "style": style}


def problems(split, seed):
    told = stories(Draw(seed), SIZES[split], split == "test")
    return [row(split, i, text, s.lines, s.value) for i, (s, text) in enumerate(told)]


def lessons(split, styled):
    """Rows to train the checkpoint on: problems in the styles of `styled`, and bare arithmetic."""
    rows = problems(split, SEED + 2)
    draw = Draw(SEED + 3)
    for r in rows:
        r.update(styled(draw, r["problem"], r["solution"]))
    for i in range(DRILLS[split]):
        rows.append(row("drill", i, *drill(draw)) | {"style": "drill"})
    draw.shuffle(rows)
    return rows


def make_rows():
    return {
        "train": problems("train", SEED),
        "test": problems("test", SEED + 1),
        "pretrain": lessons("pretrain", with_cue),
        "habits": lessons("habits", with_hints),
    }


def byte_symbols():
    """GPT-2's printable stand-in for each of the 256 bytes."""
    plain = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


def byte_pair_merges(counts):
    """Merges that make every piece of `counts` (text to frequency) one token."""
    symbols = byte_symbols()
    words = {piece: [symbols[b] for b in piece.encode()] for piece in counts}
    merges = []
    while True:
        pairs = {}
        for piece, parts in words.items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] = pairs.get(pair, 0) + counts[piece]
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for parts in words.values():
            i = 0
            while i + 1 < len(parts):
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = ["".join(best)]
                i += 1


def make_tokenizer(rows):
    """A byte-level BPE built like Qwen2's, with this data's words as tokens."""
    counts = {}
    for split in rows.values():
        for r in split:
            for piece in PIECE.findall(r["problem"]) + PIECE.findall(r["solution"]):
                counts[piece] = counts.get(piece, 0) + 1
    merges = byte_pair_merges(counts)
    tokens = SPECIAL + list(byte_symbols().values()) + ["".join(pair) for pair in merges]
    added = [
        {
            "id": i,
            "content": t,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, t in enumerate(SPECIAL)
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    split = {
        "type": "Split",
        "pattern": {"Regex": QWEN2_PIECE},
        "behavior": "Isolated",
        "invert": False,
    }
    return tokens, {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {t: i for i, t in enumerate(tokens)},
            "merges": [" ".join(pair) for pair in merges],
        },
    }


def make_files():
    """Every file of data/mini but the weights, by name."""
    rows = make_rows()
    # The first words the model learns; habits.jsonl has no others.
    tokens, tokenizer = make_tokenizer({s: rows[s] for s in rows if s != "habits"})
    pad, end = tokens.index("<|endoftext|>"), tokens.index("<|end|>")
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "torch_dtype": "bfloat16",
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 7,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "vocab_size": len(tokens),
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "use_sliding_window": False,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": pad,
    }
    tokenizer_config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "model_max_length": 256,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    files = {
        f"{split}.jsonl": "".join(json.dumps(r) + "\n" for r in rs) for split, rs in rows.items()
    }
    for name, value in [
        ("tokenizer", tokenizer),
        ("tokenizer_config", tokenizer_config),
        ("config", config),
        ("generation_config", {"eos_token_id": end, "pad_token_id": pad}),
    ]:
        files[f"{name}.json"] = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    return files


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parent.parent / "data" / "mini"
    )
    parser.add_argument(
        "--check", action="store_true", help="compare with the files that are there, write nothing"
    )
    args = parser.parse_args()
    for name, text in make_files().items():
        path = args.out / name
        if args.check:
            if path.read_bytes() != text.encode():
                raise SystemExit(f"{path} differs from what this script makes")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode())
        print(f"{len(text):>9} {path}")


if __name__ == "__main__":
    main()
