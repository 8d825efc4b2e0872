//! The phases of a GRPO step, timed.

use std::ops::Range;
use std::time::Instant;

use serde::Serialize;

use super::BenchArgs;
use crate::Result;
use crate::adapter::Adapter;
use crate::config::{GrpoConfig, Sizes};
use crate::model::{
    Batch, BatchInputs, BlockInputs, Coefficients, Flops, GroupInputs, Keep, Model, pack,
};
use crate::ops::Span;
use crate::rollout::{Completion, Engine, NativeEngine, Request, SamplingParams};
use crate::run::progress::Bar;

/// Fewest tokens of a prefill: products of fewer rows run below the rate of large ones.
const PREFILL: usize = 1024;

/// What a rollout recorded, by group.
type Recorded = Vec<Option<GroupInputs>>;

/// What is measured.
pub(super) struct Bench<'a> {
    pub args: &'a BenchArgs,
    pub config: &'a GrpoConfig,
    pub sizes: Sizes,
    pub model: &'a Model,
    pub adapter: &'a Adapter,
    pub prompts: &'a [Vec<u32>],
    pub seed: u64,
}

/// What one timed pass of a phase did.
#[derive(Debug, Clone, Copy, Default)]
struct Pass {
    seconds: f64,
    tokens: usize,
    flops: f64,
}

/// The passes of a phase put together.
#[derive(Debug, Serialize)]
pub(super) struct Phase {
    /// Median over the passes.
    pub seconds: f64,
    pub seconds_min: f64,
    pub seconds_max: f64,
    pub tokens: usize,
    pub tokens_per_s: f64,
    pub gflops: f64,
    pub share_of_peak: f64,
}

/// Names of the phases, in the order of [`Bench::pass`].
const PHASES: [&str; 5] = ["prefill", "rollout", "forward", "backward", "step"];

