//! Sampling of completions: what is asked for, what comes back, and the engines that do it.

mod batch;
mod device_sampler;
mod engines;
mod finish;
mod native;
#[cfg(test)]
mod native_tests;
mod parallel;
mod recording;
mod remote;
pub mod sampler;
mod shared;

pub use engines::Engines;
pub use native::{Answer, Ask, NativeEngine, check_prompts, is_exact};
pub use remote::{RemoteEngine, Site};
pub use shared::SharedEngine;

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::adapter::Adapter;
use crate::model::GroupInputs;

/// How tokens are drawn. `temperature == 0` is greedy.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    pub temperature: f64,
    /// Nucleus mass; `1.0` keeps everything.
    pub top_p: f64,
    /// Number of tokens kept; `0` keeps all.
    pub top_k: usize,
    /// Keep tokens with probability ≥ `min_p` × the largest; `0.0` keeps all.
    pub min_p: f64,
    pub max_tokens: usize,
    /// Strings that end a completion; the match and what follows are cut from the text.
    pub stop: Vec<String>,
    /// Token ids that end a completion; the id stays in `tokens`, not in `text`.
    pub eos: Vec<u32>,
    /// Key of the counter-based generator, with `step` and [`Request::id`].
    pub seed: u64,
    pub step: u64,
}

/// One prompt of which `n` completions are wanted. The prompt is computed once.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Identifies the prompt in the random stream: (seed, step, id, sample, position) fixes a draw.
    pub id: u64,
    pub prompt: Vec<u32>,
    pub n: usize,
}

/// Why a completion ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    Eos,
    Stop,
    /// `max_tokens` reached: the completion is truncated.
    Length,
}

/// One sampled completion.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Completion {
    /// Sampled ids, the end-of-sequence id included.
    pub tokens: Vec<u32>,
    /// Natural log-probability of each token under softmax(logits / temperature) over the whole
    /// vocabulary (temperature 1 when greedy).
    pub logprobs: Vec<f32>,
    /// Decoded text without special tokens and without the stop string.
    pub text: String,
    pub finish: FinishReason,
}

impl Completion {
    /// No tokens: what `max_tokens = 0` gives.
    fn empty() -> Self {
        Self {
            tokens: Vec::new(),
            logprobs: Vec::new(),
            text: String::new(),
            finish: FinishReason::Length,
        }
    }
}

/// Something that samples completions from the model with an adapter.
pub trait Engine {
    /// Completions of every request, in order: `n` each.
    ///
    /// `on_token(request, sample, tokens)` sees a completion each time it has grown, for streaming;
    /// `on_finished(request, sample, completion)` sees it when it ends. Both run on the calling
    /// thread between forward passes.
    fn generate(
        &mut self,
        adapter: Option<&Adapter>,
        requests: &[Request],
        params: &SamplingParams,
        on_token: &mut dyn FnMut(usize, usize, &[u32]),
        on_finished: &mut dyn FnMut(usize, usize, &Completion),
    ) -> Result<Vec<Vec<Completion>>>;

    /// From now on keep the inputs of all blocks for the groups that surely fit into `budget` bytes
    /// together, for an update at the same parameters; 0: of none.
    fn record(&mut self, _budget: usize) {}

    /// What the last [`Self::generate`] recorded, by request.
    fn take_recorded(&mut self) -> Vec<Option<GroupInputs>> {
        Vec::new()
    }

    /// Whether the log-probabilities of the completions have the bits that the trainer's own
    /// scoring gives, so that there is no difference to correct for.
    fn exact(&self) -> bool {
        false
    }

    /// Starts on requests that [`Self::generate`] will be asked for next, while something else is done:
    /// it then gives the completions of this adapter. Nothing where sampling needs this process.
    fn begin(
        &mut self,
        _adapter: Option<&Adapter>,
        _requests: &[Request],
        _params: &SamplingParams,
    ) -> Result<()> {
        Ok(())
    }

    /// Bytes sent to and received from other processes so far.
    fn bytes(&self) -> (u64, u64) {
        (0, 0)
    }
}
