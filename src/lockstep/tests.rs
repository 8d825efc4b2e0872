//! Runs in lockstep give what they give alone, and one that ends does not hold up the others.

use super::*;
use crate::adapter::{Adapter, AdapterSpec, Sigma};
use crate::config::{GrpoConfig, OptimConfig, OptimizerKind};
use crate::grpo::tests::{Run, World, config, cpu};
use crate::model::{Decoder, tests as fixtures};
use crate::run::logs::is_timing;
use crate::run::training::{StepOutput, Trainer};

const STEPS: usize = 3;

fn world() -> World {
    World::new(cpu(), config())
}

fn lockstep(world: &World) -> Lockstep<'_> {
    Lockstep {
        decoder: &world.decoder,
        tokenizer: &world.tokenizer,
        max_batch_size: 16,
        pass_tokens: 64,
    }
}

/// An adapter that starts somewhere of its own.
fn adapter(decoder: &Decoder, spec: AdapterSpec, start: usize) -> Adapter {
    let mut adapter = fixtures::adapter_of(decoder, spec);
    let moved: Vec<f32> = (0..adapter.num_parameters())
        .map(|i| ((i * 5 + start * 3) % 13) as f32 / 64.0 - 0.1)
        .collect();
    adapter.set_parameters(&moved).expect("finite");
    adapter
}

/// Runs that differ in what runs of a sweep may differ in.
fn runs(decoder: &Decoder) -> Vec<Run> {
    let plain = |start: usize, spec: AdapterSpec| Run {
        config: config(),
        optim: OptimConfig {
            learning_rate: 0.01 * (start + 1) as f64,
            ..OptimConfig::default()
        },
        adapter: adapter(decoder, spec, start),
        seed: 1 + start as u64 % 2,
    };
    let mut runs = vec![
        plain(0, fixtures::spec()),
        plain(1, fixtures::spec()),
        plain(
            2,
            AdapterSpec {
                u: 1,
                n_tie: 5,
                projection_seed: 7,
                ..fixtures::spec()
            },
        ),
        plain(
            3,
            AdapterSpec {
                sigma: Sigma::Input,
                ..fixtures::spec()
            },
        ),
    ];
    // A natural gradient, which scores its steps; updates off the policy; completions of other lengths.
    let mut natural = plain(4, fixtures::spec());
    natural.optim.kind = OptimizerKind::Natural;
    let mut updates = plain(5, fixtures::spec());
    updates.config = GrpoConfig {
        num_iterations: 2,
        beta: 0.1,
        ..config()
    };
    let mut dynamic = plain(6, fixtures::spec());
    dynamic.config = GrpoConfig {
        dynamic_sampling: true,
        temperature: 0.8,
        max_completion_length: 4,
        ..config()
    };
    runs.extend([natural, updates, dynamic]);
    for i in 1..runs.len() {
        let (before, run) = runs.split_at_mut(i);
        for other in before {
            run[0]
                .adapter
                .share_factors(&other.adapter)
                .expect("tensors");
        }
    }
    runs
}

type Trained = (Vec<f32>, Vec<(Vec<(String, f64)>, Vec<String>)>);

fn train(trainer: &mut dyn Trainer) -> Result<Trained> {
    let mut outputs = Vec::new();
    for _ in 0..STEPS {
        let StepOutput {
            metrics,
            completions,
        } = trainer.step(&mut |_, _| {})?;
        let metrics = metrics.iter().filter(|(name, _)| !is_timing(name));
        let metrics = metrics.map(|(name, value)| (name.to_owned(), value));
        let texts = completions.iter().map(|row| format!("{row:?}"));
        outputs.push((metrics.collect(), texts.collect()));
    }
    Ok((trainer.adapter().parameters().to_vec(), outputs))
}

