//! A run that is killed, interrupted or damaged and resumed ends with the same bytes as one that
//! was left alone.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Random weights in the shape of the embedded model: training moves v at every step.
const CONFIG: &str = r#"
method = "sft"
[model]
path = "mini"
random_init = true
[data]
train = "mini"
limit = 40
[adapter]
n_tie = 4
[train]
max_steps = 8
[optim]
learning_rate = 0.01
lr_scheduler_type = "cosine"
[sft]
examples_per_step = 2
[eval]
data = ["mini"]
limit = 2
max_tokens = 4
"#;

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        std::fs::write(place.path("small.toml"), CONFIG).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn start(&self, arguments: &[&str]) -> Child {
        Command::new(env!("CARGO_BIN_EXE_tinylora"))
            .arg("train")
            .args(arguments)
            .current_dir(self.0.path())
            .env("XDG_CACHE_HOME", self.path("cache"))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// Exit code and stderr.
    fn run(&self, arguments: &[&str]) -> (i32, String) {
        let output = self.start(arguments).wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code().unwrap_or(-1), stderr)
    }

    fn succeed(&self, arguments: &[&str]) {
        let (code, stderr) = self.run(arguments);
        assert_eq!(code, 0, "{arguments:?}: {stderr}");
    }

    fn refuse(&self, arguments: &[&str], code: i32, part: &str) {
        let (found, stderr) = self.run(arguments);
        assert_eq!(found, code, "{arguments:?}: {stderr}");
        assert!(stderr.contains(part), "no {part:?} in: {stderr}");
    }

    /// Starts a run and sends `signal` once it has done `steps` steps.
    fn stop_after(&self, arguments: &[&str], run: &str, steps: usize, signal: &str) -> ExitStatus {
        let mut child = self.start(arguments);
        let log = self.path(run).join("metrics.jsonl");
        let began = Instant::now();
        // One line more than steps: the evaluation before.
        while count_lines(&log) <= steps {
            assert!(
                began.elapsed() < Duration::from_secs(120),
                "no step was done"
            );
            if let Some(status) = child.try_wait().unwrap() {
                panic!("ended by itself: {status}");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let id = child.id().to_string();
        Command::new("kill").args([signal, &id]).status().unwrap();
        child.wait().unwrap()
    }

    /// Everything that must not depend on interruptions.
    fn same(&self, a: &str, b: &str) {
        for file in [
            "metrics.jsonl",
            "completions.jsonl",
            "config.toml",
            "adapter.safetensors",
            "checkpoints/step-000008/state.safetensors",
        ] {
            let read = |run: &str| std::fs::read(self.path(run).join(file)).unwrap();
            assert!(read(a) == read(b), "{file} differs");
        }
    }
}

fn count_lines(path: &Path) -> usize {
    std::fs::read(path).map_or(0, |text| text.iter().filter(|b| **b == b'\n').count())
}

#[test]
fn a_stopped_run_ends_as_if_it_had_not_been() {
    let place = Place::new();
    place.succeed(&["--config", "small.toml", "--run-dir", "whole"]);
    let v = std::fs::read(place.path("whole/checkpoints/step-000008/state.safetensors")).unwrap();
    assert!(
        v.iter().rev().take(16).any(|b| *b != 0),
        "nothing was learnt"
    );

    // Ctrl-C saves and says how to go on; a kill says nothing and loses nothing saved.
    let fresh = ["--config", "small.toml", "--run-dir", "stopped"];
    let status = place.stop_after(&fresh, "stopped", 2, "-INT");
    assert_eq!(status.code(), Some(130));
    let resume = ["--resume", "stopped"];
    let status = place.stop_after(&resume, "stopped", 4, "-KILL");
    assert_eq!(status.code(), None);
    // A torn last line and a damaged last checkpoint, as a crash of the machine can leave them.
    let log = place.path("stopped/metrics.jsonl");
    let mut text = std::fs::read(&log).unwrap();
    text.extend_from_slice(b"{\"step\": 9");
    std::fs::write(&log, text).unwrap();
    let last = std::fs::read_dir(place.path("stopped/checkpoints")).unwrap();
    let mut steps: Vec<PathBuf> = last.map(|e| e.unwrap().path()).collect();
    steps.retain(|p| p.is_dir() && p.to_string_lossy().contains("/step-"));
    steps.sort();
    std::fs::write(steps.last().unwrap().join("state.safetensors"), b"torn").unwrap();
    let (code, stderr) = place.run(&resume);
    assert_eq!(code, 0, "{stderr}");
    assert!(stderr.contains("stepping back"), "{stderr}");
    place.same("whole", "stopped");
    // Once more on the finished run: nothing to do, nothing changed.
    place.succeed(&resume);
    place.same("whole", "stopped");
}

/// `scripts/kill_test.sh` does this hundreds of times.
#[test]
fn kills_at_any_moment_lose_nothing() {
    let place = Place::new();
    let fresh = ["--config", "small.toml", "--run-dir"];
    place.succeed(&[&fresh[..], &["warm"]].concat());
    let began = Instant::now();
    place.succeed(&[&fresh[..], &["whole"]].concat());
    let length = began.elapsed();
    let next = || match place.path("killed/config.toml").exists() {
        true => vec!["--resume", "killed"],
        false => [&fresh[..], &["killed"]].concat(),
    };
    for moment in [0.1, 0.5, 0.3, 0.7, 0.2, 0.9] {
        let mut child = place.start(&next());
        std::thread::sleep(length.mul_f64(moment));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    place.succeed(&next());
    place.same("whole", "killed");
    let names = |folder: &str| {
        let entries = std::fs::read_dir(place.path(folder)).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    for folder in ["", "checkpoints", "evaluations"] {
        let [whole, killed] = ["whole", "killed"].map(|run| names(&format!("{run}/{folder}")));
        assert_eq!(whole, killed);
    }
}

#[test]
fn another_run_is_refused_and_says_what_differs() {
    let place = Place::new();
    place.succeed(&[
        "--config",
        "small.toml",
        "--run-dir",
        "a",
        "--set",
        "train.max_steps=1",
    ]);
    place.refuse(
        &["--config", "small.toml", "--run-dir", "a"],
        2,
        "is not empty",
    );
    for (change, said) in [
        ("adapter.u=2", "adapter.u was 1, is 2"),
        ("train.seed=7", "train.seed was 42, is 7"),
        ("data.limit=20", "the training problems are others"),
        ("train.max_steps=3", "train.max_steps was 1, is 3"),
    ] {
        place.refuse(&["--resume", "a", "--set", change], 2, said);
    }
    place.succeed(&["--resume", "a", "--set", "train.save_total_limit=9"]);
    place.refuse(
        &["--resume", "a", "--set", "data.train=nothing.jsonl"],
        3,
        "nothing.jsonl",
    );
}

#[test]
fn two_processes_do_not_share_a_run() {
    let place = Place::new();
    let arguments = [
        "--config",
        "small.toml",
        "--run-dir",
        "a",
        "--set",
        "train.max_steps=100000",
    ];
    let mut first = place.start(&arguments);
    while count_lines(&place.path("a/metrics.jsonl")) < 2 {
        assert!(first.try_wait().unwrap().is_none(), "ended by itself");
        std::thread::sleep(Duration::from_millis(5));
    }
    place.refuse(&["--resume", "a"], 2, "in use by another process");
    first.kill().unwrap();
    first.wait().unwrap();
}
