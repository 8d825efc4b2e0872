//! Log-probabilities and token ids against transformers, on what `scripts/oracle.py` made in the
//! folder that `TINYLORA_ORACLE` names. Skipped, and says so, without it.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use tinylora::model::{Batch, LoadOptions, Model};

#[derive(Deserialize)]
struct Row {
    prompt: String,
    completion: String,
    prompt_ids: Vec<u32>,
    completion_ids: Vec<u32>,
    logprobs: Vec<f64>,
}

/// Largest difference of a token's log-probability over all rows of `name`.
fn largest_difference(folder: &Path, name: &str, model: &str) -> f64 {
    let source = folder.join(model).display().to_string();
    let model = Model::load(&source, &LoadOptions::default()).expect("the model loads");
    let rows = std::fs::read_to_string(folder.join(name).join("scores.jsonl")).expect("scores");
    let mut largest: f64 = 0.0;
    for line in rows.lines() {
        let row: Row = serde_json::from_str(line).expect("a row");
        let encode = |text: &str| model.tokenizer.encode(text, false).expect("encoded");
        assert_eq!(encode(&row.prompt), row.prompt_ids, "{:?}", row.prompt);
        assert_eq!(
            encode(&row.completion),
            row.completion_ids,
            "{:?}",
            row.completion
        );
        let mut batch = Batch::default();
        batch
            .push_sequence(&row.prompt_ids, &row.completion_ids)
            .expect("not empty");
        let scores = model.decoder.score(None, &batch, 1.0).expect("scores");
        for (ours, theirs) in scores.logprobs.iter().zip(&row.logprobs) {
            largest = largest.max((ours - theirs).abs());
        }
    }
    largest
}

fn check(name: &str, model: &str, limit: f64) {
    let Some(folder) = std::env::var_os("TINYLORA_ORACLE").map(PathBuf::from) else {
        println!("skipped: TINYLORA_ORACLE is not set (scripts/oracle.py makes its folder)");
        return;
    };
    let largest = largest_difference(&folder, name, model);
    println!("{model}: largest difference of a log-probability to transformers: {largest:.2e}");
    assert!(largest <= limit, "{largest:e} > {limit:e}");
}

#[test]
fn qwen2_with_biases_and_an_untied_head() {
    check("qwen2", "qwen2", 1e-4);
}

#[test]
fn llama3_with_rope_scaling() {
    check("llama3", "llama3", 1e-4);
}

#[test]
fn smollm2_dequantised() {
    check("smollm2", "smollm2", 1e-3);
}

#[test]
fn smollm2_gguf() {
    check("smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", 1e-3);
}
