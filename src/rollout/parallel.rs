//! A rollout of a small model, divided between threads by its prompts.
//!
//! The products of one decoding pass of such a model are too small to share between threads; whole
//! prompts are not. What is drawn does not depend on it, as it does not on batches, and what is
//! reported comes in the same order on any number of threads.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;

use super::native::{NativeEngine, Outcome};
use super::{Completion, Request};
use crate::Result;
use crate::ops::cpu;

/// Completions of a part.
const PART: usize = 32;

/// What a thread tells the one that called the engine.
enum Event {
    Token {
        request: usize,
        sample: usize,
        token: u32,
    },
    Finished {
        request: usize,
        sample: usize,
        completion: Completion,
    },
    /// Nothing more comes from this part.
    Done,
}

/// What a part of a rollout reports to: as [`super::Engine::generate`] has them.
pub(super) struct Observers<'a> {
    pub on_token: &'a mut dyn FnMut(usize, usize, &[u32]),
    pub on_finished: &'a mut dyn FnMut(usize, usize, &Completion),
}

impl NativeEngine<'_> {
    /// The parts of a rollout: all of it, or for a small model runs of requests with up to
    /// [`PART`] completions. They do not depend on the number of threads.
    pub(super) fn parts(&self, requests: &[Request], max_batch_size: usize) -> Vec<Range<usize>> {
        if !self.decoder.is_small() || cpu::is_alone() {
            return std::iter::once(0..requests.len()).collect();
        }
        let sizes: Vec<usize> = requests.iter().map(|request| request.n).collect();
        crate::model::pack(&sizes, PART.min(max_batch_size))
    }

    /// Runs `part` for every one of `parts`, on as many threads as the pool has, and reports on the
    /// calling thread, one part after the other.
    pub(super) fn in_parallel(
        &self,
        parts: &[Range<usize>],
        observers: Observers<'_>,
        part: impl Fn(Range<usize>, Observers<'_>) -> Result<Outcome> + Sync,
    ) -> Result<Vec<Outcome>> {
        let (send, receive) = mpsc::channel();
        let next = AtomicUsize::new(0);
        thread::scope(|scope| {
            let threads: Vec<_> = (0..rayon::current_num_threads().min(parts.len()))
                .map(|_| {
                    let (send, part, next) = (send.clone(), &part, &next);
                    scope.spawn(move || {
                        let mut outcomes = Vec::new();
                        loop {
                            let index = next.fetch_add(1, Ordering::Relaxed);
                            let Some(own) = parts.get(index) else {
                                return outcomes;
                            };
                            let outcome = cpu::alone(|| watched(index, own, &send, part));
                            if outcome.is_err() {
                                // Nobody need start another one.
                                next.store(parts.len(), Ordering::Relaxed);
                            }
                            outcomes.push((index, outcome));
                        }
                    })
                })
                .collect();
            drop(send);
            report(&receive, observers);
            let mut outcomes = Vec::with_capacity(parts.len());
            for thread in threads {
                match thread.join() {
                    Ok(own) => outcomes.extend(own),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            outcomes.sort_by_key(|(index, _)| *index);
            outcomes.into_iter().map(|(_, outcome)| outcome).collect()
        })
    }
}

/// Runs one part, and sends what it reports.
fn watched(
    index: usize,
    own: &Range<usize>,
    send: &mpsc::Sender<(usize, Event)>,
    part: &impl Fn(Range<usize>, Observers<'_>) -> Result<Outcome>,
) -> Result<Outcome> {
    // Nobody listens any more only when the caller is being unwound.
    let tell = |event| drop(send.send((index, event)));
    let observers = Observers {
        on_token: &mut |request, sample, tokens| {
            if let Some(&token) = tokens.last() {
                tell(Event::Token {
                    request: own.start + request,
                    sample,
                    token,
                });
            }
        },
        on_finished: &mut |request, sample, completion| {
            tell(Event::Finished {
                request: own.start + request,
                sample,
                completion: completion.clone(),
            });
        },
    };
    let outcome = part(own.clone(), observers);
    tell(Event::Done);
    outcome
}

/// Hands events on until all threads have ended: those of the first part as they come, those of
/// others when the parts before are done.
fn report(events: &mpsc::Receiver<(usize, Event)>, observers: Observers<'_>) {
    let mut growing = HashMap::<(usize, usize), Vec<u32>>::new();
    let mut waiting = HashMap::<usize, VecDeque<Event>>::new();
    let mut current = 0;
    for (part, event) in events {
        waiting.entry(part).or_default().push_back(event);
        while let Some(event) = waiting.get_mut(&current).and_then(VecDeque::pop_front) {
            match event {
                Event::Token {
                    request,
                    sample,
                    token,
                } => {
                    let tokens = growing.entry((request, sample)).or_default();
                    tokens.push(token);
                    (observers.on_token)(request, sample, tokens);
                }
                Event::Finished {
                    request,
                    sample,
                    completion,
                } => {
                    growing.remove(&(request, sample));
                    (observers.on_finished)(request, sample, &completion);
                }
                Event::Done => {
                    waiting.remove(&current);
                    current += 1;
                }
            }
        }
    }
}
