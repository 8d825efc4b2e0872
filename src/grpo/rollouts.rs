//! The first half of a step: prompts → completions → rewards → advantages.

use serde::{Deserialize, Serialize};

use super::advantages::{Advantages, advantages};
use crate::adapter::Adapter;
use crate::config::{GrpoConfig, Sizes};
use crate::data::DataOrder;
use crate::data::prompts::PromptedProblem;
use crate::model::{BatchInputs, GroupInputs};
use crate::ranks::Ranks;
use crate::reward::{RewardSet, Sample};
use crate::rollout::{Completion, Engine, Request, SamplingParams};
use crate::run::signals;
use crate::{Error, Result};

/// A prompt with its completions.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Group {
    /// Index of the problem.
    pub problem: usize,
    pub completions: Vec<Completion>,
    /// By reward function, then completion.
    pub rewards: Vec<Vec<f64>>,
    /// Answer that the first grader found in each completion.
    pub extracted: Vec<Option<String>>,
    /// The rank that sampled it, which passes over it in updates.
    pub owner: usize,
    /// What the rollout recorded for the update, on the rank that sampled.
    #[serde(skip)]
    pub inputs: Option<GroupInputs>,
}

/// A generation batch.
#[derive(Debug)]
pub struct Rollouts {
    pub groups: Vec<Group>,
    /// One entry a completion, group after group.
    pub advantages: Advantages,
    /// Groups that dynamic sampling sampled and left out.
    pub discarded: Vec<Group>,
    /// Problems drawn from the data for it.
    pub drawn: u64,
}

/// What samples and grades.
pub struct Sampler<'a> {
    pub config: &'a GrpoConfig,
    pub engine: Box<dyn Engine + 'a>,
    pub problems: &'a [PromptedProblem],
    pub rewards: RewardSet,
    /// One weight a reward function.
    pub weights: Vec<f64>,
    pub order: DataOrder,
    /// Ids that end a completion.
    pub eos: Vec<u32>,
    pub seed: u64,
    pub sizes: Sizes,
    pub ranks: Ranks,
}

impl Sampler<'_> {
    /// The generation batch of `step`, from the problems at `position` of the data order on.
    ///
    /// With `dynamic_sampling`, groups whose rewards are all equal are replaced by groups of the
    /// next problems, for at most `dynamic_sampling_max_rounds` further rollouts; what then still
    /// lacks spread stays. `on_progress(finished, total)` counts completions.
    pub fn sample(
        &mut self,
        adapter: &Adapter,
        step: u64,
        position: u64,
        on_progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Rollouts> {
        let wanted = self.config.prompts_per_step;
        self.engine.record(self.sizes.activation_memory);
        let mut drawn = wanted as u64;
        let mut groups = self.rollout(adapter, step, position, wanted, on_progress)?;
        let mut advantages = self.judge(&groups)?;
        let mut discarded = Vec::new();
        let rounds = match self.config.dynamic_sampling {
            true => self.config.dynamic_sampling_max_rounds,
            false => 0,
        };
        for _ in 0..rounds {
            let flat: Vec<usize> = (0..wanted).filter(|&g| !advantages.spread[g]).collect();
            if flat.is_empty() {
                break;
            }
            let next = position + drawn;
            drawn += flat.len() as u64;
            let fresh = self.rollout(adapter, step, next, flat.len(), on_progress)?;
            let spread = self.judge(&fresh)?.spread;
            let mut places = flat.into_iter();
            for (group, spread) in fresh.into_iter().zip(spread) {
                // As many places as fresh groups: there is one for every useful group.
                let place = if spread { places.next() } else { None };
                let mut left_out = match place {
                    Some(at) => std::mem::replace(&mut groups[at], group),
                    None => group,
                };
                left_out.inputs = None;
                discarded.push(left_out);
            }
            advantages = self.judge(&groups)?;
        }
        Ok(Rollouts {
            groups,
            advantages,
            discarded,
            drawn,
        })
    }

    /// Groups of `count` problems from `position` on, in order: every rank samples its share.
    fn rollout(
        &mut self,
        adapter: &Adapter,
        step: u64,
        position: u64,
        count: usize,
        on_progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Vec<Group>> {
        let share = self.ranks.share(count);
        let first = position + share.start as u64;
        let own = self.own_rollout(adapter, step, first, share.len(), on_progress);
        let all = self.ranks.gather(own)?;
        Ok(all.into_iter().flatten().collect())
    }

    /// Groups of `count` problems from `position` on, in order, sampled by this rank.
    fn own_rollout(
        &mut self,
        adapter: &Adapter,
        step: u64,
        position: u64,
        count: usize,
        on_progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Vec<Group>> {
        if count == 0 {
            return Ok(Vec::new());
        }
        let n = self.config.num_generations;
        let owner = self.ranks.rank();
        let (chosen, requests) = self.requests(position, count);
        let params = self.params(step);
        let batch = Asked {
            problems: self.problems,
            chosen: &chosen,
            each: n,
        };
        let mut finished = 0;
        let mut early = Early::new(&mut self.rewards, batch);
        let completions = self.engine.generate(
            Some(adapter),
            &requests,
            &params,
            &mut |_, _, _| {},
            &mut |request, at, completion| {
                finished += 1;
                early.add(request * n + at, completion);
                on_progress(finished, count * n);
            },
        )?;
        signals::check()?;
        let logprobs = completions.iter().flatten().flat_map(|c| &c.logprobs);
        // Other engines leave some out (NaN).
        let exact = self.engine.exact();
        let is_broken = |l: &f32| l.is_infinite() || (exact && l.is_nan());
        if let Some(broken) = logprobs.copied().find(is_broken) {
            return Err(Error::Diverged(format!(
                "a log-probability of the completions of step {} is {broken}: the adapter's numbers \
                 have grown too large; lower optim.learning_rate",
                step + 1
            )));
        }
        let samples: Vec<Sample> = completions
            .iter()
            .flatten()
            .enumerate()
            .map(|(at, completion)| batch.sample(at, completion))
            .collect();
        let mut scores = self.rewards.score(&samples)?;
        let mut recorded = self.engine.take_recorded().into_iter();
        Ok(chosen
            .into_iter()
            .zip(completions)
            .enumerate()
            .map(|(group, (problem, completions))| {
                let own = group * n..(group + 1) * n;
                let rewards = scores.rewards.iter().map(|all| all[own.clone()].to_vec());
                Group {
                    problem,
                    rewards: rewards.collect(),
                    extracted: scores.extracted[own.clone()]
                        .iter_mut()
                        .map(Option::take)
                        .collect(),
                    completions,
                    owner,
                    inputs: recorded.next().flatten(),
                }
            })
            .collect())
    }

    /// The problems at `count` places from `position` on, and what the engine is asked for them.
    fn requests(&mut self, position: u64, count: usize) -> (Vec<usize>, Vec<Request>) {
        let places = (position..).take(count);
        places
            .map(|id| {
                let problem = self.order.at(id);
                let prompt = self.problems[problem].prompt.tokens.clone();
                let n = self.config.num_generations;
                (problem, Request { id, prompt, n })
            })
            .unzip()
    }

    /// Has the engine start on the generation batch of `step`, if it can while this process goes on:
    /// [`Self::sample`] then gives completions of this adapter.
    pub fn begin(&mut self, adapter: &Adapter, step: u64, position: u64) -> Result<()> {
        let share = self.ranks.share(self.config.prompts_per_step);
        let (_, requests) = self.requests(position + share.start as u64, share.len());
        let params = self.params(step);
        match requests.is_empty() {
            true => Ok(()),
            false => self.engine.begin(Some(adapter), &requests, &params),
        }
    }

    fn judge(&self, groups: &[Group]) -> Result<Advantages> {
        let rewards = rewards_by_function(groups, self.weights.len());
        advantages(
            &rewards,
            &self.weights,
            self.config.num_generations,
            self.config.scale_rewards,
        )
    }

    fn params(&self, step: u64) -> SamplingParams {
        let config = self.config;
        SamplingParams {
            temperature: config.temperature,
            top_p: config.top_p,
            top_k: config.top_k,
            min_p: config.min_p,
            max_tokens: config.max_completion_length,
            stop: config.stop.clone(),
            eos: self.eos.clone(),
            seed: self.seed,
            step,
        }
    }
}

/// What the completions of a batch answer.
#[derive(Clone, Copy)]
struct Asked<'a> {
    problems: &'a [PromptedProblem],
    /// By group.
    chosen: &'a [usize],
    /// Completions of a group.
    each: usize,
}

impl<'a> Asked<'a> {
    /// What rewards look at in completion `at` of the batch.
    fn sample<'c>(&self, at: usize, completion: &'c Completion) -> Sample<'c>
    where
        'a: 'c,
    {
        let problem = &self.problems[self.chosen[at / self.each]];
        Sample {
            prompt: &problem.prompt.text,
            completion: &completion.text,
            gold: &problem.problem.answer,
            tokens: completion.tokens.len(),
        }
    }
}

