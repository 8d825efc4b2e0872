//! Log-probabilities and token ids against transformers, on what `scripts/oracle.py` made in the
//! folder that `TINYLORA_ORACLE` names. Skipped, and says so, without it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use tinylora::adapter::{Adapter, AdapterSpec, Sigma, SvdCache};
use tinylora::export::write_peft;
use tinylora::model::{Batch, Coefficients, Keep, LoadOptions, Model};

#[derive(Deserialize)]
struct Row {
    prompt: String,
    completion: String,
    prompt_ids: Vec<u32>,
    completion_ids: Vec<u32>,
    logprobs: Vec<f64>,
}

/// The oracle's folder.
fn folder() -> Option<PathBuf> {
    let folder = std::env::var_os("TINYLORA_ORACLE").map(PathBuf::from);
    if folder.is_none() {
        println!("skipped: TINYLORA_ORACLE is not set (scripts/oracle.py makes its folder)");
    }
    folder
}

fn rows(folder: &Path, name: &str) -> Vec<Row> {
    let rows = std::fs::read_to_string(folder.join(name).join("scores.jsonl")).expect("scores");
    rows.lines()
        .map(|line| serde_json::from_str(line).expect("a row"))
        .collect()
}

/// Largest difference of a token's log-probability over all rows of `name`.
fn largest_difference(folder: &Path, name: &str, model: &str) -> f64 {
    let source = folder.join(model).display().to_string();
    let model = Model::load(&source, &LoadOptions::default()).expect("the model loads");
    let mut largest: f64 = 0.0;
    for row in rows(folder, name) {
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
    let Some(folder) = folder() else { return };
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

/// What `scripts/oracle_peft.py` writes.
#[derive(Deserialize)]
struct Theirs {
    logprobs: Vec<Vec<f64>>,
    /// Gradient of v by module index.
    gradients: HashMap<String, Vec<f64>>,
}

#[test]
fn peft_gives_the_same_log_probabilities_and_gradient_of_v() {
    let Some(folder) = folder() else { return };
    let source = folder.join("smollm2").display().to_string();
    let model = Model::load(&source, &LoadOptions::default()).expect("the model loads");
    let spec = AdapterSpec {
        u: 2,
        sigma: Sigma::Split,
        ..AdapterSpec::default()
    };
    let mut adapter = Adapter::new(
        &spec,
        model.base(),
        &model.decoder,
        &SvdCache::user(),
        &|_, _| {},
    )
    .expect("an adapter");
    let v: Vec<f32> = (0..adapter.num_parameters())
        .map(|i| ((i * 7 % 11) as f32 - 5.0) / 1000.0)
        .collect();
    adapter.set_parameters(&v).expect("finite");

    let mut ours = adapter.gradients();
    let mut logprobs = Vec::new();
    let mut scored = 0;
    for row in rows(&folder, "smollm2") {
        let mut batch = Batch::default();
        batch
            .push_sequence(&row.prompt_ids, &row.completion_ids)
            .expect("not empty");
        let weights = (scored..scored + batch.targets.len()).map(|n| 1.0 + (n % 3) as f64);
        let known = Coefficients::Known(weights.collect());
        scored += batch.targets.len();
        let scores = model
            .decoder
            .accumulate_gradients(&adapter, &batch, 1.0, Keep::Inputs.into(), known, &mut ours)
            .expect("gradients");
        logprobs.push(scores.logprobs);
    }

    let dir = folder.join("peft");
    write_peft(&adapter, &dir).expect("exported");
    let Ok(theirs) = std::fs::read_to_string(dir.join("theirs.json")) else {
        println!("skipped: run scripts/oracle_peft.py on what was just exported, then again");
        return;
    };
    let theirs: Theirs = serde_json::from_str(&theirs).expect("theirs.json");
    let pairs = logprobs
        .iter()
        .flatten()
        .zip(theirs.logprobs.iter().flatten());
    let largest = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    let mut expected = vec![0.0; v.len()];
    for (module, &group) in adapter.tying().groups.iter().enumerate() {
        for (i, g) in theirs.gradients[&module.to_string()].iter().enumerate() {
            expected[group * spec.u + i] += g;
        }
    }
    let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    let errors: Vec<f64> = ours
        .sum()
        .iter()
        .zip(&expected)
        .map(|(a, b)| a - b)
        .collect();
    let relative = norm(&errors) / norm(&expected);
    println!(
        "PEFT: largest difference of a log-probability {largest:.2e}, \
         relative error of the gradient of {} numbers {relative:.2e}",
        v.len()
    );
    assert!(largest <= 1e-3, "{largest:e}");
    assert!(relative <= 1e-3, "{relative:e}");
}
