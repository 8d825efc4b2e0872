//! The training problems with their prompts, and the trainer that goes through them.

use sha2::{Digest, Sha256};

use super::plan::Workload;
use super::training::Trainer;
use crate::adapter::Adapter;
use crate::config::{Config, Method, Sizes};
use crate::data::prompts::{PromptedProblem, Template};
use crate::data::{self, DataOrder};
use crate::grpo::{GrpoTrainer, Sampler};
use crate::model::{Model, Passes, Tokenizer};
use crate::ranks::Ranks;
use crate::reward::{Grader, RewardSet};
use crate::rollout::Engines;
use crate::sft::{Example, SftTrainer, end_of_turn};
use crate::{Error, Result};

/// What a run learns from.
pub struct TrainingData {
    problems: Vec<PromptedProblem>,
    /// GRPO: what a completion is worth when the configuration names no reward.
    default_reward: Grader,
    /// SFT: the solutions behind the prompts.
    examples: Vec<Example>,
}

impl TrainingData {
    /// Reads the problems and puts them into the prompt template.
    ///
    /// # Errors
    /// Unreadable data; no problem left; a prompt the checkpoint has no chat template for; prompts
    /// and completions that do not fit `context` positions; SFT without solutions.
    pub fn load(
        config: &Config,
        tokenizer: &Tokenizer,
        context: usize,
        quiet: bool,
    ) -> Result<Self> {
        let template = template(config)?;
        let (dataset, shots) = data::load_with_shots(&config.data, template.num_shots(), quiet)?;
        tracing::info!("{}: {}", dataset.name, dataset.report.summary());
        let limit = config.data.max_prompt_length;
        let (problems, too_long) =
            template.render_all(tokenizer, dataset.problems, &shots, limit)?;
        if too_long > 0 {
            tracing::warn!(
                "{too_long} problems have prompts of more than {limit} tokens: left out"
            );
        }
        if problems.is_empty() {
            return Err(Error::data(format!(
                "no problem of {} has a prompt of at most {limit} tokens (data.max_prompt_length)",
                config.data.train
            )));
        }
        let default_reward = match template {
            Template::QwenBoxed => Grader::Math,
            _ => Grader::Gsm8k,
        };
        let examples = match config.method {
            Method::Grpo => Vec::new(),
            Method::Sft => examples(config, tokenizer, &problems)?,
        };
        let data = Self {
            problems,
            default_reward,
            examples,
        };
        data.check_context(config, context)?;
        Ok(data)
    }

    fn check_context(&self, config: &Config, context: usize) -> Result<()> {
        let (prompt, completion) = (self.longest_prompt(), config.grpo.max_completion_length);
        if config.method == Method::Grpo && prompt + completion > context {
            return Err(Error::config(format!(
                "grpo.max_completion_length = {completion}: with the longest prompt of {prompt} \
                 tokens that is more than the model's context of {context}; lower it or \
                 data.max_prompt_length"
            )));
        }
        Ok(())
    }

    pub fn len(&self) -> usize {
        self.problems.len()
    }

    pub fn is_empty(&self) -> bool {
        self.problems.is_empty()
    }

    /// Tokens of the longest prompt.
    pub fn longest_prompt(&self) -> usize {
        let lengths = self.problems.iter().map(|p| p.prompt.tokens.len());
        lengths.max().unwrap_or(0)
    }

    /// Tokens of every prompt (GRPO) or whole example (SFT), longest first.
    pub fn lengths(&self, config: &Config) -> Vec<usize> {
        let mut lengths: Vec<usize> = match config.method {
            Method::Grpo => {
                let prompts = self.problems.iter();
                prompts.map(|p| p.prompt.tokens.len()).collect()
            }
            Method::Sft => {
                let examples = self.examples.iter();
                examples
                    .map(|e| e.prompt.len() + e.completion.len() - 1)
                    .collect()
            }
        };
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        lengths
    }

    /// Tokens that all prompts begin with.
    pub fn common_tokens(&self) -> usize {
        Workload::common(self.problems.iter().map(|p| &p.prompt.tokens[..]))
    }

