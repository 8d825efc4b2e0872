//! The trainer on a small random model: its update against the loss by finite differences, and what
//! must not change it.

use candle_core::DType;

use super::importance::SamplerRatio;
use super::loss::{LossParams, LossStats, Normalizer, Sequence, sequence_loss, token_weights};
use super::*;
use crate::Result;
use crate::adapter::Adapter;
use crate::config::{
    GrpoConfig, ImportanceSamplingLevel, LossType, OptimConfig, OptimizerKind, Sizes,
};
use crate::data::prompts::{Prompt, PromptedProblem};
use crate::data::{DataOrder, Problem};
use crate::lockstep::Seat;
use crate::model::{Batch, Decoder, Passes, Placement, Tokenizer, tests as fixtures};
use crate::ops::Backend;
use crate::ranks::{Ranks, threads::on_ranks};
use crate::reward::{Grader, RewardSet};
use crate::rollout::{Completion, Engine, FinishReason, NativeEngine, Request, SamplingParams};
use crate::run::logs::is_timing;
use crate::run::training::{StepOutput, Trainer};

/// Problems whose answers are words that the random model says now and then.
fn problems() -> Vec<PromptedProblem> {
    (0..6u32)
        .map(|i| PromptedProblem {
            problem: Problem {
                id: i.to_string(),
                problem: String::new(),
                answer: (i % 3 + 1).to_string(),
                solution: None,
            },
            prompt: Prompt {
                text: String::new(),
                tokens: (1..i + 3).collect(),
            },
        })
        .collect()
}

pub(crate) struct World {
    pub decoder: Decoder,
    pub tokenizer: Tokenizer,
    problems: Vec<PromptedProblem>,
    config: GrpoConfig,
    pub(super) optim: OptimConfig,
    sizes: Sizes,
}

/// A run in a world, apart from its own.
#[derive(Clone)]
pub(crate) struct Run {
    pub config: GrpoConfig,
    pub optim: OptimConfig,
    pub adapter: Adapter,
    pub seed: u64,
}

impl World {
    pub fn new(placement: Placement, config: GrpoConfig) -> Self {
        let decoder = fixtures::decoder(placement);
        let words: serde_json::Map<String, serde_json::Value> = (0..decoder.config.vocab_size)
            .map(|id| ((id % 5).to_string() + &" ".repeat(id / 5), id.into()))
            .collect();
        let json = serde_json::json!({
            "version": "1.0", "added_tokens": [],
            "model": {"type": "WordLevel", "vocab": words, "unk_token": "1"},
        });
        let dir = tempfile::tempdir().expect("a folder");
        std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).expect("written");
        let tokenizer = Tokenizer::from_hf_dir(dir.path(), &decoder.config).expect("a tokenizer");
        Self {
            decoder,
            tokenizer,
            problems: problems(),
            config,
            optim: OptimConfig {
                learning_rate: 0.01,
                ..OptimConfig::default()
            },
            sizes: Sizes::default(),
        }
    }

    /// With the natural gradient.
    pub(super) fn natural(mut self) -> Self {
        self.optim.kind = OptimizerKind::Natural;
        self
    }

    fn trainer(&self) -> GrpoTrainer<'_> {
        self.trainer_of_rank(Ranks::alone())
    }

    fn trainer_of_rank(&self, ranks: Ranks) -> GrpoTrainer<'_> {
        self.trainer_with(fixtures::adapter(&self.decoder), ranks)
    }

    pub(super) fn trainer_with(&self, adapter: Adapter, ranks: Ranks) -> GrpoTrainer<'_> {
        let engine = Box::new(NativeEngine::new(&self.decoder, &self.tokenizer, 16));
        let sampler = Sampler {
            ranks,
            ..self.sampler(engine, &self.config, 1)
        };
        GrpoTrainer::new(
            &self.config,
            &self.optim,
            &self.decoder,
            adapter,
            sampler,
            10,
        )
    }

    /// The trainer of a run, on the model itself or in a seat at it.
    pub fn trainer_of<'a>(&'a self, run: &'a Run, seat: Option<&'a Seat<'a>>) -> GrpoTrainer<'a> {
        let engine: Box<dyn Engine + 'a> = match seat {
            Some(seat) => Box::new(seat.engine()),
            None => Box::new(NativeEngine::new(&self.decoder, &self.tokenizer, 16)),
        };
        let passes: &dyn Passes = match seat {
            Some(seat) => seat,
            None => &self.decoder,
        };
        let sampler = self.sampler(engine, &run.config, run.seed);
        let adapter = run.adapter.clone();
        GrpoTrainer::new(&run.config, &run.optim, &self.decoder, adapter, sampler, 10)
            .with_passes(passes)
    }

    fn sampler<'a>(
        &'a self,
        engine: Box<dyn Engine + 'a>,
        config: &'a GrpoConfig,
        seed: u64,
    ) -> Sampler<'a> {
        Sampler {
            config,
            engine,
            problems: &self.problems,
            rewards: RewardSet::from(vec![Grader::Gsm8kFlexible]),
            weights: vec![1.0],
            order: DataOrder::new(seed, self.problems.len()),
            eos: vec![0],
            seed,
            sizes: self.sizes,
            ranks: Ranks::alone(),
        }
    }

    /// Parameters and outputs after `steps` steps.
    pub(super) fn train(&self, steps: usize) -> (Vec<f32>, Vec<StepOutput>) {
        self.train_of(steps, Ranks::alone())
    }

    fn train_of(&self, steps: usize, ranks: Ranks) -> (Vec<f32>, Vec<StepOutput>) {
        let mut trainer = self.trainer_of_rank(ranks);
        let outputs = (0..steps)
            .map(|_| trainer.step(&mut |_, _| {}).expect("a step"))
            .collect();
        (trainer.adapter().parameters().to_vec(), outputs)
    }
}

