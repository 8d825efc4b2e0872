//! An update along the natural gradient: every completion's own score, one proposed step, and a
//! line search that scores the completions again.

use super::loss::{Normalizer, on_policy_coefficient, token_weights};
use super::rollouts::Rollouts;
use super::trainer::{GrpoTrainer, Item, Policy, Sums};
use crate::Result;
use crate::model::{Batch, Coefficients, GradientPass, ScorePass, pack};
use crate::optim::{Direction, Update};
use crate::run::{StepMetrics, signals};

/// Times a step is halved before none is taken.
const MAX_HALVINGS: u32 = 4;
/// Divergence of an accepted step, as a multiple of the one asked for: the quadratic model it is
/// made with is no better than this.
const TOLERANCE: f64 = 2.0;

/// What a natural-gradient update did.
#[derive(Debug, Clone)]
pub(super) struct NaturalUpdate {
    direction: Direction,
    accepted: Trial,
}

/// A step tried on the completions at hand.
#[derive(Debug, Clone, Copy, Default)]
struct Trial {
    /// Share of the proposed step; 0: none was taken.
    scale: f64,
    /// Estimate of KL(before ‖ after), nats per completion.
    kl: f64,
    /// What the loss, linear in the probability ratios, fell by.
    improvement: f64,
}

impl NaturalUpdate {
    pub(super) fn write(&self, metrics: &mut StepMetrics) {
        for (name, value) in [
            ("natural/kl", self.accepted.kl),
            ("natural/improvement", self.accepted.improvement),
            (
                "natural/predicted_improvement",
                self.direction.predicted_improvement * self.accepted.scale,
            ),
            ("natural/step_scale", self.accepted.scale),
            ("natural/shrinkage", self.direction.shrinkage),
            ("natural/condition_number", self.direction.condition_number),
        ] {
            metrics.set(name, value);
        }
    }
}

