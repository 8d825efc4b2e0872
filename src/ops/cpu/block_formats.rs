//! Layouts and arithmetic of quantised blocks, see `blocks.rs`.

use super::grouped::GROUP;
use super::simd::{LANES, Simd};

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

/// Vector `index` of two-byte floats at `p`.
///
/// # Safety
/// It can be read.
#[inline(always)]
unsafe fn scales<S: Simd>(s: S, p: *const u8, index: usize) -> S::V {
    // SAFETY: the caller's promise; alignment is not assumed.
    unsafe { s.load_f16(p.add(index * 2 * LANES).cast()) }
}

/// Puts a two-byte float into its vector.
fn place_scale(header: &mut [u8], index: usize, lane: usize, value: &[u8]) {
    header[(index * LANES + lane) * 2..][..2].copy_from_slice(&value[..2]);
}

/// Sixteen inputs in four bits each, two of them in the bytes of a vector; with `FIVE`, the fifth bits of
/// eight inputs each in a vector behind them.
struct Small<const FIVE: bool>;

impl<const FIVE: bool> Small<FIVE> {
    const BYTES: usize = GROUP / 2 * LANES + if FIVE { 2 * LANES } else { 0 };

    /// # Safety
    /// [`Self::BYTES`] can be read at `p`.
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> [S::V; GROUP] {
        let mut block = [s.zero(); GROUP];
        for pair in 0..GROUP / 2 {
            // SAFETY: eight times sixteen bytes, and with `FIVE` two more.
            unsafe {
                let bytes = s.load_bytes(p.add(pair * LANES));
                let mut two = [
                    s.bytes_and(bytes, 15),
                    s.bytes_and(s.bytes_shr::<4>(bytes), 15),
                ];
                if FIVE {
                    let fifth = s.load_bytes(p.add((GROUP / 2 + pair / 4) * LANES));
                    // Bits 2·pair and 2·pair + 1 of eight become the value 16.
                    let moved = match pair % 4 {
                        0 => [s.bytes_shl::<4>(fifth), s.bytes_shl::<3>(fifth)],
                        1 => [s.bytes_shl::<2>(fifth), s.bytes_shl::<1>(fifth)],
                        2 => [fifth, s.bytes_shr::<1>(fifth)],
                        _ => [s.bytes_shr::<2>(fifth), s.bytes_shr::<3>(fifth)],
                    };
                    for i in 0..2 {
                        two[i] = s.bytes_or(two[i], s.bytes_and(moved[i], 16));
                    }
                }
                block[2 * pair] = s.widen_u8(two[0]);
                block[2 * pair + 1] = s.widen_u8(two[1]);
            }
        }
        block
    }

    /// Puts input `input` of lane `lane` where [`Self::load`] finds it.
    fn place(groups: &mut [u8], input: usize, lane: usize, value: u8) {
        let (group, i) = (input / GROUP, input % GROUP);
        let group = &mut groups[group * Self::BYTES..][..Self::BYTES];
        group[i / 2 * LANES + lane] |= (value & 15) << (i % 2 * 4);
        if FIVE {
            group[(GROUP / 2 + i / 8) * LANES + lane] |= (value >> 4 & 1) << (i % 8);
        }
    }
}

/// Blocks of 32 inputs of four or five bits that share one scale, and one minimum where `MIN`.
pub(super) struct Plain<const FIVE: bool, const MIN: bool>;

pub(super) type Q4_0 = Plain<false, false>;
pub(super) type Q4_1 = Plain<false, true>;
pub(super) type Q5_0 = Plain<true, false>;
pub(super) type Q5_1 = Plain<true, true>;

impl<const FIVE: bool, const MIN: bool> Plain<FIVE, MIN> {
    /// Two-byte floats of a block.
    const SCALES: usize = if MIN { 2 } else { 1 };
    /// What stands for zero.
    const OFFSET: f32 = if FIVE { 16.0 } else { 8.0 };
}

impl<const FIVE: bool, const MIN: bool> Format for Plain<FIVE, MIN> {
    const INPUTS: usize = 32;
    const STORED: usize = 2 * Self::SCALES + if FIVE { 4 } else { 0 } + 16;
    const HEADER: usize = 2 * LANES * Self::SCALES;
    const GROUP_BYTES: usize = Small::<FIVE>::BYTES;

    fn place(block: &[u8], lane: usize, held: &mut [u8]) {
        let (header, groups) = held.split_at_mut(Self::HEADER);
        let (scales, rest) = block.split_at(2 * Self::SCALES);
        for (index, value) in scales.chunks_exact(2).enumerate() {
            place_scale(header, index, lane, value);
        }
        let (fifths, low) = rest.split_at(rest.len() - 16);
        for input in 0..32 {
            let low = low[input % 16] >> (input / 16 * 4) & 15;
            let fifth = fifths
                .get(input / 8)
                .map_or(0, |byte| byte >> (input % 8) & 1);
            Small::<FIVE>::place(groups, input, lane, low | fifth << 4);
        }
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, held: *const u8, group: usize) -> [S::V; GROUP] {
        // SAFETY: the caller's promise.
        unsafe {
            let d = scales(s, held, 0);
            let mut block =
                Small::<FIVE>::load(s, held.add(Self::HEADER + group * Self::GROUP_BYTES));
            if MIN {
                let m = scales(s, held, 1);
                for i in 0..GROUP {
                    block[i] = s.add(s.mul(block[i], d), m);
                }
            } else {
                for i in 0..GROUP {
                    block[i] = s.mul(s.sub(block[i], s.splat(Self::OFFSET)), d);
                }
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

/// Blocks of 256 inputs of four or five bits: eight times 32 share a scale and a minimum of six bits, whose own
/// scales all share.
pub(super) struct Nested<const FIVE: bool>;

pub(super) type Q4K = Nested<false>;
pub(super) type Q5K = Nested<true>;

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

impl<const FIVE: bool> Format for Nested<FIVE> {
    const INPUTS: usize = 256;
    const STORED: usize = 2 + 2 + 12 + if FIVE { 32 } else { 0 } + 128;
    /// d and d' in two bytes each, then eight times s and m in a byte each.
    const HEADER: usize = 4 * LANES + 16 * LANES;
    const GROUP_BYTES: usize = Small::<FIVE>::BYTES;

    fn place(block: &[u8], lane: usize, held: &mut [u8]) {
        let (header, groups) = held.split_at_mut(Self::HEADER);
        place_scale(header, 0, lane, block);
        place_scale(header, 1, lane, &block[2..]);
        for index in 0..8 {
            let (scale, min) = six_bits(&block[4..16], index);
            header[(4 + 2 * index) * LANES + lane] = scale;
            header[(5 + 2 * index) * LANES + lane] = min;
        }
        let (fifths, low) = block[16..].split_at(if FIVE { 32 } else { 0 });
        for input in 0..256 {
            // 64 inputs in 32 bytes: first the low halves, then the high ones. The fifth bits of all
            // eight times 32 inputs share 32 bytes.
            let (run, position) = (input / 32, input % 32);
            let low = low[run / 2 * 32 + position] >> (run % 2 * 4) & 15;
            let fifth = fifths.get(position).map_or(0, |byte| byte >> run & 1);
            Small::<FIVE>::place(groups, input, lane, low | fifth << 4);
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
            let mut block =
                Small::<FIVE>::load(s, held.add(Self::HEADER + group * Self::GROUP_BYTES));
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
