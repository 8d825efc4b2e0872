//! Continuous batching: completions in flight, of one run or of several.
//!
//! A prompt is prefilled once and its keys and values are shared by its completions. Finished rows
//! leave the batch and waiting ones join at once. What is drawn does not depend on any of it.

use super::Completion;
use super::device_sampler::{self, DeviceSampler};
use super::finish::finished_at;
use super::native::{Item, NativeEngine};
use super::parallel::Observers;
use super::recording::Recording;
use super::sampler::{Draw, Sampled, sample};
use crate::Result;
use crate::adapter::AdapterSet;
use crate::model::{GroupInputs, KvCache, SlotId};
use crate::ops::{Backend, Span, cpu, cpu_slice};
use crate::run::signals;
use candle_core::{DType, Device, Tensor};

/// Shorter common beginnings are computed with each prompt.
const MIN_PREFIX: usize = 16;

/// Number of tokens that all prompts begin with, short of the whole of any; 0 for a single prompt.
pub(super) fn common_prefix(prompts: &[&[u32]]) -> usize {
    let [first, others @ ..] = prompts else {
        return 0;
    };
    let shared = |other: &&[u32]| {
        let pairs = first.iter().zip(*other);
        let same = pairs.take_while(|(a, b)| a == b).count();
        same.min(other.len() - 1).min(first.len() - 1)
    };
    others.iter().map(shared).min().unwrap_or(0)
}

/// What a batch gave.
pub(super) struct Outcome {
    /// By item.
    pub completions: Vec<Vec<Completion>>,
    /// By item.
    pub recorded: Vec<Option<GroupInputs>>,
    /// Bytes for records that are left, by ask.
    pub budgets: Vec<usize>,
}

/// The prompts of one call of the engine, or one thread's part of them.
pub(super) struct Batch<'a> {
    engine: &'a NativeEngine<'a>,
    max_batch_size: usize,
    adapters: &'a AdapterSet<'a>,
    items: &'a [Item<'a>],
    cache: KvCache,
    /// By ask: what all of its prompts begin with, such as worked examples, computed once and copied.
    prefixes: Vec<Option<(SlotId, usize)>>,
    /// By item: its prompt while samples of it are waiting or running.
    groups: Vec<Option<Group>>,
    /// The first item whose prompt has not been prefilled.
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
    item: usize,
    sample: usize,
    slot: SlotId,
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
}

