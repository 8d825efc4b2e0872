//! Quantised weights of GGUF files in panels: as many bytes as in the file, and the same numbers.
//!
//! The blocks of sixteen outputs are interleaved, so that what one vector needs lies together: of a
//! block first the scales of all outputs, then their inputs, sixteen at a time. Numbers are computed
//! in f32 by the formulas of the format, in its order of operations, so that they have the bits of the
//! widened file.

use std::marker::PhantomData;

use super::block_formats::{Format, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
use super::buffer::AlignedVec;
use super::grouped::{GROUP, Groups};
use super::simd::{LANES, Simd};

/// Formats of blocks with kernels of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockFormat {
    /// d·q, 4 bits and an offset of 8; 32 inputs share d.
    Q4_0,
    /// d·q + m, 4 bits; 32 inputs share d and m.
    Q4_1,
    /// d·q, 5 bits and an offset of 16; 32 inputs share d.
    Q5_0,
    /// d·q + m, 5 bits; 32 inputs share d and m.
    Q5_1,
    /// d·q, 8 bits; 32 inputs share d.
    Q8_0,
    /// (d·s)·q − d'·m, 4 bits; 32 inputs share s and m (6 bits each), 256 share d and d'.
    Q4K,
    /// As Q4_K with 5 bits.
    Q5K,
    /// (d·s)·q, 6 bits and an offset of 32; 16 inputs share s (8 bits), 256 share d.
    Q6K,
}

/// Runs an expression with the type of a format's kernels.
macro_rules! with_format {
    ($format:expr, $type:ident => $then:expr) => {
        match $format {
            BlockFormat::Q4_0 => {
                type $type = Q4_0;
                $then
            }
            BlockFormat::Q4_1 => {
                type $type = Q4_1;
                $then
            }
            BlockFormat::Q5_0 => {
                type $type = Q5_0;
                $then
            }
            BlockFormat::Q5_1 => {
                type $type = Q5_1;
                $then
            }
            BlockFormat::Q8_0 => {
                type $type = Q8_0;
                $then
            }
            BlockFormat::Q4K => {
                type $type = Q4K;
                $then
            }
            BlockFormat::Q5K => {
                type $type = Q5K;
                $then
            }
            BlockFormat::Q6K => {
                type $type = Q6K;
                $then
            }
        }
    };
}
pub(super) use with_format;

impl BlockFormat {
    /// Inputs of a block.
    pub fn block_size(self) -> usize {
        with_format!(self, F => F::INPUTS)
    }

    /// Bytes of a block in a file.
    pub fn type_size(self) -> usize {
        with_format!(self, F => F::STORED)
    }
}

/// Panels of blocks: `[ceil(out / 16)][in / block][header, groups]`.
#[derive(Debug, Clone)]
pub struct BlockPanels {
    pub(super) format: BlockFormat,
    bytes: AlignedVec<u8>,
    panels: usize,
    in_features: usize,
}

impl BlockPanels {
    /// Interleaves the rows of a file, `[out][in / block]` blocks.
    ///
    /// # Panics
    /// When `in_features` is not a multiple of the block or `rows` has not so many bytes.
    pub(super) fn pack(format: BlockFormat, rows: &[u8], out: usize, in_features: usize) -> Self {
        assert!(in_features.is_multiple_of(format.block_size()));
        let row = in_features / format.block_size() * format.type_size();
        assert_eq!(rows.len(), out * row, "bytes of a quantised matrix");
        let panels = out.div_ceil(LANES);
        let bytes = with_format!(format, F => interleave::<F>(rows, out, row));
        Self {
            format,
            bytes,
            panels,
            in_features,
        }
    }

    /// Bytes of memory.
    pub(super) fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// The kernels' view.
    ///
    /// # Panics
    /// When `F` is not the format's type.
    pub(super) fn view<F: Format>(&self) -> Blocks<'_, F> {
        let blocks = self.panels * (self.in_features / F::INPUTS);
        assert_eq!(self.bytes.len(), blocks * F::HELD, "bytes of blocks");
        Blocks {
            bytes: &self.bytes,
            panels: self.panels,
            groups: self.in_features / GROUP,
            format: PhantomData,
        }
    }
}

