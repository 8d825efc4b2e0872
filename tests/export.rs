//! `tinylora export`: from a run to every format, and back.

use std::path::{Path, PathBuf};
use std::process::Command;

use safetensors::SafeTensors;

/// Two steps on random weights in the shape of the embedded model.
const CONFIG: &str = r#"
method = "sft"
[model]
path = "mini"
random_init = true
[data]
train = "mini"
limit = 8
[adapter]
n_tie = 4
dtype = "bf16"
[train]
max_steps = 2
[optim]
learning_rate = 0.01
[sft]
examples_per_step = 2
"#;

struct Place(tempfile::TempDir);

impl Place {
    /// With a finished run `run`; `adapter` replaces the section's kind.
    fn trained(settings: &[&str]) -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        std::fs::write(place.path("small.toml"), CONFIG).unwrap();
        let mut arguments = vec!["train", "--config", "small.toml", "--run-dir", "run"];
        arguments.extend(settings.iter().flat_map(|setting| ["--set", setting]));
        place.run(&arguments, 0);
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs the program and gives its stdout and stderr.
    fn run(&self, arguments: &[&str], code: i32) -> (String, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_tinylora"))
            .args(arguments)
            .current_dir(self.0.path())
            .env("XDG_CACHE_HOME", self.path("cache"))
            .env_remove("TINYLORA_CACHE")
            .output()
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {err}");
        (out, err)
    }

    fn export(&self, format: &str, out: &str) -> String {
        let arguments = ["export", "--run", "run", "--format", format, "--out", out];
        let (stdout, stderr) = self.run(&arguments, 0);
        assert_eq!(stdout.trim_end(), out);
        stderr
    }
}

fn names(path: &Path) -> Vec<String> {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.names().into_iter().map(String::from).collect()
}

#[test]
fn a_run_is_exported_in_every_format() {
    let place = Place::trained(&[]);
    let stderr = place.export("tinylora", "v.safetensors");
    let bytes = std::fs::read(place.path("v.safetensors")).unwrap();
    assert_eq!(
        bytes,
        std::fs::read(place.path("run/adapter.safetensors")).unwrap()
    );
    assert!(stderr.contains("bytes"), "{stderr}");

    // The file alone, without a run or a model to look at.
    let elsewhere = [
        "export",
        "--adapter",
        "v.safetensors",
        "--out",
        "copy.safetensors",
    ];
    place.run(&elsewhere, 0);
    assert_eq!(
        std::fs::read(place.path("copy.safetensors")).unwrap(),
        bytes
    );

    place.export("lora", "lora");
    let lora = names(&place.path("lora/adapter_model.safetensors"));
    assert!(
        lora.iter()
            .all(|n| n.contains(".lora_A.") || n.contains(".lora_B."))
    );
    place.export("peft", "peft");
    let peft = names(&place.path("peft/adapter_model.safetensors"));
    assert_eq!(peft.len(), lora.len() * 2, "A, B, P and v for each module");

    let stderr = place.export("merged", "merged");
    assert!(stderr.contains("lost"), "rounding is reported: {stderr}");
    let (out, _) = place.run(
        &[
            "generate",
            "--model",
            "merged",
            "--prompt",
            "Tom",
            "-n",
            "1",
            "--max-tokens",
            "2",
        ],
        0,
    );
    assert!(!out.is_empty());

    let other = [
        "eval",
        "--model",
        "merged",
        "--adapter",
        "v.safetensors",
        "--benchmark",
        "mini",
    ];
    let (_, stderr) = place.run(&other, 3);
    assert!(stderr.contains("was trained on"), "{stderr}");
}

#[test]
fn a_fully_trained_model_is_exported_as_a_checkpoint() {
    let place = Place::trained(&["adapter.type=full", "adapter.dtype=f32"]);
    let stderr = place.export("merged", "model");
    assert!(!stderr.contains("lost"), "{stderr}");
    for (format, out) in [("lora", "x"), ("peft", "y")] {
        let arguments = ["export", "--run", "run", "--format", format, "--out", out];
        let (_, stderr) = place.run(&arguments, 2);
        assert!(stderr.contains("--format"), "{stderr}");
    }
    place.run(
        &[
            "generate",
            "--model",
            "model",
            "--prompt",
            "Tom",
            "--max-tokens",
            "2",
        ],
        0,
    );
}

