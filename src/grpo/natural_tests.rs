//! The natural gradient on a small random model: against a dense computation by finite differences, and
//! what must not change it.

use candle_core::{DType, Device};

use super::tests::{World, assert_learns, assert_resumes, config, cpu, trainer_start};
use crate::adapter::{
    Adapter, AdapterKind, AdapterSpec, BaseModel, ModuleKind, Sigma, StoredDtype, SvdCache,
};
use crate::model::{Batch, Coefficients, Decoder, Keep, Placement, tests as fixtures};
use crate::ops::Backend;
use crate::optim::{Learner, Natural, NaturalParams, ScoredBatch};
use crate::ranks::Ranks;
use crate::run::training::{StepOutput, Trainer};

#[test]
fn the_scores_add_up_to_the_gradient_and_a_step_keeps_its_divergence() {
    let plain = World::new(cpu(), config()).train(1).1;
    assert_learns(&plain);
    let world = World::new(cpu(), config()).natural();
    let (v, outputs) = world.train(3);
    assert_ne!(v, trainer_start(&world));
    let get = |step: usize, name: &str| outputs[step].metrics.get(name).expect("a value");
    // The scores of the completions, weighed, against the gradient with shared prompts.
    let (sum, shared) = (
        get(0, "grad_norm"),
        plain[0].metrics.get("grad_norm").expect("a norm"),
    );
    assert!((sum - shared).abs() < 1e-5 * shared, "{sum} {shared}");
    for step in 0..3 {
        let (kl, scale) = (get(step, "natural/kl"), get(step, "natural/step_scale"));
        assert!((0.0..=2.0 * world.optim.kl_per_step).contains(&kl), "{kl}");
        assert!(scale == 0.0 || kl > 0.0, "{kl} at {scale}");
        let share = get(step, "natural/effective_sample_size");
        assert!(share > 0.0 && share <= 1.0, "{share}");
    }
    // Without earlier batches the promise is that of the step's own completions.
    let (got, promised) = (
        get(0, "natural/improvement"),
        get(0, "natural/predicted_improvement"),
    );
    assert!(promised > 0.0 && got >= 0.5 * promised, "{got} {promised}");
}

#[test]
fn a_restored_natural_gradient_goes_on_to_the_same_bits() {
    assert_resumes(&World::new(cpu(), config()).natural());
}

#[test]
fn an_adapter_without_scores_of_its_completions_is_trained_by_adamw() {
    let world = World::new(cpu(), config()).natural();
    let learner = |kind| {
        let spec = AdapterSpec {
            kind,
            ..AdapterSpec::default()
        };
        let base = BaseModel {
            name: "test".into(),
            hash: "test".into(),
            num_layers: world.decoder.config.num_hidden_layers,
        };
        let cache = SvdCache::disabled();
        let adapter = Adapter::new(&spec, base, &world.decoder, &cache, &|_, _| ());
        Learner::new(adapter.expect("an adapter"), &world.optim, 10)
    };
    assert!(learner(AdapterKind::TinyLora).is_natural());
    assert!(learner(AdapterKind::LoraXs).is_natural());
    assert!(!learner(AdapterKind::Lora).is_natural());
    assert!(!learner(AdapterKind::Full).is_natural());
}

/// Groups of five completions whose tokens look random.
fn completions() -> (Batch, usize) {
    let (prompts, group) = (6, 5);
    let mut batch = Batch::default();
    let token = |i: usize| (i * i * 31 + i * 7) as u32 % 37;
    for prompt in 0..prompts {
        let tokens: Vec<u32> = (0..3 + prompt).map(|i| token(100 * prompt + i)).collect();
        let own: Vec<Vec<u32>> = (0..group)
            .map(|c| {
                (0..2 + (c + prompt) % 4)
                    .map(|i| token(7 * prompt + 50 * c + i))
                    .collect()
            })
            .collect();
        let own: Vec<&[u32]> = own.iter().map(Vec::as_slice).collect();
        batch.push_group(&tokens, &own).expect("valid");
    }
    (batch, group)
}

/// log π of every completion.
fn logprobs(decoder: &Decoder, adapter: &Adapter, batch: &Batch) -> Vec<f64> {
    let scores = decoder.score(Some(adapter), batch, 1.0).expect("scores");
    let logprobs = batch.by_completion(&scores.logprobs);
    logprobs.map(|own| own.iter().sum()).collect()
}

