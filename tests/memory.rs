//! A run takes no more memory than `--dry-run` says: trainings of the embedded model, each in a process
//! of its own, whose peak the system counts.

#![cfg(target_os = "linux")]

use std::process::Command;

use serde_json::Value;

/// A process may take this much more than its plan.
const TOLERANCE: f64 = 1.1;

/// (planned, peak) bytes of a training with these settings.
fn train(settings: &[&str]) -> (f64, f64) {
    let place = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_tinylora"));
    command.args(["train", "--json", "--quiet"]).args([
        "--set",
        "data.limit=64",
        "--set",
        "train.max_steps=2",
    ]);
    for setting in settings {
        command.args(["--set", setting]);
    }
    let output = command
        .current_dir(place.path())
        .env("XDG_CACHE_HOME", place.path())
        .env("TINYLORA_CACHE", place.path())
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{settings:?}: {stderr}");
    let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
    let bytes = |key: &str| summary[key].as_f64().unwrap();
    (bytes("planned_memory_bytes"), bytes("peak_memory_bytes"))
}

#[test]
fn no_run_takes_more_than_its_plan() {
    let cases: [&[&str]; 6] = [
        &["eval.limit=32"],
        // As long as completions may be, and many at once.
        &[
            "eval.data=[]",
            "grpo.stop=[]",
            "grpo.num_generations=16",
            "grpo.temperature=3.0",
        ],
        &[
            "eval.data=[]",
            "grpo.activation_memory_gb=0",
            "grpo.gradient_checkpointing=true",
        ],
        &["eval.data=[]", "adapter.type=lora", "adapter.r=16"],
        &["eval.data=[]", "adapter.type=full"],
        &["eval.data=[]", "method=sft", "train.max_steps=1"],
    ];
    for settings in cases {
        let (planned, peak) = train(settings);
        println!("{settings:?}: {planned} planned, {peak} at most");
        assert!(
            peak <= TOLERANCE * planned,
            "{settings:?}: {peak} bytes, {planned} planned"
        );
    }
}

#[test]
fn what_cannot_fit_is_refused_before_anything_is_made() {
    let place = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_tinylora"))
        .args(["train", "--set", "model.memory_gb=0.01"])
        .current_dir(place.path())
        .env("XDG_CACHE_HOME", place.path().join("cache"))
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(
        stderr.contains("10.0 MB (as model.memory_gb says)"),
        "{stderr}"
    );
    assert!(!place.path().join("runs").exists());
}