impl<'a> Batch<'a> {
    /// `budgets` are the bytes for recorded inputs, by ask.
    pub fn new(
        engine: &'a NativeEngine<'a>,
        adapters: &'a AdapterSet<'a>,
        items: &'a [Item<'a>],
        budgets: &[usize],
    ) -> Result<Self> {
        let decoder = engine.decoder;
        let same = |pair: &[Item<'_>]| pair[0].params.temperature == pair[1].params.temperature;
        let on_device = items.windows(2).all(same)
            && items
                .iter()
                .all(|item| device_sampler::is_supported(item.params));
        let owners = items.iter().map(|item| item.ask).collect();
        Ok(Self {
            engine,
            max_batch_size: 1,
            adapters,
            items,
            cache: decoder.new_cache(),
            prefixes: vec![None; budgets.len()],
            groups: items.iter().map(|_| None).collect(),
            next_group: 0,
            rows: Vec::new(),
            results: items
                .iter()
                .map(|item| vec![None; item.request.n])
                .collect(),
            recording: Recording::new(&decoder.config, budgets, owners),
            device_sampler: match &decoder.placement.device {
                Device::Cpu => None,
                device => on_device
                    .then(|| DeviceSampler::new(decoder.config.vocab_size, device))
                    .transpose()?,
            },
        })
    }

    /// Completes everything, up to `max_batch_size` completions at one time.
    pub fn complete(mut self, max_batch_size: usize, observers: Observers<'_>) -> Result<Outcome> {
        self.max_batch_size = max_batch_size;
        if self.items.iter().any(is_wanted) {
            cpu::team(|| {
                self.prefill_prefixes()?;
                self.run(observers.on_token, observers.on_finished)
            })?;
        }
        let (recorded, budgets) = self.recording.finish();
        let complete = |sample: Option<Completion>| sample.unwrap_or_else(Completion::empty);
        let completions = self
            .results
            .into_iter()
            .map(|group| group.into_iter().map(complete).collect());
        Ok(Outcome {
            completions: completions.collect(),
            recorded,
            budgets,
        })
    }

    fn run(
        &mut self,
        on_token: &mut dyn FnMut(usize, usize, &[u32]),
        on_finished: &mut dyn FnMut(usize, usize, &Completion),
    ) -> Result<()> {
        loop {
            signals::check()?;
            self.start_waiting()?;
            for row in &self.rows {
                on_token(row.item, row.sample, &row.tokens);
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
        let groups = self.groups.iter().zip(self.items);
        groups
            .filter_map(|(group, item)| Some(item.request.n - group.as_ref()?.next_sample))
            .sum()
    }

    /// Starts samples of prefilled prompts while there is room.
    fn start_waiting(&mut self) -> Result<()> {
        for item in 0..self.next_group {
            self.start_samples(item, self.room())?;
        }
        Ok(())
    }

    /// The next prompts whose samples will have room once those have it that wait already.
    fn incoming(&mut self) -> Vec<usize> {
        let mut wanted = self.waiting();
        let first = self.next_group;
        while self.next_group < self.items.len() && wanted < self.room() {
            let item = &self.items[self.next_group];
            wanted += if is_wanted(item) { item.request.n } else { 0 };
            self.next_group += 1;
        }
        (first..self.next_group)
            .filter(|&item| is_wanted(&self.items[item]))
            .collect()
    }

    /// Computes the beginnings that all prompts of an ask share, where that saves anything.
    fn prefill_prefixes(&mut self) -> Result<()> {
        let (mut tokens, mut spans, mut asks) = (Vec::new(), Vec::new(), Vec::new());
        for ask in 0..self.prefixes.len() {
            let own = self.items.iter().filter(|i| i.ask == ask && is_wanted(i));
            let prompts: Vec<&[u32]> = own.map(|item| &item.request.prompt[..]).collect();
            let len = common_prefix(&prompts);
            if len < MIN_PREFIX {
                continue;
            }
            spans.push(Span {
                row: tokens.len(),
                len,
                slot: self.cache.alloc(None, len),
                pos: 0,
            });
            tokens.extend_from_slice(&prompts[0][..len]);
            asks.push(ask);
        }
        if spans.is_empty() {
            return Ok(());
        }
        let lens = spans.iter().map(|span| span.len);
        let adapters = self.adapters.rows(asks.iter().copied().zip(lens));
        let kept: Vec<bool> = asks
            .iter()
            .zip(&spans)
            .map(|(&ask, span)| self.recording.open_prefix(ask, span.len))
            .collect();
        let rows = spans.iter().zip(&kept).filter(|(_, kept)| **kept);
        let rows = rows.map(|(span, _)| span.row..span.row + span.len);
        let mut recorder = self.recording.recorder_of(rows);
        let (decoder, cache) = (self.engine.decoder, &mut self.cache);
        decoder.forward(&adapters, &tokens, &spans, cache, recorder.as_mut())?;
        let owners = asks.iter().zip(&kept).filter(|(_, kept)| **kept);
        self.recording
            .set_prefixes(recorder, owners.map(|(&ask, _)| ask));
        for (ask, span) in asks.into_iter().zip(spans) {
            self.prefixes[ask] = Some((span.slot, span.len));
        }
        Ok(())
    }

    /// Draws the first tokens of up to `room` samples of a prefilled prompt.
    fn start_samples(&mut self, item: usize, room: usize) -> Result<()> {
        let Item {
            request, params, ..
        } = self.items[item];
        let Some(group) = &mut self.groups[item] else {
            return Ok(());
        };
        let first = group.next_sample;
        let count = room.min(request.n - first);
        group.next_sample += count;
        group.running += count;
        let parent = (group.slot, request.prompt.len());
        let logits = std::mem::take(&mut group.logits);
        for sample_index in first..first + count {
            let sampled = sample(&logits, params, self.draw(item, sample_index, 0));
            // The last token of a completion is never an input: one row less than tokens.
            let slot = self.cache.alloc(Some(parent), params.max_tokens - 1);
            self.rows.push(Row {
                item,
                sample: sample_index,
                slot,
                tokens: vec![sampled.token],
                logprobs: vec![sampled.logprob],
            });
        }
        if let Some(group) = &mut self.groups[item] {
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
            on_finished(row.item, row.sample, &completion);
            self.results[row.item][row.sample] = Some(completion);
            self.cache.free(row.slot);
            let Item {
                request, params, ..
            } = self.items[row.item];
            let unused = params.max_tokens - row.tokens.len();
            self.recording.close(row.item, unused);
            let done = self.groups[row.item].as_mut().is_some_and(|group| {
                group.running -= 1;
                group.running == 0 && group.next_sample == request.n
            });
            if done && let Some(group) = self.groups[row.item].take() {
                self.cache.free(group.slot);
            }
        }
        Ok(())
    }

    fn finished(&self, row: &Row) -> Option<Completion> {
        let params = self.items[row.item].params;
        let (finish, text) = finished_at(self.engine.tokenizer, &row.tokens, params)?;
        Some(Completion {
            tokens: row.tokens.clone(),
            logprobs: row.logprobs.clone(),
            text,
            finish,
        })
    }

    /// One pass of the model: a token more for the rows, of which there are `decoding` or which do not
    /// take part (0), and the prompts of `incoming` items beside them.
    fn advance(&mut self, decoding: usize, incoming: &[usize]) -> Result<()> {
        if decoding == 0 && incoming.is_empty() {
            return Ok(());
        }
        let mut tokens = Vec::with_capacity(decoding);
        let mut spans = Vec::with_capacity(decoding + incoming.len());
        // Rows of the pass with the item they belong to, and those that logits are wanted of.
        let mut owned = Vec::with_capacity(decoding + incoming.len());
        let mut wanted: Vec<u32> = (0..decoding as u32).collect();
        for (index, row) in self.rows[..decoding].iter().enumerate() {
            tokens.push(row.tokens[row.tokens.len() - 1]);
            owned.push((row.item, index..index + 1));
            spans.push(Span {
                row: index,
                len: 1,
                slot: row.slot,
                pos: self.items[row.item].request.prompt.len() + row.tokens.len() - 1,
            });
        }
        for &item in incoming {
            let span = self.open(item, tokens.len())?;
            tokens.extend_from_slice(&self.items[item].request.prompt[span.pos..]);
            owned.push((item, span.row..tokens.len()));
            wanted.push(tokens.len() as u32 - 1);
            spans.push(span);
        }
        let decoder = self.engine.decoder;
        let counts = owned
            .iter()
            .map(|(item, rows)| (self.items[*item].ask, rows.len()));
        let adapters = self.adapters.rows(counts);
        let mut recorder = self.recording.recorder(owned);
        let cache = &mut self.cache;
        let hidden = decoder.forward(&adapters, &tokens, &spans, cache, recorder.as_mut())?;
        let rows = self.rows[..decoding].iter();
        let rows = rows.map(|row| (row.item, Some(row.sample)));
        let prompts = incoming.iter().map(|&item| (item, None));
        self.recording.add(recorder, rows.chain(prompts));
        let hidden = match incoming {
            [] => hidden,
            _ => hidden.index_select(&Tensor::new(wanted, hidden.device())?, 0)?,
        };
        let logits = decoder.logits(&adapters, &hidden)?;
        match (cpu_slice(&logits), &self.device_sampler, incoming) {
            (Ok(logits), _, _) => self.take(decoding, &logits, incoming, &spans[decoding..]),
            (Err(_), Some(sampler), []) => {
                let draws = self.rows.iter();
                let draws = draws.map(|row| self.draw(row.item, row.sample, row.tokens.len()));
                let uniforms: Vec<f64> = draws.map(Draw::uniform).collect();
                let temperature = self.items[0].params.temperature;
                let sampled = sampler.sample(&logits, temperature, &uniforms)?;
                self.grow(sampled);
            }
            _ => self.take(decoding, &host(&logits)?, incoming, &spans[decoding..]),
        }
        Ok(())
    }

    /// A slot for the prompt of an item, and what of it is left to compute, as rows from `row` on.
    fn open(&mut self, item: usize, row: usize) -> Result<Span> {
        let Item {
            ask,
            request,
            params,
        } = self.items[item];
        let prompt = &request.prompt;
        let slot = self.cache.alloc(None, prompt.len());
        let mut pos = 0;
        if let Some((prefix, len)) = self.prefixes[ask] {
            self.cache.copy(prefix, slot, len)?;
            pos = len;
        }
        self.recording.open(item, request, pos, params.max_tokens);
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
            let draw = self.draw(row.item, row.sample, row.tokens.len());
            let params = self.items[row.item].params;
            sample(&logits[index * vocab..][..vocab], params, draw)
        });
        self.grow(sampled);
        let prompts = logits[decoding * vocab..].chunks_exact(vocab);
        for ((&item, span), logits) in incoming.iter().zip(spans).zip(prompts) {
            self.groups[item] = Some(Group {
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

    fn draw(&self, item: usize, sample: usize, position: usize) -> Draw {
        let Item {
            request, params, ..
        } = self.items[item];
        Draw {
            seed: params.seed,
            step: params.step,
            prompt: request.id,
            sample: sample as u64,
            position: position as u64,
        }
    }
}

/// Whether anything is to be drawn for an item.
fn is_wanted(item: &Item<'_>) -> bool {
    item.request.n > 0 && item.params.max_tokens > 0
}

/// A tensor's values in host memory as f32.
fn host(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}