pub(crate) fn config() -> GrpoConfig {
    GrpoConfig {
        num_generations: 4,
        prompts_per_step: 4,
        max_completion_length: 6,
        ..GrpoConfig::default()
    }
}

pub(crate) fn cpu() -> Placement {
    Placement::cpu(DType::F32)
}

fn assert_near(got: &[f32], expected: &[f32], tolerance: f32) {
    for (got, expected) in got.iter().zip(expected) {
        assert!((got - expected).abs() <= tolerance, "{got} {expected}");
    }
}

/// The rewards of this world must differ within groups, or none of the tests could fail.
pub(super) fn assert_learns(outputs: &[StepOutput]) {
    let metrics = &outputs[0].metrics;
    assert!(metrics.get("frac_reward_zero_std").is_some_and(|f| f < 1.0));
    assert!(metrics.get("grad_norm").is_some_and(|g| g > 0.0));
}

/// Log-probabilities of every completion under `adapter`, each scored by itself.
fn scored(world: &World, rollouts: &Rollouts, adapter: Option<&Adapter>) -> Vec<Vec<f64>> {
    let mut all = Vec::new();
    for group in &rollouts.groups {
        for completion in &group.completions {
            let mut batch = Batch::default();
            let prompt = &world.problems[group.problem].prompt.tokens;
            batch
                .push_sequence(prompt, &completion.tokens)
                .expect("valid");
            let scores = world.decoder.score(adapter, &batch, 1.0).expect("scores");
            all.push(scores.logprobs);
        }
    }
    all
}

