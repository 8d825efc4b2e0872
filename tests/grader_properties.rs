//! Properties of every grader on arbitrary text, and of `equiv` on answers made to be equal or not.

use std::time::{Duration, Instant};

use proptest::prelude::*;
use tinylora::reward::Grader;

/// Pieces that answers are made of, put together without regard for sense.
const PIECES: [&str; 62] = [
    "1",
    "2",
    "10",
    "0.5",
    ".",
    ",",
    "-",
    "+",
    "*",
    "/",
    "^",
    "_",
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    "|",
    "=",
    "<",
    ">",
    "!",
    "%",
    "&",
    "'",
    ":",
    ";",
    "$",
    " ",
    "x",
    "y",
    "e",
    "i",
    "and",
    "or",
    "sin",
    "cm",
    "pi",
    r"\frac",
    r"\sqrt",
    r"\pi",
    r"\infty",
    r"\pm",
    r"\cup",
    r"\in",
    r"\le",
    r"\text{",
    r"\{",
    r"\}",
    r"\\",
    r"\left",
    r"\boxed{",
    r"\begin{pmatrix}",
    r"\end{pmatrix}",
    r"\sin",
    r"\log_",
    r"\binom",
    "^{\\circ}",
    "\0",
    "é",
    "∞",
];

fn soup() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(PIECES.to_vec()), 0..40)
        .prop_map(|parts| parts.concat())
}

fn anything() -> impl Strategy<Value = String> {
    prop_oneof![soup(), any::<String>()]
}

/// A rational number as some answer might state it.
fn written(numerator: i64, denominator: i64, style: u8) -> String {
    let sign = if numerator < 0 { "-" } else { "" };
    let above = numerator.abs();
    match style % 7 {
        0 => format!("{numerator}/{denominator}"),
        1 => format!(r"{sign}\frac{{{above}}}{{{denominator}}}"),
        2 => format!(r"\dfrac{{{}}}{{{}}}", 3 * numerator, 3 * denominator),
        3 => format!(r"x = {sign}\tfrac{{{above}}}{{{denominator}}}"),
        4 => format!("${numerator} \\cdot {denominator}^{{-1}}$"),
        5 => format!(r"\left({numerator}\right) \div {denominator}"),
        _ => format!(
            r"\boxed{{\frac{{{}}}{{{}}}}}.",
            2 * numerator,
            2 * denominator
        ),
    }
}

proptest! {
    #[test]
    fn no_text_makes_a_grader_panic_or_dawdle(gold in anything(), completion in anything()) {
        for grader in Grader::ALL {
            let start = Instant::now();
            grader.grade(&gold, &completion);
            grader.equal(&gold, &completion);
            prop_assert!(start.elapsed() < Duration::from_millis(500), "{}", grader.name());
        }
    }

    #[test]
    fn equality_is_symmetric_and_reflexive(a in anything(), b in anything()) {
        for grader in [Grader::Math, Grader::Equiv, Grader::EquivWide] {
            prop_assert_eq!(grader.equal(&a, &b), grader.equal(&b, &a), "{}", grader.name());
            prop_assert!(a.trim().is_empty() || grader.equal(&a, &a), "{}", grader.name());
        }
    }

    #[test]
    fn a_number_equals_itself_in_any_dress_and_no_other(
        above in -2000i64..2000, below in 1i64..500, other in -2000i64..2000, s in 0u8..7, t in 0u8..7,
    ) {
        let gold = written(above, below, s);
        prop_assert!(Grader::Equiv.equal(&gold, &written(above, below, t)), "{}", gold);
        prop_assert_eq!(Grader::Equiv.equal(&gold, &written(other, below, t)), above == other);
    }

    #[test]
    fn products_equal_their_expansion(a in -9i64..10, b in -9i64..10, c in 1i64..10, d in -9i64..10, off in 1i64..5) {
        let factored = format!("({a}x{b:+})({c}x{d:+})");
        let expanded = |last: i64| format!("{}x^{{2}}{:+}x{last:+}", a * c, a * d + b * c);
        prop_assert!(Grader::Equiv.equal(&factored, &expanded(b * d)), "{}", factored);
        prop_assert!(!Grader::Equiv.equal(&factored, &expanded(b * d + off)), "{}", factored);
    }

    #[test]
    fn radicals_simplify(k in 1u32..60, n in 2u32..60, off in 1u32..4) {
        let simple = format!(r"{k}\sqrt{{{n}}}");
        let root = |radicand: u32| format!(r"\sqrt{{{radicand}}}");
        let rationalised = format!(r"\frac{{{}}}{{\sqrt{{{n}}}}}", k * n);
        let equal = [root(k * k * n), rationalised, root(k * k * n + off)]
            .map(|other| Grader::Equiv.equal(&simple, &other));
        prop_assert_eq!(equal, [true, true, false], "{}", simple);
    }

    #[test]
    fn tuples_keep_their_order_and_brackets(a in -50i64..50, b in -50i64..50, c in -50i64..50) {
        let gold = format!("({a},{b},{c})");
        let equal = [
            format!(r"\left({a}, {b}.0, \frac{{{c}}}{{1}}\right)"),
            format!("({c},{b},{a})"),
            format!("[{a},{b},{c}]"),
            format!("({a},{b},{c}]"),
        ]
        .map(|other| Grader::Equiv.equal(&gold, &other));
        prop_assert_eq!(equal, [true, a == c, false, false], "{}", gold);
    }
}

