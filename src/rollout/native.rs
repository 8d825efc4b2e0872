//! The native engine: continuous batching over the model's own decoder.
//!
//! A prompt is prefilled once and its keys and values are shared by its completions. Finished rows
//! leave the batch and waiting ones join at once. What is drawn does not depend on any of it.

use super::device_sampler::{self, DeviceSampler};
use super::finish::finished_at;
use super::parallel::Observers;
use super::recording::Recording;
use super::sampler::{Draw, Sampled, sample};
use super::{Completion, Engine, Request, SamplingParams};
use crate::adapter::Adapter;
use crate::model::{Decoder, GroupInputs, KvCache, SlotId, Tokenizer};
use crate::ops::{Backend, Span, cpu, cpu_slice};
use crate::run::signals;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};

/// Samples from a [`Decoder`] in this process.
pub struct NativeEngine<'a> {
    pub(super) decoder: &'a Decoder,
    tokenizer: &'a Tokenizer,
    /// Largest number of completions decoded at one time.
    max_batch_size: usize,
    /// Bytes for recorded inputs.
    budget: usize,
    recorded: Vec<Option<GroupInputs>>,
}

impl<'a> NativeEngine<'a> {
    pub fn new(decoder: &'a Decoder, tokenizer: &'a Tokenizer, max_batch_size: usize) -> Self {
        Self {
            decoder,
            tokenizer,
            max_batch_size: max_batch_size.max(1),
            budget: 0,
            recorded: Vec::new(),
        }
    }
}

/// What a rollout gave.
pub(super) struct Outcome {
    completions: Vec<Vec<Completion>>,
    recorded: Vec<Option<GroupInputs>>,
    /// Bytes for records that are left.
    budget: usize,
}

impl NativeEngine<'_> {
    /// One batch of requests, of which up to `max_batch_size` completions run at one time.
    fn run(
        &self,
        adapter: Option<&Adapter>,
        requests: &[Request],
        params: &SamplingParams,
        (max_batch_size, budget): (usize, usize),
        observers: Observers<'_>,
    ) -> Result<Outcome> {
        let mut batch = Batch {
            engine: self,
            max_batch_size,
            adapter,
            requests,
            params,
            cache: self.decoder.new_cache(),
            prefix: None,
            groups: requests.iter().map(|_| None).collect(),
            next_group: 0,
            rows: Vec::new(),
            results: requests.iter().map(|r| vec![None; r.n]).collect(),
            recording: Recording::new(&self.decoder.config, budget, requests.len()),
            device_sampler: match &self.decoder.placement.device {
                Device::Cpu => None,
                device => device_sampler::is_supported(params)
                    .then(|| DeviceSampler::new(self.decoder.config.vocab_size, device))
                    .transpose()?,
            },
        };
        if params.max_tokens > 0 {
            cpu::team(|| {
                batch.prefill_prefix()?;
                batch.run(observers.on_token, observers.on_finished)
            })?;
        }
        let Batch {
            results, recording, ..
        } = batch;
        let (recorded, budget) = recording.finish();
        let complete = |sample: Option<Completion>| sample.unwrap_or_else(Completion::empty);
        let completions = results
            .into_iter()
            .map(|group| group.into_iter().map(complete).collect());
        Ok(Outcome {
            completions: completions.collect(),
            recorded,
            budget,
        })
    }
}

impl Engine for NativeEngine<'_> {
    fn generate(
        &mut self,
        adapter: Option<&Adapter>,
        requests: &[Request],
        params: &SamplingParams,
        on_token: &mut dyn FnMut(usize, usize, &[u32]),
        on_finished: &mut dyn FnMut(usize, usize, &Completion),
    ) -> Result<Vec<Vec<Completion>>> {
        check(requests, self.decoder)?;
        let observers = Observers {
            on_token,
            on_finished,
        };
        let parts = self.parts(requests, self.max_batch_size);
        let share = (self.max_batch_size, self.budget / parts.len().max(1));
        let outcomes = match &parts[..] {
            [_] => vec![self.run(adapter, requests, params, share, observers)?],
            _ => self.in_parallel(&parts, observers, |own, observers| {
                self.run(adapter, &requests[own], params, share, observers)
            })?,
        };
        self.budget = outcomes.iter().map(|outcome| outcome.budget).sum();
        self.recorded.clear();
        let mut completions = Vec::with_capacity(requests.len());
        for outcome in outcomes {
            self.recorded.extend(outcome.recorded);
            completions.extend(outcome.completions);
        }
        Ok(completions)
    }

    /// Only where scoring would give the same bits.
    fn record(&mut self, budget: usize) {
        self.budget = if self.exact() { budget } else { 0 };
    }

    fn take_recorded(&mut self) -> Vec<Option<GroupInputs>> {
        std::mem::take(&mut self.recorded)
    }

    /// On the CPU, decoding and scoring are the same arithmetic.
    fn exact(&self) -> bool {
        self.decoder.placement.backend == Backend::Cpu
    }
}