fn exact_decoder() -> Decoder {
    fixtures::decoder(Placement {
        backend: Backend::Portable,
        device: Device::Cpu,
        dtype: DType::F64,
        as_stored: false,
        mmap: false,
    })
}

/// ∇_v log π of every completion, `[completions, parameters]`.
fn scores(decoder: &Decoder, adapter: &Adapter, batch: &Batch) -> Vec<f64> {
    let gradients = adapter.gradients_per_sequence(batch.lengths.len());
    let mut gradients = gradients.expect("small");
    let ones = Coefficients::Known(vec![1.0; batch.targets.len()]);
    let keep = Keep::Inputs.into();
    decoder
        .accumulate_gradients(adapter, batch, 1.0, keep, ones, &mut gradients)
        .expect("gradients");
    gradients.rows().expect("rows").to_vec()
}

/// Rewards less their mean over each group.
fn centred(group: usize, rewards: impl Iterator<Item = f64>) -> Vec<f64> {
    let rewards: Vec<f64> = rewards.collect();
    let groups = rewards.chunks(group);
    let centred = groups.flat_map(|own| {
        let mean = own.iter().sum::<f64>() / own.len() as f64;
        own.iter().map(move |reward| reward - mean)
    });
    centred.collect()
}

fn scored(adapter: &Adapter, rows: &[f64], advantages: &[f64], group: usize) -> ScoredBatch {
    ScoredBatch {
        parameters: adapter.parameters().to_vec(),
        scores: rows.iter().map(|x| *x as f32).collect(),
        advantages: advantages.iter().map(|x| *x as f32).collect(),
        weights: vec![0.5; advantages.len()],
        group,
    }
}

/// The solution of A x = b by elimination.
fn solve(mut a: Vec<Vec<f64>>, mut b: Vec<f64>) -> Vec<f64> {
    let p = b.len();
    for i in 0..p {
        for k in i + 1..p {
            let (above, below) = a.split_at_mut(k);
            let (pivot, row) = (&above[i], &mut below[0]);
            let factor = row[i] / pivot[i];
            for (x, y) in row[i..].iter_mut().zip(&pivot[i..]) {
                *x -= factor * y;
            }
            b[k] -= factor * b[i];
        }
    }
    for i in (0..p).rev() {
        let known: f64 = (i + 1..p).map(|j| a[i][j] * b[j]).sum();
        b[i] = (b[i] - known) / a[i][i];
    }
    b
}

#[test]
fn fisher_and_direction_are_those_of_a_dense_computation_by_finite_differences() {
    let decoder = exact_decoder();
    let mut adapter = fixtures::adapter(&decoder);
    let (batch, group) = completions();
    let (n, p) = (batch.lengths.len(), adapter.num_parameters());
    // A pull towards the first parameter, and some of no direction.
    let rows = scores(&decoder, &adapter, &batch);
    let advantages = centred(
        group,
        (0..n).map(|i| rows[i * p] + 0.1 * (i as f64 * 2.3).sin()),
    );
    let params = NaturalParams {
        kl_per_step: 0.05,
        damping: 0.1,
        momentum: 0.0,
        reuse: 0,
    };
    let scored = scored(&adapter, &rows, &advantages, group);
    let proposed = Natural::new(params, p)
        .propose(scored, 1, 1.0)
        .expect("a step");

    let (v, h) = (adapter.parameters().to_vec(), 2f32.powi(-12));
    let mut dense = vec![vec![0.0; p]; n];
    for j in 0..p {
        let mut at = |shift: f32| {
            let mut moved = v.clone();
            moved[j] += shift;
            adapter.set_parameters(&moved).expect("finite");
            logprobs(&decoder, &adapter, &batch)
        };
        let both = at(h).into_iter().zip(at(-h)).enumerate();
        both.for_each(|(i, (high, low))| dense[i][j] = (high - low) / (2.0 * f64::from(h)));
    }
    let mut fisher = vec![vec![0.0; p]; p];
    let mut gradient = vec![0.0; p];
    for (s, advantage) in dense.iter().zip(&advantages) {
        for i in 0..p {
            gradient[i] -= 0.5 * advantage * s[i];
            (0..p).for_each(|j| fisher[i][j] += s[i] * s[j] / n as f64);
        }
    }
    let mean = (0..p).map(|i| fisher[i][i]).sum::<f64>() / p as f64;
    let mut damped = fisher.clone();
    (0..p).for_each(|i| damped[i][i] += params.damping * mean);
    let solved = solve(damped, gradient);
    let inner = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let squared: f64 = (0..p).map(|i| solved[i] * inner(&fisher[i], &solved)).sum();
    let length = (2.0 * params.kl_per_step / squared).sqrt();
    let norm = solved
        .iter()
        .map(|x| (length * x).powi(2))
        .sum::<f64>()
        .sqrt();
    assert!(norm > 0.0);
    for (got, x) in proposed.step.iter().zip(&solved) {
        assert!(
            (got + length * x).abs() < 1e-4 * norm,
            "{got} {}",
            -length * x
        );
    }
}

