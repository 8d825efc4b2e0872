//! Memory for kernels: vectors which start on a cache line, scratch space, disjoint writes.

use std::cell::Cell;
use std::ops::{Deref, DerefMut, Range};

const LINE: usize = 64;

/// Bytes from which memory is mapped in huge pages: streaming weights through 4 KiB pages costs a
/// quarter of the bandwidth.
const HUGE: usize = 4 << 20;

/// Number types of which all-zero bytes are the zero.
pub trait Zeroable: Copy + 'static {}
impl Zeroable for f32 {}
impl Zeroable for half::bf16 {}
impl Zeroable for half::f16 {}

/// A fixed-length vector whose first element lies on a cache line, so that no load of sixteen
/// floats straddles two.
#[derive(Debug)]
pub struct AlignedVec<T> {
    memory: Memory<T>,
    len: usize,
}

#[derive(Debug)]
enum Memory<T> {
    /// From `offset` on.
    Heap { values: Vec<T>, offset: usize },
    /// The start of pages of their own.
    Pages(memmap2::MmapMut),
}

impl<T: Zeroable + Default> AlignedVec<T> {
    /// `len` zeros. Large memory is not touched before it is used.
    pub(crate) fn zeroed(len: usize) -> Self {
        let memory = Self::pages(len).unwrap_or_else(|| {
            let slack = LINE / size_of::<T>();
            let values = vec![T::default(); len + slack];
            let offset = values.as_ptr().align_offset(LINE).min(slack);
            Memory::Heap { values, offset }
        });
        Self { memory, len }
    }

    fn pages(len: usize) -> Option<Memory<T>> {
        let bytes = len * size_of::<T>();
        if bytes < HUGE {
            return None;
        }
        let pages = memmap2::MmapMut::map_anon(bytes).ok()?;
        // Only a hint: without it the pages are small.
        #[cfg(target_os = "linux")]
        let _ = pages.advise(memmap2::Advice::HugePage);
        Some(Memory::Pages(pages))
    }
}

impl<T: Zeroable + Default> Clone for AlignedVec<T> {
    fn clone(&self) -> Self {
        let mut copy = Self::zeroed(self.len);
        copy.copy_from_slice(self);
        copy
    }
}

impl<T> Default for AlignedVec<T> {
    fn default() -> Self {
        Self {
            memory: Memory::Heap {
                values: Vec::new(),
                offset: 0,
            },
            len: 0,
        }
    }
}

impl<T> Deref for AlignedVec<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &self.memory {
            Memory::Heap { values, offset } => &values[*offset..*offset + self.len],
            // SAFETY: the mapping is `len` elements long, aligned to a page, and holds zeros or
            // what was written as `T`; it was made by `zeroed`, for types that may be zero bytes.
            Memory::Pages(pages) => unsafe {
                std::slice::from_raw_parts(pages.as_ptr().cast(), self.len)
            },
        }
    }
}

impl<T> DerefMut for AlignedVec<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match &mut self.memory {
            Memory::Heap { values, offset } => &mut values[*offset..*offset + self.len],
            // SAFETY: as for `deref`, and the mapping is ours alone.
            Memory::Pages(pages) => unsafe {
                std::slice::from_raw_parts_mut(pages.as_mut_ptr().cast(), self.len)
            },
        }
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
        for len in [0, 1, 100, 4097, HUGE] {
            let mut floats = AlignedVec::<f32>::zeroed(len);
            assert_eq!(floats.len(), len);
            assert_eq!(floats.as_ptr().align_offset(LINE), 0);
            assert!(floats.iter().all(|&x| x == 0.0));
            floats.fill(1.0);
            assert_eq!(floats.clone()[..], floats[..]);
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