/// Refuses prompts that are empty or not of the model.
pub(super) fn check(requests: &[Request], decoder: &Decoder) -> Result<()> {
    let vocab = decoder.config.vocab_size;
    for request in requests {
        if request.prompt.is_empty() {
            return Err(Error::data(format!("prompt {} has no tokens", request.id)));
        }
        if let Some(id) = request.prompt.iter().find(|&&id| id as usize >= vocab) {
            return Err(Error::data(format!(
                "prompt {} has the token id {id}, the model's vocabulary ends at {vocab}; \
                 tokenizer and model do not belong together",
                request.id
            )));
        }
    }
    Ok(())
}

/// Shorter common beginnings are computed with each prompt.
const MIN_PREFIX: usize = 16;

/// Number of tokens that all prompts begin with, short of the whole of any; 0 for a single prompt.
pub(super) fn common_prefix(requests: &[Request]) -> usize {
    let [first, others @ ..] = requests else {
        return 0;
    };
    let shared = |other: &Request| {
        let pairs = first.prompt.iter().zip(&other.prompt);
        let same = pairs.take_while(|(a, b)| a == b).count();
        same.min(other.prompt.len() - 1).min(first.prompt.len() - 1)
    };
    others.iter().map(shared).min().unwrap_or(0)
}

/// One call of [`Engine::generate`], or one thread's part of it.
struct Batch<'a> {
    engine: &'a NativeEngine<'a>,
    max_batch_size: usize,
    adapter: Option<&'a Adapter>,
    requests: &'a [Request],
    params: &'a SamplingParams,
    cache: KvCache,
    /// What all prompts begin with, such as worked examples: computed once and copied.
    prefix: Option<(SlotId, usize)>,
    /// By request: its prompt while samples of it are waiting or running.
    groups: Vec<Option<Group>>,
    /// The first request whose prompt has not been prefilled.
    next_group: usize,
    rows: Vec<Row>,
    results: Vec<Vec<Option<Completion>>>,
    recording: Recording<'a>,
    /// On a GPU, where it can draw what is asked for.
    device_sampler: Option<DeviceSampler>,
}

/// A prefilled prompt.
struct Group {
    slot: SlotId,
    /// Logits `[vocab]` after the prompt, from which every sample's first token is drawn.
    logits: Vec<f32>,
    /// The first sample that has not started.
    next_sample: usize,
    running: usize,
}

/// A completion in flight.
struct Row {
    request: usize,
    sample: usize,
    slot: SlotId,
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
}

