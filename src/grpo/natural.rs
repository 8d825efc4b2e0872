//! An update along the natural gradient: every completion's own score, one proposed step, and a
//! line search that scores the completions again.

use super::loss::{Normalizer, on_policy_coefficient, token_weights};
use super::rollouts::Rollouts;
use super::trainer::{GrpoTrainer, Item, Sums};
use crate::Result;
use crate::optim::{Direction, ScoredBatch, Update};
use crate::run::StepMetrics;

/// Times a step is halved before none is taken.
const MAX_HALVINGS: u32 = 4;
/// Divergence of an accepted step, as a multiple of the one asked for: the quadratic model it is
/// made with is no better than this.
const TOLERANCE: f64 = 2.0;
/// Part of the promised improvement that an accepted step may miss by: what the objective fell short of
/// the linear model on the same completions. (Whether it improved on them at all is no criterion: they are
/// a small part of what the direction is made of.)
const MISSED: f64 = 0.5;

/// What a natural-gradient update did.
#[derive(Debug, Clone)]
pub(super) struct NaturalUpdate {
    direction: Direction,
    accepted: Trial,
}

/// A step tried on the completions at hand.
#[derive(Debug, Clone, Copy)]
struct Trial {
    /// Share of the proposed step; 0: none was taken.
    scale: f64,
    /// Estimate of KL(before ‖ after), nats per completion.
    kl: f64,
    /// What the loss, linear in the probability ratios, fell by.
    improvement: f64,
    /// Effective sample size of the completions under the policy after, by importance weights, as a
    /// share of their number.
    effective_share: f64,
}

impl Default for Trial {
    /// No step.
    fn default() -> Self {
        Self {
            scale: 0.0,
            kl: 0.0,
            improvement: 0.0,
            effective_share: 1.0,
        }
    }
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
            (
                "natural/effective_sample_size",
                self.accepted.effective_share,
            ),
            ("natural/reused", self.direction.reused),
            ("natural/condition_number", self.direction.condition_number),
        ] {
            metrics.set(name, value);
        }
        if let Some(scale) = self.direction.noise_scale {
            metrics.set("natural/gradient_noise_scale", scale);
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
        // dL/dlogp is −A ω.
        let shares: Vec<f64> = items
            .iter()
            .map(|item| match item.active {
                0 => 0.0,
                _ => -on_policy_coefficient(&self.loss, 1.0, item.weight).unwrap_or(0.0),
            })
            .collect();
        let pairs = items.iter().zip(&shares);
        let coefficients: Vec<f64> = pairs.map(|(item, share)| -item.advantage * share).collect();

        let mut sums = Sums::default();
        let scores = self.completion_scores(rollouts, &mut items, &mut sums, on_part)?;
        let direction = self.learner.propose(ScoredBatch {
            parameters: self.learner.adapter().parameters().to_vec(),
            scores: scores.iter().map(|x| *x as f32).collect(),
            advantages: items.iter().map(|item| item.advantage as f32).collect(),
            weights: shares.iter().map(|x| *x as f32).collect(),
            group: self.config.num_generations,
        })?;
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

    /// The longest of Δv, Δv/2, Δv/4 … that diverges no more than asked for and improves the loss on the
    /// completions at hand nearly as the linear model says; the adapter stands there afterwards, or
    /// where it stood.
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
            let missed = scale * direction.predicted_improvement - trial.improvement;
            if trial.kl <= allowed && missed <= MISSED * scale * direction.promised_improvement {
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
        let (mut sum, mut squares) = (0.0, 0.0);
        let logprobs = self.completion_logprobs(rollouts, items)?;
        for ((item, coefficient), new) in items.iter().zip(coefficients).zip(&logprobs) {
            let old = item.old.as_deref().unwrap_or(&item.sampled);
            let differences = || new.iter().zip(old).map(|(new, old)| new - old);
            let total: f64 = differences().sum();
            let ratio = total.exp();
            // k3 over whole completions: never negative, and its mean is the divergence.
            kl += ratio - 1.0 - total;
            (sum, squares) = (sum + ratio, squares + ratio * ratio);
            let ratios: f64 = differences().map(|d| d.exp() - 1.0).sum();
            improvement -= coefficient * ratios;
        }
        let number = items.len().max(1) as f64;
        Ok(Trial {
            scale,
            kl: kl / number,
            improvement,
            effective_share: sum * sum / (squares * number),
        })
    }
}
