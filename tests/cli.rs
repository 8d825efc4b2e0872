//! The program as a user meets it: what goes wrong gives the right exit code and one message.

use std::path::Path;
use std::process::{Command, Output};

/// A folder of its own for each test, in which the program runs.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn write(&self, name: &str, text: &str) -> &Self {
        let path = self.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
        self
    }

    fn run(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_tinylora"))
            .args(arguments)
            .current_dir(self.path())
            .env("HF_HUB_OFFLINE", "1")
            .env("HF_HOME", self.path().join("hf"))
            .env_remove("TINYLORA_DATA_DIR")
            .env_remove("RUST_LOG")
            .output()
            .unwrap()
    }

    /// Runs what must fail: `code`, nothing on stdout, one `error:` line holding every part.
    fn refuses(&self, arguments: &[&str], code: i32, parts: &[&str]) {
        let output = self.run(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        let what = format!("{arguments:?}\n{stderr}");
        assert_eq!(output.status.code(), Some(code), "{what}");
        assert!(output.stdout.is_empty(), "{what}");
        let errors: Vec<&str> = stderr
            .lines()
            .filter(|l| l.starts_with("error: "))
            .collect();
        assert_eq!(errors.len(), 1, "{what}");
        assert!(!stderr.contains("panicked"), "{what}");
        for part in parts {
            assert!(errors[0].contains(part), "no {part:?} in: {what}");
        }
    }
}

const GOOD: &str = "[model]\npath = \"nowhere\"\n[data]\ntrain = \"problems.jsonl\"\n";

#[test]
fn help_and_version_are_not_errors() {
    let place = Place::new();
    for arguments in [&["--help"][..], &["--version"], &["train", "--help"]] {
        let output = place.run(arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}");
        assert!(!output.stdout.is_empty() && output.stderr.is_empty());
    }
}

#[test]
fn wrong_usage_is_exit_code_2() {
    let place = Place::new();
    place.refuses(&["trian"], 2, &["unrecognized subcommand 'trian'"]);
    place.refuses(
        &["train", "--confg", "x"],
        2,
        &["unexpected argument '--confg'"],
    );
    place.refuses(&["train", "--device", "gpu"], 2, &["--device", "cuda:N"]);
    place.refuses(&["train", "--dtype", "int8"], 2, &["--dtype", "int8"]);
    place.refuses(&["train", "--seed", "-1"], 2, &["-1"]);
    place.refuses(&["train", "--quiet", "-v"], 2, &["cannot be used with"]);
    place.refuses(
        &["grade", "--reward", "gsm9k", "x.jsonl"],
        2,
        &["gsm9k", "lm-eval-strict"],
    );
    assert_eq!(place.run(&[]).status.code(), Some(2));
}

#[test]
fn a_wrong_configuration_names_file_line_and_key() {
    let place = Place::new();
    let train = ["train", "--config"];
    let with = |name| [train[0], train[1], name];
    place.refuses(
        &with("missing.toml"),
        2,
        &["missing.toml", "qwen7b-13p.toml"],
    );
    place.refuses(
        &with("qwen7b-13.toml"),
        2,
        &["did you mean qwen7b-13p.toml?"],
    );
    place.refuses(&with("."), 2, &["no configuration ."]);
    for (text, parts) in [
        ("[train\n", &["bad.toml:1", "not valid TOML"][..]),
        (
            "\n[train]\nmax_step = 1\n",
            &["bad.toml:3", "train.max_step", "train.max_steps"],
        ),
        (
            "[train]\nmax_steps = \"x\"\n",
            &["bad.toml:2", "train.max_steps", "whole number", "\"x\""],
        ),
        ("method = \"ppo\"\n", &["bad.toml:1", "method", "grpo, sft"]),
        ("[adapter]\nr = 0\n[model]\npath = \"x\"\n", &["adapter.r"]),
        ("[train]\nseed = 1\n", &["model.path"]),
    ] {
        place.write("bad.toml", text);
        place.refuses(&with("bad.toml"), 2, parts);
    }
    place.write("good.toml", GOOD);
    for (assignment, parts) in [
        ("train.max_steps", &["key=value"][..]),
        (
            "train.max_stepz=3",
            &["--set train.max_stepz=3", "train.max_steps"],
        ),
        ("grpo.temperature=0", &["grpo.temperature"]),
        ("optim.learning_rate=inf", &["optim.learning_rate", "inf"]),
        ("model.device=gpu", &["model.device"]),
    ] {
        place.refuses(
            &["train", "--config", "good.toml", "--set", assignment],
            2,
            parts,
        );
    }
    std::fs::write(place.path().join("latin.toml"), b"# \xe9\n").unwrap();
    place.refuses(&with("latin.toml"), 2, &["latin.toml"]);
}

#[test]
fn a_missing_model_or_data_set_is_exit_code_3() {
    let place = Place::new();
    place.write("good.toml", GOOD);
    place.refuses(&["train", "--config", "good.toml"], 3, &["nowhere"]);
    place.write("empty/config.json", "{}");
    let set = [
        "train",
        "--config",
        "good.toml",
        "--set",
        "model.path=empty",
    ];
    place.refuses(&set, 3, &["empty"]);
    place.refuses(
        &["grade", "--reward", "gsm8k", "missing.jsonl"],
        3,
        &["missing.jsonl"],
    );
    // Nothing was begun.
    assert!(!place.path().join("runs").exists());
}

#[test]
fn a_device_this_build_lacks_is_said_at_once() {
    let place = Place::new();
    place.write("good.toml", GOOD);
    let arguments = ["train", "--config", "good.toml", "--device", "cuda:0"];
    place.refuses(&arguments, 2, &["cuda:0", "built without CUDA"]);
}

#[test]
fn resuming_needs_a_run() {
    let place = Place::new();
    place.refuses(
        &["train", "--resume"],
        2,
        &["no run with a checkpoint under runs/"],
    );
    place.refuses(&["train", "--resume", "runs/x"], 2, &["no run runs/x"]);
    place.refuses(
        &["train", "--resume", "a", "--run-dir", "b"],
        2,
        &["--run-dir"],
    );
}