impl Batch<'_> {
    fn run(
        &mut self,
        on_token: &mut dyn FnMut(usize, usize, &[u32]),
        on_finished: &mut dyn FnMut(usize, usize, &Completion),
    ) -> Result<()> {
        loop {
            signals::check()?;
            self.start_waiting()?;
            for row in &self.rows {
                on_token(row.request, row.sample, &row.tokens);
            }
            self.retire(on_finished)?;
            let incoming = self.incoming();
            if !self.rows.is_empty() || !incoming.is_empty() {
                match self.engine.decoder.placement.backend {
                    Backend::Cpu => self.advance(self.rows.len(), &incoming)?,
                    // All rows in a few kernels, which prompts cannot take part in.
                    Backend::Portable => {
                        self.advance(self.rows.len(), &[])?;
                        self.advance(0, &incoming)?;
                    }
                }
            } else if self.waiting() == 0 {
                return Ok(());
            }
        }
    }

    /// Completions that can still join.
    fn room(&self) -> usize {
        self.max_batch_size - self.rows.len()
    }

    /// Samples of prefilled prompts that have not started.
    fn waiting(&self) -> usize {
        let groups = self.groups.iter().zip(self.requests);
        groups
            .filter_map(|(group, request)| Some(request.n - group.as_ref()?.next_sample))
            .sum()
    }

    /// Starts samples of prefilled prompts while there is room.
    fn start_waiting(&mut self) -> Result<()> {
        for request in 0..self.next_group {
            self.start_samples(request, self.room())?;
        }
        Ok(())
    }

    /// The next prompts whose samples will have room once those have it that wait already.
    fn incoming(&mut self) -> Vec<usize> {
        let mut wanted = self.waiting();
        let first = self.next_group;
        while self.next_group < self.requests.len() && wanted < self.room() {
            wanted += self.requests[self.next_group].n;
            self.next_group += 1;
        }
        (first..self.next_group)
            .filter(|&r| self.requests[r].n > 0)
            .collect()
    }

    /// Computes the beginning that all prompts share, where that saves anything.
    fn prefill_prefix(&mut self) -> Result<()> {
        let len = common_prefix(self.requests);
        if len < MIN_PREFIX {
            return Ok(());
        }
        let span = Span {
            row: 0,
            len,
            slot: self.cache.alloc(None, len),
            pos: 0,
        };
        let tokens = &self.requests[0].prompt[..len];
        let decoder = self.engine.decoder;
        let mut recorder = match self.recording.open_prefix(len) {
            true => self.recording.recorder_of(std::iter::once(0..len)),
            false => None,
        };
        let cache = &mut self.cache;
        decoder.forward(self.adapter, tokens, &[span], cache, recorder.as_mut())?;
        self.recording.set_prefix(recorder);
        self.prefix = Some((span.slot, len));
        Ok(())
    }

    /// Draws the first tokens of up to `room` samples of a prefilled request.
    fn start_samples(&mut self, request: usize, room: usize) -> Result<()> {
        let n = self.requests[request].n;
        let prompt_len = self.requests[request].prompt.len();
        let Some(group) = &mut self.groups[request] else {
            return Ok(());
        };
        let first = group.next_sample;
        let count = room.min(n - first);
        group.next_sample += count;
        group.running += count;
        let parent = group.slot;
        let logits = std::mem::take(&mut group.logits);
        for sample_index in first..first + count {
            let sampled = sample(&logits, self.params, self.draw(request, sample_index, 0));
            // The last token of a completion is never an input: one row less than tokens.
            let slot = self
                .cache
                .alloc(Some((parent, prompt_len)), self.params.max_tokens - 1);
            self.rows.push(Row {
                request,
                sample: sample_index,
                slot,
                tokens: vec![sampled.token],
                logprobs: vec![sampled.logprob],
            });
        }
        if let Some(group) = &mut self.groups[request] {
            group.logits = logits;
        }
        Ok(())
    }

    /// Takes finished rows out of the batch.
    fn retire(&mut self, on_finished: &mut dyn FnMut(usize, usize, &Completion)) -> Result<()> {
        let rows = std::mem::take(&mut self.rows);
        for row in rows {
            let Some(completion) = self.finished(&row) else {
                self.rows.push(row);
                continue;
            };
            on_finished(row.request, row.sample, &completion);
            self.results[row.request][row.sample] = Some(completion);
            self.cache.free(row.slot);
            let unused = self.params.max_tokens - row.tokens.len();
            self.recording.close(row.request, unused);
            let done = self.groups[row.request].as_mut().is_some_and(|group| {
                group.running -= 1;
                group.running == 0 && group.next_sample == self.requests[row.request].n
            });
            if done && let Some(group) = self.groups[row.request].take() {
                self.cache.free(group.slot);
            }
        }
        Ok(())
    }

    fn finished(&self, row: &Row) -> Option<Completion> {
        let (finish, text) = finished_at(self.engine.tokenizer, &row.tokens, self.params)?;
        Some(Completion {
            tokens: row.tokens.clone(),
            logprobs: row.logprobs.clone(),
            text,
            finish,
        })
    }

    /// One pass of the model: a token more for the rows, of which there are `decoding` or which do not
    /// take part (0), and the prompts of `incoming` requests beside them.
    fn advance(&mut self, decoding: usize, incoming: &[usize]) -> Result<()> {
        if decoding == 0 && incoming.is_empty() {
            return Ok(());
        }
        let mut tokens = Vec::with_capacity(decoding);
        let mut spans = Vec::with_capacity(decoding + incoming.len());
        // Rows of the pass with the request they belong to, and those that logits are wanted of.
        let mut owned = Vec::with_capacity(decoding + incoming.len());
        let mut wanted: Vec<u32> = (0..decoding as u32).collect();
        for (index, row) in self.rows[..decoding].iter().enumerate() {
            tokens.push(row.tokens[row.tokens.len() - 1]);
            owned.push((row.request, index..index + 1));
            spans.push(Span {
                row: index,
                len: 1,
                slot: row.slot,
                pos: self.requests[row.request].prompt.len() + row.tokens.len() - 1,
            });
        }
        for &request in incoming {
            let span = self.open(request, tokens.len())?;
            tokens.extend_from_slice(&self.requests[request].prompt[span.pos..]);
            owned.push((request, span.row..tokens.len()));
            wanted.push(tokens.len() as u32 - 1);
            spans.push(span);
        }
        let decoder = self.engine.decoder;
        let mut recorder = self.recording.recorder(owned);
        let cache = &mut self.cache;
        let hidden = decoder.forward(self.adapter, &tokens, &spans, cache, recorder.as_mut())?;
        let rows = self.rows[..decoding].iter();
        let rows = rows.map(|row| (row.request, Some(row.sample)));
        let prompts = incoming.iter().map(|&request| (request, None));
        self.recording.add(recorder, rows.chain(prompts));
        let hidden = match incoming {
            [] => hidden,
            _ => hidden.index_select(&Tensor::new(wanted, hidden.device())?, 0)?,
        };
        let logits = decoder.logits(self.adapter, &hidden)?;
        match (cpu_slice(&logits), &self.device_sampler, incoming) {
            (Ok(logits), _, _) => self.take(decoding, &logits, incoming, &spans[decoding..]),
            (Err(_), Some(sampler), []) => {
                let draws = self.rows.iter();
                let draws = draws.map(|row| self.draw(row.request, row.sample, row.tokens.len()));
                let uniforms: Vec<f64> = draws.map(Draw::uniform).collect();
                let sampled = sampler.sample(&logits, self.params.temperature, &uniforms)?;
                self.grow(sampled);
            }
            _ => self.take(decoding, &host(&logits)?, incoming, &spans[decoding..]),
        }
        Ok(())
    }

    /// A slot for the prompt of a request, and what of it is left to compute, as rows from `row` on.
    fn open(&mut self, request: usize, row: usize) -> Result<Span> {
        let prompt = &self.requests[request].prompt;
        let slot = self.cache.alloc(None, prompt.len());
        let mut pos = 0;
        if let Some((prefix, len)) = self.prefix {
            self.cache.copy(prefix, slot, len)?;
            pos = len;
        }
        let max_tokens = self.params.max_tokens;
        self.recording
            .open(request, &self.requests[request], pos, max_tokens);
        Ok(Span {
            row,
            len: prompt.len() - pos,
            slot,
            pos,
        })
    }

    /// Draws the next token of every row that took part from its logits; those that follow are the
    /// prompts'.
    fn take(&mut self, decoding: usize, logits: &[f32], incoming: &[usize], spans: &[Span]) {
        let vocab = self.engine.decoder.config.vocab_size;
        let sampled = cpu::map(decoding, 8 * vocab, |index| {
            let row = &self.rows[index];
            let draw = self.draw(row.request, row.sample, row.tokens.len());
            sample(&logits[index * vocab..][..vocab], self.params, draw)
        });
        self.grow(sampled);
        let prompts = logits[decoding * vocab..].chunks_exact(vocab);
        for ((&request, span), logits) in incoming.iter().zip(spans).zip(prompts) {
            self.groups[request] = Some(Group {
                slot: span.slot,
                logits: logits.to_vec(),
                next_sample: 0,
                running: 0,
            });
        }
    }

    /// Adds a token to every row; to none when there are none.
    fn grow(&mut self, sampled: Vec<Sampled>) {
        for (row, sampled) in self.rows.iter_mut().zip(sampled) {
            row.tokens.push(sampled.token);
            row.logprobs.push(sampled.logprob);
        }
    }

    fn draw(&self, request: usize, sample: usize, position: usize) -> Draw {
        Draw {
            seed: self.params.seed,
            step: self.params.step,
            prompt: self.requests[request].id,
            sample: sample as u64,
            position: position as u64,
        }
    }
}

/// A tensor's values in host memory as f32.
fn host(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}