#[test]
fn runs_in_lockstep_have_the_bits_that_they_have_alone() {
    let world = world();
    let runs = runs(&world.decoder);
    assert!(runs[1].adapter.shares_factors(&runs[0].adapter));
    assert!(runs[2].adapter.shares_factors(&runs[0].adapter));
    assert!(!runs[3].adapter.shares_factors(&runs[0].adapter));
    let alone: Vec<Trained> = runs
        .iter()
        .map(|run| train(&mut world.trainer_of(run, None)).expect("a run"))
        .collect();
    for (i, trained) in alone.iter().enumerate() {
        let start = runs[i].adapter.parameters();
        assert!(trained.0 != start, "run {i} learns nothing");
        assert!(
            alone[..i].iter().all(|other| other.1 != trained.1),
            "run {i}"
        );
    }
    let together = || {
        lockstep(&world).run(runs.len(), |number, seat| {
            train(&mut world.trainer_of(&runs[number], Some(seat)))
        })
    };
    // A small model is divided between threads by prompts; on one thread all rows share every pass.
    for results in [together(), crate::ops::cpu::alone(together)] {
        for (number, (result, alone)) in results.into_iter().zip(&alone).enumerate() {
            assert_eq!(&result.expect("a run"), alone, "run {number}");
        }
    }
}

#[test]
fn a_run_that_ends_early_leaves_the_others_their_bits() {
    let world = world();
    let runs = runs(&world.decoder);
    let alone = train(&mut world.trainer_of(&runs[1], None)).expect("a run");
    let results = lockstep(&world).run(3, |number, seat| {
        let mut trainer = world.trainer_of(&runs[number], Some(seat));
        match number {
            0 => Ok(None),
            2 => trainer.step(&mut |_, _| {}).map(|_| None),
            _ => train(&mut trainer).map(Some),
        }
    });
    let [first, second, third] = &results[..] else {
        panic!("three runs")
    };
    assert!(matches!((first, third), (Ok(None), Ok(None))));
    assert_eq!(second.as_ref().expect("a run").as_ref(), Some(&alone));
}

#[test]
fn a_failure_interrupts_the_others_and_is_what_is_said() {
    let world = world();
    let runs = runs(&world.decoder);
    let results = lockstep(&world).run(3, |number, seat| {
        let mut trainer = world.trainer_of(&runs[number], Some(seat));
        trainer.step(&mut |_, _| {})?;
        if number == 1 {
            return Err(Error::data("the disk is full"));
        }
        train(&mut trainer)
    });
    let codes: Vec<u8> = results
        .iter()
        .map(|result| result.as_ref().err().map_or(0, Error::exit_code))
        .collect();
    assert_eq!(codes, [130, 3, 130]);
    let said = all(results).expect_err("a failure").to_string();
    assert_eq!(said, "the disk is full");
}

#[test]
#[should_panic(expected = "a bug in run 1")]
fn a_panic_goes_on_in_the_caller() {
    let world = world();
    let runs = runs(&world.decoder);
    lockstep(&world).run(2, |number, seat| {
        assert!(number != 1, "a bug in run 1");
        train(&mut world.trainer_of(&runs[number], Some(seat)))
    });
}

#[test]
fn a_loss_that_fails_is_the_failure_of_its_own_run() {
    use crate::model::{Batch, Coefficients, GradientPass, Keep, Passes};
    let world = world();
    let runs = runs(&world.decoder);
    let mut batch = Batch::default();
    batch.push_group(&[3, 4], &[&[5, 6], &[7]]).expect("valid");
    let gradient = |passes: &dyn Passes, adapter: &Adapter, fails: bool| {
        let mut gradients = adapter.gradients();
        let mut loss = |scores: &crate::ops::head::Scores| match fails {
            true => Err(Error::data("no loss")),
            false => Ok(scores.logprobs.clone()),
        };
        passes.accumulate(GradientPass {
            adapter,
            batch: &batch,
            temperature: 1.0,
            inputs: Keep::Inputs.into(),
            coefficients: Coefficients::OfScores(&mut loss),
            gradients: &mut gradients,
        })?;
        Ok(gradients.sum())
    };
    let results = lockstep(&world).run(2, |number, seat| {
        let own = gradient(seat, &runs[number].adapter, number == 0);
        Ok(own.map_err(|error: Error| error.to_string()))
    });
    let results: Vec<_> = results.into_iter().map(|r| r.expect("an answer")).collect();
    assert_eq!(results[0], Err("no loss".to_owned()));
    let alone = gradient(&world.decoder, &runs[1].adapter, false).expect("a gradient");
    assert!(alone.iter().any(|g| *g != 0.0));
    assert_eq!(results[1], Ok(alone));
}