/// The loss of a whole generation batch as one update, for logps under a moved policy.
fn loss_of(
    config: &GrpoConfig,
    rollouts: &Rollouts,
    logps: &[Vec<f64>],
    old: &[Vec<f64>],
    reference: &[Vec<f64>],
) -> f64 {
    let params = LossParams::from(config);
    let masked =
        |c: &Completion| config.mask_truncated_completions && c.finish == FinishReason::Length;
    let active: Vec<usize> = rollouts
        .completions()
        .map(|c| if masked(c) { 0 } else { c.tokens.len() })
        .collect();
    let weights = token_weights(
        config.loss_type,
        Normalizer {
            active_tokens: &active,
            micro_batch: &vec![0; active.len()],
            tokens_per_update: active.iter().sum::<usize>() as f64,
            max_completion_length: config.max_completion_length,
        },
    );
    let completions = (0..active.len()).filter(|&i| active[i] > 0);
    completions
        .map(|i| {
            let sequence = Sequence {
                logps: &logps[i],
                old_logps: &old[i],
                ref_logps: (config.beta != 0.0).then_some(&reference[i]),
                advantage: rollouts.advantages.values[i],
                ratio: &SamplerRatio::One,
                weight: weights[i],
            };
            let (mut gradient, mut stats) = (vec![0.0; logps[i].len()], LossStats::default());
            sequence_loss(&params, sequence, &mut gradient, &mut stats)
        })
        .sum()
}

#[test]
fn the_gradient_is_that_of_the_loss_by_finite_differences() {
    let plain = config();
    let gspo = GrpoConfig {
        importance_sampling_level: ImportanceSamplingLevel::Sequence,
        loss_type: LossType::Grpo,
        beta: 0.3,
        mask_truncated_completions: true,
        importance_sampling_correction: false,
        ..config()
    };
    for config in [plain, gspo] {
        let portable = Placement {
            backend: crate::ops::Backend::Portable,
            device: candle_core::Device::Cpu,
            dtype: DType::F64,
            as_stored: false,
            mmap: false,
        };
        let world = World::new(portable, config);
        let mut trainer = world.trainer();
        let mut adapter = trainer.adapter().clone();
        let sampler = trainer.sampler_mut();
        let rollouts = sampler
            .sample(&adapter, 0, 0, &mut |_, _| {})
            .expect("rollouts");
        let output = trainer.step(&mut |_, _| {}).expect("a step");
        assert_learns(std::slice::from_ref(&output));
        let clipped = output
            .metrics
            .get("completions/clipped_ratio")
            .expect("a share");
        assert!(
            clipped > 0.0 && clipped < 1.0,
            "{clipped}: the mask is not tested"
        );

        let old = scored(&world, &rollouts, Some(&adapter));
        let reference = scored(&world, &rollouts, None);
        let start = adapter.parameters().to_vec();
        let step = 2f32.powi(-12);
        let mut loss_at = |i: usize, shift: f32| {
            let mut moved = start.clone();
            moved[i] += shift;
            adapter.set_parameters(&moved).expect("finite");
            let logps = scored(&world, &rollouts, Some(&adapter));
            loss_of(&world.config, &rollouts, &logps, &old, &reference)
        };
        let slopes: Vec<f64> = (0..start.len())
            .map(|i| (loss_at(i, step) - loss_at(i, -step)) / (2.0 * f64::from(step)))
            .collect();
        let norm = slopes.iter().map(|g| g * g).sum::<f64>().sqrt();
        let got = output.metrics.get("grad_norm").expect("a norm");
        assert!((got - norm).abs() < 1e-5 * norm, "{got} {norm}");
    }
}

/// A sampler whose log-probabilities are not the trainer's.
struct Foreign<'a>(NativeEngine<'a>);

impl Engine for Foreign<'_> {
    fn generate(
        &mut self,
        adapter: Option<&Adapter>,
        requests: &[Request],
        params: &SamplingParams,
        on_token: &mut dyn FnMut(usize, usize, &[u32]),
        on_finished: &mut dyn FnMut(usize, usize, &Completion),
    ) -> Result<Vec<Vec<Completion>>> {
        let mut groups = self
            .0
            .generate(adapter, requests, params, on_token, on_finished)?;
        for logprob in groups.iter_mut().flatten().flat_map(|c| &mut c.logprobs) {
            *logprob -= 0.1;
        }
        Ok(groups)
    }
}

