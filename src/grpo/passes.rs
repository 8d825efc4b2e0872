//! The forward and backward passes of an update: one after the other, or of a small model side by
//! side.

use super::loss::on_policy_coefficient;
use super::rollouts::Rollouts;
use super::trainer::{GrpoTrainer, Item, Policy, Sums};
use crate::Result;
use crate::adapter::Gradients;
use crate::model::{ApartPass, Batch, BatchInputs, BlockInputs, Coefficients, GradientPass, Keep};
use crate::ops::head::Scores;
use crate::run::signals;

impl GrpoTrainer<'_> {
    /// The gradient of one update, micro-batch by micro-batch.
    pub(super) fn gradients(
        &self,
        rollouts: &Rollouts,
        items: &[Item],
        micro_batches: &[Vec<usize>],
        policy: &Policy,
        sums: &mut Sums,
        on_progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Gradients> {
        for item in items.iter().filter(|item| !self.is_trained(item)) {
            sums.stats.add_inactive(&self.loss, item.active);
        }
        let passes: Vec<Vec<&Item>> = micro_batches
            .iter()
            .map(|own| own.iter().map(|&i| &items[i]).collect())
            .collect();
        if self.decoder.is_small() && self.learner.adapter().has_sequence_gradients() {
            let groups: Vec<&[&Item]> = passes
                .iter()
                .flat_map(|own| own.chunk_by(|a, b| a.group == b.group))
                .collect();
            if let Some(gradients) = self.gradients_apart(rollouts, &groups, policy, sums)? {
                on_progress(passes.len(), passes.len());
                return Ok(gradients);
            }
        }
        let mut gradients = self.learner.adapter().gradients();
        for (done, own) in passes.iter().enumerate() {
            signals::check()?;
            self.accumulate(rollouts, own, policy, &mut gradients, sums)?;
            on_progress(done + 1, passes.len());
        }
        Ok(gradients)
    }

    /// [`Self::gradients`] of a small model: passes over single groups run side by side, each on
    /// one thread, and are added in order whatever the number of threads. `None` where a pass needs
    /// its scores first.
    fn gradients_apart(
        &self,
        rollouts: &Rollouts,
        passes: &[&[&Item]],
        policy: &Policy,
        sums: &mut Sums,
    ) -> Result<Option<Gradients>> {
        let mut apart = Vec::with_capacity(passes.len());
        for items in passes {
            let Some(coefficients) = self.known_coefficients(items, policy) else {
                return Ok(None);
            };
            let batch = self.pack(rollouts, items)?;
            let inputs = self.inputs_of(rollouts, items, policy, &batch);
            apart.push(ApartPass {
                batch,
                temperature: self.config.temperature,
                inputs,
                coefficients,
                per_sequence: false,
            });
        }
        let adapter = self.learner.adapter();
        let done = self.passes.accumulate_apart(adapter, apart)?;
        let mut gradients = adapter.gradients();
        for (items, pass) in passes.iter().zip(done) {
            gradients.merge(&pass.gradients)?;
            let logprobs = &pass.scores.logprobs;
            sums.add(&self.loss, policy, items, &pass.batch, logprobs);
            sums.add_entropies(&pass.scores);
        }
        Ok(Some(gradients))
    }

    /// One forward and backward pass.
    fn accumulate(
        &self,
        rollouts: &Rollouts,
        items: &[&Item],
        policy: &Policy,
        gradients: &mut Gradients,
        sums: &mut Sums,
    ) -> Result<()> {
        let batch = self.pack(rollouts, items)?;
        let inputs = self.inputs_of(rollouts, items, policy, &batch);
        let known = self.known_coefficients(items, policy);
        let is_known = known.is_some();
        let mut add =
            |scores: &Scores| Ok(sums.add(&self.loss, policy, items, &batch, &scores.logprobs));
        let scores = self.passes.accumulate(GradientPass {
            adapter: self.learner.adapter(),
            batch: &batch,
            temperature: self.config.temperature,
            inputs,
            coefficients: match known {
                Some(known) => Coefficients::Known(known),
                None => Coefficients::OfScores(&mut add),
            },
            gradients,
        })?;
        if is_known {
            add(&scores)?;
        }
        sums.add_entropies(&scores);
        Ok(())
    }

    /// Where the pass over these completions gets the inputs of its blocks from.
    pub(super) fn inputs_of(
        &self,
        rollouts: &Rollouts,
        items: &[&Item],
        policy: &Policy,
        batch: &Batch,
    ) -> BlockInputs {
        let recorded = match policy.moved {
            true => None,
            false => {
                let groups = items.chunk_by(|a, b| a.group == b.group);
                let samples: Vec<(usize, Vec<usize>)> = groups
                    .map(|own| (own[0].group, own.iter().map(|item| item.sample).collect()))
                    .collect();
                rollouts.recorded(samples.iter().map(|(group, own)| (*group, &own[..])))
            }
        };
        self.block_inputs(batch.tokens.len(), recorded)
    }

    /// Where a pass over `rows` rows gets the inputs of its blocks from.
    pub(super) fn block_inputs(&self, rows: usize, recorded: Option<BatchInputs>) -> BlockInputs {
        match recorded {
            Some(inputs) => BlockInputs::Recorded(inputs),
            None => BlockInputs::Computed(Keep::choose(
                self.config.gradient_checkpointing,
                &self.decoder.config,
                rows,
                self.sampler.sizes.activation_memory,
            )),
        }
    }

    /// dL/dlogp of every token where it does not depend on the log-probabilities.
    fn known_coefficients(&self, items: &[&Item], policy: &Policy) -> Option<Vec<f64>> {
        if policy.moved || policy.correction.is_some() {
            return None;
        }
        let mut all = Vec::new();
        for item in items {
            let own = on_policy_coefficient(&self.loss, item.advantage, item.weight)?;
            all.extend(std::iter::repeat_n(own, item.sampled.len()));
        }
        Some(all)
    }
}
