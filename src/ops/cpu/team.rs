//! Threads that wait for the next piece of work without going to sleep.
//!
//! A decoding step of a small model is some two hundred kernels of tens of microseconds with less time
//! between them. A thread of a pool that finds nothing to do sleeps, and being woken takes it as long as
//! the kernel. So while a [`team`] is at work, the threads of the pool spin, and only rest when nothing
//! has come for a while.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
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
    /// What the first task that panicked panicked with.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: what `job` points to may be used by any thread, and outlives that use (see `run`).
unsafe impl Send for Team {}
// SAFETY: as above; and `job` is written by the leader alone, and only while no other thread reads it.
unsafe impl Sync for Team {}

/// What a thread has to do with teams.
#[derive(Clone, Copy)]
enum Role {
    Nothing,
    /// It leads this one, and its kernels hand out their tasks.
    Leads(*const Team),
    /// It follows one, or leads one and is at a task: what it hands out in turn is not the team's.
    Helps,
}

thread_local! {
    static ROLE: Cell<Role> = const { Cell::new(Role::Nothing) };
}

/// Runs `f` while the other threads of the pool that the calling thread belongs to wait for what its
/// kernels hand out. On a thread of no pool, which could wait for a pool that waits for it, `f` runs as it
/// would without, and so it does inside of a team.
///
/// A panic of a task goes on in `f`, at the kernel that handed it out.
pub fn team<T>(f: impl FnOnce() -> T) -> T {
    let alone = super::par::threads_for(usize::MAX) <= 1;
    let leader = match (ROLE.get(), rayon::current_thread_index()) {
        (Role::Nothing, Some(leader)) if !alone => leader,
        _ => return f(),
    };
    let team = Arc::new(Team {
        job: UnsafeCell::new(None),
        next: AtomicUsize::new(0),
        open: AtomicBool::new(false),
        inside: AtomicUsize::new(0),
        over: AtomicBool::new(false),
        panic: Mutex::new(None),
    });
    // Nobody waits for these: a thread that has other work comes late, or when all is over.
    let followed = team.clone();
    rayon::spawn_broadcast(move |thread| {
        // The leader, should it ever wait for a job that another thread took from it, would come by here,
        // and wait for itself.
        if thread.index() != leader {
            followed.follow();
        }
    });
    // Also when `f` panics.
    struct End(Arc<Team>);
    impl Drop for End {
        fn drop(&mut self) {
            ROLE.set(Role::Nothing);
            self.0.over.store(true, Ordering::Relaxed);
        }
    }
    let end = End(team);
    ROLE.set(Role::Leads(Arc::as_ptr(&end.0)));
    f()
}

/// Whether the calling thread leads a team.
pub(super) fn is_led() -> bool {
    matches!(ROLE.get(), Role::Leads(_))
}

/// Runs tasks `0..count`, each once, if the calling thread leads a team.
pub(super) fn run(count: usize, task: &(dyn Fn(usize) + Sync)) -> bool {
    let Role::Leads(leads) = ROLE.get() else {
        return false;
    };
    // SAFETY: `End` keeps the team for `f`, inside of which this is called, on this very thread.
    let team = unsafe { &*leads };
    // SAFETY: erases the lifetime only; nobody uses the job once it is closed and nobody is inside, which
    // is waited for below: no panic gets past `work`.
    let task: *const (dyn Fn(usize) + Sync + 'static) = unsafe {
        std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), _>(std::ptr::from_ref(task))
    };
    let job = Job { task, count };
    // SAFETY: the last job was closed and everybody has left it, and who comes since sees that it is closed,
    // or reads after the store to `open` below.
    unsafe { *team.job.get() = Some(job) };
    team.next.store(0, Ordering::Relaxed);
    team.open.store(true, Ordering::SeqCst);
    ROLE.set(Role::Helps);
    team.work(job);
    ROLE.set(Role::Leads(leads));
    team.open.store(false, Ordering::SeqCst);
    let mut polls = 0;
    while team.inside.load(Ordering::SeqCst) > 0 {
        wait(&mut polls);
    }
    let panic = team
        .panic
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    if let Some(panic) = panic {
        resume_unwind(panic);
    }
    true
}

impl Team {
    /// Takes tasks until there are none left, or one panics.
    fn work(&self, job: Job) {
        // What a panic leaves half done is seen by nobody before the leader goes on with the panic.
        let tasks = AssertUnwindSafe(|| {
            loop {
                let index = self.next.fetch_add(1, Ordering::Relaxed);
                if index >= job.count {
                    return;
                }
                // SAFETY: the leader keeps the task alive until the job is closed and nobody is inside.
                unsafe { (*job.task)(index) };
            }
        });
        if let Err(panic) = catch_unwind(tasks) {
            let mut first = self.panic.lock().unwrap_or_else(PoisonError::into_inner);
            first.get_or_insert(panic);
        }
    }

