//! SFT against PyTorch, against itself with other packing, and across a resume.

use candle_core::DType;
use serde_json::Value;

use super::{Example, SftTrainer};
use crate::adapter::{Adapter, AdapterKind, AdapterSpec, BaseModel};
use crate::config::{LrSchedulerType, OptimConfig, SftConfig};
use crate::data::DataOrder;
use crate::model::tests::{adapter, decoder};
use crate::model::{Decoder, Placement};
use crate::run::StepMetrics;
use crate::run::training::Trainer;

const SEED: u64 = 11;

fn small() -> Decoder {
    decoder(Placement::cpu(DType::F32))
}

/// Sequences and weights by the formulas of scripts/sft_fixture.py.
fn example(n: u32) -> Example {
    let completion = (0..2 + n % 5).map(|i| (5 * n + 11 * i + 1) % 37);
    Example {
        prompt: (0..3 + n % 4).map(|i| (7 * n + 3 * i) % 37).collect(),
        completion: completion.chain([0]).collect(),
    }
}

fn full(decoder: &Decoder) -> Adapter {
    let spec = AdapterSpec {
        kind: AdapterKind::Full,
        ..AdapterSpec::default()
    };
    let base = BaseModel {
        name: "test".into(),
        hash: "test".into(),
        num_layers: decoder.config.num_hidden_layers,
    };
    let mut adapter = Adapter::full(&spec, base, &decoder.weights).unwrap();
    let mut parameters = Vec::new();
    for (name, weight) in decoder.weights.named() {
        let phase: u32 = name.bytes().map(u32::from).sum();
        let count = weight.to_f32().unwrap().len();
        parameters.extend((0..count).map(|i| {
            let wave = (0.7 * i as f64 + f64::from(phase)).sin();
            match name.ends_with("norm.weight") {
                true => (1.0 + 0.1 * wave) as f32,
                false => (0.2 * wave) as f32,
            }
        }));
    }
    adapter.set_parameters(&parameters).unwrap();
    adapter
}

fn run(trainer: &mut SftTrainer<'_>, steps: usize) -> Vec<StepMetrics> {
    (0..steps)
        .map(|_| trainer.step(&mut |_, _| ()).unwrap().metrics)
        .collect()
}

#[test]
fn full_fine_tuning_follows_pytorch() {
    let text = include_str!("../../tests/fixtures/torch_sft.json");
    let fixture: Value = serde_json::from_str(text).unwrap();
    let number = |key: &str| fixture[key].as_f64().unwrap();
    let losses = fixture["losses"].as_array().unwrap();
    let config = SftConfig {
        examples_per_step: number("examples_per_step") as usize,
        ..SftConfig::default()
    };
    let optim = OptimConfig {
        learning_rate: number("learning_rate"),
        lr_scheduler_type: LrSchedulerType::Constant,
        weight_decay: number("weight_decay"),
        max_grad_norm: number("max_grad_norm"),
        ..OptimConfig::default()
    };
    // The trainer shuffles: deal the examples so that they come out in PyTorch's order.
    let count = losses.len() * config.examples_per_step;
    let mut order = DataOrder::new(SEED, count);
    let mut examples = vec![example(0); count];
    for position in 0..count as u64 {
        examples[order.at(position)] = example((position % 7) as u32);
    }
    let decoder = small();
    let steps = losses.len() as u64;
    let mut trainer = SftTrainer::new(
        &config,
        &optim,
        &decoder,
        full(&decoder),
        &examples,
        SEED,
        steps,
    )
    .unwrap();
    for (step, metrics) in run(&mut trainer, losses.len()).iter().enumerate() {
        for (name, key) in [("loss", "losses"), ("grad_norm", "grad_norms")] {
            let got = metrics.get(name).unwrap();
            let expected = fixture[key][step].as_f64().unwrap();
            assert!(
                (got - expected).abs() < 2e-4 * expected,
                "step {step}, {name}: {got} instead of {expected}"
            );
        }
    }
}

#[test]
fn a_resumed_run_gives_the_same_bits() {
    let decoder = small();
    let examples: Vec<_> = (0..7).map(example).collect();
    let config = SftConfig {
        examples_per_step: 4,
        ..SftConfig::default()
    };
    let optim = OptimConfig {
        learning_rate: 1e-2,
        ..OptimConfig::default()
    };
    let new = || {
        SftTrainer::new(
            &config,
            &optim,
            &decoder,
            adapter(&decoder),
            &examples,
            SEED,
            6,
        )
        .unwrap()
    };
    let mut whole = new();
    run(&mut whole, 6);
    let mut first = new();
    run(&mut first, 2);
    let mut second = new();
    second.restore(&first.state()).unwrap();
    let metrics = run(&mut second, 4);
    assert_eq!(whole.state(), second.state());
    assert_eq!(metrics[3].get("epoch"), Some(24.0 / 7.0));
}

#[test]
fn packing_changes_nothing_but_the_order_of_sums() {
    let decoder = small();
    let examples: Vec<_> = (0..7).map(example).collect();
    let optim = OptimConfig::default();
    let first_step = |micro_batch_tokens, gradient_checkpointing| {
        let config = SftConfig {
            examples_per_step: 7,
            micro_batch_tokens: Some(micro_batch_tokens),
            gradient_checkpointing: Some(gradient_checkpointing),
            ..SftConfig::default()
        };
        let mut trainer = SftTrainer::new(
            &config,
            &optim,
            &decoder,
            adapter(&decoder),
            &examples,
            SEED,
            6,
        )
        .unwrap();
        let metrics = run(&mut trainer, 1);
        ["loss", "grad_norm", "num_tokens"].map(|name| metrics[0].get(name).unwrap())
    };
    let whole = first_step(1000, false);
    for (tokens, checkpointing) in [(1, false), (20, false), (1000, true)] {
        for (a, b) in first_step(tokens, checkpointing).iter().zip(whole) {
            assert!((a - b).abs() <= 1e-6 * b.abs(), "{a} {b}");
        }
    }
}