fn interleave<F: Format>(rows: &[u8], out: usize, row: usize) -> AlignedVec<u8> {
    use rayon::prelude::*;
    let blocks = row / F::STORED;
    let panel = blocks * F::HELD;
    let mut held = AlignedVec::<u8>::for_weights(out.div_ceil(LANES) * panel);
    if panel > 0 {
        held.par_chunks_exact_mut(panel)
            .zip(rows.par_chunks(LANES * row))
            .for_each(|(held, rows)| {
                for (index, held) in held.chunks_exact_mut(F::HELD).enumerate() {
                    for (lane, row) in rows.chunks_exact(row).enumerate() {
                        F::place(&row[index * F::STORED..][..F::STORED], lane, held);
                    }
                }
            });
    }
    held
}

/// Blocks with their type.
pub(super) struct Blocks<'a, F> {
    bytes: &'a [u8],
    panels: usize,
    groups: usize,
    format: PhantomData<F>,
}

impl<F: Format> Groups for Blocks<'_, F> {
    #[inline(always)]
    unsafe fn load<S: Simd>(&self, s: S, panel: usize, group: usize) -> [S::V; GROUP] {
        let each = F::INPUTS / GROUP;
        let block = (panel * self.groups + group) / each;
        // SAFETY: `view` saw `panels · groups / each` blocks.
        unsafe { F::load(s, self.bytes.as_ptr().add(block * F::HELD), group % each) }
    }

    fn size(&self) -> (usize, usize) {
        (self.panels, self.groups)
    }
}

#[cfg(test)]
mod tests {
    use super::super::pack::PackedMatrix;
    use super::super::testing::{assert_products, noise, size};
    use super::BlockFormat;
    use candle_core::quantized::{GgmlDType, QTensor};
    use candle_core::{Device, Tensor};

    #[test]
    fn blocks_have_the_numbers_of_their_format() {
        for (format, dtype) in [
            (BlockFormat::Q4_0, GgmlDType::Q4_0),
            (BlockFormat::Q4_1, GgmlDType::Q4_1),
            (BlockFormat::Q5_0, GgmlDType::Q5_0),
            (BlockFormat::Q5_1, GgmlDType::Q5_1),
            (BlockFormat::Q8_0, GgmlDType::Q8_0),
            (BlockFormat::Q4K, GgmlDType::Q4K),
            (BlockFormat::Q5K, GgmlDType::Q5K),
            (BlockFormat::Q6K, GgmlDType::Q6K),
        ] {
            assert_eq!(format.block_size(), dtype.block_size());
            assert_eq!(format.type_size(), dtype.type_size());
            for &(out, input) in size(&[(1, 256), (35, 1024), (300, 768)][..], &[(17, 256)]) {
                let values = noise(out * input, out as u32);
                let values = Tensor::from_vec(values, (out, input), &Device::Cpu).unwrap();
                let stored = QTensor::quantize(&values, dtype).unwrap();
                let wide = stored.dequantize(&Device::Cpu).unwrap();
                let wide: Vec<f32> = wide.flatten_all().unwrap().to_vec1().unwrap();
                let rows = stored.data().unwrap();
                let packed = PackedMatrix::pack_blocks(format, &rows, out, input);
                let panels = out.div_ceil(16) * 16;
                assert!(packed.bytes() <= rows.len() / out * panels * 103 / 100);
                assert_products(&packed, &wide);
            }
        }
    }

    #[test]
    fn every_byte_of_a_block_counts() {
        // What candle's quantiser never writes: all bits of the scales, any halves.
        for (format, dtype) in [
            (BlockFormat::Q4K, GgmlDType::Q4K),
            (BlockFormat::Q5K, GgmlDType::Q5K),
            (BlockFormat::Q6K, GgmlDType::Q6K),
        ] {
            let bytes = noise(33 * format.type_size(), 3);
            let mut bytes: Vec<u8> = bytes.iter().map(|x| (x * 1e6) as i32 as u8).collect();
            for block in bytes.chunks_exact_mut(format.type_size()) {
                let scales = match format {
                    BlockFormat::Q6K => [208, 208],
                    _ => [0, 2],
                };
                for at in scales {
                    block[at..at + 2].copy_from_slice(&half::f16::from_f32(0.37).to_le_bytes());
                }
            }
            let stored = dtype.from_data(std::borrow::Cow::Borrowed(&bytes));
            let candle_core::CpuStorage::F32(wide) = stored.dequantize(33 * 256).unwrap() else {
                panic!("not f32");
            };
            let packed = PackedMatrix::pack_blocks(format, &bytes, 33, 256);
            assert_products(&packed, &wide);
        }
    }
}
