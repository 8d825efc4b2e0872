//! The GRPO step: rollouts and advantages, then one or several updates on them.

use std::ops::Range;
use std::time::Instant;

use super::importance::{SamplerCorrection, SamplerRatio};
use super::loss::{LossParams, LossStats, Normalizer, Sequence, sequence_loss, token_weights};
use super::metrics::{self, SamplerDifference};
use super::natural::NaturalUpdate;
use super::rollouts::{Group, Rollouts, Sampler};
use crate::Result;
use crate::adapter::Adapter;
use crate::config::{GrpoConfig, LossType, OptimConfig};
use crate::model::{Batch, Decoder, Passes, pack};
use crate::optim::{Learner, Update};
use crate::rollout::FinishReason;
use crate::run::logs::CompletionRow;
use crate::run::training::{StepOutput, Trainer};
use crate::run::{StepMetrics, TrainState};

/// Trains an adapter with GRPO, one generation batch a step.
pub struct GrpoTrainer<'a> {
    pub(super) config: &'a GrpoConfig,
    pub(super) loss: LossParams,
    pub(super) decoder: &'a Decoder,
    /// What computes the passes of updates: the decoder, or one that other runs share.
    pub(super) passes: &'a dyn Passes,
    pub(super) sampler: Sampler<'a>,
    pub(super) learner: Learner,
    step: u64,
    position: u64,
    num_tokens: u64,
    total_steps: u64,
    /// Completions of the next step are sampled while this one is learnt from.
    overlaps: bool,
}

/// A completion in an update.
#[derive(Debug, Clone)]
pub(super) struct Item {
    pub(super) group: usize,
    pub(super) sample: usize,
    pub(super) advantage: f64,
    /// Tokens that take part in the loss: all, or none of a truncated one when those are masked.
    pub(super) active: usize,
    /// Share of each of its tokens in the loss of the update.
    pub(super) weight: f64,
    /// Log-probabilities the sampler gave.
    pub(super) sampled: Vec<f64>,
    /// The trainer's own at that time, where the sampler's are not the same.
    pub(super) old: Option<Vec<f64>>,
    reference: Option<Vec<f64>>,
}

/// What the updates of a step add up.
#[derive(Default)]
pub(super) struct Sums {
    loss: f64,
    pub(super) entropy: f64,
    pub(super) tokens: usize,
    pub(super) stats: LossStats,
    difference: SamplerDifference,
    ratios: Vec<f64>,
    pub(super) updates: Vec<Update>,
    pub(super) natural: Option<NaturalUpdate>,
}

impl<'a> GrpoTrainer<'a> {
    /// A run of `total_steps` generation batches.
    pub fn new(
        config: &'a GrpoConfig,
        optim: &OptimConfig,
        decoder: &'a Decoder,
        adapter: Adapter,
        sampler: Sampler<'a>,
        total_steps: u64,
    ) -> Self {
        let updates = total_steps * config.updates_per_step() as u64;
        Self {
            config,
            loss: LossParams::from(config),
            decoder,
            passes: decoder,
            sampler,
            learner: Learner::new(adapter, optim, updates),
            step: 0,
            position: 0,
            num_tokens: 0,
            total_steps,
            overlaps: false,
        }
    }

    /// Has the completions of the next step sampled while this one is learnt from, by the policy before
    /// the update: one step off the policy that learns from them, which the correction for another
    /// sampler corrects for, too.
    pub fn one_step_off_policy(mut self, overlaps: bool) -> Self {
        self.overlaps = overlaps;
        self
    }

    /// Leaves the passes of its updates to something else than the decoder itself.
    pub fn with_passes(mut self, passes: &'a dyn Passes) -> Self {
        self.passes = passes;
        self
    }

