//! Memory for kernels: vectors which start on a cache line, scratch space, disjoint writes.

use std::cell::Cell;
use std::ops::{Deref, DerefMut, Range};
use std::sync::{Arc, Mutex, PoisonError};

const LINE: usize = 64;

/// What divides the sizes below: Miri is to see such memory in tests it can run.
const SCALE: usize = if cfg!(miri) { 1 << 8 } else { 1 };
/// Bytes from which memory is mapped in huge pages: streaming weights through 4 KiB pages costs a
/// third of the speed of a product.
const HUGE: usize = (4 << 20) / SCALE;
/// Bytes of a chunk in huge pages which smaller long-lived vectors share.
const CHUNK: usize = (64 << 20) / SCALE;
/// Bytes from which a long-lived vector goes into a chunk.
const SHARED: usize = (32 << 10) / SCALE;

/// Number types of which all-zero bytes are the zero.
///
/// # Safety
/// They are, and need no more alignment than a cache line has.
pub unsafe trait Zeroable: Copy + 'static {}
// SAFETY: a number.
unsafe impl Zeroable for u8 {}
// SAFETY: a number.
unsafe impl Zeroable for f32 {}
// SAFETY: the bits of a number in a `u16`.
unsafe impl Zeroable for half::bf16 {}
// SAFETY: as above.
unsafe impl Zeroable for half::f16 {}

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
    /// `start..start + len` of a chunk, a part that no other vector has.
    Part { chunk: Arc<Chunk>, start: usize },
}

/// Memory that is handed out from front to back and given back as a whole.
#[derive(Debug)]
struct Chunk {
    start: *mut u8,
    /// Owns what `start` points into.
    _pages: memmap2::MmapMut,
}

// SAFETY: the memory behind `start` is reached only through the vectors that have a part of it,
// each its own.
unsafe impl Send for Chunk {}
// SAFETY: as above.
unsafe impl Sync for Chunk {}

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

    /// `len` zeros for weights: vectors that are too small for pages of their own share huge ones,
    /// which are given back when the last of their vectors goes.
    pub(crate) fn for_weights(len: usize) -> Self {
        let memory = Self::part(len);
        match memory {
            Some(memory) => Self { memory, len },
            None => Self::zeroed(len),
        }
    }

    fn part(len: usize) -> Option<Memory<T>> {
        /// The chunk that is being filled, and where its free part begins.
        static FILLING: Mutex<Option<(std::sync::Weak<Chunk>, usize)>> = Mutex::new(None);
        let bytes = (len * size_of::<T>()).next_multiple_of(LINE);
        if !(SHARED..CHUNK).contains(&bytes) {
            return None;
        }
        let mut filling = FILLING.lock().unwrap_or_else(PoisonError::into_inner);
        let current = filling
            .as_ref()
            .and_then(|(chunk, used)| Some((chunk.upgrade()?, *used)));
        let (chunk, start) = match current {
            Some((chunk, used)) if used + bytes <= CHUNK => (chunk, used),
            _ => {
                let mut pages = huge_pages(CHUNK)?;
                let start = pages.as_mut_ptr();
                let _pages = pages;
                (Arc::new(Chunk { start, _pages }), 0)
            }
        };
        *filling = Some((Arc::downgrade(&chunk), start + bytes));
        Some(Memory::Part { chunk, start })
    }

    fn pages(len: usize) -> Option<Memory<T>> {
        let bytes = len * size_of::<T>();
        if bytes < HUGE {
            return None;
        }
        huge_pages(bytes).map(Memory::Pages)
    }
}

/// Zeroed memory, in huge pages where the system has them.
fn huge_pages(bytes: usize) -> Option<memmap2::MmapMut> {
    let pages = memmap2::MmapMut::map_anon(bytes).ok()?;
    // Only a hint, which Miri does not know: without it the pages are small.
    #[cfg(all(target_os = "linux", not(miri)))]
    let _ = pages.advise(memmap2::Advice::HugePage);
    Some(pages)
}

impl<T: Zeroable + Default> Clone for AlignedVec<T> {
    fn clone(&self) -> Self {
        let mut copy = match self.memory {
            Memory::Part { .. } => Self::for_weights(self.len),
            Memory::Heap { .. } | Memory::Pages(_) => Self::zeroed(self.len),
        };
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
            // SAFETY: as above, for a part of the chunk that starts at a multiple of a line.
            Memory::Part { chunk, start } => unsafe {
                std::slice::from_raw_parts(chunk.start.add(*start).cast(), self.len)
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
            // SAFETY: as for `deref`, and no other vector has this part.
            Memory::Part { chunk, start } => unsafe {
                std::slice::from_raw_parts_mut(chunk.start.add(*start).cast(), self.len)
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
    fn weights_share_chunks_but_no_elements() {
        let lengths = [
            SHARED / 4 - 16,
            SHARED / 4 + 1,
            CHUNK / 20,
            SHARED / 3,
            CHUNK / 7,
            CHUNK / 9,
            CHUNK / 4 + 1,
        ];
        let mut vectors: Vec<_> = lengths.map(AlignedVec::<f32>::for_weights).into();
        for (i, vector) in vectors.iter_mut().enumerate() {
            assert_eq!(vector.as_ptr().align_offset(LINE), 0);
            assert!(vector.iter().all(|&x| x == 0.0));
            vector.fill(i as f32);
        }
        for (i, vector) in vectors.iter().enumerate() {
            assert_eq!(vector.len(), lengths[i]);
            assert!(vector.iter().all(|&x| x == i as f32));
        }
        // A part stays when the vectors around it go.
        let kept = vectors.swap_remove(1);
        drop(vectors);
        let fresh = AlignedVec::<f32>::for_weights(SHARED / 4 + 1);
        assert!(fresh.iter().all(|&x| x == 0.0));
        assert!(kept.iter().all(|&x| x == 1.0));
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
