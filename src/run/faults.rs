//! Failures on request, for tests: of the file system, of the clock, of a worker thread. Only in builds
//! with debug assertions.

use std::cell::Cell;
use std::io::{self, ErrorKind};
use std::ops::RangeInclusive;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

thread_local! {
    /// Changes made by this thread since the last [`inject`], and which of them fail how.
    static CHANGES: Cell<usize> = const { Cell::new(0) };
    static FAILING: Cell<Option<(usize, usize, ErrorKind)>> = const { Cell::new(None) };
}

/// Runs `doing` while this thread's changes of the file system with these numbers, counted from 1,
/// fail as `kind`. Gives the result and how many changes there were.
pub fn inject<T>(
    numbers: RangeInclusive<usize>,
    kind: ErrorKind,
    doing: impl FnOnce() -> T,
) -> (T, usize) {
    CHANGES.set(0);
    FAILING.set(Some((*numbers.start(), *numbers.end(), kind)));
    let result = doing();
    FAILING.set(None);
    (result, CHANGES.get())
}

/// Asked before every change, see [`super::fs::change`].
pub(super) fn before_change() -> io::Result<()> {
    let number = CHANGES.get().wrapping_add(1);
    CHANGES.set(number);
    match FAILING.get() {
        Some((first, last, kind)) if (first..=last).contains(&number) => Err(kind.into()),
        _ => Ok(()),
    }
}

thread_local! {
    /// Readings of the clock so far, while it is wild.
    static READINGS: Cell<Option<usize>> = const { Cell::new(None) };
}

/// Runs `doing` while this thread's wall clock jumps by years, back and forth, at every reading. Gives
/// the result and how often it was read.
pub fn with_wild_clock<T>(doing: impl FnOnce() -> T) -> (T, usize) {
    READINGS.set(Some(0));
    let result = doing();
    (result, READINGS.take().unwrap_or_default())
}

/// Asked at every reading, see [`super::clock::now`].
pub(super) fn wild_clock() -> Option<SystemTime> {
    let reading = READINGS.get()?;
    READINGS.set(Some(reading + 1));
    let years = |n: u64| Duration::from_secs(n * 31_556_952);
    Some(match reading % 3 {
        0 => UNIX_EPOCH + years(80),
        1 => UNIX_EPOCH - years(3),
        _ => UNIX_EPOCH + years(20),
    })
}

/// Environment variable: the number of the kernel task, counted from 1 over all threads, that panics.
pub const PANICKING_TASK: &str = "TINYLORA_PANICKING_TASK";

/// Asked before every task of a kernel.
pub fn before_task() {
    static PANICKING: LazyLock<Option<usize>> =
        LazyLock::new(|| std::env::var(PANICKING_TASK).ok()?.parse().ok());
    static TASKS: AtomicUsize = AtomicUsize::new(0);
    if let Some(number) = *PANICKING {
        let task = TASKS.fetch_add(1, Ordering::Relaxed) + 1;
        assert!(task != number, "task {task}, as a test asked");
    }
}