    #[cfg(test)]
    pub(super) fn sampler_mut(&mut self) -> &mut Sampler<'a> {
        &mut self.sampler
    }

    /// What went over the network so far, as metrics.
    fn bytes(&self) -> [(&'static str, u64); 3] {
        let (sent, received) = self.sampler.engine.bytes();
        [
            ("bytes/ranks_sent", self.sampler.ranks.bytes_sent()),
            ("bytes/rollout_sent", sent),
            ("bytes/rollout_received", received),
        ]
    }

    /// All updates on one generation batch.
    fn learn(
        &mut self,
        rollouts: &Rollouts,
        on_part: &mut dyn FnMut(usize, usize),
    ) -> Result<Sums> {
        let mut items = self.items(rollouts);
        if self.learner.is_natural() {
            return self.learn_natural(rollouts, items, on_part);
        }
        let parts = self.config.updates_per_step();
        let exact = self.sampler.engine.exact();
        // The first update is at the policy that sampled: it needs no log-probabilities of then.
        if !exact && parts > 1 {
            let adapter = Some(self.learner.adapter());
            self.score(rollouts, &mut items, adapter, |item, logps| {
                item.old = Some(logps)
            })?;
        }
        if self.loss.beta != 0.0 {
            self.score(rollouts, &mut items, None, |item, logps| {
                item.reference = Some(logps)
            })?;
        }
        let mut sums = Sums::default();
        let tokens: usize = items.iter().map(|item| item.active).sum();
        let per_update = self.config.prompts_per_step / self.config.steps_per_generation;
        for part in 0..parts {
            let first = part % self.config.steps_per_generation * per_update;
            let groups = first..first + per_update;
            let mut own: Vec<Item> = items
                .iter()
                .filter(|item| groups.contains(&item.group))
                .cloned()
                .collect();
            let policy = Policy {
                moved: part > 0,
                correction: if exact {
                    None
                } else {
                    SamplerCorrection::new(self.config)
                },
            };
            let mut progress = |done: usize, total: usize| {
                on_part(part * total + done, parts * total);
            };
            let micro_batches = self.plan(rollouts, &mut own, tokens);
            let gradients = self.gradients(
                rollouts,
                &own,
                &micro_batches,
                &policy,
                &mut sums,
                &mut progress,
            )?;
            sums.updates.push(self.learner.update(&gradients)?);
        }
        Ok(sums)
    }

    /// Every completion with its advantage; weights are set update by update.
    fn items(&self, rollouts: &Rollouts) -> Vec<Item> {
        let n = self.config.num_generations;
        let masked = self.config.mask_truncated_completions;
        let completions = rollouts.completions().enumerate();
        completions
            .map(|(i, completion)| Item {
                group: i / n,
                sample: i % n,
                advantage: rollouts.advantages.values[i],
                active: match completion.finish {
                    FinishReason::Length if masked => 0,
                    _ => completion.tokens.len(),
                },
                weight: 0.0,
                sampled: completion.logprobs.iter().map(|&l| f64::from(l)).collect(),
                old: None,
                reference: None,
            })
            .collect()
    }

    /// Whether a completion has a gradient. At advantage 0 only the KL term has one.
    pub(super) fn is_trained(&self, item: &Item) -> bool {
        item.active > 0 && (item.advantage != 0.0 || self.loss.beta != 0.0)
    }

    /// The micro-batches of an update, as indices into `items`, whose weights are set.
    /// `tokens` are the active tokens of the generation batch.
    fn plan(&self, rollouts: &Rollouts, items: &mut [Item], tokens: usize) -> Vec<Vec<usize>> {
        // Only in bnpo the completions without gradient have a say in the weights of others.
        let bnpo = self.loss.loss_type == LossType::Bnpo;
        let members = |item: &Item| bnpo || self.is_trained(item);
        let mut micro_batches = self.micro_batches(rollouts, items, members);
        let mut micro_batch = vec![0; items.len()];
        for (number, members) in micro_batches.iter().enumerate() {
            members.iter().for_each(|&i| micro_batch[i] = number);
        }
        let active: Vec<usize> = items.iter().map(|item| item.active).collect();
        let weights = token_weights(
            self.loss.loss_type,
            Normalizer {
                active_tokens: &active,
                micro_batch: &micro_batch,
                tokens_per_update: tokens as f64 / self.config.steps_per_generation as f64,
                max_completion_length: self.config.max_completion_length,
            },
        );
        for (item, weight) in items.iter_mut().zip(weights) {
            item.weight = weight;
        }
        for members in &mut micro_batches {
            members.retain(|&i| self.is_trained(&items[i]));
        }
        micro_batches.retain(|members| !members.is_empty());
        micro_batches
    }

    /// The items that are `members`, as indices, cut into passes: whole groups, up to
    /// [`Sizes::pass_tokens`](crate::config::Sizes) rows; a group of more than
    /// [`GrpoConfig::cut_tokens`] is cut, with the prompt in every piece.
    pub(super) fn micro_batches(
        &self,
        rollouts: &Rollouts,
        items: &[Item],
        members: impl Fn(&Item) -> bool,
    ) -> Vec<Vec<usize>> {
        let limit = self.config.cut_tokens();
        let mut pieces: Vec<(Vec<usize>, usize)> = Vec::new();
        for (i, item) in items.iter().enumerate().filter(|(_, item)| members(item)) {
            // The last token of a completion has no row.
            let rows = item.sampled.len().saturating_sub(1);
            match pieces.last_mut() {
                Some((own, filled))
                    if items[own[0]].group == item.group && *filled + rows <= limit =>
                {
                    own.push(i);
                    *filled += rows;
                }
                _ => pieces.push((vec![i], self.prompt(rollouts, item.group).len() + rows)),
            }
        }
        let sizes: Vec<usize> = pieces.iter().map(|(_, rows)| *rows).collect();
        let own = |run: Range<usize>| pieces[run].iter().flat_map(|(own, _)| own.clone());
        pack(&sizes, self.sampler.sizes.pass_tokens)
            .into_iter()
            .map(|run| own(run).collect())
            .collect()
    }

    /// Completions packed with the prompts of their groups, each prompt once.
    pub(super) fn pack(&self, rollouts: &Rollouts, items: &[&Item]) -> Result<Batch> {
        let mut batch = Batch::default();
        for own in items.chunk_by(|a, b| a.group == b.group) {
            let group = &rollouts.groups[own[0].group];
            let completions: Vec<&[u32]> = own
                .iter()
                .map(|item| &group.completions[item.sample].tokens[..])
                .collect();
            batch.push_group(self.prompt(rollouts, own[0].group), &completions)?;
        }
        Ok(batch)
    }

    /// The prompt of a group.
    pub(super) fn prompt(&self, rollouts: &Rollouts, group: usize) -> &[u32] {
        let problem = rollouts.groups[group].problem;
        &self.sampler.problems[problem].prompt.tokens
    }

    fn completion_rows(&self, rollouts: &Rollouts) -> Vec<CompletionRow> {
        let n = self.config.num_generations;
        let completions = rollouts.completions().enumerate();
        completions
            .map(|(i, completion)| {
                let group = &rollouts.groups[i / n];
                let problem = &self.sampler.problems[group.problem];
                CompletionRow {
                    step: self.step,
                    problem: problem.problem.id.clone(),
                    prompt: problem.prompt.text.clone(),
                    completion: completion.text.clone(),
                    answer: problem.problem.answer.clone(),
                    extracted: group.extracted[i % n].clone(),
                    reward: rollouts.advantages.rewards[i],
                    advantage: rollouts.advantages.values[i],
                    num_tokens: completion.tokens.len(),
                    finish: completion.finish,
                }
            })
            .collect()
    }
}

