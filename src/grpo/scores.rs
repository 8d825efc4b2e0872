//! What the natural gradient knows of completions: each one's own gradient, and how far a step moves
//! each one's probability.

use super::passes::side_by_side;
use super::rollouts::Rollouts;
use super::trainer::{GrpoTrainer, Item, Policy, Sums};
use crate::Result;
use crate::model::{Batch, BlockInputs, Coefficients, pack};
use crate::ops::head::Scores;
use crate::run::signals;

/// A forward and backward pass over some of the completions.
struct Pass<'a> {
    items: &'a [Item],
    batch: Batch,
    inputs: BlockInputs,
}

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
        let (number, mut logprobs) = (passes.len(), Vec::with_capacity(items.len()));
        let (decoder, adapter) = (self.decoder, self.learner.adapter());
        let temperature = self.config.temperature;
        let run = |pass: Pass<'_>| -> Result<(Batch, Scores, Vec<f64>)> {
            signals::check()?;
            let mut gradients = adapter.gradients_per_sequence(pass.items.len())?;
            let scores = decoder.accumulate_gradients(
                adapter,
                &pass.batch,
                temperature,
                pass.inputs,
                Coefficients::Known(vec![1.0; pass.batch.targets.len()]),
                &mut gradients,
            )?;
            let rows = gradients.rows().unwrap_or_default().to_vec();
            Ok((pass.batch, scores, rows))
        };
        let mut take = |items: &[Item], (batch, scores, rows): (Batch, Scores, Vec<f64>)| {
            let own: Vec<&Item> = items.iter().collect();
            sums.add(&self.loss, &policy, &own, &batch, &scores.logprobs);
            sums.add_entropies(&scores);
            logprobs.extend(batch.by_completion(&scores.logprobs).map(<[f64]>::to_vec));
            rows
        };
        let mut all = Vec::new();
        let own: Vec<&[Item]> = passes.iter().map(|pass| pass.items).collect();
        if self.decoder.is_small() {
            for (items, done) in own.into_iter().zip(side_by_side(passes, run)) {
                all.extend(take(items, done?));
            }
        } else {
            for (done, (items, pass)) in own.into_iter().zip(passes).enumerate() {
                all.extend(take(items, run(pass)?));
                on_part(done + 1, number);
            }
        }
        for (item, logprobs) in items.iter_mut().zip(logprobs) {
            item.old = Some(logprobs);
        }
        Ok(all)
    }

    /// Cut so that no pass has more rows on its way back, where a prompt is copied for each of its
    /// completions, than [`Sizes::pass_tokens`](crate::config::Sizes); of a small model by groups.
    fn score_passes<'i>(
        &self,
        rollouts: &Rollouts,
        items: &'i [Item],
        policy: &Policy,
    ) -> Result<Vec<Pass<'i>>> {
        let rows = |item: &Item| self.prompt(rollouts, item.group).len() + item.sampled.len() - 1;
        let sizes: Vec<usize> = items.iter().map(rows).collect();
        let runs = pack(&sizes, self.sampler.sizes.pass_tokens);
        let mut passes = Vec::new();
        for run in runs {
            let items = &items[run];
            let pieces: Vec<&[Item]> = match self.decoder.is_small() {
                true => items.chunk_by(|a, b| a.group == b.group).collect(),
                false => vec![items],
            };
            for items in pieces {
                let own: Vec<&Item> = items.iter().collect();
                let batch = self.pack(rollouts, &own)?;
                let inputs = self.inputs_of(rollouts, &own, policy, &batch);
                passes.push(Pass {
                    items,
                    batch,
                    inputs,
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
        let micro_batches = self.micro_batches(rollouts, items, |_| true);
        let passes: Vec<Vec<usize>> = match self.decoder.is_small() {
            true => {
                let same = |a: &usize, b: &usize| items[*a].group == items[*b].group;
                let pieces = micro_batches.iter().flat_map(|own| own.chunk_by(same));
                pieces.map(<[usize]>::to_vec).collect()
            }
            false => micro_batches,
        };
        let batches: Vec<Batch> = passes
            .iter()
            .map(|own| {
                let own: Vec<&Item> = own.iter().map(|&i| &items[i]).collect();
                self.pack(rollouts, &own)
            })
            .collect::<Result<_>>()?;
        let (decoder, adapter) = (self.decoder, self.learner.adapter());
        let temperature = self.config.temperature;
        let run = |batch: Batch| -> Result<Vec<Vec<f64>>> {
            signals::check()?;
            let scores = decoder.score(Some(adapter), &batch, temperature)?;
            let logprobs = batch.by_completion(&scores.logprobs);
            Ok(logprobs.map(<[f64]>::to_vec).collect())
        };
        let done: Vec<Result<Vec<Vec<f64>>>> = match decoder.is_small() {
            true => side_by_side(batches, run),
            false => batches.into_iter().map(run).collect(),
        };
        let done: Vec<Vec<Vec<f64>>> = done.into_iter().collect::<Result<_>>()?;
        Ok(done.into_iter().flatten().collect())
    }
}
