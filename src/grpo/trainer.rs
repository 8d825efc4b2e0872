//! The GRPO step: rollouts and advantages, then one or several updates on them.

use std::time::Instant;

use super::importance::{SamplerCorrection, SamplerRatio};
use super::loss::{
    LossParams, LossStats, Normalizer, Sequence, on_policy_coefficient, sequence_loss,
    token_weights,
};
use super::metrics::{self, SamplerDifference};
use super::rollouts::{Rollouts, Sampler};
use crate::Result;
use crate::adapter::{Adapter, Gradients};
use crate::config::{GrpoConfig, OptimConfig};
use crate::model::{Batch, Coefficients, Decoder, Keep, pack};
use crate::ops::Backend;
use crate::ops::head::Scores;
use crate::optim::{Learner, Update};
use crate::run::logs::CompletionRow;
use crate::run::training::{StepOutput, Trainer};
use crate::run::{StepMetrics, TrainState, signals};

/// Trains an adapter with GRPO, one generation batch a step.
pub struct GrpoTrainer<'a> {
    config: &'a GrpoConfig,
    loss: LossParams,
    decoder: &'a Decoder,
    sampler: Sampler<'a>,
    learner: Learner,
    step: u64,
    position: u64,
    num_tokens: u64,
}

/// A completion in an update.
#[derive(Debug, Clone)]
struct Item {
    group: usize,
    sample: usize,
    advantage: f64,
    /// Share of each of its tokens in the loss; 0 leaves it out.
    weight: f64,
    /// Log-probabilities when it was sampled, by the trainer's own arithmetic once known.
    old: Vec<f64>,
    reference: Option<Vec<f64>>,
    ratio: SamplerRatio,
}

