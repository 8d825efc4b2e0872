//! `tinylora sweep` from a description to results, table and figures.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

const SWEEP: &str = r#"
base = "small.toml"
title = "A small sweep"
seeds = [1, 2]
learning_rates = [0.02]
[[method]]
name = "grpo"
[[method]]
name = "sft"
[[size]]
name = "13"
adapter = { n_tie = 4 }
[[size]]
name = "full"
adapter = { type = "full" }
learning_rates = [1e-4]
"#;

const BASE: &str = r#"
[model]
path = "mini"
dtype = "f32"
[data]
train = "mini"
prompt = "chat"
limit = 40
[train]
max_steps = 2
[grpo]
prompts_per_step = 2
num_generations = 4
max_completion_length = 8
[sft]
examples_per_step = 4
[eval]
data = ["mini"]
limit = 6
max_tokens = 8
sampled = true
"#;

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        std::fs::write(place.path("small.toml"), BASE).unwrap();
        std::fs::write(place.path("grid.toml"), SWEEP).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tinylora"));
        command
            .args(arguments)
            .current_dir(self.0.path())
            .env("XDG_CACHE_HOME", self.path("cache"))
            .env_remove("TINYLORA_CACHE");
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// stdout and stderr of a command that must succeed.
    fn succeed(&self, arguments: &[&str]) -> (String, String) {
        let output = self.run(arguments);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{arguments:?}: {stderr}");
        (String::from_utf8(output.stdout).unwrap(), stderr)
    }

    fn refuse(&self, arguments: &[&str], code: i32, part: &str) {
        let output = self.run(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
        assert!(stderr.contains(part), "no {part:?} in: {stderr}");
    }

    fn results(&self, sweep: &str) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path(sweep).join("results.jsonl"));
        let text = text.unwrap_or_default();
        let lines = text.lines();
        lines.map(|l| serde_json::from_str(l).unwrap()).collect()
    }
}

/// Results without what the clock says.
fn timeless(mut results: Vec<Value>) -> Vec<Value> {
    for result in &mut results {
        result.as_object_mut().unwrap().remove("seconds");
    }
    results
}

fn same_run(a: &Path, b: &Path) {
    for file in [
        "metrics.jsonl",
        "completions.jsonl",
        "config.toml",
        "adapter.safetensors",
        "checkpoints/step-000002/state.safetensors",
        "evaluations/step-000000-mini.jsonl",
        "evaluations/step-000000-sampled_mini.jsonl",
    ] {
        let read = |run: &Path| std::fs::read(run.join(file)).unwrap();
        assert!(read(a) == read(b), "{file} of {} differs", a.display());
    }
}

