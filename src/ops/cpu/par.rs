//! When and how work is spread over the threads of the current rayon pool.
//!
//! Tasks own rows, columns or heads of a result; no reduction is ever split between them, so the
//! number of threads cannot change a bit.

use super::buffer::Shared;
use super::team;
use rayon::prelude::*;
use std::cell::Cell;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Floating-point operations below which waking another thread costs more than it brings. Under Miri,
/// which can do little, all is shared: it looks for data races.
const WORTH_SHARING: usize = if cfg!(miri) { 0 } else { 1_500_000 };
/// The same for a thread that is awake and waits, see [`team`].
const WORTH_HANDING_OUT: usize = if cfg!(miri) { 0 } else { 200_000 };

thread_local! {
    static ALONE: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f` with kernels that keep to the calling thread: for threads beside the pool which have
/// enough to do each.
pub fn alone<T>(f: impl FnOnce() -> T) -> T {
    let before = ALONE.replace(true);
    let result = f();
    ALONE.set(before);
    result
}

/// Number of threads worth using for `flops` operations.
pub(crate) fn threads_for(flops: usize) -> usize {
    let worth = match team::is_led() {
        true => WORTH_HANDING_OUT,
        false => WORTH_SHARING,
    };
    if flops < worth || ALONE.get() {
        1
    } else {
        rayon::current_num_threads()
    }
}

/// Run tasks `0..tasks`, each once, in any order.
pub(crate) fn run(tasks: usize, threads: usize, task: impl Fn(usize) + Sync) {
    let task = |i| {
        #[cfg(debug_assertions)]
        crate::run::faults::before_task();
        task(i);
    };
    if threads <= 1 || tasks <= 1 {
        (0..tasks).for_each(task);
    } else if !team::run(tasks, &task) {
        (0..tasks).into_par_iter().with_max_len(1).for_each(task);
    }
}

/// Whether the calling thread runs inside of [`alone`].
pub fn is_alone() -> bool {
    ALONE.get()
}

/// `f` of every number below `count`, in order, where each takes some `flops`.
pub fn map<T: Send>(count: usize, flops: usize, f: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let threads = threads_for(count * flops);
    if threads == 1 {
        return (0..count).map(f).collect();
    }
    let results: Vec<Mutex<Option<T>>> = (0..count).map(|_| Mutex::new(None)).collect();
    run(count, threads, |i| {
        let result = f(i);
        *results[i].lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
    });
    results
        .into_iter()
        .filter_map(|result| result.into_inner().unwrap_or_else(PoisonError::into_inner))
        .collect()
}

/// `f` of every row of `values` and its number, in order; each element takes some `flops`.
pub fn map_rows<T: Send>(
    values: &mut [f32],
    width: usize,
    flops: usize,
    f: impl Fn(usize, &mut [f32]) -> T + Sync,
) -> Vec<T> {
    let rows = values.len() / width;
    let values = Shared::new(values);
    map(rows, flops * width, |row| {
        // SAFETY: every row is visited once.
        f(row, unsafe { values.range(row * width..(row + 1) * width) })
    })
}

/// Cut `0..count` into pieces for a row-wise kernel which spends `flops` on each and run them.
pub(crate) fn run_rows(count: usize, flops: usize, task: impl Fn(Range<usize>) + Sync) {
    let threads = threads_for(count * flops);
    let pieces = if threads == 1 {
        1
    } else {
        count.min(4 * threads)
    };
    run(pieces, threads, |i| task(piece(count, pieces, i)));
}

/// The `index`-th of `pieces` nearly equal parts of `0..count`.
pub fn piece(count: usize, pieces: usize, index: usize) -> Range<usize> {
    count * index / pieces..count * (index + 1) / pieces
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn pieces_cover_everything_once() {
        for (count, pieces) in [(0, 3), (1, 4), (17, 4), (64, 1)] {
            let mut next = 0;
            for i in 0..pieces {
                let range = piece(count, pieces, i);
                assert_eq!(range.start, next);
                next = range.end;
            }
            assert_eq!(next, count);
        }
        let sum = AtomicUsize::new(0);
        run_rows(1000, 10_000, |rows| {
            sum.fetch_add(rows.sum::<usize>(), Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 499_500);
    }
}
