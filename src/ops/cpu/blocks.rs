//! Quantised weights of GGUF files in panels: as many bytes as in the file, and the same numbers.
//!
//! The blocks of sixteen outputs are interleaved, so that what one vector needs lies together: of a
//! block first the scales of all outputs, then their inputs, sixteen at a time. Numbers are computed
//! in f32 by the formulas of the format, in its order of operations, so that they have the bits of the
//! widened file.

use std::marker::PhantomData;

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
    /// d·q, 8 bits; 32 inputs share d.
    Q8_0,
    /// (d·s)·q − d'·m, 4 bits; 32 inputs share s and m (6 bits each), 256 share d and d'.
    Q4K,
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
            BlockFormat::Q8_0 => {
                type $type = Q8_0;
                $then
            }
            BlockFormat::Q4K => {
                type $type = Q4K;
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

/// A format's layout and arithmetic.
pub(super) trait Format: Sync {
    /// Inputs of a block, a multiple of sixteen.
    const INPUTS: usize;
    /// Bytes of a block in a file.
    const STORED: usize;
    /// Bytes of the scales of sixteen blocks beside each other.
    const HEADER: usize;
    /// Bytes of sixteen inputs of sixteen outputs.
    const GROUP_BYTES: usize;
    /// Bytes of sixteen blocks beside each other.
    const HELD: usize = Self::HEADER + Self::INPUTS / GROUP * Self::GROUP_BYTES;

    /// Puts the block of one output into lane `lane` of `held`, which holds zeros there.
    fn place(block: &[u8], lane: usize, held: &mut [u8]);

    /// Group `group` of the blocks at `held`.
    ///
    /// # Safety
    /// `held` points to [`Format::HELD`] bytes, and they have this group.
    unsafe fn load<S: Simd>(s: S, held: *const u8, group: usize) -> [S::V; GROUP];
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

/// Vector `index` of two-byte floats at `p`.
///
/// # Safety
/// It can be read.
#[inline(always)]
unsafe fn scales<S: Simd>(s: S, p: *const u8, index: usize) -> S::V {
    // SAFETY: the caller's promise; alignment is not assumed.
    unsafe { s.load_f16(p.add(index * 2 * LANES).cast()) }
}

/// Sixteen inputs in four bits each: two of them share the bytes of a vector.
///
/// # Safety
/// 128 bytes can be read at `p`.
#[inline(always)]
unsafe fn nibbles<S: Simd>(s: S, p: *const u8) -> [S::V; GROUP] {
    let mut block = [s.zero(); GROUP];
    for pair in 0..GROUP / 2 {
        // SAFETY: eight times sixteen bytes.
        let bytes = unsafe { s.load_bytes(p.add(pair * LANES)) };
        block[2 * pair] = s.widen_u8(s.bytes_and(bytes, 15));
        block[2 * pair + 1] = s.widen_u8(s.bytes_and(s.bytes_shr::<4>(bytes), 15));
    }
    block
}

/// Puts input `input` of lane `lane`, four bits, where [`nibbles`] finds it.
fn place_nibble(groups: &mut [u8], group_bytes: usize, input: usize, lane: usize, value: u8) {
    let (group, input) = (input / GROUP, input % GROUP);
    groups[group * group_bytes + input / 2 * LANES + lane] |= value << (input % 2 * 4);
}

/// Puts a two-byte float into its vector.
fn place_scale(header: &mut [u8], index: usize, lane: usize, value: &[u8]) {
    header[(index * LANES + lane) * 2..][..2].copy_from_slice(&value[..2]);
}

pub(super) struct Q4_0;

impl Format for Q4_0 {
    const INPUTS: usize = 32;
    const STORED: usize = 2 + 16;
    const HEADER: usize = 2 * LANES;
    const GROUP_BYTES: usize = GROUP * LANES / 2;

    fn place(block: &[u8], lane: usize, held: &mut [u8]) {
        let (header, groups) = held.split_at_mut(Self::HEADER);
        place_scale(header, 0, lane, block);
        for (i, &byte) in block[2..].iter().enumerate() {
            place_nibble(groups, Self::GROUP_BYTES, i, lane, byte & 15);
            place_nibble(groups, Self::GROUP_BYTES, i + 16, lane, byte >> 4);
        }
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, held: *const u8, group: usize) -> [S::V; GROUP] {
        // SAFETY: the caller's promise.
        unsafe {
            let d = scales(s, held, 0);
            let mut block = nibbles(s, held.add(Self::HEADER + group * Self::GROUP_BYTES));
            for i in 0..GROUP {
                block[i] = s.mul(s.sub(block[i], s.splat(8.0)), d);
            }
            block
        }
    }
}

pub(super) struct Q4_1;

impl Format for Q4_1 {
    const INPUTS: usize = 32;
    const STORED: usize = 2 + 2 + 16;
    const HEADER: usize = 4 * LANES;
    const GROUP_BYTES: usize = GROUP * LANES / 2;

    fn place(block: &[u8], lane: usize, held: &mut [u8]) {
        let (header, groups) = held.split_at_mut(Self::HEADER);
        place_scale(header, 0, lane, block);
        place_scale(header, 1, lane, &block[2..]);
        for (i, &byte) in block[4..].iter().enumerate() {
            place_nibble(groups, Self::GROUP_BYTES, i, lane, byte & 15);
            place_nibble(groups, Self::GROUP_BYTES, i + 16, lane, byte >> 4);
        }
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, held: *const u8, group: usize) -> [S::V; GROUP] {
        // SAFETY: the caller's promise.
        unsafe {
            let (d, m) = (scales(s, held, 0), scales(s, held, 1));
            let mut block = nibbles(s, held.add(Self::HEADER + group * Self::GROUP_BYTES));
            for i in 0..GROUP {
                block[i] = s.add(s.mul(block[i], d), m);
            }
            block
        }
    }
}

pub(super) struct Q8_0;

impl Format for Q8_0 {
    const INPUTS: usize = 32;
    const STORED: usize = 2 + 32;
    const HEADER: usize = 2 * LANES;
    const GROUP_BYTES: usize = GROUP * LANES;

    fn place(block: &[u8], lane: usize, held: &mut [u8]) {
        let (header, groups) = held.split_at_mut(Self::HEADER);
        place_scale(header, 0, lane, block);
        for (i, &byte) in block[2..].iter().enumerate() {
            groups[i * LANES + lane] = byte;
        }
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, held: *const u8, group: usize) -> [S::V; GROUP] {
        // SAFETY: the caller's promise.
        unsafe {
            let d = scales(s, held, 0);
            let p = held.add(Self::HEADER + group * Self::GROUP_BYTES);
            let mut block = [s.zero(); GROUP];
            for i in 0..GROUP {
                block[i] = s.mul(s.widen_i8(s.load_bytes(p.add(i * LANES))), d);
            }
            block
        }
    }
}

pub(super) struct Q4K;

impl Q4K {
    /// Scale and minimum `index` of the eight pairs that twelve bytes hold, six bits each.
    fn six_bits(packed: &[u8], index: usize) -> (u8, u8) {
        if index < 4 {
            (packed[index] & 63, packed[index + 4] & 63)
        } else {
            let low = packed[index + 4];
            let high = |byte: u8| byte >> 6 << 4;
            (
                low & 15 | high(packed[index - 4]),
                low >> 4 | high(packed[index]),
            )
        }
    }
}

impl Format for Q4K {
    const INPUTS: usize = 256;
    const STORED: usize = 2 + 2 + 12 + 128;
    /// d and d' in two bytes each, then eight times s and m in a byte each.
    const HEADER: usize = 4 * LANES + 16 * LANES;
    const GROUP_BYTES: usize = GROUP * LANES / 2;

    fn place(block: &[u8], lane: usize, held: &mut [u8]) {
        let (header, groups) = held.split_at_mut(Self::HEADER);
        place_scale(header, 0, lane, block);
        place_scale(header, 1, lane, &block[2..]);
        for index in 0..8 {
            let (scale, min) = Self::six_bits(&block[4..16], index);
            header[(4 + 2 * index) * LANES + lane] = scale;
            header[(5 + 2 * index) * LANES + lane] = min;
        }
        // 64 inputs in 32 bytes: first the low halves, then the high ones.
        for (i, &byte) in block[16..].iter().enumerate() {
            let input = i / 32 * 64 + i % 32;
            place_nibble(groups, Self::GROUP_BYTES, input, lane, byte & 15);
            place_nibble(groups, Self::GROUP_BYTES, input + 32, lane, byte >> 4);
        }
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, held: *const u8, group: usize) -> [S::V; GROUP] {
        // SAFETY: the caller's promise.
        unsafe {
            let small = held.add((4 + group / 2 * 2) * LANES);
            let scale = s.widen_u8(s.load_bytes(small));
            let min = s.widen_u8(s.load_bytes(small.add(LANES)));
            let d = s.mul(scales(s, held, 0), scale);
            let m = s.mul(scales(s, held, 1), min);
            let mut block = nibbles(s, held.add(Self::HEADER + group * Self::GROUP_BYTES));
            for i in 0..GROUP {
                block[i] = s.sub(s.mul(d, block[i]), m);
            }
            block
        }
    }
}

pub(super) struct Q6K;

impl Format for Q6K {
    const INPUTS: usize = 256;
    const STORED: usize = 128 + 64 + 16 + 2;
    /// d in two bytes, then sixteen times s in a byte.
    const HEADER: usize = 2 * LANES + 16 * LANES;
    /// Four times: low halves of inputs 0 and 1, of 2 and 3, two high bits of all four.
    const GROUP_BYTES: usize = 12 * LANES;

    fn place(block: &[u8], lane: usize, held: &mut [u8]) {
        let (low, rest) = block.split_at(128);
        let (high, rest) = rest.split_at(64);
        let (header, groups) = held.split_at_mut(Self::HEADER);
        place_scale(header, 0, lane, &rest[16..]);
        for (index, &scale) in rest[..16].iter().enumerate() {
            header[(2 + index) * LANES + lane] = scale;
        }
        // 128 inputs: each of 32 positions holds four, 32 inputs apart.
        for input in 0..Self::INPUTS {
            let (half, quarter, position) = (input / 128, input / 32 % 4, input % 32);
            let four = low[half * 64 + quarter % 2 * 32 + position] >> (quarter / 2 * 4) & 15;
            let two = high[half * 32 + position] >> (quarter * 2) & 3;
            let (group, i) = (input / GROUP, input % GROUP);
            let vectors = &mut groups[group * Self::GROUP_BYTES + i / 4 * 3 * LANES..];
            vectors[i % 4 / 2 * LANES + lane] |= four << (i % 2 * 4);
            vectors[2 * LANES + lane] |= two << (i % 4 * 2);
        }
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, held: *const u8, group: usize) -> [S::V; GROUP] {
        // SAFETY: the caller's promise.
        unsafe {
            let scale = s.widen_i8(s.load_bytes(held.add((2 + group) * LANES)));
            let d = s.mul(scales(s, held, 0), scale);
            let p = held.add(Self::HEADER + group * Self::GROUP_BYTES);
            let mut block = [s.zero(); GROUP];
            for four in 0..GROUP / 4 {
                let p = p.add(four * 3 * LANES);
                let low = [s.load_bytes(p), s.load_bytes(p.add(LANES))];
                let high = s.load_bytes(p.add(2 * LANES));
                let values = [
                    s.bytes_or(
                        s.bytes_and(low[0], 15),
                        s.bytes_and(s.bytes_shl::<4>(high), 48),
                    ),
                    s.bytes_or(
                        s.bytes_and(s.bytes_shr::<4>(low[0]), 15),
                        s.bytes_and(s.bytes_shl::<2>(high), 48),
                    ),
                    s.bytes_or(s.bytes_and(low[1], 15), s.bytes_and(high, 48)),
                    s.bytes_or(
                        s.bytes_and(s.bytes_shr::<4>(low[1]), 15),
                        s.bytes_and(s.bytes_shr::<2>(high), 48),
                    ),
                ];
                for i in 0..4 {
                    let q = s.sub(s.widen_u8(values[i]), s.splat(32.0));
                    block[4 * four + i] = s.mul(d, q);
                }
            }
            block
        }
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
            (BlockFormat::Q8_0, GgmlDType::Q8_0),
            (BlockFormat::Q4K, GgmlDType::Q4K),
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
