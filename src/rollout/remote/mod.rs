//! Engines in other processes, asked over HTTP: vLLM and llama.cpp's server.
//!
//! The frozen model lies at the server; what is sent is the adapter (a LoRA directory for vLLM, the
//! trained numbers themselves for llama.cpp) and prompts as token ids, what comes back are token ids with
//! the sampler's log-probabilities. Another program computes these with other roundings: training
//! corrects for it by truncated importance sampling, and its metrics say how large it is.
//!
//! A policy has a name of its own for every value of the trained numbers, answers are checked for it, and
//! before the first prompt every server completes a probe whose log-probabilities must be those of this
//! policy and no earlier one ([`probe`]). So no completion is of a stale adapter.

mod http;
mod llama;
mod pool;
mod probe;
mod process;
#[cfg(test)]
mod tests;
mod vllm;

use std::path::Path;
use std::sync::Arc;

use http::Server;
use llama::LlamaServer;
use pool::{Ask, Pool, Running};
use probe::Probe;
use process::Started;
use vllm::Vllm;

use super::finish::finished_at;
use super::sampler::Draw;
use super::{Completion, Engine, FinishReason, Request, SamplingParams, check_prompts};
use crate::adapter::Adapter;
use crate::config::{RolloutConfig, RolloutEngine};
use crate::model::Model;
use crate::run::progress::Progress;
use crate::{Error, Result};

/// The policy that is asked for: the frozen model with these trained numbers.
#[derive(Debug, Clone, PartialEq)]
struct Policy {
    /// Unlike that of any other policy.
    name: String,
    /// The trained numbers as the policy uses them; none for the model without an adapter.
    parameters: Vec<f32>,
}

/// A way to talk to a kind of server. Failures that may pass are [`Failure::Passing`].
trait Protocol: Send + Sync {
    /// Makes the policy known to the server, before the first completion of it.
    fn publish(&self, server: &Server, policy: &Policy) -> Result<(), Failure>;

    /// One completion.
    fn complete(&self, server: &Server, policy: &Policy, ask: &Ask) -> Result<Answer, Failure>;

    /// The policy will not be asked for any more. What goes wrong with that is not worth an error.
    fn retire(&self, server: &Server, policy: &Policy);
}

/// What a server sampled.
#[derive(Debug, Clone, PartialEq)]
struct Answer {
    tokens: Vec<u32>,
    /// Of each token under the sampler; NaN where it was not told.
    logprobs: Vec<f32>,
    /// Ended at one of the stop strings.
    stopped: bool,
}

/// Why a request did not succeed.
#[derive(Debug, Clone, PartialEq)]
enum Failure {
    /// May succeed when it is asked again: no connection, too busy, an error of the server.
    Passing(String),
    /// The server does not know the policy (any more).
    UnknownPolicy(String),
    /// The same request would fail again.
    Final(String),
}

/// Samples from servers.
pub struct RemoteEngine<'a> {
    model: &'a Model,
    pool: Pool,
    /// Files for the servers are made by the kind of protocol.
    kind: Kind,
    policy: Option<Policy>,
    /// Policies so far.
    version: u64,
    probe: Option<Probe>,
    started: Option<Started>,
    begun: Option<Begun>,
    rank: usize,
}

/// What has to be done on this side when there is a new policy.
enum Kind {
    Vllm(Arc<Vllm>),
    Llama,
}

/// Where an engine for these servers belongs in a run.
#[derive(Debug, Clone, Copy)]
pub struct Site<'a> {
    /// Folder for what servers read: adapters.
    pub folder: &'a Path,
    /// Longest prompt and completion together, in tokens.
    pub context: usize,
    /// This rank and how many there are.
    pub rank: usize,
    pub ranks: usize,
    pub progress: Progress,
}

impl<'a> RemoteEngine<'a> {
    /// Finds the servers, or starts one where the configuration names a program. `adapter` is any of the
    /// kind that will be sampled from; without one, only the model itself can be.
    ///
    /// # Errors
    /// [`Error::Config`] for what the kind of server cannot do; [`Error::Data`] when a server does not
    /// answer or has another model.
    pub fn open(
        config: &RolloutConfig,
        model: &'a Model,
        adapter: Option<&Adapter>,
        site: &Site<'_>,
    ) -> Result<Self> {
        let mut started = None;
        let mut urls = own_urls(&config.base_url, site);
        let folder = config.adapter_dir.as_deref().unwrap_or(site.folder);
        let (kind, protocol): (_, Arc<dyn Protocol>) = match config.engine {
            RolloutEngine::Vllm => {
                let vllm = Arc::new(Vllm::new(folder)?);
                (Kind::Vllm(Arc::clone(&vllm)), vllm)
            }
            RolloutEngine::LlamaServer => {
                let files = match adapter {
                    Some(adapter) => llama::write_basis(adapter, &model.decoder.config, folder)?,
                    None => Vec::new(),
                };
                if urls.is_empty() {
                    let process = Started::new(config, model, &files, site)?;
                    urls.push(process.url());
                    started = Some(process);
                }
                (Kind::Llama, Arc::new(LlamaServer::new(&files)))
            }
            RolloutEngine::Native => {
                return Err(Error::Internal("the native engine is no server".to_owned()));
            }
        };
        let servers = urls.iter().map(|url| Server::new(url, config)).collect();
        let mut engine = Self {
            model,
            pool: Pool::new(protocol, servers, config),
            kind,
            policy: None,
            version: 0,
            probe: None,
            started,
            begun: None,
            rank: site.rank,
        };
        engine.wait_until_ready(site.progress)?;
        Ok(engine)
    }