#[test]
fn a_sweep_gives_results_a_table_and_figures() {
    let place = Place::new();
    let (list, _) = place.succeed(&["sweep", "--config", "grid.toml", "--dry-run"]);
    assert!(
        list.contains("grpo-13-lr0.02-seed1") && list.ends_with("\n8 runs\n"),
        "{list}"
    );
    assert!(!place.path("runs").exists(), "a dry run leaves nothing");

    let (table, _) = place.succeed(&["sweep", "--config", "grid.toml"]);
    let sweep = place.path("runs/grid");
    assert_eq!(
        std::fs::read_to_string(sweep.join("table.txt")).unwrap(),
        table
    );
    assert_eq!(
        table
            .lines()
            .filter(|l| l.starts_with("grpo ") || l.starts_with("sft "))
            .count(),
        4
    );
    assert!(table.contains("share of gain"), "{table}");

    let results = place.results("runs/grid");
    assert_eq!(results.len(), 8);
    let first = &results[0];
    for (key, expected) in [
        ("run", Value::from("grpo-13-lr0.02-seed1")),
        ("size", "13".into()),
        ("method", "grpo".into()),
        ("adapter", "tinylora".into()),
        ("trained_parameters", 13.into()),
        ("learning_rate", 0.02.into()),
        ("seed", 1.into()),
        ("steps", 2.into()),
    ] {
        assert_eq!(first[key], expected, "{key}");
    }
    assert!(first["seconds"].as_f64().unwrap() > 0.0);
    for when in ["before", "after"] {
        let scores = &first[when]["mini"];
        assert!(scores["exact_match,gsm8k"].is_f64(), "{scores}");
        assert!(
            scores["sampled_exact_match,gsm8k_stderr"].is_f64(),
            "{scores}"
        );
    }
    // One greedy evaluation of the untrained model for all, one sampled for each seed.
    assert_eq!(
        std::fs::read_dir(sweep.join("untrained")).unwrap().count(),
        3
    );

    for name in ["accuracy", "sampled_accuracy"] {
        let svg = std::fs::read_to_string(sweep.join(format!("{name}.svg"))).unwrap();
        assert!(
            svg.starts_with("<svg") && svg.contains("A small sweep"),
            "{svg}"
        );
        assert_eq!(svg.matches('<').count(), svg.matches('>').count());
        let png = std::fs::read(sweep.join(format!("{name}.png"))).unwrap();
        let reader = png::Decoder::new(std::io::Cursor::new(png))
            .read_info()
            .unwrap();
        assert_eq!(reader.info().size(), (1840, 1080));
    }

    // A run of the sweep is the run that `train` makes of the same configuration, also where the
    // untrained model's evaluation was another run's.
    for name in ["grpo-13-lr0.02-seed2", "sft-full-lr0.0001-seed1"] {
        let run = sweep.join("runs").join(name);
        let config = run.join("config.toml");
        let alone = place.path(name);
        place.succeed(&[
            "train",
            "--config",
            config.to_str().unwrap(),
            "--run-dir",
            alone.to_str().unwrap(),
        ]);
        same_run(&run, &alone);
        place.succeed(&["train", "--resume", run.to_str().unwrap()]);
        same_run(&run, &alone);
    }

    // Again: refused, or nothing left to do.
    place.refuse(
        &["sweep", "--config", "grid.toml"],
        2,
        "go on with it by --resume",
    );
    let (again, log) = place.succeed(&["sweep", "--config", "grid.toml", "--resume"]);
    assert_eq!(again, table);
    assert!(log.contains("8 of 8 runs are done already"), "{log}");
    for (change, said) in [
        (
            "grpo.temperature=0.5",
            "all runs: grpo.temperature was 1.0, is 0.5",
        ),
        ("data.limit=20", "all runs: data.limit was 40, is 20"),
        ("train.seed=3", "the runs of grid.toml differ in train.seed"),
    ] {
        place.refuse(
            &[
                "sweep",
                "--config",
                "grid.toml",
                "--resume",
                "--set",
                change,
            ],
            2,
            said,
        );
    }
    place.refuse(
        &["sweep", "--config", "grid.toml", "--seed", "1"],
        2,
        "in its file",
    );
    place.refuse(
        &["sweep", "--config", "sweep-min.toml"],
        2,
        "did you mean sweep-mini.toml?",
    );
    place.refuse(
        &[
            "sweep",
            "--config",
            "grid.toml",
            "--sweep-dir",
            "none",
            "--resume",
        ],
        2,
        "no sweep to resume in none",
    );
}

