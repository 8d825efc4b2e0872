//! A wall clock that jumps by years at every reading changes nothing but names and dates.

// The clock comes from `run::faults`, which is not in other builds.
#![cfg(debug_assertions)]

use std::io::{self, ErrorKind};
use std::path::Path;

use clap::Parser;
use tinylora::Result;
use tinylora::cli::GlobalArgs;
use tinylora::commands::train::{self, TrainArgs};
use tinylora::ranks::Ranks;
use tinylora::run::directory;
use tinylora::run::faults::{inject, with_wild_clock};

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    args: TrainArgs,
    #[command(flatten)]
    global: GlobalArgs,
}

/// Two steps with an evaluation after each, whose reward (a short completion) moves v.
fn train(arguments: &[&str]) -> Result<()> {
    let settings = [
        "data.limit=8",
        "train.max_steps=2",
        "train.eval_steps=1",
        "grpo.prompts_per_step=2",
        "grpo.num_generations=4",
        "grpo.max_completion_length=16",
        "reward.funcs=[\"length\"]",
        "eval.limit=1",
        "eval.max_tokens=4",
        "eval.sampled=false",
    ];
    let settings = settings.iter().flat_map(|setting| ["--set", setting]);
    let line = ["train", "--quiet"].into_iter().chain(settings);
    let Line { args, global } = Line::parse_from(line.chain(arguments.iter().copied()));
    train::run(&args, &global, &Ranks::alone(), &mut io::sink())
}

fn is_same(a: &Path, b: &Path) {
    for file in [
        "config.toml",
        "metrics.jsonl",
        "completions.jsonl",
        "adapter.safetensors",
        "checkpoints/step-000002/state.safetensors",
    ] {
        let read = |run: &Path| std::fs::read(run.join(file)).unwrap();
        assert!(read(a) == read(b), "{file} differs");
    }
}

// One test, since it changes the process's folder.
#[test]
fn a_clock_that_jumps_changes_no_result_and_no_order() {
    let place = tempfile::tempdir().unwrap();
    std::env::set_current_dir(place.path()).unwrap();
    train(&["--run-dir", "plain"]).unwrap();

    let (result, readings) = with_wild_clock(|| train(&["--run-dir", "wild"]));
    result.unwrap();
    assert!(readings > 0);
    is_same(Path::new("plain"), Path::new("wild"));

    // The clock is set while the run is stopped, too.
    let (stopped, _) = with_wild_clock(|| {
        inject(90..=usize::MAX, ErrorKind::StorageFull, || {
            train(&["--run-dir", "stopped"])
        })
    });
    assert_eq!(stopped.0.unwrap_err().exit_code(), 3);
    assert!(Path::new("stopped/checkpoints/step-000000").exists());
    assert!(!Path::new("stopped/checkpoints/step-000002").exists());
    let (result, _) = with_wild_clock(|| train(&["--resume", "stopped"]));
    result.unwrap();
    is_same(Path::new("plain"), Path::new("stopped"));

    // Prompts that name the day name that of the beginning, also when the run goes on on another.
    std::fs::create_dir("model").unwrap();
    for entry in std::fs::read_dir(tinylora::data::mini::directory().unwrap()).unwrap() {
        let from = entry.unwrap().path();
        std::fs::copy(&from, Path::new("model").join(from.file_name().unwrap())).unwrap();
    }
    let template = "<|user|>{{ strftime_now('%d %m %Y') }} {{ messages[0].content }}<|assistant|>";
    std::fs::write("model/chat_template.jinja", template).unwrap();
    let of_the_day = ["--set", "model.path=model", "--set", "data.prompt=chat"];
    let (result, _) = with_wild_clock(|| {
        let begun = inject(90..=usize::MAX, ErrorKind::StorageFull, || {
            train(&[&of_the_day[..], &["--run-dir", "day"]].concat())
        });
        assert!(begun.0.is_err());
        train(&[&of_the_day[..], &["--resume", "day"]].concat())
    });
    result.unwrap();
    let prompts = std::fs::read_to_string("day/completions.jsonl").unwrap();
    assert!(prompts.lines().count() > 8);
    let day = std::fs::read_to_string("day/config.toml").unwrap();
    let (_, day) = day.split_once("today = \"").unwrap();
    let [year, month, day] = [&day[..4], &day[5..7], &day[8..10]];
    let named = format!("<|user|>{day} {month} {year} ");
    assert!(prompts.lines().all(|line| line.contains(&named)), "{named}");

    // Whatever its name says, the newest run is the one that began last.
    let mut names = Vec::new();
    let (_, _) = with_wild_clock(|| {
        for number in 1..=4 {
            train(&["--set", "train.max_steps=1", "--set", "eval.data=[]"]).unwrap();
            let newest = directory::newest().unwrap();
            let found = std::fs::read_dir("runs").unwrap().count();
            assert_eq!(found, number);
            assert!(!names.contains(&newest), "{newest:?} is not the newest");
            names.push(newest);
        }
    });
    assert!(!names.is_sorted(), "the clock did not jump: {names:?}");
}