    /// The first prompt as the model sees it.
    pub fn first_prompt(&self) -> &str {
        self.problems.first().map_or("", |p| &p.prompt.text)
    }

    /// Steps of `train.num_train_epochs`.
    pub fn steps(&self, config: &Config) -> u64 {
        let per_step = match config.method {
            Method::Grpo => config.grpo.prompts_per_step,
            Method::Sft => config.sft.examples_per_step,
        };
        DataOrder::new(0, self.len()).steps(config.train.num_train_epochs, per_step)
    }

    /// SHA-256 over prompts, answers and solutions in order.
    pub fn hash(&self) -> String {
        let mut hasher = Sha256::new();
        let mut add = |bytes: &[u8]| {
            hasher.update((bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        for PromptedProblem { problem, prompt } in &self.problems {
            let tokens: Vec<u8> = prompt.tokens.iter().flat_map(|t| t.to_le_bytes()).collect();
            add(&tokens);
            add(problem.answer.as_bytes());
            add(problem.solution.as_deref().unwrap_or_default().as_bytes());
        }
        format!("{:x}", hasher.finalize())
    }

    /// The trainer of the configured method, on the model itself or in a seat at it.
    pub fn trainer<'a>(
        &'a self,
        config: &'a Config,
        model: &'a Model,
        adapter: Adapter,
        total_steps: u64,
        sizes: Sizes,
        (engines, ranks): (&'a Engines<'a>, &Ranks),
    ) -> Result<Box<dyn Trainer + 'a>> {
        let seed = config.train.seed;
        let passes: &dyn Passes = match engines {
            Engines::Lockstep(seat) => *seat,
            _ => &model.decoder,
        };
        match config.method {
            Method::Sft => {
                let trainer = SftTrainer::new(
                    &config.sft,
                    &config.optim,
                    &model.decoder,
                    adapter,
                    &self.examples,
                    seed,
                    total_steps,
                )?;
                let trainer = trainer.with_pass_tokens(sizes.pass_tokens);
                Ok(Box::new(
                    trainer.with_passes(passes).with_ranks(ranks.clone()),
                ))
            }
            Method::Grpo => {
                let longest = config.grpo.max_completion_length;
                let rewards = RewardSet::from_config(&config.reward, self.default_reward, longest)?;
                let all_one = vec![1.0; rewards.names().count()];
                let sampler = Sampler {
                    config: &config.grpo,
                    engine: engines.engine(),
                    problems: &self.problems,
                    rewards,
                    weights: config.grpo.reward_weights.clone().unwrap_or(all_one),
                    order: DataOrder::new(seed, self.len()),
                    eos: model.tokenizer.eos_ids().to_vec(),
                    seed,
                    sizes,
                    ranks: ranks.clone(),
                };
                let (grpo, optim) = (&config.grpo, &config.optim);
                let trainer =
                    GrpoTrainer::new(grpo, optim, &model.decoder, adapter, sampler, total_steps);
                let overlaps = config.rollout.one_step_off_policy;
                let trainer = trainer.with_passes(passes);
                Ok(Box::new(trainer.one_step_off_policy(overlaps)))
            }
        }
    }
}

/// Fills in what follows from the prompt: where completions of a raw prompt end.
pub fn complete(config: &mut Config) -> Result<()> {
    if config.grpo.stop.is_empty() {
        config.grpo.stop = template(config)?.stop();
    }
    Ok(())
}

/// `auto` is the benchmark's own template; problems from a file get that of GSM8K.
fn template(config: &Config) -> Result<Template> {
    match config.data.prompt.as_str() {
        "auto" => match data::benchmarks::find(&config.data.train) {
            Some(benchmark) => benchmark.prompt.parse(),
            None => Ok(Template::Gsm8k),
        },
        given => given.parse(),
    }
}

fn examples(
    config: &Config,
    tokenizer: &Tokenizer,
    problems: &[PromptedProblem],
) -> Result<Vec<Example>> {
    let end = end_of_turn(tokenizer)?;
    let example = |p: &PromptedProblem| {
        let max_length = config.sft.max_length;
        Example::new(&p.problem, &p.prompt.tokens, tokenizer, end, max_length)
    };
    problems.iter().map(example).collect()
}
