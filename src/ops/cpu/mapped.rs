//! Weights in two bytes that stay in the file they came in: rows of a mapped checkpoint.

use std::ops::Deref;
use std::sync::Arc;

use half::{bf16, f16};
use memmap2::Mmap;

use super::grouped::{GROUP, Groups};
use super::simd::{LANES, Simd};
use super::tile::Element;

/// Where the bytes of a file are.
#[derive(Debug, Clone)]
enum Bytes {
    Mapped(Arc<Mmap>),
    /// What the tests have in place of a file where none can be mapped, which is under Miri.
    #[cfg(test)]
    Memory(Arc<[u8]>),
}

impl Deref for Bytes {
    type Target = [u8];

    #[inline(always)]
    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(file) => file,
            #[cfg(test)]
            Self::Memory(bytes) => bytes,
        }
    }
}

/// A row-major matrix [out, in] inside of a mapped file.
#[derive(Debug, Clone)]
pub struct MappedRows<T> {
    file: Bytes,
    /// Byte at which the matrix begins.
    offset: usize,
    pub(super) out_features: usize,
    pub(super) in_features: usize,
    element: std::marker::PhantomData<T>,
}

/// Types of which every bit pattern is a value.
///
/// # Safety
/// It is.
pub unsafe trait Stored: Element {}
// SAFETY: the bits of a number in a `u16`.
unsafe impl Stored for bf16 {}
// SAFETY: as above.
unsafe impl Stored for f16 {}

impl<T: Stored> MappedRows<T> {
    /// The matrix at `offset` bytes; `None` when the file does not hold it at an address for its type,
    /// when its rows are no multiple of sixteen, or on a big-endian machine.
    pub fn new(
        file: Arc<Mmap>,
        offset: usize,
        out_features: usize,
        in_features: usize,
    ) -> Option<Self> {
        Self::within(Bytes::Mapped(file), offset, out_features, in_features)
    }

    fn within(file: Bytes, offset: usize, out_features: usize, in_features: usize) -> Option<Self> {
        let bytes = out_features
            .checked_mul(in_features)?
            .checked_mul(size_of::<T>())?;
        let matrix = file.get(offset..offset.checked_add(bytes)?)?;
        let fits = cfg!(target_endian = "little")
            && matrix.as_ptr().cast::<T>().is_aligned()
            && in_features.is_multiple_of(GROUP);
        fits.then_some(Self {
            file,
            offset,
            out_features,
            in_features,
            element: std::marker::PhantomData,
        })
    }

    /// All elements, row-major.
    pub(super) fn elements(&self) -> &[T] {
        let len = self.out_features * self.in_features;
        // SAFETY: `new` saw that so many elements lie there, aligned; every bit pattern is one; the file
        // does not change while it is used (a condition of `model::weights`).
        unsafe { std::slice::from_raw_parts(self.file.as_ptr().add(self.offset).cast(), len) }
    }
}

impl<T: Stored> Groups for MappedRows<T> {
    #[inline(always)]
    unsafe fn load<S: Simd>(&self, s: S, panel: usize, group: usize) -> [S::V; GROUP] {
        // SAFETY: the caller's promise.
        let mut block = unsafe { self.load_turned(s, panel, group) };
        s.transpose(&mut block);
        block
    }

    #[inline(always)]
    unsafe fn load_turned<S: Simd>(&self, s: S, panel: usize, group: usize) -> [S::V; GROUP] {
        let rows = LANES.min(self.out_features - panel * LANES);
        let mut block = [s.zero(); GROUP];
        // SAFETY: the rows of this panel and sixteen inputs of the group exist by the caller's promise.
        unsafe {
            let start = self
                .file
                .as_ptr()
                .add(self.offset)
                .cast::<T>()
                .add(panel * LANES * self.in_features + group * GROUP);
            if rows == LANES {
                for i in 0..LANES {
                    block[i] = T::load(s, start.add(i * self.in_features));
                }
            } else {
                for i in 0..LANES {
                    if i < rows {
                        block[i] = T::load(s, start.add(i * self.in_features));
                    }
                }
            }
        }
        block
    }

    fn size(&self) -> (usize, usize) {
        (self.out_features.div_ceil(LANES), self.in_features / GROUP)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::super::pack::PackedMatrix;
    use super::super::testing::{assert_products, noise, size};
    use super::*;

    fn mapped(bytes: &[u8]) -> Bytes {
        if cfg!(miri) {
            return Bytes::Memory(bytes.into());
        }
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        // SAFETY: nobody else knows the file.
        Bytes::Mapped(Arc::new(unsafe { Mmap::map(&file) }.unwrap()))
    }

    #[test]
    fn products_read_the_file() {
        for &(out, input) in size(
            &[(1, 16), (35, 1024), (300, 784)][..],
            &[(1, 16), (35, 208)],
        ) {
            let values = noise(out * input, 3);
            let narrow: Vec<bf16> = values.iter().map(|&x| bf16::from_f32(x)).collect();
            let halves: Vec<f16> = values.iter().map(|&x| f16::from_f32(x)).collect();
            let bytes = |bits: Vec<u16>| bits.into_iter().flat_map(u16::to_le_bytes).collect();
            let mut file: Vec<u8> = vec![1; 10];
            file.append(&mut bytes(narrow.iter().map(|x| x.to_bits()).collect()));
            let second = file.len();
            file.append(&mut bytes(halves.iter().map(|x| x.to_bits()).collect()));
            let file = mapped(&file);
            let wide: Vec<f32> = narrow.iter().map(|x| x.to_f32()).collect();
            let rows = MappedRows::within(file.clone(), 10, out, input).unwrap();
            assert_products(&PackedMatrix::mapped_bf16(rows), &wide);
            let wide: Vec<f32> = halves.iter().map(|x| x.to_f32()).collect();
            let rows = MappedRows::within(file, second, out, input).unwrap();
            assert_products(&PackedMatrix::mapped_f16(rows), &wide);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let file = mapped(&[0; 1000]);
        assert!(MappedRows::<bf16>::within(file.clone(), 0, 10, 48).is_some());
        assert!(MappedRows::<bf16>::within(file.clone(), 1, 10, 48).is_none());
        assert!(MappedRows::<bf16>::within(file.clone(), 0, 10, 40).is_none());
        assert!(MappedRows::<bf16>::within(file.clone(), 42, 10, 48).is_none());
        assert!(MappedRows::<bf16>::within(file, 0, usize::MAX / 16, 64).is_none());
    }
}
