//! Threads that wait for the next piece of work without going to sleep.
//!
//! A decoding step of a small model is some two hundred kernels of tens of microseconds with less time
//! between them. A thread of a pool that finds nothing to do sleeps, and being woken takes it as long as
//! the kernel. So while a [`team`] is at work, the threads of the pool spin, and only rest when nothing
//! has come for a while.

use std::cell::{Cell, UnsafeCell};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

/// Polls before a thread lets others run between two of them: some hundred microseconds.
const SPINS: usize = 5_000;
/// Polls before it sleeps between two of them: some milliseconds.
const YIELDS: usize = 10_000;
const REST: Duration = Duration::from_micros(50);

/// Work that is being handed out: tasks `0..count`, each to whom comes first.
#[derive(Clone, Copy)]
struct Job {
    task: *const (dyn Fn(usize) + Sync),
    count: usize,
}

/// What the leader, the thread that began the team, shares with the others.
struct Team {
    /// Written by the leader while `open` is false and nobody is `inside`.
    job: UnsafeCell<Option<Job>>,
    /// The first task that nobody has taken.
    next: AtomicUsize,
    open: AtomicBool,
    /// Threads that may be looking at the job.
    inside: AtomicUsize,
    over: AtomicBool,
}

// SAFETY: `job` is written by the leader alone, and only while no other thread reads it (see `run`); what
// it points to may be used by several threads, and outlives their use of it.
unsafe impl Sync for Team {}

thread_local! {
    /// The team that this thread leads.
    static LED: Cell<Option<*const Team>> = const { Cell::new(None) };
}

/// Runs `f` while the other threads of the pool that the calling thread belongs to wait for what its
/// kernels hand out. On a thread of no pool, which could wait for a pool that waits for it, `f` runs as it
/// would without.
pub fn team<T>(f: impl FnOnce() -> T) -> T {
    let alone = super::par::threads_for(usize::MAX) <= 1;
    if alone || is_led() || rayon::current_thread_index().is_none() {
        return f();
    }
    let team = Team {
        job: UnsafeCell::new(None),
        next: AtomicUsize::new(0),
        open: AtomicBool::new(false),
        inside: AtomicUsize::new(0),
        over: AtomicBool::new(false),
    };
    rayon::in_place_scope(|scope| {
        scope.spawn_broadcast(|_, _| team.follow());
        // Also when `f` panics: the scope waits for the others, and the team must not be led any more.
        struct End<'a>(&'a Team);
        impl Drop for End<'_> {
            fn drop(&mut self) {
                LED.set(None);
                self.0.over.store(true, Ordering::Release);
            }
        }
        let _end = End(&team);
        LED.set(Some(&raw const team));
        f()
    })
}

/// Whether the calling thread leads a team.
pub(super) fn is_led() -> bool {
    LED.get().is_some()
}

/// Runs tasks `0..count`, each once, if the calling thread leads a team.
pub(super) fn run(count: usize, task: &(dyn Fn(usize) + Sync)) -> bool {
    let Some(team) = LED.get() else {
        return false;
    };
    // SAFETY: `team` outlives `f`, inside of which this is called, on this very thread.
    let team = unsafe { &*team };
    // SAFETY: erases the lifetime only; nobody uses the job after `Close` has been dropped.
    let task: *const (dyn Fn(usize) + Sync + 'static) = unsafe {
        std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), _>(std::ptr::from_ref(task))
    };
    let job = Job { task, count };
    // SAFETY: the last job was closed and everybody has left it.
    unsafe { *team.job.get() = Some(job) };
    team.next.store(0, Ordering::Relaxed);
    team.open.store(true, Ordering::SeqCst);
    /// Waits until nobody uses the job: also when a task panics.
    struct Close<'a>(&'a Team);
    impl Drop for Close<'_> {
        fn drop(&mut self) {
            LED.set(Some(self.0));
            self.0.open.store(false, Ordering::SeqCst);
            let mut polls = 0;
            while self.0.inside.load(Ordering::SeqCst) > 0 {
                wait(&mut polls);
            }
        }
    }
    let _close = Close(team);
    // What a task hands out in turn is not the team's.
    LED.set(None);
    team.work(job);
    true
}

impl Team {
    /// Takes tasks until there are none left.
    fn work(&self, job: Job) {
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= job.count {
                return;
            }
            // SAFETY: the leader keeps the task alive until the job is closed and nobody is inside.
            unsafe { (*job.task)(index) };
        }
    }

    /// Helps until the team's work is over.
    fn follow(&self) {
        let mut polls = 0;
        while !self.over.load(Ordering::Acquire) {
            if self.open.load(Ordering::Relaxed) && self.help() {
                polls = 0;
            }
            wait(&mut polls);
        }
    }

    /// Takes part in the open job; `false` when it was already closed.
    fn help(&self) -> bool {
        struct Inside<'a>(&'a AtomicUsize);
        impl Drop for Inside<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::SeqCst);
            }
        }
        self.inside.fetch_add(1, Ordering::SeqCst);
        let _inside = Inside(&self.inside);
        // Either this sees that the job was closed, or the leader sees that somebody is inside: both
        // order what they write before what they read (`SeqCst`).
        if !self.open.load(Ordering::SeqCst) {
            return false;
        }
        // SAFETY: open, so the leader does not write until `inside` is zero.
        if let Some(job) = unsafe { *self.job.get() } {
            self.work(job);
        }
        true
    }
}

/// A pause between two polls, longer the more there have been.
fn wait(polls: &mut usize) {
    *polls += 1;
    match *polls {
        0..SPINS => std::hint::spin_loop(),
        SPINS..YIELDS => std::thread::yield_now(),
        _ => std::thread::sleep(REST),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{par, testing::on_threads};
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    /// Every task of many jobs once, however many threads help.
    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 5] {
            on_threads(threads, || {
                team(|| {
                    assert_eq!(is_led(), threads > 1);
                    for count in (0..40).cycle().take(4_000) {
                        let seen: Vec<AtomicUsize> = (0..count).map(|_| 0.into()).collect();
                        par::run(count, threads, |i| {
                            seen[i].fetch_add(1, Ordering::Relaxed);
                        });
                        assert!(seen.iter().all(|n| n.load(Ordering::Relaxed) == 1));
                    }
                });
                assert!(!is_led());
            });
        }
    }

    #[test]
    fn tasks_can_hand_out_tasks() {
        let sum = AtomicUsize::new(0);
        on_threads(3, || {
            team(|| {
                par::run(8, 3, |i| {
                    par::run(4, 3, |j| {
                        sum.fetch_add(4 * i + j, Ordering::Relaxed);
                    });
                });
            });
        });
        assert_eq!(sum.into_inner(), (0..32).sum::<usize>());
    }

    #[test]
    fn a_panic_in_any_task_ends_the_team() {
        for bad in [0, 7, 31] {
            let seen = catch_unwind(AssertUnwindSafe(|| {
                on_threads(3, || {
                    team(|| {
                        par::run(32, 3, |i| {
                            assert!(i != bad, "task {i}");
                            std::thread::sleep(Duration::from_micros(200));
                        });
                    });
                });
            }));
            assert!(seen.is_err(), "task {bad}");
        }
        on_threads(3, || team(|| par::run(3, 3, |_| ())));
    }
}