/// Parameters and outputs of three steps from v = 0.
fn trained(world: &World, spec: &AdapterSpec) -> (Vec<f32>, Vec<StepOutput>) {
    let mut trainer = world.trainer_with(
        fixtures::untrained(&world.decoder, spec.clone()),
        Ranks::alone(),
    );
    let outputs = (0..3)
        .map(|_| trainer.step(&mut |_, _| {}).expect("a step"))
        .collect();
    (trainer.adapter().parameters().to_vec(), outputs)
}

#[test]
fn the_scales_of_p_and_of_the_update_do_not_matter() {
    let world = World::new(cpu(), config()).natural();
    let spec = AdapterSpec {
        n_tie: 3,
        dtype: StoredDtype::F32,
        ..AdapterSpec::default()
    };
    let (v, outputs) = trained(&world, &spec);
    assert_learns(&outputs);
    assert!(v.iter().any(|&v| v != 0.0));
    for (scaling, projection_std) in [(1.0 / 32.0, 1.0), (1.0, 16.0)] {
        let other = AdapterSpec {
            scaling,
            projection_std,
            ..spec.clone()
        };
        let (other, other_outputs) = trained(&world, &other);
        let factor = (scaling * projection_std) as f32;
        // Powers of two: even the rounding is the same.
        let rescaled: Vec<f32> = other.iter().map(|v| v * factor).collect();
        assert_eq!(rescaled, v);
        for (a, b) in outputs.iter().zip(&other_outputs) {
            assert_eq!(a.completions, b.completions);
        }
    }
}

#[test]
fn where_the_singular_values_stand_does_not_matter_to_a_whole_core() {
    // Four numbers a module span every 2×2 core, so that the placements are the same family of
    // updates in other coordinates; without damping no coordinates are preferred.
    let decoder = exact_decoder();
    let (batch, group) = completions();
    let n = batch.lengths.len();
    let params = NaturalParams {
        kl_per_step: 0.05,
        damping: 0.0,
        momentum: 0.0,
        reuse: 0,
    };
    let spec = |sigma: Sigma| AdapterSpec {
        u: 4,
        n_tie: 1,
        sigma,
        dtype: StoredDtype::F32,
        target_modules: vec![ModuleKind::V],
        ..AdapterSpec::default()
    };
    let adapter = |sigma: Sigma| fixtures::untrained(&decoder, spec(sigma));
    let p = 8;
    let pull = scores(&decoder, &adapter(Sigma::Output), &batch);
    let advantages = centred(group, (0..n).map(|i| pull[i * p]));
    // How far the step moves the log-probability of every completion.
    let moved = |sigma: Sigma| -> Vec<f64> {
        let adapter = adapter(sigma);
        let rows = scores(&decoder, &adapter, &batch);
        assert_eq!(rows.len(), n * p);
        let scored = scored(&adapter, &rows, &advantages, group);
        let step = Natural::new(params, p).propose(scored, 1, 1.0);
        let step = step.expect("a step").step;
        let along = rows.chunks_exact(p);
        along
            .map(|row| row.iter().zip(&step).map(|(s, d)| s * d).sum())
            .collect()
    };
    let expected = moved(Sigma::Output);
    let largest = expected
        .iter()
        .copied()
        .fold(0.0, |a: f64, x| a.max(x.abs()));
    assert!(largest > 0.01, "{largest}");
    for sigma in [Sigma::Input, Sigma::Split] {
        for (got, expected) in moved(sigma).into_iter().zip(&expected) {
            assert!((got - expected).abs() < 1e-3 * largest, "{got} {expected}");
        }
    }
}
