//! What the natural gradient knows of completions: each one's own gradient, and how far a step moves
//! each one's probability.

use super::rollouts::Rollouts;
use super::trainer::{GrpoTrainer, Item, Policy, Sums};
use crate::Result;
use crate::model::{ApartPass, ApartScores, Coefficients, GradientPass, ScorePass, pack};
use crate::run::signals;

impl GrpoTrainer<'_> {
    /// ∇_v log π of every completion at the policy that sampled, `[completions, parameters]`; its
    /// log-probabilities go to [`Item::old`].
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
        let passes = self.score_passes(rollouts, items, &policy)?;
        let cut: Vec<usize> = passes.iter().map(|pass| pass.batch.lengths.len()).collect();
        let done = self.run_score_passes(passes, on_part)?;
        let (mut rows, mut first) = (Vec::new(), 0);
        for (pass, number) in done.iter().zip(cut) {
            let items = &mut items[first..first + number];
            first += number;
            let (batch, scores) = (&pass.batch, &pass.scores);
            let own: Vec<&Item> = items.iter().collect();
            sums.add(&self.loss, &policy, &own, &scores.logprobs);
            sums.add_entropies(&scores.entropies);
            rows.extend_from_slice(pass.gradients.rows().unwrap_or_default());
            for (item, logprobs) in items.iter_mut().zip(batch.by_completion(&scores.logprobs)) {
                item.old = Some(logprobs.to_vec());
            }
        }
        Ok(rows)
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
        items: &[Item],
        policy: &Policy,
    ) -> Result<Vec<ApartPass>> {
        let rows = |item: &Item| self.prompt(rollouts, item.group).len() + item.sampled.len() - 1;
        let sizes: Vec<usize> = items.iter().map(rows).collect();
        let mut passes = Vec::new();
        for run in pack(&sizes, self.sampler.sizes.pass_tokens) {
            let items = &items[run];
            let pieces: Vec<&[Item]> = match self.decoder.is_small() {
                true => items.chunk_by(|a, b| a.group == b.group).collect(),
                false => vec![items],
            };
            for items in pieces {
                let own: Vec<&Item> = items.iter().collect();
                let batch = self.pack(rollouts, &own)?;
                passes.push(ApartPass {
                    temperature: self.config.temperature,
                    inputs: self.inputs_of(rollouts, &own, policy, &batch),
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
        let mut all = Vec::with_capacity(items.len());
        for micro_batch in self.micro_batches(rollouts, items, |_| true) {
            signals::check()?;
            let own: Vec<&Item> = micro_batch.iter().map(|&i| &items[i]).collect();
            let batch = self.pack(rollouts, &own)?;
            let scores = self.passes.score(ScorePass {
                adapter: Some(self.learner.adapter()),
                batch: &batch,
                temperature: self.config.temperature,
            })?;
            let logprobs = batch.by_completion(&scores.logprobs);
            all.extend(logprobs.map(<[f64]>::to_vec));
        }
        Ok(all)
    }
}