/// Where the policy of an update stands towards the one that sampled.
pub(super) struct Policy {
    /// There was an update since.
    pub(super) moved: bool,
    /// For a sampler whose log-probabilities are not those of the trainer.
    pub(super) correction: Option<SamplerCorrection>,
}

impl Sums {
    /// Adds completions whose tokens have these log-probabilities, one after the other, and gives
    /// dL/dlogp of every token.
    pub(super) fn add(
        &mut self,
        params: &LossParams,
        policy: &Policy,
        items: &[&Item],
        logps: &[f64],
    ) -> Vec<f64> {
        let mut gradient = vec![0.0; logps.len()];
        let (mut rest, mut logps_left) = (&mut gradient[..], logps);
        for item in items {
            let length = item.sampled.len();
            let (logps, after) = logps_left.split_at(length);
            let (own, others) = rest.split_at_mut(length);
            (rest, logps_left) = (others, after);
            let old = match (policy.moved, &item.old) {
                (false, _) => logps,
                (true, Some(old)) => old,
                (true, None) => &item.sampled,
            };
            let ratio = match &policy.correction {
                Some(correction) => correction.ratio(old, &item.sampled),
                None => SamplerRatio::One,
            };
            let sequence = Sequence {
                logps,
                old_logps: old,
                ref_logps: item.reference.as_deref(),
                advantage: item.advantage,
                ratio: &ratio,
                weight: item.weight,
            };
            self.loss += sequence_loss(params, sequence, own, &mut self.stats);
            if !policy.moved {
                self.difference.add(logps, &item.sampled);
                self.ratios.extend(ratio.values());
            }
        }
        gradient
    }

    pub(super) fn add_entropies(&mut self, entropies: &[f64]) {
        // One by one: the sum must not depend on what was packed together.
        entropies.iter().for_each(|e| self.entropy += e);
        self.tokens += entropies.len();
    }