impl GrpoTrainer<'_> {
    /// The one update of a generation batch under `optim.type = "natural"`.
    ///
    /// All completions take part, those without advantage in the Fisher matrix alone.
    pub(super) fn learn_natural(
        &mut self,
        rollouts: &Rollouts,
        mut items: Vec<Item>,
        on_part: &mut dyn FnMut(usize, usize),
    ) -> Result<Sums> {
        let active: Vec<usize> = items.iter().map(|item| item.active).collect();
        let weights = token_weights(
            self.loss.loss_type,
            Normalizer {
                active_tokens: &active,
                micro_batch: &vec![0; items.len()],
                tokens_per_update: active.iter().sum::<usize>() as f64,
                max_completion_length: self.config.max_completion_length,
            },
        );
        for (item, weight) in items.iter_mut().zip(weights) {
            item.weight = weight;
        }
        let coefficients: Vec<f64> = items
            .iter()
            .map(|item| match item.active {
                0 => 0.0,
                _ => on_policy_coefficient(&self.loss, item.advantage, item.weight).unwrap_or(0.0),
            })
            .collect();

        let mut sums = Sums::default();
        let scores = self.completion_scores(rollouts, &mut items, &mut sums, on_part)?;
        let direction = self.learner.propose(&scores, &coefficients)?;
        let accepted = self.line_search(rollouts, &items, &coefficients, &direction)?;
        sums.updates.push(Update {
            grad_norm: direction.grad_norm,
            learning_rate: None,
        });
        sums.natural = Some(NaturalUpdate {
            direction,
            accepted,
        });
        Ok(sums)
    }

    /// ∇_v log π of every completion, `[completions, parameters]`, and the log-probabilities at
    /// the policy that sampled into [`Item::old`].
    ///
    /// A prompt is computed for each of its completions: its rows belong to one of them.
    fn completion_scores(
        &self,
        rollouts: &Rollouts,
        items: &mut [Item],
        sums: &mut Sums,
        on_part: &mut dyn FnMut(usize, usize),
    ) -> Result<Vec<f64>> {
        let adapter = self.learner.adapter();
        let mut gradients = adapter.gradients_per_sequence(items.len())?;
        let policy = Policy {
            moved: false,
            correction: None,
        };
        let tokens = |item: &Item| &rollouts.groups[item.group].completions[item.sample].tokens[..];
        let sizes: Vec<usize> = items
            .iter()
            .map(|item| self.prompt(rollouts, item.group).len() + tokens(item).len() - 1)
            .collect();
        let runs = pack(&sizes, self.sampler.sizes.pass_tokens);
        for (done, run) in runs.iter().enumerate() {
            signals::check()?;
            let mut batch = Batch::default();
            for item in &items[run.clone()] {
                batch.push_sequence(self.prompt(rollouts, item.group), tokens(item))?;
            }
            gradients.set_sequence_offset(run.start);
            let own: Vec<&Item> = items[run.clone()].iter().collect();
            let recorded = rollouts.recorded(
                own.iter()
                    .map(|item| (item.group, std::slice::from_ref(&item.sample))),
            );
            let inputs = self.block_inputs(batch.tokens.len(), recorded);
            let scores = self.passes.accumulate(GradientPass {
                adapter,
                batch: &batch,
                temperature: self.config.temperature,
                inputs,
                coefficients: Coefficients::Known(vec![1.0; batch.targets.len()]),
                gradients: &mut gradients,
            })?;
            sums.add(&self.loss, &policy, &own, &scores.logprobs);
            sums.add_entropies(&scores.entropies);
            for (item, logps) in items[run.clone()]
                .iter_mut()
                .zip(batch.by_completion(&scores.logprobs))
            {
                item.old = Some(logps.to_vec());
            }
            on_part(done + 1, runs.len() + 1);
        }
        Ok(gradients
            .rows()
            .into_iter()
            .flatten()
            .flatten()
            .copied()
            .collect())
    }

    /// The longest of Δv, Δv/2, Δv/4 … that diverges no more than asked for and improves the loss
    /// on the completions at hand; the adapter stands there afterwards, or where it stood.
    fn line_search(
        &mut self,
        rollouts: &Rollouts,
        items: &[Item],
        coefficients: &[f64],
        direction: &Direction,
    ) -> Result<Trial> {
        let start = self.learner.adapter().parameters().to_vec();
        let allowed = TOLERANCE * direction.kl_per_step;
        if direction.step.iter().all(|x| *x == 0.0) {
            return Ok(Trial::default());
        }
        for halvings in 0..=MAX_HALVINGS {
            let scale = 0.5f64.powi(halvings as i32);
            let moved: Vec<f32> = start
                .iter()
                .zip(&direction.step)
                .map(|(v, step)| (f64::from(*v) + scale * step) as f32)
                .collect();
            self.learner.set_parameters(&moved)?;
            let trial = self.trial(rollouts, items, coefficients, scale)?;
            if trial.kl <= allowed && trial.improvement >= 0.0 {
                return Ok(trial);
            }
        }
        self.learner.set_parameters(&start)?;
        Ok(Trial::default())
    }

    fn trial(
        &self,
        rollouts: &Rollouts,
        items: &[Item],
        coefficients: &[f64],
        scale: f64,
    ) -> Result<Trial> {
        let (mut kl, mut improvement) = (0.0, 0.0);
        for micro_batch in self.micro_batches(rollouts, items, |_| true) {
            signals::check()?;
            let own: Vec<&Item> = micro_batch.iter().map(|&i| &items[i]).collect();
            let batch = self.pack(rollouts, &own)?;
            let scores = self.passes.score(ScorePass {
                adapter: Some(self.learner.adapter()),
                batch: &batch,
                temperature: self.config.temperature,
            })?;
            for (&i, new) in micro_batch
                .iter()
                .zip(batch.by_completion(&scores.logprobs))
            {
                let old = items[i].old.as_deref().unwrap_or(&items[i].sampled);
                let differences = || new.iter().zip(old).map(|(new, old)| new - old);
                let total: f64 = differences().sum();
                // k3 over whole completions: never negative, and its mean is the divergence.
                kl += total.exp() - 1.0 - total;
                let ratios: f64 = differences().map(|d| d.exp() - 1.0).sum();
                improvement -= coefficients[i] * ratios;
            }
        }
        Ok(Trial {
            scale,
            kl: kl / items.len() as f64,
            improvement,
        })
    }
}
