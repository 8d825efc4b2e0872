//! Work on what strangers wrote, within bounds of memory, time and stack.
//!
//! A template engine can count its steps, but one step may double a text, compare two values that hold
//! one another a thousand times, or drop a value nested so deep that the stack ends. [`run`] bounds what
//! it calls whatever it does: the work has a thread of its own with a large stack, its memory is counted
//! by [`Allocator`], and its result is awaited only so long.
//!
//! An allocator must not unwind, and one that gives nothing ends the process. A thread that asks for
//! more than its share is therefore left asleep where it asks, and a thread that takes too long is left
//! to itself; whoever waits goes on with an error. Either keeps what it holds until the process ends,
//! which it usually does at that error.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Duration;

use crate::{Error, Result};

/// What work may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes held at once. Needs [`Allocator`] to be the program's allocator.
    pub memory: usize,
    pub stack: usize,
    pub time: Duration,
}

/// How often a thread that waits looks up. A limit on time is a number of these waits, which go by only
/// while the process runs, so that one that is paused has not used them up when it goes on.
const WAIT: Duration = Duration::from_millis(10);

/// Does `work` on a thread of its own.
///
/// # Errors
/// [`Error::Data`] with what exceeded the limits, or panicked, as "it …".
pub fn run<T: Send + 'static>(
    limits: Limits,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    let (send, receive) = sync_channel(1);
    let bounded = move || {
        LEFT.set(Some(limits.memory));
        let result = work();
        LEFT.set(None);
        // Nobody waits any longer when the limit on time has passed.
        let _ = send.send(result);
    };
    let thread = thread::Builder::new().stack_size(limits.stack);
    thread
        .spawn(bounded)
        .map_err(|e| Error::Internal(format!("cannot start a thread: {e}")))?;
    for _ in 0..limits.time.div_duration_f64(WAIT).ceil() as u64 {
        match receive.recv_timeout(WAIT) {
            Ok(result) => return Ok(result),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Error::data("it made the library that reads it fail"));
            }
        }
    }
    Err(Error::data(format!(
        "it takes more than {} MB of memory or {} s",
        limits.memory >> 20,
        limits.time.as_secs_f64()
    )))
}

thread_local! {
    /// Bytes that this thread may still take, if they are counted.
    static LEFT: Cell<Option<usize>> = const { Cell::new(None) };
}

/// The system's allocator, which holds the threads of [`run`] to their limit of memory.
#[derive(Debug, Clone, Copy)]
pub struct Allocator;

impl Allocator {
    fn take(bytes: usize) {
        let Some(left) = LEFT.get() else { return };
        match left.checked_sub(bytes) {
            Some(rest) => LEFT.set(Some(rest)),
            // Its message is written under a lock that the whole process shares.
            None if thread::panicking() => LEFT.set(None),
            None => loop {
                thread::sleep(Duration::MAX);
            },
        }
    }

    fn give_back(bytes: usize) {
        if let Some(left) = LEFT.get() {
            LEFT.set(Some(left.saturating_add(bytes)));
        }
    }
}

// SAFETY: every call goes to the system's allocator as it is, or does not return.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::take(layout.size());
        // SAFETY: the caller's promise is that of `System`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::take(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        Self::give_back(layout.size());
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // For a moment both may be there.
        Self::take(size);
        Self::give_back(layout.size());
        // SAFETY: as above.
        unsafe { System.realloc(memory, layout, size) }
    }
}