/// Processor time of this thread where the system tells, else the clock's.
fn now(began: Instant) -> Duration {
    let schedule = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanoseconds = schedule.split(' ').next().and_then(|n| n.parse().ok());
    nanoseconds.map_or_else(|| began.elapsed(), Duration::from_nanos)
}

/// The quickest of a few runs, so that a busy machine does not decide.
fn quickest(work: impl Fn()) -> Duration {
    let began = Instant::now();
    let time = |_| {
        let start = now(began);
        work();
        now(began).saturating_sub(start)
    };
    (0..5).map(time).min().unwrap_or_default()
}

#[test]
fn hostile_answers_are_graded_within_50_ms() {
    const MEGABYTE: usize = 1 << 20;
    let nested = |open: &str, close: &str| open.repeat(10_000) + "1" + &close.repeat(10_000);
    let filled = |part: &str| part.repeat(MEGABYTE / part.len());
    let answers = [
        ("a megabyte of digits", filled("7")),
        ("a megabyte of numbers", filled("12, ")),
        ("a megabyte of words", filled("the answer is ")),
        ("a megabyte of boxes", filled(r"\boxed{1} ")),
        ("a megabyte of open boxes", filled(r"\boxed{")),
        ("a megabyte of marks", filled("#### 1\n")),
        ("a megabyte of formulas", filled("$x^2$ ")),
        ("a megabyte of backslashes", filled("\\")),
        ("10,000 nested braces", nested("{", "}")),
        ("10,000 nested brackets", nested("(", ")")),
        ("10,000 nested fractions", nested(r"\frac{1}{", "}")),
        ("10,000 nested boxes", nested(r"\boxed{", "}")),
        ("10,000 open braces", "{".repeat(10_000)),
        ("NUL bytes", "\0".repeat(10_000)),
        ("a NUL byte in a number", "1\x002".to_owned()),
        ("a replacement character", "\u{fffd}1".to_owned()),
    ];
    for (what, answer) in &answers {
        let boxed = format!("so it is \\boxed{{{answer}}}");
        for grader in Grader::ALL {
            let time = quickest(|| {
                for completion in [answer, &boxed] {
                    assert!(!grader.grade("5", completion).correct, "{what}");
                }
            });
            assert!(
                time.as_millis() < 2 * 50,
                "{}, {what}: {time:?}",
                grader.name()
            );
            let time = quickest(|| assert!(!grader.equal("5", answer), "{what}"));
            assert!(time.as_millis() < 50, "{}, {what}: {time:?}", grader.name());
            let time = quickest(|| {
                grader.equal(answer, &boxed);
            });
            assert!(time.as_millis() < 50, "{}, {what}: {time:?}", grader.name());
        }
    }
}
