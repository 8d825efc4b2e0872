"""Writes tests/fixtures/data/**.parquet: small files with the columns the hub's data sets have.

The rows are made up here. Needs pyarrow (made with 26.0). Run from the repository's root.
"""

import datetime
import pathlib

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = pathlib.Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "data"


def write(name, table, **options):
    path = ROOT / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    print(path.relative_to(ROOT), table.num_rows, "rows")


text = pa.string()

write(
    "gsm8k/test.parquet",
    pa.table(
        {
            "question": [
                "A shelf holds 3 books and 4 magazines. How many items are on it?",
                "A mill grinds 300 sacks an hour. How many in 4 hours?",
                "Größer als ½? Ünïcödé 数学",
            ],
            "answer": [
                "There are 3+4=<<3+4=7>>7 items.\n#### 7",
                "It grinds 300*4=<<300*4=1200>>1200 sacks.\n#### 1,200",
                "Yes.\n#### 1",
            ],
        },
        schema=pa.schema([("question", text), ("answer", text)]),
    ),
    # Plain pages keep the text findable for the test that damages it.
    compression="none",
    use_dictionary=False,
)

write(
    "olympiadbench/test.parquet",
    pa.table(
        {
            "id": pa.array([1606, 1607], pa.int64()),
            "question": ["Find the height.", "Prove it."],
            "solution": pa.array([["First way.", "Second way."], ["By symmetry."]], pa.list_(text)),
            "final_answer": pa.array([["$\\sqrt{3}$"], []], pa.list_(text)),
            "context": pa.array([None, None], text),
            "is_multiple_answer": pa.array([False, False]),
            "image_1": pa.array([None, None], pa.struct([("bytes", pa.binary()), ("path", text)])),
        }
    ),
    compression="snappy",
)

write(
    "amc23/test-00000-of-00001.parquet",
    pa.table(
        {
            "id": pa.array([0, 1, 2], pa.int64()),
            "question": ["First?", "Second?", "Third?"],
            "answer": pa.array([27.0, 36.0, 0.0], pa.float64()),
            "url": ["u0", "u1", "u2"],
        }
    ),
    compression="zstd",
    row_group_size=2,
)

write(
    "aime24/test.parquet",
    pa.table(
        {
            "id": pa.array([60], pa.int64()),
            "problem": ["How long is the walk?"],
            "solution": ["It is \\boxed{025}."],
            "answer": ["025"],
            "year": ["2024"],
        },
        schema=pa.schema(
            [("id", pa.int64()), ("problem", pa.large_string()), ("solution", text), ("answer", text), ("year", text)]
        ),
    ),
    compression="gzip",
)

write(
    "math/test.parquet",
    pa.table(
        {
            "problem": ["What is half of one?"],
            "level": ["Level 5"],
            "type": ["Algebra"],
            "solution": ["Half of one is $\\boxed{\\frac{1}{2}}$."],
        }
    ),
    compression="brotli",
)

message = pa.struct([("role", text), ("content", text)])
reward = pa.struct([("ground_truth", text), ("style", text)])
write(
    "nested.parquet",
    pa.table(
        {
            "data_source": ["made/up"] * 3,
            "prompt": pa.array(
                [
                    [{"role": "user", "content": "What is 6 times 7?"}],
                    [{"role": "user", "content": "What is 6 times 8?"}],
                    [],
                ],
                pa.list_(message),
            ),
            "reward_model": pa.array(
                [
                    {"ground_truth": "42", "style": "rule"},
                    None,
                    {"ground_truth": "1", "style": "rule"},
                ],
                reward,
            ),
        }
    ),
    compression="lz4",
)

write(
    "times.parquet",
    pa.table(
        {
            "problem": pa.array([datetime.time(1, 2, 3)], pa.time64("ns")),
            "answer": ["1"],
        }
    ),
)