    /// Helps until the team's work is over.
    fn follow(&self) {
        let before = ROLE.replace(Role::Helps);
        let mut polls = 0;
        while !self.over.load(Ordering::Relaxed) {
            if self.open.load(Ordering::Relaxed) && self.help() {
                polls = 0;
            }
            wait(&mut polls);
        }
        ROLE.set(before);
    }

    /// Takes part in the open job; `false` when it was already closed.
    fn help(&self) -> bool {
        self.inside.fetch_add(1, Ordering::SeqCst);
        // Either this sees that the job was closed, or the leader sees that somebody is inside: both
        // order what they write before what they read (`SeqCst`).
        let open = self.open.load(Ordering::SeqCst);
        if open {
            // SAFETY: open, so the leader wrote it before, and does not again until `inside` is zero.
            if let Some(job) = unsafe { *self.job.get() } {
                self.work(job);
            }
        }
        // What the tasks wrote, the leader sees once it reads zero: every change of `inside` is part of
        // one release sequence.
        self.inside.fetch_sub(1, Ordering::SeqCst);
        open
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
    use super::super::buffer::Shared;
    use super::super::par;
    use super::super::testing::{on_threads, size};
    use super::*;

    /// Every task of many jobs once, however many threads help, and all that they wrote is seen.
    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 5] {
            on_threads(threads, || {
                team(|| {
                    assert_eq!(is_led(), threads > 1);
                    for count in (0..40).cycle().take(size(4_000, 41)) {
                        let seen: Vec<AtomicUsize> = (0..count).map(|_| 0.into()).collect();
                        let mut squares = vec![0.0; count];
                        let shared = Shared::new(&mut squares);
                        par::run(count, threads, |i| {
                            seen[i].fetch_add(1, Ordering::Relaxed);
                            // SAFETY: a task has its own element.
                            unsafe { shared.range(i..i + 1)[0] = (i * i) as f32 };
                        });
                        assert!(seen.iter().all(|n| n.load(Ordering::Relaxed) == 1));
                        assert!(
                            squares
                                .iter()
                                .enumerate()
                                .all(|(i, &x)| x == (i * i) as f32)
                        );
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

    /// A team inside of a team's task would wait for threads that wait for its leader.
    #[test]
    fn teams_are_not_nested() {
        let sum = AtomicUsize::new(0);
        on_threads(3, || {
            team(|| {
                team(|| assert!(is_led()));
                par::run(8, 3, |i| {
                    team(|| {
                        assert!(!is_led());
                        par::run(2, 3, |j| {
                            sum.fetch_add(2 * i + j, Ordering::Relaxed);
                        });
                    });
                });
            });
        });
        assert_eq!(sum.into_inner(), (0..16).sum::<usize>());
    }

    /// What the leader hands to the pool rather than to the team, from the first moment on, when other
    /// threads may still take it.
    #[test]
    fn the_leader_can_use_the_pool() {
        on_threads(3, || {
            for round in 0..size(2_000, 10) {
                let sum = team(|| {
                    let (a, b) = rayon::join(|| round, || rayon::join(|| 1, || 2));
                    a + b.0 + b.1
                });
                assert_eq!(sum, round + 3);
            }
        });
    }

    #[test]
    fn a_panic_of_any_task_goes_on_at_its_kernel() {
        for bad in [0, 7, 31] {
            on_threads(3, || {
                team(|| {
                    for _ in 0..2 {
                        let seen = catch_unwind(AssertUnwindSafe(|| {
                            par::run(32, 3, |i| {
                                assert!(i != bad, "task {i}");
                                std::thread::sleep(Duration::from_micros(200));
                            });
                        }));
                        let message = *seen.unwrap_err().downcast::<String>().unwrap();
                        assert_eq!(message, format!("task {bad}"));
                    }
                    let done = AtomicUsize::new(0);
                    par::run(32, 3, |_| {
                        done.fetch_add(1, Ordering::Relaxed);
                    });
                    assert_eq!(done.into_inner(), 32);
                });
            });
            let seen = catch_unwind(|| on_threads(3, || team(|| panic!("not a task"))));
            assert!(seen.is_err());
        }
        on_threads(3, || team(|| par::run(3, 3, |_| ())));
    }
}