    fn write(&self, loss: &LossParams, metrics: &mut StepMetrics) {
        let updates = self.updates.len().max(1) as f64;
        metrics.set("loss", self.loss / updates);
        let grad_norm = self.updates.iter().map(|u| u.grad_norm).sum::<f64>() / updates;
        metrics.set("grad_norm", grad_norm);
        if let Some(rate) = self.updates.last().and_then(|u| u.learning_rate) {
            metrics.set("learning_rate", rate);
        }
        if let Some(natural) = &self.natural {
            natural.write(metrics);
        }
        if self.tokens > 0 {
            metrics.set("entropy", self.entropy / self.tokens as f64);
        }
        for (name, value) in self.stats.metrics(loss) {
            metrics.set(name, value);
        }
        self.difference.write(metrics);
        if !self.ratios.is_empty() {
            let name = |part: &str| format!("sampling/importance_sampling_ratio/{part}");
            let of = |f: fn(f64, f64) -> f64| self.ratios.iter().copied().reduce(f);
            metrics.set(name("min"), of(f64::min).unwrap_or(1.0));
            let mean = self.ratios.iter().sum::<f64>() / self.ratios.len() as f64;
            metrics.set(name("mean"), mean);
            metrics.set(name("max"), of(f64::max).unwrap_or(1.0));
        }
    }
}

impl Trainer for GrpoTrainer<'_> {
    fn step(&mut self, on_progress: &mut dyn FnMut(usize, usize)) -> Result<StepOutput> {
        let started = Instant::now();
        let bytes_before = self.bytes();
        // Rollouts are about half of the time: they count from 0 to 1000, the updates to 2000.
        let rollouts = self.sampler.sample(
            self.learner.adapter(),
            self.step,
            self.position,
            &mut |done, total| on_progress(1000 * done / total.max(1), 2000),
        )?;
        let rollout_time = started.elapsed().as_secs_f64();
        if self.overlaps && self.step + 1 < self.total_steps {
            let next = self.position + rollouts.drawn;
            self.sampler
                .begin(self.learner.adapter(), self.step + 1, next)?;
        }
        let sums = self.learn(&rollouts, &mut |done, total| {
            on_progress(1000 + 1000 * done / total.max(1), 2000);
        })?;

        self.step += 1;
        self.position += rollouts.drawn;
        let groups: Vec<&Group> = rollouts.sampled().collect();
        let completions = groups.iter().flat_map(|group| &group.completions);
        let sampled: usize = completions.map(|c| c.tokens.len()).sum();
        let prompt = |group: &&Group| self.sampler.problems[group.problem].prompt.tokens.len();
        let prompts: usize = groups.iter().map(prompt).sum();
        self.num_tokens += (sampled + prompts * self.config.num_generations) as u64;

        let mut metrics = StepMetrics::default();
        let names: Vec<&str> = self.sampler.rewards.names().collect();
        let weights = &self.sampler.weights;
        metrics::rewards(groups.iter().copied(), &names, weights, &mut metrics);
        metrics.set("frac_reward_zero_std", rollouts.advantages.frac_zero_std);
        metrics::lengths(groups.iter().copied(), &mut metrics);
        sums.write(&self.loss, &mut metrics);
        let step_time = started.elapsed().as_secs_f64();
        for (name, value) in [
            ("num_tokens", self.num_tokens as f64),
            ("epoch", self.sampler.order.epochs(self.position)),
            ("step_time", step_time),
            ("time/rollout", rollout_time),
            ("tokens_per_second", sampled as f64 / step_time),
        ] {
            metrics.set(name, value);
        }
        for ((name, after), (_, before)) in self.bytes().into_iter().zip(bytes_before) {
            if after > before {
                metrics.set(name, (after - before) as f64);
            }
        }
        Ok(StepOutput {
            metrics,
            completions: self.completion_rows(&rollouts),
        })
    }

    fn adapter(&self) -> &Adapter {
        self.learner.adapter()
    }

    fn step_number(&self) -> u64 {
        self.step
    }

    fn state(&self) -> TrainState {
        let mut state = TrainState {
            step: self.step,
            position: self.position,
            num_tokens: self.num_tokens,
            ..TrainState::default()
        };
        self.learner.save(&mut state);
        state
    }

    fn restore(&mut self, state: &TrainState) -> Result<()> {
        self.learner.restore(state)?;
        self.step = state.step;
        self.position = state.position;
        self.num_tokens = state.num_tokens;
        Ok(())
    }
}
