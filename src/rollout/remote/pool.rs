//! Servers that share the requests of a rollout, each answering several at a time.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::http::Server;
use super::process::Started;
use super::{Answer, Failure, Policy, Protocol};
use crate::config::RolloutConfig;
use crate::rollout::SamplingParams;
use crate::run::signals;
use crate::{Error, Result};

/// Wait before a request is made again for the first time; twice as long every further time.
const FIRST_DELAY: Duration = Duration::from_millis(250);
const LONGEST_DELAY: Duration = Duration::from_secs(20);
/// How often the calling thread looks after signals and a server that it started.
const LOOK: Duration = Duration::from_millis(100);
/// How long a server may take to load its model.
const READY: Duration = Duration::from_secs(600);

/// One completion that is wanted.
pub(super) struct Ask {
    pub prompt: Arc<[u32]>,
    pub max_tokens: usize,
    pub temperature: f64,
    pub top_p: f64,
    pub top_k: usize,
    pub min_p: f64,
    pub stop: Arc<[String]>,
    pub eos: Arc<[u32]>,
    pub seed: u32,
}

impl Ask {
    pub fn new(prompt: Arc<[u32]>, params: &SamplingParams, seed: u32) -> Self {
        Self {
            prompt,
            max_tokens: params.max_tokens,
            temperature: params.temperature,
            top_p: params.top_p,
            top_k: params.top_k,
            min_p: params.min_p,
            stop: params.stop.as_slice().into(),
            eos: params.eos.as_slice().into(),
            seed,
        }
    }
}

/// The servers of a rank.
pub(super) struct Pool {
    protocol: Arc<dyn Protocol>,
    pub servers: Vec<Arc<Server>>,
    max_concurrency: usize,
    max_retries: u32,
}

impl Pool {
    pub fn new(protocol: Arc<dyn Protocol>, servers: Vec<Server>, config: &RolloutConfig) -> Self {
        Self {
            protocol,
            servers: servers.into_iter().map(Arc::new).collect(),
            max_concurrency: config.max_concurrency,
            max_retries: config.max_retries,
        }
    }

    /// Bytes sent to and received from all servers so far.
    pub fn bytes(&self) -> (u64, u64) {
        let all = self.servers.iter().map(|server| server.bytes());
        all.fold((0, 0), |(a, b), (sent, received)| (a + sent, b + received))
    }

    /// Waits until every server says that it is well. `look_after` is called now and then.
    ///
    /// # Errors
    /// The first that is not well after ten minutes, with its last answer.
    pub fn wait_until_ready(&self, look_after: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let started = Instant::now();
        for server in &self.servers {
            while let Err(failure) = server.get("/health") {
                signals::check()?;
                look_after()?;
                let why = match failure {
                    Failure::Passing(why) if started.elapsed() < READY => {
                        tracing::debug!("{why}");
                        thread::sleep(LOOK);
                        continue;
                    }
                    Failure::Passing(why) | Failure::UnknownPolicy(why) | Failure::Final(why) => {
                        why
                    }
                };
                return Err(Error::data(format!("the server is not ready: {why}")));
            }
        }
        Ok(())
    }

    /// Makes a policy known to every server, and gives their completions of `probe`. A server that does
    /// not answer is left out from now on, if there are others.
    pub fn publish(
        &mut self,
        policy: &Policy,
        probe: &Ask,
        mut started: Option<&mut Started>,
    ) -> Result<Vec<Answer>> {
        let (mut alive, mut answers) = (Vec::new(), Vec::new());
        let mut last = Error::config("rollout.base_url: no servers");
        for server in &self.servers {
            let publish = || {
                self.protocol.publish(server, policy)?;
                complete(&*self.protocol, server, policy, probe)
            };
            match self.patiently(publish, started.as_deref_mut()) {
                Ok(answer) => {
                    alive.push(Arc::clone(server));
                    answers.push(answer);
                }
                Err(Error::Lost(why)) => {
                    tracing::warn!("{why}: going on without it");
                    last = Error::Lost(format!("no server answers any more; the last said: {why}"));
                }
                Err(other) => return Err(other),
            }
        }
        self.servers = alive;
        match self.servers.is_empty() {
            true => Err(last),
            false => Ok(answers),
        }
    }

    /// [`Error::Lost`] after the last retry.
    fn patiently<T>(
        &self,
        mut work: impl FnMut() -> Result<T, Failure>,
        mut started: Option<&mut Started>,
    ) -> Result<T> {
        let mut attempt = 0;
        loop {
            signals::check()?;
            if let Some(process) = &mut started {
                process.keep_alive()?;
            }
            match work() {
                Ok(done) => return Ok(done),
                Err(Failure::Passing(why)) if attempt < self.max_retries => {
                    tracing::warn!("{why}: trying again");
                    thread::sleep(delay(attempt));
                    attempt += 1;
                }
                Err(Failure::Passing(why)) => return Err(Error::Lost(why)),
                Err(Failure::UnknownPolicy(why) | Failure::Final(why)) => {
                    return Err(Error::data(why));
                }
            }
        }
    }

    /// The policy will not be asked for any more.
    pub fn retire(&self, policy: &Policy) {
        for server in &self.servers {
            self.protocol.retire(server, policy);
        }
    }