#[test]
fn targets_of_the_wrong_kind_are_refused() {
    let place = Place::trained(&[]);
    std::fs::create_dir(place.path("full")).unwrap();
    std::fs::write(place.path("full/file"), "something").unwrap();
    for (format, out, reason) in [
        ("tinylora", "full", "is a directory"),
        ("gguf-lora", "full", "adapter.gguf"),
        ("lora", "full/file", "is a file"),
        ("merged", "full", "is not empty"),
        ("onnx", "x", "onnx"),
    ] {
        let arguments = ["export", "--run", "run", "--format", format, "--out", out];
        let (_, stderr) = place.run(&arguments, 2);
        assert!(stderr.contains(reason), "{stderr}");
    }
    let (_, stderr) = place.run(&["export", "--adapter", "full/file", "--out", "x"], 3);
    assert!(stderr.contains("full/file"), "{stderr}");
    place.run(
        &["export", "--out", "x", "--adapter", "nowhere.safetensors"],
        3,
    );
}

/// Log-probabilities of two completions under the newest run's model.
fn scores(place: &Place, adapter: &str) -> Vec<f64> {
    let rows = [("Tom has 3", " apples and 4"), ("Lea", " counts to 10.")];
    let line = |(p, c): &(&str, &str)| format!("{{\"prompt\":\"{p}\",\"completion\":\"{c}\"}}\n");
    let rows: String = rows.iter().map(line).collect();
    std::fs::write(place.path("rows.jsonl"), rows).unwrap();
    let (out, _) = place.run(&["score", "--adapter", adapter, "rows.jsonl", "--quiet"], 0);
    let rows = out
        .lines()
        .map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap());
    rows.flat_map(|row| row["logprobs"].as_array().unwrap().clone())
        .map(|x| x.as_f64().unwrap())
        .collect()
}

#[test]
fn every_form_of_an_adapter_is_taken_where_an_adapter_is() {
    let place = Place(tempfile::tempdir().unwrap());
    std::fs::write(place.path("small.toml"), CONFIG).unwrap();
    let (_, stderr) = place.run(&["train", "--config", "small.toml"], 0);
    let text = stderr
        .lines()
        .find_map(|line| line.strip_prefix("as text, for --adapter: "));
    let text = text.expect(&stderr).trim();
    assert!(text.starts_with("tinylora1:") && text.len() < 120, "{text}");
    for (format, out) in [
        ("tinylora", "own.safetensors"),
        ("lora", "lora"),
        ("peft", "peft"),
        ("gguf-lora", "adapter.gguf"),
    ] {
        place.run(
            &[
                "export",
                "--adapter",
                text,
                "--format",
                format,
                "--out",
                out,
            ],
            0,
        );
    }
    let own = std::fs::read(place.path("own.safetensors")).unwrap();
    let run = std::fs::read_dir(place.path("runs"))
        .unwrap()
        .next()
        .unwrap();
    let run = run.unwrap().path();
    assert_eq!(own, std::fs::read(run.join("adapter.safetensors")).unwrap());
    assert!(
        std::fs::read(place.path("adapter.gguf"))
            .unwrap()
            .starts_with(b"GGUF")
    );

    let expected = scores(&place, "own.safetensors");
    assert_eq!(scores(&place, text), expected);
    assert_eq!(scores(&place, run.to_str().unwrap()), expected);
    for directory in ["lora", "peft"] {
        let found = scores(&place, directory);
        assert_eq!(found.len(), expected.len());
        for (a, b) in found.iter().zip(&expected) {
            assert!((a - b).abs() < 1e-4, "{directory}: {a} {b}");
        }
    }
    // What PEFT made becomes a file of one's own.
    place.run(
        &["export", "--adapter", "peft", "--out", "kept.safetensors"],
        0,
    );
    assert_eq!(scores(&place, "kept.safetensors"), scores(&place, "peft"));

    let damaged = text.replacen("tinylora1:g", "tinylora1:h", 1);
    let (_, stderr) = place.run(&["score", "--adapter", &damaged, "rows.jsonl"], 3);
    assert!(stderr.contains("damaged"), "{stderr}");
    place.run(&["export", "--format", "merged", "--out", "merged"], 0);
    let other = [
        "score",
        "--model",
        "merged",
        "--adapter",
        text,
        "rows.jsonl",
    ];
    let (_, stderr) = place.run(&other, 3);
    assert!(stderr.contains("was trained on"), "{stderr}");
    let nothing = [
        "score",
        "--model",
        "merged",
        "--adapter",
        "cache",
        "rows.jsonl",
    ];
    let (_, stderr) = place.run(&nothing, 3);
    assert!(
        stderr.contains("neither a run nor a PEFT adapter"),
        "{stderr}"
    );
}
