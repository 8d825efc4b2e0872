//! Every change that a training makes to the file system fails in turn: the error says where, what
//! was saved before is good, and going on ends with the same bytes.

// The failures come from `run::faults`, which is not in other builds.
#![cfg(debug_assertions)]

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use clap::Parser;
use tinylora::cli::GlobalArgs;
use tinylora::commands::train::{self, TrainArgs};
use tinylora::ranks::Ranks;
use tinylora::run::faults::inject;
use tinylora::run::{checkpoint, directory};
use tinylora::{Error, Result};

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    args: TrainArgs,
    #[command(flatten)]
    global: GlobalArgs,
}

fn train(arguments: &[&str]) -> Result<()> {
    let Line { args, global } = Line::parse_from([&["train", "--quiet"], arguments].concat());
    train::run(&args, &global, &Ranks::alone(), &mut io::sink())
}

/// Two steps with an evaluation after each, whose reward (a short completion) moves v.
fn begin(run: &Path) -> Result<()> {
    let settings = [
        "data.limit=8",
        "train.max_steps=2",
        "train.eval_steps=1",
        "train.save_total_limit=1",
        "grpo.prompts_per_step=2",
        "grpo.num_generations=4",
        "grpo.max_completion_length=16",
        "reward.funcs=[\"length\"]",
        "eval.limit=1",
        "eval.max_tokens=4",
        "eval.sampled=false",
    ];
    let mut arguments = vec!["--run-dir", run.to_str().unwrap()];
    arguments.extend(settings.iter().flat_map(|setting| ["--set", setting]));
    train(&arguments)
}

/// As a user goes on: from what is there, or from the start when nothing had begun.
fn go_on(run: &Path) -> Result<()> {
    match run.join(directory::CONFIG).exists() {
        true => train(&["--resume", run.to_str().unwrap()]),
        false => begin(run),
    }
}

/// The files of a run whose bytes must not depend on what went wrong on the way.
fn files(run: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    let mut folders = vec![run.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(run).unwrap().to_owned();
            let file_name = path.file_name().unwrap().to_str().unwrap();
            // What the clock says is in these.
            let clock = [
                "timings.jsonl",
                "events.out.tfevents.tinylora",
                "report.html",
                "manifest.json",
                "SHA256SUMS",
                ".lock",
            ];
            if path.is_dir() {
                folders.push(path);
            } else if !clock.contains(&file_name) {
                found.push((name, std::fs::read(&path).unwrap()));
            }
        }
    }
    found.sort();
    found
}

/// `adapter.safetensors` and every checkpoint, when there, are whole.
fn check_saved(run: &Path, whole: &[(PathBuf, Vec<u8>)]) {
    let checkpoints = directory::checkpoints(run);
    for step in checkpoint::steps(&checkpoints) {
        checkpoint::load(&checkpoints.join(format!("step-{step:06}"))).unwrap();
    }
    for name in ["adapter.safetensors", directory::CONFIG] {
        if let Ok(bytes) = std::fs::read(run.join(name)) {
            assert!(whole.contains(&(name.into(), bytes)), "{name} is torn");
        }
    }
}

fn is_said(error: &Error, run: &Path) {
    let message = error.to_string();
    assert_eq!(error.exit_code(), 3, "{message}");
    assert!(message.contains("the disk is full"), "{message}");
    assert!(message.contains(run.to_str().unwrap()), "{message}");
}

#[test]
fn a_disk_that_is_full_at_any_moment_costs_nothing_that_was_saved() {
    let place = tempfile::tempdir().unwrap();
    let run = place.path().join("run");
    let full = ErrorKind::StorageFull;
    let (result, changes) = inject(0..=0, full, || begin(&run));
    result.unwrap();
    let whole = files(&run);
    let state = Path::new("checkpoints/step-000002/state.safetensors");
    let (_, state) = whole.iter().find(|(name, _)| name == state).unwrap();
    let learnt = state.iter().rev().take(16).any(|byte| *byte != 0);
    assert!(learnt, "nothing was learnt");
    std::fs::remove_dir_all(&run).unwrap();
    assert!(changes > 100, "{changes}");

    // Full from then on, or for one moment.
    for (lasting, every) in [(true, 1), (false, 7)] {
        let mut survived = 0;
        for first in (1..=changes).step_by(every) {
            let last = if lasting { usize::MAX } else { first };
            let (result, _) = inject(first..=last, full, || begin(&run));
            match result {
                Err(error) => is_said(&error, &run),
                Ok(()) => survived += 1,
            }
            if run.exists() {
                check_saved(&run, &whole);
            }
            go_on(&run).unwrap_or_else(|error| panic!("change {first}: {error}"));
            let found = files(&run);
            let names = |files: &[(PathBuf, Vec<u8>)]| -> Vec<PathBuf> {
                files.iter().map(|(name, _)| name.clone()).collect()
            };
            assert_eq!(names(&found), names(&whole), "change {first}");
            assert!(found == whole, "change {first}: other bytes");
            std::fs::remove_dir_all(&run).unwrap();
        }
        // Only the page at the end may be missing from a run that says it is done. On a disk that stays
        // full it is; single moments are tried too far apart to meet it for sure.
        assert!((usize::from(lasting)..=7).contains(&survived), "{survived}");
    }
}

#[test]
fn a_folder_that_cannot_be_written_is_named() {
    let place = tempfile::tempdir().unwrap();
    let run = place.path().join("run");
    for kind in [ErrorKind::ReadOnlyFilesystem, ErrorKind::PermissionDenied] {
        let (result, _) = inject(1..=usize::MAX, kind, || begin(&run));
        let error = result.unwrap_err();
        assert_eq!(error.exit_code(), 3, "{error}");
        let message = error.to_string();
        assert!(message.contains(run.to_str().unwrap()), "{message}");
        assert!(message.starts_with("cannot create"), "{message}");
    }
}