    /// Waits for servers that are still loading.
    fn wait_until_ready(&mut self, progress: Progress) -> Result<()> {
        let bar = progress.bar("waiting for servers", 0);
        let started = &mut self.started;
        let result = self.pool.wait_until_ready(&mut || match started {
            Some(process) => process.keep_alive(),
            None => Ok(()),
        });
        bar.clear();
        result
    }

    /// Makes the servers ready for an adapter's present numbers, if they are not.
    fn publish(&mut self, adapter: Option<&Adapter>, prompt: &[u32]) -> Result<()> {
        let parameters = adapter.map_or_else(Vec::new, Adapter::rounded_parameters);
        let is_current = |policy: &Policy| policy.parameters == parameters;
        if self.policy.as_ref().is_some_and(is_current) {
            return Ok(());
        }
        self.version += 1;
        let policy = Policy {
            name: policy_name(self.rank, self.version, &parameters),
            parameters,
        };
        if let (Kind::Vllm(vllm), Some(adapter)) = (&self.kind, adapter) {
            vllm.write(adapter, &policy)?;
        }
        let earlier = self.policy.take();
        let probe = self.probe.get_or_insert_with(|| Probe::new(prompt));
        let started = self.started.as_mut();
        let answers = self.pool.publish(&policy, &probe.ask(), started)?;
        let urls = self.pool.servers.iter().map(|server| &server.url[..]);
        let answers: Vec<_> = urls.zip(answers).collect();
        probe.check(self.model, adapter, &policy, &answers)?;
        if let Some(earlier) = earlier {
            self.pool.retire(&earlier);
            if let Kind::Vllm(vllm) = &self.kind {
                vllm.remove(&earlier);
            }
        }
        self.policy = Some(policy);
        Ok(())
    }

    /// A server's answer as the native engine would have given it.
    fn completion(&self, answer: Answer, params: &SamplingParams) -> Result<Completion> {
        let Answer {
            mut tokens,
            mut logprobs,
            stopped,
        } = answer;
        let vocab = self.model.decoder.config.vocab_size;
        if let Some(id) = tokens.iter().find(|&&id| id as usize >= vocab) {
            return Err(Error::data(format!(
                "a server answered with the token id {id}, the model's vocabulary ends at {vocab}: it \
                 has another model"
            )));
        }
        let tokenizer = &self.model.tokenizer;
        for end in 1..=tokens.len() {
            if let Some((finish, text)) = finished_at(tokenizer, &tokens[..end], params) {
                tokens.truncate(end);
                logprobs.truncate(end);
                return Ok(Completion {
                    tokens,
                    logprobs,
                    text,
                    finish,
                });
            }
        }
        // Ended before anything that this side would have ended it for.
        let finish = match stopped {
            true => FinishReason::Stop,
            false => FinishReason::Length,
        };
        let text = tokenizer.decode(&tokens, true);
        Ok(Completion {
            tokens,
            logprobs,
            text,
            finish,
        })
    }
}

/// The servers of one rank: those whose number is its own, or one that several share.
fn own_urls(urls: &[String], site: &Site<'_>) -> Vec<String> {
    let own = |(i, url): (usize, &String)| (i % site.ranks == site.rank).then(|| url.clone());
    let found: Vec<String> = urls.iter().enumerate().filter_map(own).collect();
    match found.is_empty() {
        true => urls.get(site.rank % urls.len().max(1)).cloned(),
        false => None,
    }
    .into_iter()
    .chain(found)
    .collect()
}

/// Unlike that of other numbers, other ranks and other runs with the same server.
fn policy_name(rank: usize, version: u64, parameters: &[f32]) -> String {
    use sha2::{Digest, Sha256};
    let mut hasher = Sha256::new();
    hasher.update(std::process::id().to_le_bytes());
    parameters
        .iter()
        .for_each(|x| hasher.update(x.to_le_bytes()));
    let digest = format!("{:x}", hasher.finalize());
    format!("policy-{rank}-{version:06}-{}", &digest[..12])
}

