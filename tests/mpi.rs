//! Training on several processes: the bytes of one, and an end in every case. Needs `--features mpi` and
//! mpirun (`scripts/install-mpi.sh`).
#![cfg(feature = "mpi")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The embedded model, with every kind of work: evaluations, several updates a step, a KL term.
const CONFIG: &str = r#"
[model]
path = "mini"
[data]
train = "mini"
[adapter]
n_tie = 4
[train]
max_steps = 6
eval_steps = 3
[optim]
learning_rate = 0.01
[grpo]
prompts_per_step = 5
num_generations = 4
num_iterations = 2
beta = 0.01
max_completion_length = 48
[eval]
data = ["mini"]
limit = 7
sampled = true
"#;

/// A run whose ranks are gone ends within this.
const LIMIT: Duration = Duration::from_secs(30);

struct Place(tempfile::TempDir);

impl Place {
    /// `None`, aloud, where there is no mpirun.
    fn new() -> Option<Self> {
        let found = Command::new("mpirun").arg("--version").output();
        if !found.is_ok_and(|output| output.status.success()) {
            eprintln!("skipped: no mpirun");
            return None;
        }
        let place = Self(tempfile::tempdir().unwrap());
        std::fs::write(place.path("small.toml"), CONFIG).unwrap();
        Some(place)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `mpirun` with these arguments, or without any the program alone.
    fn command(&self, mpirun: &[&str]) -> Command {
        let program = env!("CARGO_BIN_EXE_tinylora");
        let mut command = match mpirun {
            [] => Command::new(program),
            _ => {
                let mut command = Command::new("mpirun");
                command.args(mpirun).arg(program);
                command
            }
        };
        command
            .current_dir(self.0.path())
            .env("XDG_CACHE_HOME", self.path("cache"))
            .env("RAYON_NUM_THREADS", "1")
            .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
            .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
            .env("OMPI_MCA_rmaps_base_oversubscribe", "1")
            .env("OMPI_MCA_hwloc_base_binding_policy", "none")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn train(&self, mpirun: &[&str], arguments: &[&str]) -> Command {
        let mut command = self.command(mpirun);
        command.arg("train").args(arguments);
        command
    }

    fn same(&self, a: &str, b: &str) {
        self.same_files(a, b, &["completions.jsonl"]);
    }

    /// The files of every training, and these.
    fn same_files(&self, a: &str, b: &str, more: &[&str]) {
        let files = [
            "metrics.jsonl",
            "config.toml",
            "adapter.safetensors",
            "checkpoints/step-000006/state.safetensors",
            "evaluations/problems-mini.jsonl",
        ];
        for file in files.iter().chain(more) {
            let read = |run: &str| std::fs::read(self.path(run).join(file)).unwrap();
            assert!(read(a) == read(b), "{file} of {b} differs");
        }
    }
}

fn succeed(mut command: Command) -> String {
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{command:?}: {stderr}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Process ids of the rank `rank` below the launcher `parent`.
fn process_of(parent: u32, rank: usize) -> u32 {
    let wanted = format!("OMPI_COMM_WORLD_RANK={rank}");
    let children = Command::new("pgrep")
        .args(["-P", &parent.to_string()])
        .output()
        .unwrap();
    let ids = String::from_utf8(children.stdout).unwrap();
    let has = |id: &u32| {
        let environment = std::fs::read(Path::new("/proc").join(id.to_string()).join("environ"));
        let environment = environment.unwrap_or_default();
        environment
            .split(|&b| b == 0)
            .any(|v| v == wanted.as_bytes())
    };
    let mut all = ids.lines().filter_map(|id| id.parse().ok());
    all.find(has).expect("a process of this rank")
}

/// Waits until a run has so many lines of metrics.
fn wait_for_lines(log: &Path, lines: usize, child: &mut Child) {
    let began = Instant::now();
    let count = || std::fs::read_to_string(log).map_or(0, |text| text.lines().count());
    while count() < lines {
        assert!(
            began.elapsed() < Duration::from_secs(120),
            "no step was done"
        );
        if let Some(status) = child.try_wait().unwrap() {
            panic!("ended by itself: {status}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What the child said, when it has ended; it must within [`LIMIT`].
fn end_of(mut child: Child) -> (i32, String) {
    let began = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if began.elapsed() > LIMIT {
            child.kill().unwrap();
            panic!("still there after {LIMIT:?}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code().unwrap_or(-1), stderr)
}

#[test]
fn one_two_and_three_processes_end_with_the_bytes_of_one() {
    let Some(place) = Place::new() else { return };
    let config = ["--config", "small.toml", "--json", "--run-dir"];
    succeed(place.train(&[], &[&config[..], &["alone"]].concat()));
    for (count, run) in [("1", "one"), ("2", "two"), ("3", "three")] {
        // The decompositions are shared, too, when nobody has them.
        let _ = std::fs::remove_dir_all(place.path("cache"));
        let printed = succeed(place.train(&["-n", count], &[&config[..], &[run]].concat()));
        // One process prints.
        let summary: serde_json::Value = serde_json::from_str(&printed).expect("one object");
        assert_eq!(summary["steps"], 6);
        place.same("alone", run);
    }
    let table = |mpirun: &[&str], out: &str| {
        let mut command = place.command(mpirun);
        command.args([
            "eval",
            "--run",
            "two",
            "--benchmark",
            "mini",
            "--limit",
            "9",
            "--out",
            out,
        ]);
        let text = succeed(command);
        // The last line is the clock's.
        text.lines()
            .filter(|line| !line.contains("tok/s"))
            .map(|line| format!("{line}\n"))
            .collect::<String>()
    };
    assert_eq!(table(&[], "eval-alone"), table(&["-n", "3"], "eval-three"));
}

#[test]
fn supervised_training_has_the_bytes_of_one_process_too() {
    let Some(place) = Place::new() else { return };
    let config = ["--config", "small.toml"];
    // Neither one rank's share nor a pass is a divisor of the other.
    let sft = ["--set", "method=sft", "--set", "sft.examples_per_step=7"];
    let train = |mpirun: &[&str], run: &str| {
        succeed(place.train(mpirun, &[&config[..], &sft, &["--run-dir", run]].concat()));
    };
    train(&[], "alone");
    for (count, run) in [("2", "two"), ("3", "three")] {
        train(&["-n", count], run);
        place.same_files("alone", run, &[]);
    }
}

/// Ends one rank in the middle of a run, and the run goes on from its checkpoint to the same bytes.
fn lose(signal: &str, rank: usize, said: Option<&str>) {
    let Some(place) = Place::new() else { return };
    succeed(place.train(&[], &["--config", "small.toml", "--run-dir", "alone"]));
    let mut command = place.train(
        &["-n", "2"],
        &["--config", "small.toml", "--run-dir", "lost"],
    );
    let mut child = command.spawn().unwrap();
    // Two evaluations before, and two steps.
    wait_for_lines(&place.path("lost/metrics.jsonl"), 3, &mut child);
    let id = process_of(child.id(), rank).to_string();
    let killed = Command::new("kill").args([signal, &id]).status().unwrap();
    assert!(killed.success());
    let (code, stderr) = end_of(child);
    assert_ne!(code, 0, "{stderr}");
    if let Some(said) = said {
        assert!(stderr.contains(said), "no {said:?} in: {stderr}");
    }
    succeed(place.train(&["-n", "3"], &["--resume", "lost"]));
    place.same("alone", "lost");
}

#[test]
fn a_killed_rank_ends_the_run() {
    lose("-KILL", 1, None);
}

#[test]
fn a_killed_root_ends_the_run() {
    lose("-KILL", 0, None);
}

#[test]
fn a_rank_that_stands_still_ends_the_run_with_its_name() {
    lose(
        "-STOP",
        1,
        Some("rank 1 has not been heard of for 15 seconds; saved after step"),
    );
}

#[test]
fn an_interruption_of_one_rank_is_one_of_all() {
    lose("-INT", 1, Some("interrupted; saved after step"));
}

#[test]
fn ranks_with_different_configurations_are_refused() {
    let Some(place) = Place::new() else { return };
    let program = env!("CARGO_BIN_EXE_tinylora");
    let mut command = place.train(&["-n", "1"], &["--config", "small.toml", "--run-dir", "a"]);
    command.args([":", "-n", "1", program, "train", "--config", "small.toml"]);
    command.args(["--run-dir", "a", "--set", "optim.learning_rate=0.02"]);
    let (code, stderr) = end_of(command.spawn().unwrap());
    assert_ne!(code, 0);
    let said = "rank 1 has another program, configuration, model or data than rank 0";
    assert!(stderr.contains(said), "{stderr}");
}

#[test]
fn an_error_is_said_once_with_its_exit_code() {
    let Some(place) = Place::new() else { return };
    let arguments = ["--config", "small.toml", "--set", "adapter.type=lora"];
    let (code, stderr) = end_of(place.train(&["-n", "2"], &arguments).spawn().unwrap());
    assert_eq!(code, 2, "{stderr}");
    assert_eq!(stderr.matches("error: ").count(), 1, "{stderr}");
}