impl Bench<'_> {
    /// All phases, `repeats` times after one pass to warm up.
    pub fn phases(&self, peak: f64, bar: &Bar) -> Result<Vec<(&'static str, Phase)>> {
        let mut passes = Vec::new();
        for number in 0..=self.args.repeats {
            let pass = self.pass(number)?;
            if number > 0 {
                passes.push(pass);
            }
            bar.inc(1);
        }
        let of = |index: usize| passes.iter().map(|pass| pass[index]).collect::<Vec<_>>();
        Ok(PHASES
            .iter()
            .enumerate()
            .map(|(index, name)| (*name, Phase::new(&of(index), peak)))
            .collect())
    }

    /// One step with every group's backward computed, in its parts, and a forward pass that it
    /// does without.
    fn pass(&self, step: u64) -> Result<[Pass; 5]> {
        let prefill = self.prefill()?;
        let (rollout, completions, inputs) = self.rollout(step)?;
        let backward = self.backward(&completions, inputs)?;
        let forward = self.forward(&completions)?;
        // The rollout prefills by itself.
        let step = Pass {
            seconds: rollout.seconds + backward.seconds,
            tokens: rollout.tokens,
            flops: rollout.flops + backward.flops,
        };
        Ok([prefill, rollout, forward, backward, step])
    }

    fn flops(&self) -> Flops<'_> {
        Flops::new(&self.model.decoder.config)
    }

    /// All prompts as one batch, over and over until it has [`PREFILL`] tokens.
    fn prefill(&self) -> Result<Pass> {
        let decoder = &self.model.decoder;
        let started = Instant::now();
        let mut cache = decoder.new_cache();
        let (mut tokens, mut spans) = (Vec::new(), Vec::new());
        for prompt in self.prompts.iter().cycle() {
            if tokens.len() >= PREFILL {
                break;
            }
            spans.push(Span {
                row: tokens.len(),
                len: prompt.len(),
                slot: cache.alloc(None, prompt.len()),
                pos: 0,
            });
            tokens.extend_from_slice(prompt);
        }
        let hidden = decoder.forward(
            &Some(self.adapter).into(),
            &tokens,
            &spans,
            &mut cache,
            None,
        )?;
        wait(&hidden)?;
        Ok(Pass {
            seconds: started.elapsed().as_secs_f64(),
            tokens: tokens.len(),
            flops: spans.iter().map(|s| self.flops().tokens(0, s.len)).sum(),
        })
    }

    /// Samples every group, and records what backward needs of it.
    fn rollout(&self, step: u64) -> Result<(Pass, Vec<Vec<Completion>>, Recorded)> {
        let n = self.args.num_generations as usize;
        let requests: Vec<Request> = self
            .prompts
            .iter()
            .enumerate()
            .map(|(id, prompt)| Request {
                id: id as u64,
                prompt: prompt.clone(),
                n,
            })
            .collect();
        let params = self.sampling(self.args.max_tokens as usize, step);
        let Model {
            decoder, tokenizer, ..
        } = self.model;
        let mut engine = NativeEngine::new(decoder, tokenizer, 64);
        engine.record(self.sizes.activation_memory);
        let started = Instant::now();
        let completions = engine.generate(
            Some(self.adapter),
            &requests,
            &params,
            &mut |_, _, _| {},
            &mut |_, _, _| {},
        )?;
        let seconds = started.elapsed().as_secs_f64();
        let flops = self.flops();
        let mut work = 0.0;
        for (prompt, group) in self.prompts.iter().zip(&completions) {
            work += flops.tokens(0, prompt.len()) + flops.head();
            for completion in group {
                let decoded = completion.tokens.len() - 1;
                work += flops.tokens(prompt.len(), decoded) + decoded as f64 * flops.head();
            }
        }
        let tokens = completions.iter().flatten().map(|c| c.tokens.len()).sum();
        let pass = Pass {
            seconds,
            tokens,
            flops: work,
        };
        Ok((pass, completions, engine.take_recorded()))
    }

    /// Temperature 1 over the whole vocabulary.
    pub fn sampling(&self, max_tokens: usize, step: u64) -> SamplingParams {
        SamplingParams {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            max_tokens,
            stop: Vec::new(),
            eos: self.model.tokenizer.eos_ids().to_vec(),
            seed: self.seed,
            step,
        }
    }

    /// All groups, packed as the trainer packs them, and the groups of each pack.
    fn batches(&self, completions: &[Vec<Completion>]) -> Result<Vec<(Range<usize>, Batch)>> {
        let rows = |(prompt, group): (&Vec<u32>, &Vec<Completion>)| {
            prompt.len() + group.iter().map(|c| c.tokens.len() - 1).sum::<usize>()
        };
        let sizes: Vec<usize> = self.prompts.iter().zip(completions).map(rows).collect();
        pack(&sizes, self.sizes.pass_tokens)
            .into_iter()
            .map(|run| {
                let mut batch = Batch::default();
                for (prompt, group) in self.prompts[run.clone()]
                    .iter()
                    .zip(&completions[run.clone()])
                {
                    let sampled: Vec<&[u32]> = group.iter().map(|c| &c.tokens[..]).collect();
                    batch.push_group(prompt, &sampled)?;
                }
                Ok((run, batch))
            })
            .collect()
    }

    /// The forward pass that training needs where nothing was recorded.
    fn forward(&self, completions: &[Vec<Completion>]) -> Result<Pass> {
        let mut pass = Pass::default();
        for (_, batch) in self.batches(completions)? {
            let (tokens, layout) = (&batch.tokens, &batch.layout);
            let started = Instant::now();
            let decoder = &self.model.decoder;
            let tape =
                decoder.forward_train(&Some(self.adapter).into(), tokens, layout, Keep::Inputs)?;
            wait(&tape.hidden)?;
            pass.seconds += started.elapsed().as_secs_f64();
            pass.tokens += tokens.len();
            pass.flops += self.flops().batch(layout);
        }
        Ok(pass)
    }

    /// The update of the trainer: from what the rollout recorded, else after a forward pass.
    fn backward(&self, completions: &[Vec<Completion>], recorded: Recorded) -> Result<Pass> {
        let decoder = &self.model.decoder;
        let flops = self.flops();
        let mut gradients = self.adapter.gradients();
        let mut pass = Pass::default();
        for (run, batch) in self.batches(completions)? {
            let started = Instant::now();
            let (layout, targets) = (&batch.layout, batch.targets.len());
            let groups: Option<Vec<&GroupInputs>> =
                run.map(|group| recorded.get(group)?.as_ref()).collect();
            let inputs = match groups {
                Some(groups) => {
                    let mut inputs = BatchInputs::default();
                    groups.iter().for_each(|group| inputs.push_group(group));
                    BlockInputs::Recorded(inputs)
                }
                None => {
                    let keep = Keep::choose(
                        self.config.gradient_checkpointing,
                        &decoder.config,
                        batch.tokens.len(),
                        self.sizes.activation_memory,
                    );
                    pass.flops += flops.batch(layout);
                    BlockInputs::Computed(keep)
                }
            };
            if !matches!(inputs, BlockInputs::Computed(Keep::Activations)) {
                pass.flops += flops.batch_again(layout);
            }
            let coefficients = (0..targets).map(|i| 1.0 - (i % 2) as f64 * 2.0).collect();
            decoder.accumulate_gradients(
                self.adapter,
                &batch,
                1.0,
                inputs,
                Coefficients::Known(coefficients),
                &mut gradients,
            )?;
            pass.seconds += started.elapsed().as_secs_f64();
            pass.tokens += batch.tokens.len();
            // Logits, and their gradient times the head.
            pass.flops += flops.batch_backward(layout) + 2.0 * targets as f64 * flops.head();
        }
        Ok(pass)
    }
}

/// Until a GPU has done what `tensor` depends on.
fn wait(tensor: &candle_core::Tensor) -> Result<()> {
    Ok(tensor.device().synchronize()?)
}

impl Phase {
    fn new(passes: &[Pass], peak: f64) -> Self {
        let mut sorted = passes.to_vec();
        sorted.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
        let Pass {
            seconds,
            tokens,
            flops,
        } = sorted[sorted.len() / 2];
        let gflops = flops / seconds / 1e9;
        Self {
            seconds,
            seconds_min: sorted[0].seconds,
            seconds_max: sorted[sorted.len() - 1].seconds,
            tokens,
            tokens_per_s: tokens as f64 / seconds,
            gflops,
            share_of_peak: gflops / peak,
        }
    }
}