#[test]
fn a_foreign_sampler_is_corrected_for() {
    for num_iterations in [1, 2] {
        let config = GrpoConfig {
            num_iterations,
            ..config()
        };
        let own = World::new(cpu(), config.clone()).train(1);
        let world = World::new(cpu(), config);
        let mut trainer = world.trainer();
        trainer.sampler_mut().engine = Box::new(Foreign(NativeEngine::new(
            &world.decoder,
            &world.tokenizer,
            16,
        )));
        let metrics = trainer.step(&mut |_, _| {}).expect("a step").metrics;
        let get = |name: &str| metrics.get(name).expect("a value");
        let difference = get("sampling/sampling_logp_difference/max");
        assert!((difference - 0.1).abs() < 1e-5, "{difference}");
        let ratio = get("sampling/importance_sampling_ratio/mean");
        assert!((ratio - 0.1f64.exp()).abs() < 1e-5, "{ratio}");
        if num_iterations == 1 {
            // Every token weighs the same factor more; the old policy is the trainer's own.
            let grown = get("grad_norm") / own.1[0].metrics.get("grad_norm").expect("a norm");
            assert!((grown - 0.1f64.exp()).abs() < 1e-5, "{grown}");
        } else {
            let clipped = get("clip_ratio/region_mean");
            assert!(
                clipped < 0.5,
                "{clipped}: the sampler passes for the old policy"
            );
        }
    }
}

pub(super) fn trainer_start(world: &World) -> Vec<f32> {
    world.trainer().adapter().parameters().to_vec()
}

#[test]
fn the_sampler_and_the_trainer_agree_to_the_bit_on_the_cpu() {
    let (_, outputs) = World::new(cpu(), config()).train(3);
    assert_learns(&outputs);
    for output in outputs {
        let largest = output.metrics.get("sampling/sampling_logp_difference/max");
        assert!(largest.is_none_or(|d| d == 0.0), "{largest:?}");
    }
}

#[test]
fn a_step_on_the_portable_path_gives_the_same_numbers() {
    let portable = Placement {
        backend: Backend::Portable,
        ..cpu()
    };
    for natural in [false, true] {
        let train = |placement: Placement| {
            let world = World::new(placement, config());
            let world = if natural { world.natural() } else { world };
            world.train(1)
        };
        let (fast, outputs) = train(cpu());
        assert_learns(&outputs);
        let (v, portable_outputs) = train(portable.clone());
        let texts = |outputs: &[StepOutput]| -> Vec<String> {
            let rows = outputs.iter().flat_map(|output| &output.completions);
            rows.map(|row| row.completion.clone()).collect()
        };
        assert_eq!(texts(&portable_outputs), texts(&outputs));
        assert!(fast.iter().any(|&v| v != 0.0));
        assert_near(&v, &fast, 1e-5);
    }
}

#[test]
fn micro_batches_do_not_change_the_update() {
    let whole = World::new(cpu(), config()).train(2);
    assert_learns(&whole.1);
    for micro_batch_tokens in [1, 30] {
        let cut = GrpoConfig {
            micro_batch_tokens: Some(micro_batch_tokens),
            ..config()
        };
        assert_near(&World::new(cpu(), cut).train(2).0, &whole.0, 1e-5);
    }
}

/// Parameters, and the bits of all metrics but those of the clock.
fn timeless((v, outputs): (Vec<f32>, Vec<StepOutput>)) -> (Vec<f32>, Vec<(String, u64)>) {
    let metrics = outputs.iter().flat_map(|output| output.metrics.iter());
    let timeless = metrics.filter(|(name, _)| !is_timing(name));
    (
        v,
        timeless
            .map(|(name, value)| (name.to_owned(), value.to_bits()))
            .collect(),
    )
}

#[test]
fn any_number_of_ranks_gives_the_bits_of_one_process() {
    let inner = GrpoConfig {
        beta: 0.1,
        num_iterations: 2,
        steps_per_generation: 2,
        loss_type: LossType::Bnpo,
        ..config()
    };
    let dynamic = GrpoConfig {
        dynamic_sampling: true,
        micro_batch_tokens: Some(30),
        ..config()
    };
    for config in [config(), inner, dynamic] {
        for natural in [false, true] {
            if natural && config.beta != 0.0 {
                continue;
            }
            let world = World::new(cpu(), config.clone());
            let world = if natural { world.natural() } else { world };
            let alone = world.train(3);
            assert_learns(&alone.1);
            let alone = timeless(alone);
            for count in [2, 3, 5] {
                for one in on_ranks(count, |ranks| timeless(world.train_of(3, ranks))) {
                    assert_eq!(one, alone, "{count} ranks, {config:?}");
                }
            }
        }
    }
}

