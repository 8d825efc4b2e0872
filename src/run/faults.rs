//! Failures of the file system on request, for tests; only in builds with debug assertions.

use std::cell::Cell;
use std::io::{self, ErrorKind};
use std::ops::RangeInclusive;

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
