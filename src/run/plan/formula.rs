//! Bytes of each part of a training on the CPU: what `ops::cpu` and `model` allocate, counted.
//!
//! Activations are f32 there whatever the weights are. `h` is the hidden size, `q` and `kv` the widths
//! of queries and of keys, `i` the intermediate size.

use super::workload::{Evaluation, WeightBytes, Workload};
use super::{Part, Phase};
use crate::adapter::{AdapterKind, Tying};
use crate::config::{Config, Method, OptimizerKind, RolloutEngine, Sizes};
use crate::model::{Keep, ModelConfig};
use crate::optim::natural::MAX_PARAMETERS;

const F32: usize = size_of::<f32>();
const F64: usize = size_of::<f64>();
/// llama.cpp keeps keys and values in half precision,
const F16: usize = 2;
/// for a multiple of so many positions,
const SERVER_POSITIONS: usize = 256;
/// computes so many tokens at once at most,
const SERVER_BATCH: usize = 512;
/// and takes so much for itself, the tokenizer and its threads; in Python more than as a program.
const SERVER_PROGRAM: usize = 150 << 20;
/// Tokens of the probe's completion.
const PROBE: usize = 16;
/// Positions that keys are laid out by.
const PANEL: usize = 16;
/// Rows whose logits exist at one time while scoring.
const LOGIT_ROWS: usize = 128;
/// Stack, scratch memory of kernels and what an allocator keeps for a thread.
const THREAD: usize = 3 << 20;
/// Completions that one thread decodes of a model small enough to give every thread its own.
const SMALL_PART: usize = 32;
/// Gradients of keys and values that may wait for their prompts.
const PENDING: usize = 32 << 20;

/// What everything is counted from.
pub(super) struct Formula<'a> {
    pub config: &'a Config,
    pub model: &'a ModelConfig,
    pub weights: WeightBytes,
    pub workload: &'a Workload,
    /// Numbers that are trained.
    pub trained: usize,
    /// Every thread works on sequences of its own.
    pub is_small: bool,
    pub threads: usize,
    /// Runs in lockstep.
    pub runs: usize,
    /// Most sequences decoded at once by all of them, as a multiple of
    /// [`Sizes::max_batch_size`](crate::config::Sizes).
    pub batches: usize,
}

/// What a pass of an update has to compute first.
enum Forward {
    /// Nothing: sampling kept the inputs of all blocks.
    Recorded,
    /// The pass, which keeps this.
    Computed(Keep),
}