/// What the updates of a step add up.
#[derive(Default)]
struct Sums {
    loss: f64,
    entropy: f64,
    tokens: usize,
    stats: LossStats,
    difference: SamplerDifference,
    ratios: Vec<f64>,
    updates: Vec<Update>,
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
            sampler,
            learner: Learner::new(adapter, optim, updates),
            step: 0,
            position: 0,
            num_tokens: 0,
        }
    }

    #[cfg(test)]
    pub(super) fn sampler_mut(&mut self) -> &mut Sampler<'a> {
        &mut self.sampler
    }

    /// All updates on one generation batch.
    fn learn(
        &mut self,
        rollouts: &Rollouts,
        on_part: &mut dyn FnMut(usize, usize),
    ) -> Result<Sums> {
        let mut items = self.items(rollouts);
        // On the CPU the sampler's log-probabilities have the scorer's bits. Elsewhere they are
        // computed again: for the correction of the difference, and before the policy moves.
        let exact = self.decoder.placement.backend == Backend::Cpu;
        if !exact {
            self.score_old(rollouts, &mut items)?;
        }
        if self.loss.beta != 0.0 {
            self.score_reference(rollouts, &mut items)?;
        }
        let mut sums = Sums::default();
        let per_update = self.config.prompts_per_step / self.config.steps_per_generation;
        let parts = self.config.updates_per_step();
        for part in 0..parts {
            let first = part % self.config.steps_per_generation * per_update;
            let groups = first..first + per_update;
            let own: Vec<Item> = items
                .iter()
                .filter(|item| groups.contains(&item.group))
                .cloned()
                .collect();
            let on_policy = part == 0;
            let mut progress = |done: usize, total: usize| {
                on_part(part * total + done, parts * total);
            };
            let gradients = self.gradients(rollouts, own, on_policy, &mut sums, &mut progress)?;
            sums.updates.push(self.learner.update(&gradients)?);
        }
        Ok(sums)
    }

    /// Every completion with its advantage; weights are set update by update.
    fn items(&self, rollouts: &Rollouts) -> Vec<Item> {
        let n = self.config.num_generations;
        let completions = rollouts.completions().enumerate();
        completions
            .map(|(i, completion)| Item {
                group: i / n,
                sample: i % n,
                advantage: rollouts.advantages.values[i],
                weight: 0.0,
                old: completion.logprobs.iter().map(|&l| f64::from(l)).collect(),
                reference: None,
                ratio: SamplerRatio::One,
            })
            .collect()
    }

    /// The gradient of one update, micro-batch by micro-batch.
    fn gradients(
        &self,
        rollouts: &Rollouts,
        mut items: Vec<Item>,
        on_policy: bool,
        sums: &mut Sums,
        on_progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Gradients> {
        let mut micro_batches = self.micro_batches(rollouts, &items);
        self.weigh(rollouts, &mut items, &micro_batches);
        let idle =
            |item: &Item| item.weight == 0.0 || (item.advantage == 0.0 && self.loss.beta == 0.0);
        for item in items.iter().filter(|item| idle(item)) {
            let tokens = if item.weight == 0.0 {
                0
            } else {
                item.old.len()
            };
            sums.stats.add_inactive(&self.loss, tokens);
        }
        for micro_batch in &mut micro_batches {
            micro_batch.retain(|&i| !idle(&items[i]));
        }
        let mut gradients = self.learner.adapter().gradients();
        let total = micro_batches.len();
        for (done, micro_batch) in micro_batches.iter().enumerate() {
            signals::check()?;
            if !micro_batch.is_empty() {
                let own: Vec<&Item> = micro_batch.iter().map(|&i| &items[i]).collect();
                self.accumulate(rollouts, &own, on_policy, &mut gradients, sums)?;
            }
            on_progress(done + 1, total);
        }
        Ok(gradients)
    }

    /// Completions (indices into `items`) of each micro-batch: whole groups, up to
    /// `micro_batch_tokens` rows; a group that is larger by itself is cut.
    fn micro_batches(&self, rollouts: &Rollouts, items: &[Item]) -> Vec<Vec<usize>> {
        let limit = self.config.micro_batch_tokens;
        let prompt = |i: usize| self.prompt(rollouts, items[i].group).len();
        let mut pieces: Vec<(Vec<usize>, usize)> = Vec::new();
        for (i, item) in items.iter().enumerate() {
            let rows = item.old.len();
            match pieces.last_mut() {
                Some((own, filled))
                    if items[own[0]].group == item.group && *filled + rows <= limit =>
                {
                    own.push(i);
                    *filled += rows;
                }
                _ => pieces.push((vec![i], prompt(i) + rows)),
            }
        }
        let sizes: Vec<usize> = pieces.iter().map(|(_, rows)| *rows).collect();
        pack(&sizes, limit)
            .into_iter()
            .map(|run| {
                pieces[run]
                    .iter()
                    .flat_map(|(own, _)| own.clone())
                    .collect()
            })
            .collect()
    }

    /// Sets the weight of every completion of an update.
    fn weigh(&self, rollouts: &Rollouts, items: &mut [Item], micro_batches: &[Vec<usize>]) {
        let n = self.config.num_generations;
        let active = rollouts.active_tokens(self.config.mask_truncated_completions);
        let own: Vec<usize> = items
            .iter()
            .map(|i| active[i.group * n + i.sample])
            .collect();
        let mut micro_batch = vec![0; items.len()];
        for (number, members) in micro_batches.iter().enumerate() {
            members.iter().for_each(|&i| micro_batch[i] = number);
        }
        let updates = self.config.steps_per_generation as f64;
        let weights = token_weights(
            self.loss.loss_type,
            Normalizer {
                active_tokens: &own,
                micro_batch: &micro_batch,
                tokens_per_update: active.iter().sum::<usize>() as f64 / updates,
                max_completion_length: self.config.max_completion_length,
            },
        );
        for ((item, weight), tokens) in items.iter_mut().zip(weights).zip(own) {
            item.weight = if tokens > 0 { weight } else { 0.0 };
        }
    }

    /// One forward and backward pass.
    fn accumulate(
        &self,
        rollouts: &Rollouts,
        items: &[&Item],
        on_policy: bool,
        gradients: &mut Gradients,
        sums: &mut Sums,
    ) -> Result<()> {
        let batch = self.pack(rollouts, items)?;
        let keep = Keep::choose(
            self.config.gradient_checkpointing,
            &self.decoder.config,
            batch.tokens.len(),
        );
        let known: Option<Vec<f64>> = items
            .iter()
            .map(|item| match item.ratio {
                SamplerRatio::One if on_policy => {
                    on_policy_coefficient(&self.loss, item.advantage, item.weight)
                }
                _ => None,
            })
            .collect();
        let mut loss = LossSum::default();
        let mut of_scores = |scores: &Scores| Ok(loss.add(&self.loss, items, &batch, scores));
        let coefficients = match known {
            Some(known) => {
                let lengths = batch.lengths.iter();
                let spread = known
                    .iter()
                    .zip(lengths)
                    .flat_map(|(&c, &len)| vec![c; len]);
                Coefficients::Known(spread.collect())
            }
            None => Coefficients::OfScores(&mut of_scores),
        };
        let was_known = matches!(coefficients, Coefficients::Known(_));
        let scores = self.decoder.accumulate_gradients(
            self.learner.adapter(),
            &batch,
            self.config.temperature,
            keep,
            coefficients,
            gradients,
        )?;
        if was_known {
            loss.add(&self.loss, items, &batch, &scores);
        }
        sums.loss += loss.value;
        sums.stats.merge(&loss.stats);
        sums.entropy += scores.entropies.iter().sum::<f64>();
        sums.tokens += scores.entropies.len();
        if on_policy {
            for (item, logps) in items.iter().zip(batch.by_completion(&scores.logprobs)) {
                let completion = &rollouts.groups[item.group].completions[item.sample];
                let sampler: Vec<f64> = completion.logprobs.iter().map(|&l| f64::from(l)).collect();
                sums.difference.add(logps, &sampler);
                sums.ratios.extend(item.ratio.values());
            }
        }
        Ok(())
    }

    /// The trainer's own log-probabilities at sampling time, and the correction for the sampler's.
    fn score_old(&self, rollouts: &Rollouts, items: &mut [Item]) -> Result<()> {
        let correction = SamplerCorrection::new(self.config);
        self.score(
            rollouts,
            items,
            Some(self.learner.adapter()),
            |item, logps| {
                if let Some(correction) = &correction {
                    item.ratio = correction.ratio(logps, &item.old);
                }
                item.old = logps.to_vec();
            },
        )
    }

    /// Log-probabilities under the model with the adapter off.
    fn score_reference(&self, rollouts: &Rollouts, items: &mut [Item]) -> Result<()> {
        self.score(rollouts, items, None, |item, logps| {
            item.reference = Some(logps.to_vec());
        })
    }

    fn score(
        &self,
        rollouts: &Rollouts,
        items: &mut [Item],
        adapter: Option<&Adapter>,
        mut each: impl FnMut(&mut Item, &[f64]),
    ) -> Result<()> {
        for micro_batch in self.micro_batches(rollouts, items) {
            signals::check()?;
            let own: Vec<&Item> = micro_batch.iter().map(|&i| &items[i]).collect();
            let batch = self.pack(rollouts, &own)?;
            let temperature = self.config.temperature;
            let scores = self.decoder.score(adapter, &batch, temperature)?;
            for (&i, logps) in micro_batch
                .iter()
                .zip(batch.by_completion(&scores.logprobs))
            {
                each(&mut items[i], logps);
            }
        }
        Ok(())
    }

    /// Completions packed with the prompts of their groups, each prompt once.
    fn pack(&self, rollouts: &Rollouts, items: &[&Item]) -> Result<Batch> {
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

    fn prompt(&self, rollouts: &Rollouts, group: usize) -> &[u32] {
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

/// Loss and its statistics over the completions of a pass.
#[derive(Default)]
struct LossSum {
    value: f64,
    stats: LossStats,
}

impl LossSum {
    /// Adds all completions of a pass, and gives dL/dlogp of every token.
    fn add(
        &mut self,
        params: &LossParams,
        items: &[&Item],
        batch: &Batch,
        scores: &Scores,
    ) -> Vec<f64> {
        let mut gradient = vec![0.0; batch.targets.len()];
        let mut rest = &mut gradient[..];
        for (item, logps) in items.iter().zip(batch.by_completion(&scores.logprobs)) {
            let (own, others) = rest.split_at_mut(logps.len());
            rest = others;
            let sequence = Sequence {
                logps,
                old_logps: &item.old,
                ref_logps: item.reference.as_deref(),
                advantage: item.advantage,
                ratio: &item.ratio,
                weight: item.weight,
            };
            self.value += sequence_loss(params, sequence, own, &mut self.stats);
        }
        gradient
    }
}

impl Sums {
    fn write(&self, loss: &LossParams, metrics: &mut StepMetrics) {
        let updates = self.updates.len().max(1) as f64;
        metrics.set("loss", self.loss / updates);
        let grad_norm = self.updates.iter().map(|u| u.grad_norm).sum::<f64>() / updates;
        metrics.set("grad_norm", grad_norm);
        if let Some(last) = self.updates.last() {
            metrics.set("learning_rate", last.learning_rate);
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
        // Rollouts are about half of the time: they count from 0 to 1000, the updates to 2000.
        let rollouts = self.sampler.sample(
            self.learner.adapter(),
            self.step,
            self.position,
            &mut |done, total| on_progress(1000 * done / total.max(1), 2000),
        )?;
        let rollout_time = started.elapsed().as_secs_f64();
        let sums = self.learn(&rollouts, &mut |done, total| {
            on_progress(1000 + 1000 * done / total.max(1), 2000);
        })?;

        self.step += 1;
        self.position += rollouts.drawn;
        let sampled: usize = rollouts.completions().map(|c| c.tokens.len()).sum();
        let prompts: usize = (0..rollouts.groups.len())
            .map(|group| self.prompt(&rollouts, group).len() * self.config.num_generations)
            .sum();
        self.num_tokens += (sampled + prompts) as u64;

        let mut metrics = StepMetrics::default();
        metrics::of_rollouts(&rollouts, self.sampler.rewards.names(), &mut metrics);
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
