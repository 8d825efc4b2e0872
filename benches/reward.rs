//! Verdicts a second on one core.
//!
//! On the labelled pairs in `$TINYLORA_TEST_DATA/graders` where they are, else on a few of our own.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use tinylora::reward::Grader;

const PAIRS: [(&str, &str); 12] = [
    ("42", "42.0"),
    (r"\frac{3}{4}", "0.75"),
    (r"5\sqrt{2}", r"\sqrt{50}"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"\left(3, \frac{\pi}{2}\right)", r"(3, \pi/2)"),
    (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty)\cup(-\infty,2)"),
    (
        r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
        r"\begin{bmatrix}1&2\\3&5\end{bmatrix}",
    ),
    (r"\text{(B)}", "B"),
    (r"50\%", "0.5"),
    ("y=2x+1", "2x-y+1=0"),
    (r"1 \pm \sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{19}"),
    ("no solution", r"\text{No solution}"),
];

fn pairs() -> Vec<(String, String)> {
    let own = || {
        PAIRS
            .map(|(gold, pred)| (gold.to_owned(), pred.to_owned()))
            .to_vec()
    };
    let Ok(root) = std::env::var("TINYLORA_TEST_DATA") else {
        return own();
    };
    let path = format!("{root}/graders/equiv_pairs_public.jsonl");
    let text = std::fs::read_to_string(path).expect("the labelled pairs");
    let pair = |line: &str| {
        let row: serde_json::Value = serde_json::from_str(line).expect("JSON");
        let field = |name: &str| row[name].as_str().expect("text").to_owned();
        (field("gold"), field("pred"))
    };
    text.lines().map(pair).collect()
}

fn completions() -> Vec<(String, String)> {
    let reasoning = "First $a + b = 12$, and then 3 * 12 = 36 because of it. ".repeat(30);
    PAIRS
        .map(|(gold, pred)| {
            (
                gold.to_owned(),
                format!("{reasoning}\n\\boxed{{{pred}}}\n#### {pred}"),
            )
        })
        .to_vec()
}

fn verdicts(criterion: &mut Criterion) {
    let pairs = pairs();
    let mut group = criterion.benchmark_group("equal");
    group.throughput(Throughput::Elements(pairs.len() as u64));
    for grader in [Grader::Math, Grader::Equiv, Grader::EquivWide] {
        group.bench_function(grader.name(), |bencher| {
            bencher.iter(|| {
                pairs
                    .iter()
                    .filter(|(gold, pred)| grader.equal(gold, black_box(pred)))
                    .count()
            });
        });
    }
    group.finish();

    let completions = completions();
    let mut group = criterion.benchmark_group("grade");
    group.throughput(Throughput::Elements(completions.len() as u64));
    for grader in Grader::ALL {
        group.bench_function(grader.name(), |bencher| {
            bencher.iter(|| {
                completions
                    .iter()
                    .filter(|(gold, text)| grader.grade(gold, black_box(text)).correct)
                    .count()
            });
        });
    }
    group.finish();
}

criterion_group!(benches, verdicts);
criterion_main!(benches);
