//! Memory for kernels: vectors which start on a cache line, scratch space, disjoint writes.

use std::cell::Cell;
use std::ops::{Deref, DerefMut, Range};

const LINE: usize = 64;

/// A fixed-length vector whose first element lies on a cache line, so that no load of sixteen
/// floats straddles two.
#[derive(Debug)]
pub struct AlignedVec<T> {
    storage: Vec<T>,
    offset: usize,
    len: usize,
}

impl<T: Copy + Default> AlignedVec<T> {
    /// `len` default values. For `f32` the memory is not touched before it is used.
    pub(crate) fn zeroed(len: usize) -> Self {
        let slack = LINE / size_of::<T>();
        let storage = vec![T::default(); len + slack];
        let offset = storage.as_ptr().align_offset(LINE).min(slack);
        Self {
            storage,
            offset,
            len,
        }
    }
}

impl<T: Copy + Default> Clone for AlignedVec<T> {
    fn clone(&self) -> Self {
        let mut copy = Self::zeroed(self.len);
        copy.copy_from_slice(self);
        copy
    }
}

impl<T> Default for AlignedVec<T> {
    fn default() -> Self {
        Self {
            storage: Vec::new(),
            offset: 0,
            len: 0,
        }
    }
}

impl<T> Deref for AlignedVec<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.storage[self.offset..self.offset + self.len]
    }
}

impl<T> DerefMut for AlignedVec<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.storage[self.offset..self.offset + self.len]
    }
}

thread_local! {
    static SCRATCH: Cell<AlignedVec<f32>> = Cell::new(AlignedVec::default());
}

/// Lend `len` floats of this thread's scratch memory, contents unspecified.
pub(crate) fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut buffer = SCRATCH.take();
    if buffer.len() < len {
        buffer = AlignedVec::zeroed(len.next_multiple_of(1024));
    }
    let result = f(&mut buffer[..len]);
    SCRATCH.set(buffer);
    result
}

/// A slice which several threads write, each its own elements.
#[derive(Clone, Copy)]
pub(crate) struct Shared<'a> {
    start: *mut f32,
    len: usize,
    _borrow: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: it stands for a `&mut [f32]`, and the unsafe methods make their callers promise that
// no two threads touch the same element.
unsafe impl Send for Shared<'_> {}
// SAFETY: as above.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    pub(crate) fn new(slice: &'a mut [f32]) -> Self {
        Self {
            start: slice.as_mut_ptr(),
            len: slice.len(),
            _borrow: std::marker::PhantomData,
        }
    }

    /// Part of the slice.
    ///
    /// # Safety
    /// No element of the range is used elsewhere while the result lives.
    pub(crate) unsafe fn range(&self, range: Range<usize>) -> &'a mut [f32] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: inside the slice by the line above, unshared by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }

    /// Where element `index` lies; elements may be reached through it as in [`Self::range`].
    pub(crate) fn at(&self, index: usize) -> *mut f32 {
        assert!(index <= self.len);
        // SAFETY: inside the slice, or one past it.
        unsafe { self.start.add(index) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_start_on_a_line() {
        for len in [0, 1, 100, 4097] {
            let floats = AlignedVec::<f32>::zeroed(len);
            assert_eq!(floats.len(), len);
            assert_eq!(floats.as_ptr().align_offset(LINE), 0);
            let mut halves = AlignedVec::<half::bf16>::zeroed(len);
            halves.fill(half::bf16::ONE);
            let copy = halves.clone();
            assert_eq!(copy.as_ptr().align_offset(LINE), 0);
            assert_eq!(&copy[..], &halves[..]);
        }
    }

    #[test]
    fn scratch_can_be_nested() {
        with_scratch(10, |outer| {
            outer.fill(1.0);
            with_scratch(2000, |inner| inner.fill(2.0));
            assert!(outer.iter().all(|&x| x == 1.0));
        });
    }
}