#[test]
fn a_stopped_sweep_ends_as_if_it_had_not_been() {
    let place = Place::new();
    let sweep = |dir: &'static str| ["sweep", "--config", "grid.toml", "--sweep-dir", dir];
    place.succeed(&sweep("whole"));

    // After two runs, in the middle of the third.
    let mut child = place
        .command(&sweep("stopped"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let began = Instant::now();
    while place.results("stopped").len() < 2 {
        assert!(
            began.elapsed() < Duration::from_secs(120),
            "no run was done"
        );
        assert!(child.try_wait().unwrap().is_none(), "ended by itself");
        std::thread::sleep(Duration::from_millis(5));
    }
    let id = child.id().to_string();
    Command::new("kill").args(["-INT", &id]).status().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let done = place.results("stopped").len();
    assert!((2..8).contains(&done), "{done}");
    assert!(
        place.path("stopped/table.txt").exists(),
        "what is done is shown"
    );

    // As a crash leaves it: a torn line and a run that has only its configuration.
    let log = place.path("stopped/results.jsonl");
    let text = std::fs::read_to_string(&log).unwrap();
    std::fs::write(&log, format!("{text}{{\"run\": \"sft")).unwrap();
    let (_, stderr) = place.succeed(&[&sweep("stopped")[..], &["--resume"]].concat());
    assert!(
        stderr.contains(&format!("{done} of 8 runs are done already")),
        "{stderr}"
    );
    assert_eq!(
        timeless(place.results("stopped")),
        timeless(place.results("whole"))
    );
    for result in place.results("whole") {
        let run = |sweep: &str| {
            place
                .path(sweep)
                .join("runs")
                .join(result["run"].as_str().unwrap())
        };
        same_run(&run("whole"), &run("stopped"));
    }
}

/// Runs that differ in everything that runs in lockstep may differ in; one diverges at once.
const LOCKSTEP: &str = r#"
base = "small.toml"
seeds = [1, 2]
learning_rates = [0.02, 1e38]
[set]
train.max_steps = 4
train.save_total_limit = 0
[[method]]
name = "grpo"
[[size]]
name = "13"
adapter = { n_tie = 4 }
[[size]]
name = "other"
adapter = { n_tie = 7, u = 2, projection_seed = 7 }
learning_rates = [0.02]
[[size]]
name = "input"
adapter = { n_tie = 4, sigma = "input" }
learning_rates = [0.05]
[[size]]
name = "xs"
adapter = { type = "lora-xs", r = 2 }
learning_rates = [0.003]
[[size]]
name = "lora"
adapter = { type = "lora", r = 2 }
learning_rates = [0.001]
"#;

impl Place {
    fn sweep(&self, folder: &str, more: &[&str]) -> Output {
        std::fs::write(self.path("lockstep.toml"), LOCKSTEP).unwrap();
        let own = ["sweep", "--config", "lockstep.toml", "--sweep-dir", folder];
        self.run(&[&own[..], more].concat())
    }

    /// Results and run directories of two sweeps are the same, but for the clock.
    fn same_sweeps(&self, a: &str, b: &str) {
        assert_eq!(timeless(self.results(a)), timeless(self.results(b)));
        let mut diverged = 0;
        for result in self.results(a) {
            let run = |sweep: &str| {
                self.path(sweep)
                    .join("runs")
                    .join(result["run"].as_str().unwrap())
            };
            match result.get("diverged") {
                None => {
                    same_run(&run(a), &run(b));
                    let last = "checkpoints/step-000004/state.safetensors";
                    let read = |run: &Path| std::fs::read(run.join(last)).unwrap();
                    assert!(read(&run(a)) == read(&run(b)));
                }
                Some(_) => diverged += 1,
            }
        }
        assert!(diverged > 0, "none diverged");
    }
}

#[test]
fn runs_in_lockstep_end_with_the_bytes_of_runs_alone() {
    let place = Place::new();
    let said = |output: Output| {
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{stderr}");
        stderr
    };
    let alone = said(place.sweep("alone", &["--lockstep", "1"]));
    assert!(!alone.contains("in lockstep"), "{alone}");
    assert_eq!(place.results("alone").len(), 12);
    // On two threads and, where every row of every run shares each pass, on one.
    let together = said(place.sweep("together", &[]));
    assert!(
        together.contains("runs 1 to 8 of 12 in lockstep"),
        "{together}"
    );
    assert!(
        together.contains("runs 9 to 12 of 12 in lockstep"),
        "{together}"
    );
    place.same_sweeps("alone", "together");
    let refused = place.sweep("none", &["--lockstep", "0"]);
    assert_eq!(refused.status.code(), Some(2));
}

#[test]
fn a_stopped_lockstep_goes_on_with_any_number_of_runs() {
    let place = Place::new();
    assert!(place.sweep("whole", &["--lockstep", "12"]).status.success());
    let own = [
        "sweep",
        "--config",
        "lockstep.toml",
        "--sweep-dir",
        "stopped",
    ];
    let mut child = place
        .command(&[&own[..], &["--lockstep", "12"]].concat())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let began = Instant::now();
    let run = place.path("stopped/runs/grpo-13-lr0.02-seed1");
    while !run.join("checkpoints/step-000001").exists() {
        assert!(
            began.elapsed() < Duration::from_secs(120),
            "no step was done"
        );
        assert!(child.try_wait().unwrap().is_none(), "ended by itself");
        std::thread::sleep(Duration::from_millis(2));
    }
    let id = child.id().to_string();
    Command::new("kill").args(["-INT", &id]).status().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(place.results("stopped").len(), 0, "all were under way");
    let resumed = place.sweep("stopped", &["--resume", "--lockstep", "3"]);
    let stderr = String::from_utf8_lossy(&resumed.stderr);
    assert!(resumed.status.success(), "{stderr}");
    let order = |folder: &str| {
        let mut results = timeless(place.results(folder));
        results.sort_by_key(|r| r["run"].to_string());
        std::fs::write(
            place.path(folder).join("results.jsonl"),
            results.iter().map(|r| format!("{r}\n")).collect::<String>(),
        )
        .unwrap();
    };
    // With other groups runs end in another order.
    order("whole");
    order("stopped");
    place.same_sweeps("whole", "stopped");
}