impl RemoteEngine<'_> {
    /// Starts on the completions of these requests.
    fn start(
        &mut self,
        adapter: Option<&Adapter>,
        requests: &[Request],
        params: &SamplingParams,
    ) -> Result<Begun> {
        let first = requests.first().map_or(&[][..], |request| &request.prompt);
        self.publish(adapter, first)?;
        let policy = self.policy.as_ref();
        let policy = policy.ok_or_else(|| Error::Internal("no policy was published".to_owned()))?;
        let mut places = Vec::new();
        let mut asks = Vec::new();
        for (index, request) in requests.iter().enumerate() {
            let prompt: Arc<[u32]> = request.prompt.as_slice().into();
            for sample in 0..request.n {
                let seed = seed(params, request, sample);
                places.push((index, sample));
                asks.push(Ask::new(Arc::clone(&prompt), params, seed));
            }
        }
        Ok(Begun {
            requests: requests.to_vec(),
            params: params.clone(),
            places,
            state: State::Running(self.pool.start(policy, asks)),
        })
    }

    /// Waits for completions that were begun; `each` sees them.
    fn wait(&mut self, begun: Begun, each: &mut dyn FnMut(usize, usize, Completion)) -> Result<()> {
        let Begun {
            params,
            places,
            state,
            ..
        } = begun;
        let mut take = |engine: &Self, at: usize, answer| {
            let (request, sample) = places[at];
            each(request, sample, engine.completion(answer, &params)?);
            Ok(())
        };
        match state {
            State::Done(answers) => {
                let mut answers = answers.into_iter();
                answers.try_for_each(|(at, answer)| take(self, at, answer))
            }
            State::Running(running) => {
                let mut started = self.started.take();
                let engine = &*self;
                let mut take = |at, answer| take(engine, at, answer);
                let outcome = running.wait(started.as_mut(), &mut take);
                self.started = started;
                outcome
            }
        }
    }

    /// Lets what was begun come to its end, before the servers are asked for something else.
    fn settle(&mut self) -> Result<()> {
        let Some(mut begun) = self.begun.take() else {
            return Ok(());
        };
        if let State::Running(running) = begun.state {
            let mut answers = Vec::new();
            running.wait(self.started.as_mut(), &mut |at, answer| {
                answers.push((at, answer));
                Ok(())
            })?;
            begun.state = State::Done(answers);
        }
        self.begun = Some(begun);
        Ok(())
    }
}

/// A rollout that was begun ahead.
struct Begun {
    requests: Vec<Request>,
    params: SamplingParams,
    /// Request and sample of every completion.
    places: Vec<(usize, usize)>,
    state: State,
}

enum State {
    Running(Running),
    /// Its answers, as they came.
    Done(Vec<(usize, Answer)>),
}

impl Engine for RemoteEngine<'_> {
    /// `on_token` hears of whole completions.
    fn generate(
        &mut self,
        adapter: Option<&Adapter>,
        requests: &[Request],
        params: &SamplingParams,
        on_token: &mut dyn FnMut(usize, usize, &[u32]),
        on_finished: &mut dyn FnMut(usize, usize, &Completion),
    ) -> Result<Vec<Vec<Completion>>> {
        check_prompts(requests, &self.model.decoder)?;
        let empty = |request: &Request| vec![Completion::empty(); request.n];
        let mut results: Vec<Vec<Completion>> = requests.iter().map(empty).collect();
        if requests.is_empty() || params.max_tokens == 0 {
            return Ok(results);
        }
        let is_this = |begun: &mut Begun| begun.requests == requests && begun.params == *params;
        let begun = match self.begun.take_if(is_this) {
            Some(begun) => begun,
            None => {
                self.settle()?;
                self.start(adapter, requests, params)?
            }
        };
        self.wait(begun, &mut |request, sample, completion| {
            on_token(request, sample, &completion.tokens);
            on_finished(request, sample, &completion);
            results[request][sample] = completion;
        })?;
        Ok(results)
    }

    fn begin(
        &mut self,
        adapter: Option<&Adapter>,
        requests: &[Request],
        params: &SamplingParams,
    ) -> Result<()> {
        check_prompts(requests, &self.model.decoder)?;
        self.settle()?;
        self.begun = Some(self.start(adapter, requests, params)?);
        Ok(())
    }

    fn bytes(&self) -> (u64, u64) {
        self.pool.bytes()
    }
}

/// The server's own seed of a completion, fixed by the run's as every draw is.
fn seed(params: &SamplingParams, request: &Request, sample: usize) -> u32 {
    let draw = Draw {
        seed: params.seed,
        step: params.step,
        prompt: request.id,
        sample: sample as u64,
        position: 0,
    };
    (draw.uniform() * f64::from(u32::MAX)) as u32
}
