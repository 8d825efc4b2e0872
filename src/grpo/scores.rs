//! What is known of completions: their log-probabilities under a policy, and each one's own gradient.

use serde::{Deserialize, Serialize};

use super::owners::ByOwner;
use super::rollouts::Rollouts;
use super::trainer::{GrpoTrainer, Item, Policy, Sums};
use crate::Result;
use crate::adapter::Adapter;
use crate::model::{ApartPass, ApartScores, Coefficients, GradientPass, ScorePass, pack};
use crate::run::signals;

/// What a pass gave of one completion.
#[derive(Serialize, Deserialize)]
struct Scored {
    gradient: Vec<f64>,
    logprobs: Vec<f64>,
    entropies: Vec<f64>,
}

impl GrpoTrainer<'_> {
    /// ∇_v log π of every completion at the policy that sampled, `[completions, parameters]`; its
    /// log-probabilities go to [`Item::old`]. Every rank scores what it sampled.
    pub(super) fn completion_scores(
        &self,
        rollouts: &Rollouts,
        items: &mut [Item],
        sums: &mut Sums,
        on_part: &mut dyn FnMut(usize, usize),
    ) -> Result<Vec<f64>> {
        let policy = Policy {
            moved: false,
            correction: None,
        };
        let own = self.own_completion_scores(rollouts, items, &policy, on_part);
        let mut scored = ByOwner::gather(&self.sampler.ranks, own)?;
        let mut rows = Vec::new();
        for item in items {
            let own: Scored = scored.next_of(rollouts, item.group)?;
            sums.add(&self.loss, &policy, &[&*item], &own.logprobs);
            sums.add_entropies(&own.entropies);
            rows.extend(own.gradient);
            item.old = Some(own.logprobs);
        }
        Ok(rows)
    }

    fn own_completion_scores(
        &self,
        rollouts: &Rollouts,
        items: &[Item],
        policy: &Policy,
        on_part: &mut dyn FnMut(usize, usize),
    ) -> Result<Vec<Scored>> {
        let own: Vec<&Item> = items.iter().filter(|i| self.is_own(rollouts, i)).collect();
        let passes = self.score_passes(rollouts, &own, policy)?;
        let mut all = Vec::with_capacity(own.len());
        for pass in self.run_score_passes(passes, on_part)? {
            let rows = pass.gradients.rows().unwrap_or_default();
            let rows = rows.chunks_exact(pass.gradients.num_parameters());
            let logprobs = pass.batch.by_completion(&pass.scores.logprobs);
            let entropies = pass.batch.by_completion(&pass.scores.entropies);
            let scored = rows.zip(logprobs.zip(entropies));
            all.extend(scored.map(|(gradient, (logprobs, entropies))| Scored {
                gradient: gradient.to_vec(),
                logprobs: logprobs.to_vec(),
                entropies: entropies.to_vec(),
            }));
        }
        Ok(all)
    }

    /// Whether this rank sampled a completion, and passes over it.
    pub(super) fn is_own(&self, rollouts: &Rollouts, item: &Item) -> bool {
        rollouts.groups[item.group].owner == self.sampler.ranks.rank()
    }

    /// One after the other, or of a small model side by side.
    fn run_score_passes(
        &self,
        passes: Vec<ApartPass>,
        on_part: &mut dyn FnMut(usize, usize),
    ) -> Result<Vec<ApartScores>> {
        let adapter = self.learner.adapter();
        if self.decoder.is_small() {
            return self.passes.accumulate_apart(adapter, passes);
        }
        let number = passes.len();
        let run = |(done, pass): (usize, ApartPass)| {
            signals::check()?;
            let mut gradients = adapter.gradients_per_sequence(pass.batch.lengths.len())?;
            let scores = self.passes.accumulate(GradientPass {
                adapter,
                batch: &pass.batch,
                temperature: pass.temperature,
                inputs: pass.inputs,
                coefficients: Coefficients::Known(pass.coefficients),
                gradients: &mut gradients,
            })?;
            on_part(done + 1, number + 1);
            Ok(ApartScores {
                batch: pass.batch,
                scores,
                gradients,
            })
        };
        passes.into_iter().enumerate().map(run).collect()
    }

    /// Cut so that no pass has more rows on its way back, where a prompt is copied for each of its
    /// completions, than [`Sizes::pass_tokens`](crate::config::Sizes); of a small model by groups.
    fn score_passes(
        &self,
        rollouts: &Rollouts,
        items: &[&Item],
        policy: &Policy,
    ) -> Result<Vec<ApartPass>> {
        let rows = |item: &&Item| self.prompt(rollouts, item.group).len() + item.sampled.len() - 1;
        let sizes: Vec<usize> = items.iter().map(rows).collect();
        let mut passes = Vec::new();
        for run in pack(&sizes, self.sampler.sizes.pass_tokens) {
            let items = &items[run];
            let pieces: Vec<&[&Item]> = match self.decoder.is_small() {
                true => items.chunk_by(|a, b| a.group == b.group).collect(),
                false => vec![items],
            };
            for own in pieces {
                let batch = self.pack(rollouts, own)?;
                passes.push(ApartPass {
                    temperature: self.config.temperature,
                    inputs: self.inputs_of(rollouts, own, policy, &batch),
                    coefficients: vec![1.0; batch.targets.len()],
                    per_sequence: true,
                    batch,
                });
            }
        }
        Ok(passes)
    }

    /// log π at the adapter's parameters of every completion, token by token.
    pub(super) fn completion_logprobs(
        &self,
        rollouts: &Rollouts,
        items: &[Item],
    ) -> Result<Vec<Vec<f64>>> {
        let own = self.own_logprobs(rollouts, items, Some(self.learner.adapter()), |_| true);
        let mut logprobs = ByOwner::gather(&self.sampler.ranks, own)?;
        let of = |item: &Item| logprobs.next_of(rollouts, item.group);
        items.iter().map(of).collect()
    }

    /// Log-probabilities of all completions that are trained on, with `adapter` or without.
    pub(super) fn score(
        &self,
        rollouts: &Rollouts,
        items: &mut [Item],
        adapter: Option<&Adapter>,
        mut each: impl FnMut(&mut Item, Vec<f64>),
    ) -> Result<()> {
        let own = self.own_logprobs(rollouts, items, adapter, |item| self.is_trained(item));
        let mut logprobs = ByOwner::gather(&self.sampler.ranks, own)?;
        for item in items.iter_mut().filter(|item| self.is_trained(item)) {
            let own = logprobs.next_of(rollouts, item.group)?;
            each(item, own);
        }
        Ok(())
    }

    /// Log-probabilities of the completions of this rank that are `members`, in order.
    fn own_logprobs(
        &self,
        rollouts: &Rollouts,
        items: &[Item],
        adapter: Option<&Adapter>,
        members: impl Fn(&Item) -> bool,
    ) -> Result<Vec<Vec<f64>>> {
        let is_own = |item: &Item| members(item) && self.is_own(rollouts, item);
        let mut all = Vec::new();
        for micro_batch in self.micro_batches(rollouts, items, is_own) {
            signals::check()?;
            let own: Vec<&Item> = micro_batch.iter().map(|&i| &items[i]).collect();
            let batch = self.pack(rollouts, &own)?;
            let scores = self.passes.score(ScorePass {
                adapter,
                batch: &batch,
                temperature: self.config.temperature,
            })?;
            let logprobs = batch.by_completion(&scores.logprobs);
            all.extend(logprobs.map(<[f64]>::to_vec));
        }
        Ok(all)
    }
}
