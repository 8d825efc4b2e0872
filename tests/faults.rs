//! What can go wrong around a run, from outside: signals, programs that hang, data that vanish,
//! numbers that leave their range. Each has its exit code, its message, and a checkpoint to go on from.
//!
//! A full disk and a folder that cannot be written are in `failing_writes`, kills, damage and two
//! processes in `resume`.
#![cfg(unix)]

use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How long saving may take after a signal.
const SAVED_WITHIN: Duration = Duration::from_secs(5);
/// For what a busy machine may make slow.
const PATIENCE: Duration = Duration::from_secs(120);

/// Two short completions of each of two problems a step.
const SMALL: &str = r#"
[model]
path = "mini"
[data]
train = "mini"
prompt = "chat"
limit = 8
[adapter]
n_tie = 4
[grpo]
prompts_per_step = 2
num_generations = 4
max_completion_length = 32
"#;

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        std::fs::write(place.path("small.toml"), SMALL).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn start(&self, arguments: &[&str]) -> Child {
        self.start_in(&[], arguments)
    }

    /// Starts the program with these environment variables.
    fn start_in(&self, environment: &[(&str, &str)], arguments: &[&str]) -> Child {
        Command::new(env!("CARGO_BIN_EXE_tinylora"))
            .arg("train")
            .args(arguments)
            .envs(environment.iter().copied())
            .current_dir(self.0.path())
            .env("XDG_CACHE_HOME", self.path("cache"))
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(self.path("stderr")).unwrap())
            .spawn()
            .unwrap()
    }

    /// A new run `run` with these settings.
    fn begin(&self, settings: &[&str]) -> Child {
        let mut arguments = vec!["--config", "small.toml", "--run-dir", "run"];
        arguments.extend(settings.iter().flat_map(|setting| ["--set", setting]));
        self.start(&arguments)
    }

    fn said(&self) -> String {
        std::fs::read_to_string(self.path("stderr")).unwrap()
    }

    /// The run ends with this exit code and says every part.
    fn ends(&self, mut child: Child, code: i32, parts: &[&str]) {
        let status = wait(&mut child, PATIENCE);
        let said = self.said();
        assert_eq!(status.code(), Some(code), "{said}");
        assert!(!said.contains("panicked"), "{said}");
        for part in parts {
            assert!(said.contains(part), "no {part:?} in: {said}");
        }
    }

    /// Waits until the checkpoint of a step is there.
    fn reach(&self, child: &mut Child, step: u64) {
        let checkpoint = self.path(&format!("run/checkpoints/step-{step:06}"));
        let began = Instant::now();
        while !checkpoint.exists() {
            assert!(began.elapsed() < PATIENCE, "{}", self.said());
            if let Some(status) = child.try_wait().unwrap() {
                panic!("ended by itself ({status}): {}", self.said());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn signal(child: &Child, name: &str) {
    let id = child.id().to_string();
    let sent = Command::new("kill").args([name, &id]).status().unwrap();
    assert!(sent.success());
}

fn wait(child: &mut Child, limit: Duration) -> ExitStatus {
    let began = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if began.elapsed() > limit {
            child.kill().unwrap();
            panic!("still running after {limit:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_signal_saves_within_seconds_whatever_the_run_is_doing() {
    let place = Place::new();
    let mut child = place.begin(&["train.max_steps=100000", "train.max_dead_steps=0"]);
    place.reach(&mut child, 2);
    signal(&child, "-TERM");
    assert_eq!(wait(&mut child, SAVED_WITHIN).code(), Some(130));
    let said = place.said();
    assert!(said.contains("tinylora train --resume run"), "{said}");
}

#[test]
fn a_signal_is_heard_while_the_reward_command_hangs() {
    let place = Place::new();
    let mut child = place.begin(&[
        "reward.funcs=[\"command\"]",
        "reward.command=[\"sleep\", \"600\"]",
        "reward.command_timeout=600",
    ]);
    place.reach(&mut child, 0);
    // Long enough for a few completions; sooner, it is heard while they are sampled.
    std::thread::sleep(Duration::from_secs(1));
    signal(&child, "-TERM");
    assert_eq!(wait(&mut child, SAVED_WITHIN).code(), Some(130));
    assert!(
        place.said().contains("saved after step 0"),
        "{}",
        place.said()
    );
}

#[test]
fn a_reward_command_that_hangs_ends_the_run_in_its_time() {
    let place = Place::new();
    let child = place.begin(&[
        "reward.funcs=[\"command\"]",
        "reward.command=[\"sleep\", \"600\"]",
        "reward.command_timeout=0.5",
    ]);
    place.ends(child, 2, &["reward.command 'sleep 600'", "command_timeout"]);
}

#[test]
fn a_second_signal_leaves_at_once() {
    let place = Place::new();
    let mut child = place.begin(&["train.max_steps=3", "eval.data=[\"mini\"]", "eval.limit=1"]);
    place.reach(&mut child, 1);
    signal(&child, "-INT");
    assert!(matches!(wait(&mut child, PATIENCE).code(), Some(130 | 0)));
    // The last evaluation reads from a pipe that nobody writes to: a run that cannot stop by itself.
    let log = place.path("run/evaluations/step-000003-mini.jsonl");
    let _ = std::fs::remove_file(&log);
    let last = place.path("run/checkpoints/step-000003");
    let _ = std::fs::remove_dir_all(last);
    assert!(Command::new("mkfifo").arg(&log).status().unwrap().success());
    let mut child = place.start(&["--resume", "run"]);
    place.reach(&mut child, 3);
    signal(&child, "-INT");
    std::thread::sleep(Duration::from_secs(1));
    assert!(child.try_wait().unwrap().is_none(), "{}", place.said());
    signal(&child, "-INT");
    assert_eq!(wait(&mut child, Duration::from_secs(1)).code(), Some(130));
}

#[test]
fn data_and_model_may_vanish_during_a_run_and_are_missed_by_the_next() {
    let place = Place::new();
    let rows: String = (1..9)
        .map(|i| {
            format!(
                "{{\"problem\": \"What is {i} + 1?\", \"answer\": \"{}\"}}\n",
                i + 1
            )
        })
        .collect();
    std::fs::write(place.path("rows.jsonl"), rows).unwrap();
    let settings = [
        "data.train=rows.jsonl",
        "train.max_steps=6",
        "train.max_dead_steps=0",
    ];
    let mut child = place.begin(&settings);
    place.reach(&mut child, 1);
    std::fs::remove_file(place.path("rows.jsonl")).unwrap();
    place.ends(child, 0, &["adapter saved"]);
    let child = place.start(&["--resume", "run"]);
    place.ends(child, 3, &["rows.jsonl"]);
    let child = place.start(&["--resume", "run", "--set", "model.path=gone"]);
    place.ends(child, 3, &["gone"]);
}

#[test]
fn rewards_that_are_never_different_end_the_run() {
    let place = Place::new();
    let child = place.begin(&[
        "reward.funcs=[\"format\"]",
        "reward.format_pattern=never to be seen",
        "train.max_dead_steps=3",
    ]);
    place.ends(
        child,
        4,
        &["no group had two different rewards in the last 3 steps"],
    );
    assert!(place.path("run/checkpoints/step-000002").exists());
    // Interruptions do not make it last longer.
    let child = place.start(&["--resume", "run"]);
    place.ends(child, 4, &["in the last 3 steps"]);
    assert!(!place.path("run/checkpoints/step-000003").exists());
}

#[test]
fn a_reward_that_is_no_finite_number_is_refused() {
    for answer in ["inf", "NaN", "-inf", "1e999"] {
        let place = Place::new();
        let script = format!("while read -r line; do echo {answer}; done");
        let command = format!("reward.command=[\"sh\", \"-c\", \"{script}\"]");
        let child = place.begin(&["reward.funcs=[\"command\"]", &command]);
        place.ends(child, 2, &["is no finite number", answer]);
        assert!(place.path("run/checkpoints/step-000000").exists());
    }
}

#[test]
fn numbers_that_leave_their_range_end_the_run() {
    // One update makes v so large that the log-probabilities after it, or the gradient, are NaN.
    for (settings, said) in [
        (
            &["reward.funcs=[\"length\"]", "optim.learning_rate=1e36"][..],
            "log-probability",
        ),
        (
            &[
                "method=\"sft\"",
                "model.random_init=true",
                "optim.learning_rate=1e38",
            ],
            "gradient of update 2",
        ),
    ] {
        let place = Place::new();
        let mut settings = settings.to_vec();
        settings.extend(["train.max_steps=6", "optim.lr_scheduler_type=constant"]);
        let child = place.begin(&settings);
        place.ends(child, 4, &[said, "NaN", "optim.learning_rate"]);
        assert!(place.path("run/checkpoints/step-000001").exists());
        assert!(!place.path("run/checkpoints/step-000002").exists());
    }
}

/// The task that panics comes from `run::faults`, which is not in other builds.
#[cfg(debug_assertions)]
#[test]
fn a_panic_in_any_thread_ends_the_run_at_once_and_costs_nothing_that_was_saved() {
    let settings = ["train.max_steps=3", "train.max_dead_steps=0"];
    let mut arguments = vec!["--config", "small.toml", "--run-dir", "run"];
    arguments.extend(settings.iter().flat_map(|setting| ["--set", setting]));
    // While weights are decomposed, by threads that wait for one another, and in the steps.
    let mut saved = 0;
    for task in ["1", "50", "2000", "20000", "60000", "120000"] {
        let place = Place::new();
        let environment = [
            ("RAYON_NUM_THREADS", "4"),
            (tinylora::run::faults::PANICKING_TASK, task),
        ];
        let mut child = place.start_in(&environment, &arguments);
        let code = wait(&mut child, PATIENCE).code();
        let said = place.said();
        if code == Some(0) {
            // As many tasks are not needed for these steps on this machine.
            assert!(!said.contains("panicked"), "{said}");
            continue;
        }
        assert_eq!(code, Some(1), "task {task}: {said}");
        assert!(
            said.contains(&format!("task {task}, as a test asked")),
            "{said}"
        );
        assert!(said.contains("internal error"), "{said}");
        let child = match place.path("run/checkpoints/step-000000").exists() {
            true => {
                saved += 1;
                place.start(&["--resume", "run"])
            }
            false => {
                let _ = std::fs::remove_dir_all(place.path("run"));
                place.start(&arguments)
            }
        };
        place.ends(child, 0, &["adapter saved"]);
    }
    assert!(saved > 0, "no panic came after the first checkpoint");
}
