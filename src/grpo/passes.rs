//! The forward and backward passes of an update: one after the other, or of a small model side by
//! side.

use serde::{Deserialize, Serialize};

use super::loss::on_policy_coefficient;
use super::owners::ByOwner;
use super::rollouts::Rollouts;
use super::trainer::{GrpoTrainer, Item, Policy, Sums};
use crate::adapter::Gradients;
use crate::model::{ApartPass, Batch, BatchInputs, BlockInputs, Coefficients, GradientPass, Keep};
use crate::ops::head::Scores;
use crate::run::signals;
use crate::{Error, Result};

/// What one pass over completions of a single prompt gave.
#[derive(Serialize, Deserialize)]
struct Piece {
    gradient: Vec<f64>,
    /// Of every token, completion after completion.
    logprobs: Vec<f64>,
    entropies: Vec<f64>,
}

impl GrpoTrainer<'_> {
    /// The gradient of one update, micro-batch by micro-batch.
    ///
    /// Every rank passes over the completions that it sampled; what comes of them is added up piece by
    /// piece in the order of the batch, whoever computed it.
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
        if !self.learner.adapter().has_sequence_gradients() {
            return self.large_gradients(rollouts, &passes, policy, sums, on_progress);
        }
        let own = self.own_pieces(rollouts, &passes, policy, on_progress);
        let mut pieces = ByOwner::gather(&self.sampler.ranks, own)?;
        let mut gradients = self.learner.adapter().gradients();
        for items in passes.iter().flat_map(|pass| groups_of(pass)) {
            let piece: Piece = pieces.next_of(rollouts, items[0].group)?;
            gradients.add_piece(&piece.gradient)?;
            sums.add(&self.loss, policy, items, &piece.logprobs);
            sums.add_entropies(&piece.entropies);
        }
        Ok(gradients)
    }

    /// The gradient of an adapter that is as large as its weights, in one process.
    fn large_gradients(
        &self,
        rollouts: &Rollouts,
        passes: &[Vec<&Item>],
        policy: &Policy,
        sums: &mut Sums,
        on_progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Gradients> {
        let mut gradients = self.learner.adapter().gradients();
        for (done, items) in passes.iter().enumerate() {
            signals::check()?;
            let scores = self.accumulate(rollouts, items, policy, &mut gradients)?;
            sums.add(&self.loss, policy, items, &scores.logprobs);
            sums.add_entropies(&scores.entropies);
            on_progress(done + 1, passes.len());
        }
        Ok(gradients)
    }

    /// The pieces of this rank, in order.
    fn own_pieces(
        &self,
        rollouts: &Rollouts,
        passes: &[Vec<&Item>],
        policy: &Policy,
        on_progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Vec<Piece>> {
        let is_own = |item: &&Item| self.is_own(rollouts, item);
        let passes: Vec<Vec<&Item>> = passes
            .iter()
            .map(|pass| pass.iter().copied().filter(is_own).collect())
            .filter(|pass: &Vec<&Item>| !pass.is_empty())
            .collect();
        if self.decoder.is_small() {
            let pieces: Vec<&[&Item]> = passes.iter().flat_map(|pass| groups_of(pass)).collect();
            if let Some(pieces) = self.pieces_apart(rollouts, &pieces, policy)? {
                on_progress(passes.len(), passes.len());
                return Ok(pieces);
            }
        }
        let mut all = Vec::new();
        for (done, items) in passes.iter().enumerate() {
            signals::check()?;
            let mut gradients = self.learner.adapter().gradients();
            gradients.keep_pieces();
            let scores = self.accumulate(rollouts, items, policy, &mut gradients)?;
            all.extend(split(items, gradients.take_pieces(), &scores)?);
            on_progress(done + 1, passes.len());
        }
        Ok(all)
    }

    /// [`Self::own_pieces`] of a small model: passes over single groups run side by side, each on one
    /// thread. `None` where a pass needs its scores first.
    fn pieces_apart(
        &self,
        rollouts: &Rollouts,
        passes: &[&[&Item]],
        policy: &Policy,
    ) -> Result<Option<Vec<Piece>>> {
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
        let done = self
            .passes
            .accumulate_apart(self.learner.adapter(), apart)?;
        let mut pieces = Vec::with_capacity(passes.len());
        for (items, pass) in passes.iter().zip(done) {
            pieces.extend(split(items, vec![pass.gradients.sum()], &pass.scores)?);
        }
        Ok(Some(pieces))
    }

    /// One forward and backward pass.
    fn accumulate(
        &self,
        rollouts: &Rollouts,
        items: &[&Item],
        policy: &Policy,
        gradients: &mut Gradients,
    ) -> Result<Scores> {
        let batch = self.pack(rollouts, items)?;
        let inputs = self.inputs_of(rollouts, items, policy, &batch);
        // The sums of the step are made in the order of the batch, later.
        let mut of_scores =
            |scores: &Scores| Ok(Sums::default().add(&self.loss, policy, items, &scores.logprobs));
        self.passes.accumulate(GradientPass {
            adapter: self.learner.adapter(),
            batch: &batch,
            temperature: self.config.temperature,
            inputs,
            coefficients: match self.known_coefficients(items, policy) {
                Some(known) => Coefficients::Known(known),
                None => Coefficients::OfScores(&mut of_scores),
            },
            gradients,
        })
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

/// The completions of a pass by their prompts: what becomes a piece each.
fn groups_of<'a, 'b>(pass: &'a [&'b Item]) -> impl Iterator<Item = &'a [&'b Item]> {
    pass.chunk_by(|a, b| a.group == b.group)
}

/// What a pass gave, by its pieces.
fn split(items: &[&Item], gradients: Vec<Vec<f64>>, scores: &Scores) -> Result<Vec<Piece>> {
    let mut start = 0;
    let pieces: Vec<Piece> = groups_of(items)
        .zip(gradients)
        .map(|(own, gradient)| {
            let own = start..start + own.iter().map(|item| item.sampled.len()).sum::<usize>();
            start = own.end;
            Piece {
                gradient,
                logprobs: scores.logprobs[own.clone()].to_vec(),
                entropies: scores.entropies[own].to_vec(),
            }
        })
        .collect();
    match start == scores.logprobs.len() {
        true => Ok(pieces),
        false => Err(Error::Internal(
            "a pass gave other pieces than its prompts".to_owned(),
        )),
    }
}