impl Formula<'_> {
    fn query(&self) -> usize {
        self.model.num_attention_heads * self.model.head_dim
    }

    fn key_value(&self) -> usize {
        self.model.num_key_value_heads * self.model.head_dim
    }

    /// What is there from the start to the end, `process` bytes of it before the model is loaded.
    pub fn always(&self, process: usize) -> Vec<Part> {
        let mut parts = vec![
            Part::new("program, tokenizer and problems", process),
            Part::new(
                format!("threads: {} and their scratch memory", self.threads),
                self.threads * THREAD,
            ),
            Part::new(
                format!("frozen weights as {}", self.weights.format),
                self.weights.held,
            ),
        ];
        parts.push(Part::reclaimable(
            "frozen weights in their files",
            self.weights.in_files,
        ));
        parts.extend(self.adapter());
        parts.retain(|part| part.bytes > 0);
        parts
    }

    /// Whether completions come from other processes: then nothing is decoded or kept here.
    fn is_remote(&self) -> bool {
        self.config.method == Method::Grpo && self.config.rollout.engine != RolloutEngine::Native
    }

    /// A llama.cpp server that the run starts itself, in its own process.
    pub fn server(&self) -> Vec<Part> {
        let rollout = &self.config.rollout;
        let is_own = rollout.engine == RolloutEngine::LlamaServer && rollout.base_url.is_empty();
        if !is_own || !self.is_remote() {
            return Vec::new();
        }
        let slots = rollout.max_concurrency;
        let training = self.workload.longest() + self.config.grpo.max_completion_length;
        let evaluation = self
            .workload
            .evaluation
            .map_or(0, |e| e.prompt + e.completion);
        let positions = (slots * training.max(evaluation)).next_multiple_of(SERVER_POSITIONS);
        let row = 2 * self.key_value() * F16;
        let rows = positions * self.model.num_hidden_layers;
        let (h, i, vocab) = (
            self.model.hidden_size,
            self.model.intermediate_size,
            self.model.vocab_size,
        );
        // Logits of a batch, and what a block makes of it.
        let buffers = SERVER_BATCH * (vocab + 4 * h + 3 * i) * F32;
        vec![
            Part::new("llama-server's program", SERVER_PROGRAM),
            Part::new("llama-server's weights", self.weights.stored),
            Part::new("llama-server's adapters", self.factors() * F32),
            Part::new(
                format!("llama-server's keys and values of {slots} slots, {positions} positions"),
                rows * row,
            ),
            Part::new("llama-server's buffers", buffers),
        ]
    }

    fn adapter(&self) -> Vec<Part> {
        let mut parts = Vec::new();
        if matches!(
            self.config.adapter.kind,
            AdapterKind::TinyLora | AdapterKind::LoraXs
        ) {
            // Runs in lockstep may all have their own.
            let bytes = self.runs * self.factors() * F32;
            parts.push(Part::new("A and B of the adapter", bytes));
        }
        // The numbers, two moments, and both in the last saved state; the gradient in f32 or f64 and
        // once more in f64 for the update.
        let numbers = self.trained * (6 * F32 + 2 * F64);
        let copies = match self.config.adapter.kind {
            AdapterKind::TinyLora | AdapterKind::LoraXs => 0,
            // The factors as tensors, those before and after an update.
            AdapterKind::Lora => 3 * F32,
            // The trained copy of the weights, and the rounded numbers.
            AdapterKind::Full => 2 * F32,
        };
        let what = "trained numbers, gradient and optimizer";
        let bytes = self.runs * (numbers + self.trained * copies);
        parts.push(Part::new(what, bytes));
        parts
    }

    /// Floats of A and B of all adapted modules.
    fn factors(&self) -> usize {
        let spec = &self.config.adapter;
        let tying = Tying::new(spec, self.model.num_hidden_layers);
        let modules = tying.modules.iter();
        let sides = modules.map(|id| {
            let (output, input) = super::shape(self.model, id.kind);
            output + input
        });
        spec.r * sides.sum::<usize>()
    }

    /// Bringing the weights into memory.
    pub fn loading(&self) -> Phase {
        Phase {
            name: "loading",
            parts: vec![
                Part::new("tensors on their way", self.weights.in_flight),
                Part::reclaimable(
                    "tensors in their files, as they are read",
                    self.weights.mapped,
                ),
            ],
        }
    }

    /// Decompositions, before they have become A and B, and on their way to the cache.
    pub fn decomposing(&self) -> Phase {
        let bytes = match self.config.adapter.kind {
            AdapterKind::TinyLora | AdapterKind::LoraXs => 3 * self.factors() * F32,
            AdapterKind::Lora | AdapterKind::Full => 0,
        };
        // A basis of the shorter side for each thread.
        let rank = self.config.adapter.r;
        let rows = 3 * rank + 13 * (rank / 2).next_multiple_of(8).clamp(8, 64);
        let bases = match bytes {
            0 => 0,
            _ => self.threads * rows * self.model.hidden_size * F32,
        };
        Phase {
            name: "decomposing",
            parts: vec![
                Part::new("decompositions", bytes),
                Part::new("bases of the iteration", bases),
            ],
        }
    }

    /// Bytes of the keys and values of `rows` positions of a slot, in all layers.
    fn kv(&self, rows: usize) -> usize {
        let heads = self.model.num_key_value_heads;
        let dim = self.model.head_dim;
        let width = heads * (dim + dim.next_multiple_of(PANEL));
        self.model.num_hidden_layers * rows.next_multiple_of(PANEL) * width * F32
    }

    /// Drawing completions for a generation batch.
    pub fn sampling(&self, sizes: &Sizes) -> Phase {
        if self.is_remote() {
            return Phase {
                name: "sampling",
                parts: self.probing(),
            };
        }
        let grpo = &self.config.grpo;
        let (n, groups) = (grpo.num_generations, grpo.prompts_per_step);
        let work = Decoding {
            prompt: self.workload.longest(),
            shared: self.workload.shared,
            completion: grpo.max_completion_length,
            completions: self.runs * n * groups,
            group: n,
        };
        let mut parts = self.decoding(&work, sizes);
        parts.push(Part::new(
            "inputs of blocks, kept for the update",
            self.kept(sizes),
        ));
        Phase {
            name: "sampling",
            parts,
        }
    }

    /// Evaluating, where that is asked for.
    pub fn evaluating(&self, sizes: &Sizes) -> Option<Phase> {
        let Evaluation {
            prompt,
            shared,
            completion,
            completions,
        } = self.workload.evaluation?;
        let work = Decoding {
            prompt,
            shared,
            completion,
            completions: self.runs * completions,
            group: self.config.eval.samples_per_problem.max(1),
        };
        Some(Phase {
            name: "evaluating",
            parts: match self.is_remote() {
                true => self.probing(),
                false => self.decoding(&work, sizes),
            },
        })
    }

    /// Scoring what a server made of a probe.
    fn probing(&self) -> Vec<Part> {
        let rows = self.workload.longest() + PROBE;
        let width = self.block_forward() + self.model.hidden_size;
        vec![
            Part::new(format!("a block of {rows} rows"), rows * width * F32),
            Part::new("logits", PROBE * self.model.vocab_size * F32),
        ]
    }

    fn decoding(&self, work: &Decoding, sizes: &Sizes) -> Vec<Part> {
        let batch = self.batches * sizes.max_batch_size;
        let batch = batch.min(work.completions).max(1);
        let (lanes, batch) = match self.is_small {
            true => {
                let part = SMALL_PART.min(sizes.max_batch_size).max(work.group);
                let part = part.min(work.completions).max(1);
                let lanes = self.threads.min(work.completions.div_ceil(part));
                (lanes, part.min(sizes.max_batch_size))
            }
            false => (1, batch),
        };
        // Prompts that are computed together; and those that are there, which stay until the last of
        // their completions ends: of eight with lengths like waiting times that is 2.7 times the mean.
        let together = batch.div_ceil(work.group) + usize::from(batch % work.group != 0);
        let groups = work.completions.div_ceil(work.group).div_ceil(lanes);
        let alive = match work.group {
            1 => together,
            _ => (3 * together).min(groups).max(together),
        };
        // A completion has up to fifteen keys of its prompt in front of its own.
        let own = self.kv(work.completion + PANEL - 2);
        let prompts = alive * self.kv(work.prompt) + self.kv(work.shared);
        let kv = lanes * (batch * own + prompts);
        let vocab = self.model.vocab_size;
        // A row of logits stays with every prompt; those of a pass exist beside them.
        let logits = lanes * (batch + together + alive) * vocab * F32;
        // The common beginning is computed by itself, and copied; prompts beside rows that decode.
        let rows = (together * (work.prompt - work.shared) + batch).max(work.shared);
        let total = batch * lanes;
        vec![
            Part::new(format!("keys and values of {total} sequences"), kv),
            Part::new("logits", logits),
            Part::new(
                format!("a block of {rows} rows"),
                lanes * rows * self.block_forward() * F32,
            ),
        ]
    }

    /// Rows of the passes over a generation batch or the examples of an update, prompts once a group.
    fn step_rows(&self) -> usize {
        let grpo = &self.config.grpo;
        match self.config.method {
            Method::Grpo => {
                let completions = grpo.num_generations * (grpo.max_completion_length - 1);
                self.workload.longest_sum(grpo.prompts_per_step)
                    + grpo.prompts_per_step * completions
            }
            Method::Sft => self.workload.longest_sum(self.config.sft.examples_per_step),
        }
    }

    /// Bytes of the inputs of all blocks of a generation batch.
    pub fn wanted_inputs(&self) -> usize {
        match self.config.method {
            Method::Grpo => {
                // The common beginning of prompts is recorded once.
                let prompts = self
                    .workload
                    .lengths
                    .len()
                    .min(self.config.grpo.prompts_per_step);
                let twice = prompts.saturating_sub(1) * self.workload.shared;
                (self.step_rows() - twice) * self.model.input_bytes()
            }
            Method::Sft => 0,
        }
    }

    fn kept(&self, sizes: &Sizes) -> usize {
        if self.is_remote() {
            return 0;
        }
        self.runs * self.wanted_inputs().min(sizes.activation_memory)
    }

    /// Rows of the largest piece that is never cut: of a group up to the limit, or one completion.
    pub fn largest_piece(&self) -> usize {
        let grpo = &self.config.grpo;
        match self.config.method {
            Method::Sft => self.workload.longest(),
            Method::Grpo => {
                let (prompt, own) = (self.workload.longest(), grpo.max_completion_length - 1);
                let one = prompt + own;
                match self.is_natural() {
                    true => one,
                    false => (prompt + grpo.num_generations * own)
                        .min(grpo.cut_tokens())
                        .max(one),
                }
            }
        }
    }

    /// Whether every completion's own gradient is wanted: on the way back each has a prompt of its own.
    fn is_natural(&self) -> bool {
        let has_scores = matches!(
            self.config.adapter.kind,
            AdapterKind::TinyLora | AdapterKind::LoraXs
        );
        let is_small = self.trained <= MAX_PARAMETERS;
        self.config.optim.kind == OptimizerKind::Natural && has_scores && is_small
    }

    /// Passes at a time, and their rows.
    fn update_rows(&self, sizes: &Sizes) -> (usize, usize) {
        let grpo = &self.config.grpo;
        let (piece, prompts) = (self.largest_piece(), self.runs * grpo.prompts_per_step);
        let group = grpo.num_generations * piece;
        if self.is_small && self.config.method == Method::Grpo {
            let rows = match self.is_natural() {
                true => group.min(sizes.pass_tokens).max(piece),
                false => piece,
            };
            return (self.threads.min(prompts), rows);
        }
        let all = match self.is_natural() {
            true => prompts * group,
            false => self.runs * self.step_rows(),
        };
        (1, sizes.pass_tokens.max(piece).min(all))
    }

    /// Floats of a row in the forward pass of a block.
    fn block_forward(&self) -> usize {
        let (h, i) = (self.model.hidden_size, self.model.intermediate_size);
        // x, both norms' outputs, the middle and the output; q and the attention's output; k, v, and
        // both in panels; gate, up and their product.
        5 * h + 2 * self.query() + 4 * self.key_value() + 3 * i
    }

    /// Floats of a row on the way back through a block: what it keeps, and the most that its gradients
    /// take at one time.
    fn block_backward(&self) -> usize {
        let (h, i) = (self.model.hidden_size, self.model.intermediate_size);
        let (q, kv) = (self.query(), self.key_value());
        let heads = self.model.num_attention_heads;
        let kept = 4 * h + 2 * q + 2 * kv + heads + 3 * i;
        kept + (h + 2 * i).max(h + 2 * kv)
    }

    /// One pass of an update.
    pub fn updating(&self, sizes: &Sizes) -> Phase {
        let (h, vocab) = (self.model.hidden_size, self.model.vocab_size);
        let (lanes, rows) = self.update_rows(sizes);
        let per_pass = lanes * rows * F32;
        let kept = match self.forward(sizes, rows) {
            Forward::Recorded => 0,
            Forward::Computed(Keep::Inputs) => lanes * rows * self.model.input_bytes(),
            Forward::Computed(Keep::Activations) => lanes * self.model.activation_bytes(rows),
        };
        let scored = rows.min(LOGIT_ROWS);
        let mut parts = vec![
            Part::new("inputs of blocks, kept while sampling", self.kept(sizes)),
            Part::new("inputs or activations of a pass", kept),
            Part::new(
                format!("a block forward and backward, {rows} rows"),
                per_pass * (self.block_backward() + self.block_to_copy()),
            ),
            // Inputs and outputs of the last norm, the scored rows and the gradients of all these.
            Part::new("hidden states and their gradient", per_pass * 6 * h),
            Part::new(
                format!("logits of {scored} rows"),
                lanes * scored * vocab * F32,
            ),
        ];
        let pending = rows * self.key_value() * 2 * F32;
        parts.push(Part::new(
            "gradients of shared keys",
            lanes * pending.min(PENDING),
        ));
        if self.is_natural() {
            let grpo = &self.config.grpo;
            let numbers = grpo.prompts_per_step * grpo.num_generations * self.trained;
            let batches = F64 + (1 + self.config.optim.reuse) * F32;
            let bytes = self.runs * numbers * batches;
            parts.push(Part::new("gradients of completions", bytes));
        }
        let pieces = rows / self.largest_piece().max(1) + 1;
        if self.config.adapter.kind == AdapterKind::LoraXs {
            let bytes = lanes * pieces * self.trained * F64;
            parts.push(Part::new("gradients of pieces", bytes));
        }
        Phase {
            name: "updating",
            parts,
        }
    }

    /// Floats of a row that what a block kept takes while it is copied for single completions.
    fn block_to_copy(&self) -> usize {
        match self.is_natural() {
            true => self.block_forward(),
            false => 0,
        }
    }

    fn forward(&self, sizes: &Sizes, rows: usize) -> Forward {
        let (checkpointing, updates) = match self.config.method {
            Method::Grpo => (
                self.config.grpo.gradient_checkpointing,
                self.config.grpo.updates_per_step(),
            ),
            Method::Sft => (self.config.sft.gradient_checkpointing, 0),
        };
        // A policy that has moved since, or what did not fit, has to be computed.
        if updates == 1 && !self.is_remote() && self.wanted_inputs() <= sizes.activation_memory {
            return Forward::Recorded;
        }
        let memory = sizes.activation_memory;
        Forward::Computed(Keep::choose(checkpointing, self.model, rows, memory))
    }
}

/// Completions to be decoded.
struct Decoding {
    /// Tokens of the longest prompt.
    prompt: usize,
    /// Tokens that all prompts begin with.
    shared: usize,
    /// Most tokens of a completion.
    completion: usize,
    completions: usize,
    /// Completions of a prompt.
    group: usize,
}
