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

use super::Completion;
use super::batch::Outcome;
use super::native::{Ask, Item, NativeEngine};
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

/// Consecutive prompts that one thread completes.
pub(super) struct Part {
    pub items: Range<usize>,
    /// Bytes for recorded inputs, by ask.
    pub budgets: Vec<usize>,
}

impl NativeEngine<'_> {
    /// The parts of a rollout: all of it, or for a small model runs of prompts with up to
    /// [`PART`] completions. They do not depend on the number of threads.
    pub(super) fn parts(
        &self,
        items: &[Item<'_>],
        asks: &[Ask<'_>],
        max_batch_size: usize,
    ) -> Vec<Part> {
        let runs = match !self.decoder.is_small() || cpu::is_alone() {
            true => std::iter::once(0..items.len()).collect(),
            false => {
                let sizes: Vec<usize> = items.iter().map(|item| item.request.n).collect();
                crate::model::pack(&sizes, PART.min(max_batch_size))
            }
        };
        let takes_part = |run: &Range<usize>, ask| items[run.clone()].iter().any(|i| i.ask == ask);
        let budgets: Vec<usize> = asks
            .iter()
            .enumerate()
            .map(|(ask, own)| {
                let sharing = runs.iter().filter(|run| takes_part(run, ask)).count();
                own.budget / sharing.max(1)
            })
            .collect();
        let budget = |run: &Range<usize>, ask: usize| match takes_part(run, ask) {
            true => budgets[ask],
            false => 0,
        };
        runs.into_iter()
            .map(|items| Part {
                budgets: (0..asks.len()).map(|ask| budget(&items, ask)).collect(),
                items,
            })
            .collect()
    }

    /// Runs `part` for every one of `parts`, on as many threads as the pool has, and reports on the
    /// calling thread, one part after the other.
    pub(super) fn in_parallel(
        &self,
        parts: &[Part],
        observers: Observers<'_>,
        part: impl Fn(&Part, Observers<'_>) -> Result<Outcome> + Sync,
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
    own: &Part,
    send: &mpsc::Sender<(usize, Event)>,
    part: &impl Fn(&Part, Observers<'_>) -> Result<Outcome>,
) -> Result<Outcome> {
    // Nobody listens any more only when the caller is being unwound.
    let tell = |event| drop(send.send((index, event)));
    let observers = Observers {
        on_token: &mut |request, sample, tokens| {
            if let Some(&token) = tokens.last() {
                tell(Event::Token {
                    request: own.items.start + request,
                    sample,
                    token,
                });
            }
        },
        on_finished: &mut |request, sample, completion| {
            tell(Event::Finished {
                request: own.items.start + request,
                sample,
                completion: completion.clone(),
            });
        },
    };
    let outcome = part(own, observers);
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
