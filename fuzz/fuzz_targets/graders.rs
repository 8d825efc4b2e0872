//! No pair of texts makes a grader panic, hang or contradict itself.
//!
//! `scripts/fuzz.sh` on a stable toolchain, or `cargo +nightly fuzz run graders -- -dict=graders.dict`.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tinylora::reward::Grader;
use tinylora_fuzz::{CpuTime, LIMIT};

fuzz_target!(|data: &[u8]| {
    let text = String::from_utf8_lossy(data);
    // The first line break parts the two answers.
    let (gold, pred) = text.split_once('\n').unwrap_or((&text, &text));
    for grader in Grader::ALL {
        let start = CpuTime::now();
        let graded = grader.grade(gold, pred);
        assert!(graded.extracted.is_some() || !graded.correct);
        let equal = grader.equal(gold, pred);
        if matches!(grader, Grader::Math | Grader::Equiv | Grader::EquivWide) {
            assert_eq!(equal, grader.equal(pred, gold), "{gold:?} {pred:?}");
        }
        assert!(
            start.elapsed() < LIMIT,
            "{} {gold:?} {pred:?}",
            grader.name()
        );
    }
});