/// Announces completions to rewards that listen, in the order of the batch however they finish.
struct Early<'a> {
    rewards: Option<&'a mut RewardSet>,
    asked: Asked<'a>,
    waiting: Vec<Option<Completion>>,
    next: usize,
}

impl<'a> Early<'a> {
    fn new(rewards: &'a mut RewardSet, asked: Asked<'a>) -> Self {
        Self {
            rewards: rewards.listens().then_some(rewards),
            asked,
            waiting: vec![None; asked.chosen.len() * asked.each],
            next: 0,
        }
    }

    /// The completion of number `at` has finished.
    fn add(&mut self, at: usize, completion: &Completion) {
        let Some(rewards) = &mut self.rewards else {
            return;
        };
        self.waiting[at] = Some(completion.clone());
        while let Some(completion) = self.waiting.get_mut(self.next).and_then(Option::take) {
            rewards.announce(&self.asked.sample(self.next, &completion));
            self.next += 1;
        }
    }
}

/// What each of `count` functions gave the completions, group after group.
pub(super) fn rewards_by_function<'a>(
    groups: impl IntoIterator<Item = &'a Group> + Clone,
    count: usize,
) -> Vec<Vec<f64>> {
    let of = |k: usize| {
        groups
            .clone()
            .into_iter()
            .flat_map(move |g| g.rewards[k].iter().copied())
    };
    (0..count).map(|k| of(k).collect()).collect()
}

impl Rollouts {
    /// Completions in the order of the advantages.
    pub fn completions(&self) -> impl Iterator<Item = &Completion> {
        self.groups.iter().flat_map(|group| &group.completions)
    }

    /// The rows of these prompts and samples of them, group after group, if all were recorded.
    pub(super) fn recorded<'s>(
        &self,
        groups: impl Iterator<Item = (usize, &'s [usize])>,
    ) -> Option<BatchInputs> {
        let mut batch = BatchInputs::default();
        for (group, samples) in groups {
            let inputs = self.groups[group].inputs.as_ref()?;
            batch.push(&inputs.prompt);
            for &sample in samples {
                batch.push(&inputs.completions[sample]);
            }
        }
        Some(batch)
    }

    /// Every group that was sampled, also those left out.
    pub fn sampled(&self) -> impl Iterator<Item = &Group> {
        self.groups.iter().chain(&self.discarded)
    }
}
