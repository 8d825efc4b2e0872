//! Training through llama.cpp's own server. `TINYLORA_LLAMA_SERVER` names the program and its arguments
//! (`llama-server`, or `python scripts/llama_server.py` with its whole path), `TINYLORA_SMOLLM2` the file that
//! `scripts/install-smollm2.sh` installs; without both the test says that it was skipped.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Short completions of a few problems, with a rate that moves the policy at once.
const CONFIG: &str = r#"
[data]
train = "mini"
prompt = "Question: 2 plus 3?\nAnswer: #### 5\n\nQuestion: {problem}\nAnswer:"
[adapter]
n_tie = 17
[train]
max_steps = 3
[optim]
learning_rate = 0.05
lr_scheduler_type = "constant"
[grpo]
prompts_per_step = 3
num_generations = 4
max_completion_length = 8
stop = ["\n"]
[reward]
funcs = ["length"]
[rollout]
engine = "llama-server"
max_concurrency = 4
[eval]
data = ["mini"]
limit = 2
"#;

/// Threads of llama.cpp wait for each other without giving up their cores: two servers, or a server and a
/// training, on too few of them take ten times as long. So one test runs at a time, and a server has
/// one thread.
static ALONE: Mutex<()> = Mutex::new(());

struct Place {
    _alone: MutexGuard<'static, ()>,
    folder: tempfile::TempDir,
    model: String,
    server: Vec<String>,
}

impl Place {
    /// `None`, aloud, without a server or a model.
    fn new() -> Option<Self> {
        let (Ok(server), Ok(model)) = (
            std::env::var("TINYLORA_LLAMA_SERVER"),
            std::env::var("TINYLORA_SMOLLM2"),
        ) else {
            eprintln!("skipped: TINYLORA_LLAMA_SERVER and TINYLORA_SMOLLM2 are not both set");
            return None;
        };
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("remote.toml"), CONFIG).unwrap();
        let arguments = server.split_whitespace().chain(["--threads", "1"]);
        let server = arguments.map(str::to_owned).collect();
        Some(Self {
            _alone: ALONE.lock().unwrap_or_else(PoisonError::into_inner),
            folder,
            model,
            server,
        })
    }

    fn run(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    fn train(&self, settings: &[&str]) -> Command {
        let server = serde_json::to_string(&self.server).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_tinylora"));
        command
            .args(["train", "--config", "remote.toml", "--run-dir", "run"])
            .args(["--set", &format!("model.path={}", self.model)])
            .args(["--set", &format!("rollout.server={server}")])
            .args(settings.iter().flat_map(|setting| ["--set", setting]))
            .current_dir(self.folder.path())
            .env("XDG_CACHE_HOME", self.folder.path().join("cache"))
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        command
    }
}

/// The values of a metric, step by step.
fn metric(run: &Path, name: &str) -> Vec<f64> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let rows = text
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    rows.filter_map(|row| row[name].as_f64()).collect()
}

fn finish(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{stderr}");
    stderr
}

#[test]
fn a_policy_that_moves_is_followed_by_the_server() {
    let Some(place) = Place::new() else { return };
    // A completion of the policy one update ago differs by that update as well.
    let off_policy = &["rollout.one_step_off_policy=true"][..];
    for (settings, largest) in [(&[][..], 0.2), (off_policy, 1.0)] {
        let _ = std::fs::remove_dir_all(place.run());
        finish(&mut place.train(settings));
        // Q4_1 products are rounded to 8 bits there: a tenth of a nat is usual, more is another policy.
        let difference = metric(&place.run(), "sampling/sampling_logp_difference/mean");
        // A step whose completions are all as long has nothing to learn from.
        assert!(!difference.is_empty());
        assert!(
            difference.iter().all(|d| *d > 0.0 && *d < largest),
            "{difference:?}"
        );
        assert_eq!(metric(&place.run(), "reward").len(), 3);
        assert!(metric(&place.run(), "grad_norm").iter().any(|g| *g > 0.0));
        let timings = std::fs::read_to_string(place.run().join("timings.jsonl")).unwrap();
        assert!(timings.contains("bytes/rollout_sent"), "{timings}");
    }
}

#[test]
fn a_server_that_dies_in_the_middle_is_started_again() {
    let Some(place) = Place::new() else { return };
    let mut child = place.train(&[]).spawn().unwrap();
    let log = place.run().join("metrics.jsonl");
    let began = Instant::now();
    // The evaluation before, and a step.
    while std::fs::read_to_string(&log).map_or(0, |text| text.lines().count()) < 2 {
        assert!(began.elapsed() < Duration::from_secs(300), "no step");
        assert!(child.try_wait().unwrap().is_none(), "ended by itself");
        std::thread::sleep(Duration::from_millis(5));
    }
    let parent = child.id().to_string();
    let killed = Command::new("pkill")
        .args(["-KILL", "-P", &parent])
        .status();
    assert!(killed.unwrap().success());
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("starting it again"), "{stderr}");
    assert_eq!(metric(&place.run(), "reward").len(), 3);
}

#[test]
fn a_model_that_the_server_cannot_read_is_refused() {
    let Some(place) = Place::new() else { return };
    let output = place.train(&["model.path=mini"]).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("reads GGUF files"), "{stderr}");
}