    /// Starts on these completions; the servers take the next one whenever they have room.
    pub fn start(&self, policy: &Policy, asks: Vec<Ask>) -> Running {
        let total = asks.len();
        let (send, events) = mpsc::channel();
        let work = Arc::new(Work {
            protocol: Arc::clone(&self.protocol),
            policy: policy.clone(),
            left: AtomicUsize::new(total),
            waiting: Mutex::new((0..total).collect()),
            changed: Condvar::new(),
            asks,
            stop: AtomicBool::new(false),
            max_retries: self.max_retries,
        });
        let mut threads = 0;
        for server in &self.servers {
            for _ in 0..self.max_concurrency.min(total) {
                let (work, server, send) = (Arc::clone(&work), Arc::clone(server), send.clone());
                // Not joined: one that waits for an answer that nobody wants ends by its time limit.
                thread::spawn(move || work.serve(&server, &send));
                threads += 1;
            }
        }
        Running {
            work,
            events,
            threads,
            total,
        }
    }
}

/// Completions that servers are at. When it is dropped they take no more.
pub(super) struct Running {
    work: Arc<Work>,
    events: mpsc::Receiver<Event>,
    threads: usize,
    total: usize,
}

impl Running {
    /// All completions; `each(number, answer)` sees them as they come, on the calling thread.
    ///
    /// # Errors
    /// What `each` gives; [`Error::Interrupted`]; [`Error::Data`] when a request fails for good;
    /// [`Error::Lost`] when no server is left that answers.
    pub fn wait(
        mut self,
        mut started: Option<&mut Started>,
        each: &mut dyn FnMut(usize, Answer) -> Result<()>,
    ) -> Result<()> {
        let (mut done, mut why) = (0, String::new());
        while done < self.total {
            match self.events.recv_timeout(LOOK) {
                Ok(Event::Done(at, answer)) => {
                    each(at, answer)?;
                    done += 1;
                }
                Ok(Event::Failed(why)) => return Err(Error::data(why)),
                Ok(Event::Gone(last)) => {
                    (self.threads, why) = (self.threads - 1, last);
                    if self.threads == 0 {
                        return Err(Error::Lost(format!(
                            "no server answers any more; the last said: {why}"
                        )));
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::Internal(format!("requests were lost: {why}")));
                }
            }
            signals::check()?;
            if let Some(process) = &mut started {
                process.keep_alive()?;
            }
        }
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.work.stop.store(true, Ordering::Relaxed);
        self.work.changed.notify_all();
    }
}

/// A completion; the policy is made known again to a server that has lost it, as by a restart.
fn complete(
    protocol: &dyn Protocol,
    server: &Server,
    policy: &Policy,
    ask: &Ask,
) -> Result<Answer, Failure> {
    match protocol.complete(server, policy, ask) {
        Err(Failure::UnknownPolicy(why)) => {
            tracing::warn!("{why}: the server has lost the adapter, and gets it again");
            protocol.publish(server, policy)?;
            protocol.complete(server, policy, ask)
        }
        other => other,
    }
}

fn delay(attempt: u32) -> Duration {
    FIRST_DELAY
        .saturating_mul(1 << attempt.min(16))
        .min(LONGEST_DELAY)
}

/// What a thread tells the calling one.
enum Event {
    Done(usize, Answer),
    /// This request fails anywhere.
    Failed(String),
    /// The thread's server does not answer: others have its request.
    Gone(String),
}

/// What the threads of a rollout share.
struct Work {
    protocol: Arc<dyn Protocol>,
    policy: Policy,
    asks: Vec<Ask>,
    /// Numbers of requests that nobody is at.
    waiting: Mutex<VecDeque<usize>>,
    changed: Condvar,
    /// Requests without an answer.
    left: AtomicUsize,
    stop: AtomicBool,
    max_retries: u32,
}

impl Work {
    /// One thread of a server.
    fn serve(&self, server: &Server, events: &mpsc::Sender<Event>) {
        while let Some(at) = self.next() {
            let event = match self.complete(server, at) {
                Ok(answer) => {
                    self.left.fetch_sub(1, Ordering::SeqCst);
                    self.changed.notify_all();
                    Event::Done(at, answer)
                }
                Err(Failure::Passing(why)) => {
                    self.put_back(at);
                    Event::Gone(why)
                }
                Err(Failure::UnknownPolicy(why) | Failure::Final(why)) => Event::Failed(why),
            };
            let go_on = matches!(event, Event::Done(..));
            if events.send(event).is_err() || !go_on {
                return;
            }
        }
    }

    fn complete(&self, server: &Server, at: usize) -> Result<Answer, Failure> {
        let ask = &self.asks[at];
        let mut attempt = 0;
        loop {
            match complete(&*self.protocol, server, &self.policy, ask) {
                Err(Failure::Passing(why))
                    if attempt < self.max_retries && !self.stop.load(Ordering::Relaxed) =>
                {
                    tracing::debug!("{why}: trying again");
                    thread::sleep(delay(attempt));
                    attempt += 1;
                }
                other => return other,
            }
        }
    }

    /// The next request; waits while others may put one back.
    fn next(&self) -> Option<usize> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if self.stop.load(Ordering::Relaxed) || self.left.load(Ordering::SeqCst) == 0 {
                return None;
            }
            if let Some(at) = waiting.pop_front() {
                return Some(at);
            }
            let woken = self.changed.wait_timeout(waiting, Duration::from_secs(1));
            waiting = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn put_back(&self, at: usize) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.push_front(at);
        self.changed.notify_all();
    }
}
