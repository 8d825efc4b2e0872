//! The graders against labelled cases of the reference implementations.
//!
//! The cases are in `$TINYLORA_TEST_DATA/graders`; without that variable these tests say so and
//! pass.

use std::path::PathBuf;

use serde_json::Value;
use tinylora::reward::Grader;

fn cases(file: &str) -> Option<Vec<Value>> {
    let Ok(root) = std::env::var("TINYLORA_TEST_DATA") else {
        eprintln!("skipped: TINYLORA_TEST_DATA is not set");
        return None;
    };
    let path = PathBuf::from(root).join("graders").join(file);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    Some(
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect(),
    )
}

fn text<'a>(case: &'a Value, key: &str) -> &'a str {
    case[key]
        .as_str()
        .unwrap_or_else(|| panic!("no text '{key}' in {case}"))
}

/// Extraction and verdict of one grader against one reference's columns.
fn check_completions(grader: Grader, extracted: &str, correct: impl Fn(&Value) -> bool) {
    let Some(cases) = cases("extract_cases_public.jsonl") else {
        return;
    };
    for case in &cases {
        let graded = grader.grade(text(case, "gold"), text(case, "completion"));
        let expected = case[extracted]
            .as_str()
            .filter(|answer| *answer != "[invalid]");
        assert_eq!(
            graded.extracted.as_deref(),
            expected,
            "{} {}",
            grader.name(),
            case["id"]
        );
        assert_eq!(
            graded.correct,
            correct(case),
            "{} {}",
            grader.name(),
            case["id"]
        );
    }
    eprintln!("{}: {} completions agree", grader.name(), cases.len());
}

#[test]
fn gsm8k_graders_agree_with_verl() {
    check_completions(Grader::Gsm8k, "verl_gsm8k_strict", |c| {
        c["verl_gsm8k_strict_score"] == 1.0
    });
    check_completions(Grader::Gsm8kFlexible, "verl_gsm8k_flexible", |c| {
        c["verl_gsm8k_flexible_score"] == 1.0
    });
}

#[test]
fn lm_eval_graders_agree_with_lm_eval() {
    check_completions(Grader::LmEvalStrict, "lmeval_strict", |c| {
        c["lmeval_strict_correct"] == true
    });
    check_completions(Grader::LmEvalFlexible, "lmeval_flexible", |c| {
        c["lmeval_flexible_correct"] == true
    });
}

#[test]
fn math_agrees_with_verl_on_completions() {
    check_completions(Grader::Math, "last_boxed_verl", |c| {
        c["verl_math_score"] == 1.0
    });
}

#[test]
fn math_agrees_with_hendrycks_on_pairs() {
    let Some(pairs) = cases("equiv_pairs_public.jsonl") else {
        return;
    };
    for pair in &pairs {
        let (gold, pred) = (text(pair, "gold"), text(pair, "pred"));
        assert_eq!(
            Grader::Math.equal(gold, pred),
            pair["hendrycks"] == true,
            "{pair}"
        );
        assert_eq!(
            Grader::Math.equal(pred, gold),
            pair["hendrycks"] == true,
            "{pair}"
        );
    }
    eprintln!("math: {} pairs agree", pairs.len());
}

#[test]
fn math_passes_the_suite_of_hendrycks() {
    let Some(suite) = cases("hendrycks_suite.jsonl") else {
        return;
    };
    for case in &suite {
        let verdict = Grader::Math.equal(text(case, "a"), text(case, "b"));
        assert_eq!(verdict, case["expected"] == true, "{case}");
    }
    assert_eq!(suite.len(), 16);
}
