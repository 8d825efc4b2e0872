use super::event::{What, event};
use super::record::frame;
use super::*;
use crate::rollout::FinishReason;

/// What TensorBoard's own library writes for the same events (`make_events.py` beside it).
const THEIRS: &[u8] = include_bytes!("../../../tests/fixtures/tensorboard/events");

#[test]
fn events_are_byte_for_byte_those_of_tensorboard() {
    let scalars = [("reward".to_owned(), 0.25), ("natural/kl".to_owned(), 1e-3)];
    let texts = [
        ("completions/1".to_owned(), "größer ".repeat(30)),
        ("completions/2".to_owned(), String::new()),
    ];
    let ours: Vec<u8> = [
        event(1.5, 0, &What::Version),
        event(2.5, 1, &What::Scalars(&scalars)),
        event(3.0, 300, &What::Texts(&texts)),
    ]
    .iter()
    .flat_map(|event| frame(event))
    .collect();
    assert!(ours == THEIRS);
}

/// The data of every record of a file.
fn records(mut bytes: &[u8]) -> Vec<&[u8]> {
    let mut found = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk::<8>() {
        let length = u64::from_le_bytes(*length) as usize;
        let data = &rest[4..4 + length];
        assert!(frame(data) == bytes[..length + 16]);
        found.push(data);
        bytes = &bytes[length + 16..];
    }
    assert!(bytes.is_empty());
    found
}

fn contains(record: &[u8], part: &str) -> bool {
    record.windows(part.len()).any(|w| w == part.as_bytes())
}

#[test]
fn a_file_that_goes_on_has_every_step_once_and_one_version() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("events");
    let step = |events: &mut EventFile, step: u64, name: &str| {
        let value = [(name.to_owned(), step as f64)];
        events.scalars(step, &value).unwrap();
    };
    let mut events = EventFile::open(&path, 0).unwrap();
    step(&mut events, 1, "first");
    let kept = events.sync().unwrap();
    step(&mut events, 2, "lost");
    events.scalars(3, &[]).unwrap();
    drop(events);
    let mut events = EventFile::open(&path, kept).unwrap();
    step(&mut events, 2, "again");
    drop(events);
    let bytes = std::fs::read(&path).unwrap();
    let records = records(&bytes);
    assert_eq!(records.len(), 3);
    for (record, part) in records.iter().zip(["brain.Event:2", "first", "again"]) {
        assert!(contains(record, part), "{part}");
    }
}

#[test]
fn texts_of_completions_are_few_short_and_no_markup() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("events");
    let row = CompletionRow {
        step: 1,
        problem: "p".into(),
        prompt: "ä".repeat(5000),
        completion: "# 7\n<b>".into(),
        answer: "7".into(),
        extracted: None,
        reward: 0.5,
        advantage: -1.0,
        num_tokens: 3,
        finish: FinishReason::Eos,
    };
    let mut events = EventFile::open(&path, 0).unwrap();
    events.completions(1, &vec![row; 9]).unwrap();
    events.completions(2, &[]).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let records = records(&bytes);
    assert_eq!(records.len(), 2);
    assert!(contains(records[1], "    # 7\n    <b>\n"));
    assert!(contains(records[1], "found `nothing`"));
    assert!(contains(records[1], "completions/4") && !contains(records[1], "completions/5"));
    assert!(records[1].len() < 4 * 2 * (LONGEST + 200));
}