#[test]
fn sizes_taken_from_memory_change_no_bit_on_the_cpu() {
    for natural in [false, true] {
        let train = |sizes: Sizes| {
            let mut world = World::new(cpu(), config());
            world.sizes = sizes;
            let world = if natural { world.natural() } else { world };
            timeless(world.train(2))
        };
        let whole = train(Sizes::default());
        for (pass_tokens, activation_memory) in [(1, 0), (30, 1 << 30), (30, 5000)] {
            let small = train(Sizes {
                pass_tokens,
                activation_memory,
                ..Sizes::default()
            });
            assert_eq!(small, whole);
        }
    }
}

#[test]
fn a_restored_trainer_goes_on_to_the_same_bits() {
    let config = GrpoConfig {
        beta: 0.1,
        num_iterations: 2,
        steps_per_generation: 2,
        ..config()
    };
    assert_resumes(&World::new(cpu(), config));
}

/// Four steps, and two and two with a new trainer between, end with the same bits.
pub(super) fn assert_resumes(world: &World) {
    let (expected, outputs) = world.train(4);
    assert_learns(&outputs);
    let mut first = world.trainer();
    for _ in 0..2 {
        first.step(&mut |_, _| {}).expect("a step");
    }
    let mut second = world.trainer();
    second.restore(&first.state()).expect("restored");
    for _ in 0..2 {
        second.step(&mut |_, _| {}).expect("a step");
    }
    assert_eq!(second.adapter().parameters(), expected);
}

#[test]
fn every_loss_moves_the_parameters_and_reports_its_metrics() {
    let start = trainer_start(&World::new(cpu(), config()));
    for loss_type in [
        LossType::Grpo,
        LossType::Dapo,
        LossType::Bnpo,
        LossType::DrGrpo,
        LossType::Cispo,
    ] {
        let config = GrpoConfig {
            loss_type,
            epsilon_high: (loss_type == LossType::Cispo).then_some(2.0),
            num_iterations: 2,
            beta: 0.05,
            ..config()
        };
        let (v, outputs) = World::new(cpu(), config).train(1);
        assert_ne!(v, start, "{loss_type:?}");
        for name in ["reward", "loss", "kl", "entropy", "completions/mean_length"] {
            let value = outputs[0].metrics.get(name);
            assert!(value.is_some_and(f64::is_finite), "{loss_type:?} {name}");
        }
    }
}

#[test]
fn dynamic_sampling_replaces_groups_without_spread() {
    let plain = World::new(cpu(), config()).train(1).1;
    let before = plain[0]
        .metrics
        .get("frac_reward_zero_std")
        .expect("a share");
    assert!(before > 0.0, "every group has spread, nothing to replace");
    let dynamic = GrpoConfig {
        dynamic_sampling: true,
        dynamic_sampling_max_rounds: 8,
        ..config()
    };
    let world = World::new(cpu(), dynamic);
    let mut trainer = world.trainer();
    let output = trainer.step(&mut |_, _| {}).expect("a step");
    let after = output.metrics.get("frac_reward_zero_std").expect("a share");
    assert!(after < before, "{after} {before}");
    assert!(trainer.state().position > 4);
}

#[test]
fn log_probabilities_that_are_not_finite_stop_the_run() {
    let world = World::new(cpu(), config());
    let mut trainer = world.trainer();
    let mut state = trainer.state();
    state.parameters.fill(f32::MAX);
    trainer.restore(&state).expect("parameters");
    let Err(error) = trainer.step(&mut |_, _| {}) else {
        panic!("a step was made");
    };
    assert_eq!(error.exit_code(), 4, "{error}");
    assert!(error.to_string().contains("learning_rate"), "{error}");
}
