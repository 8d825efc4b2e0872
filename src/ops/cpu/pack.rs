//! Weights in panels of sixteen outputs: what one vector of the micro-kernel reads.

use super::blocks::{BlockFormat, BlockPanels};
use super::buffer::AlignedVec;
use super::isa::{Isa, dispatch};
use super::mapped::MappedRows;
use super::panels::Panels;
use super::par;
use super::simd::{LANES, Simd};
use super::tile::Element;
use candle_core::DType;
use half::{bf16, f16};
use rayon::prelude::*;

/// A matrix W of shape [out, in] for products: panels `[ceil(out / 16)][in][16]` in `f32`, `bf16` or
/// `f16`, missing outputs of the last panel zero; or panels of quantised blocks; or rows in two bytes
/// that stay in a mapped file.
///
/// Both directions of a linear layer read the same storage, see `forward` and `backward`, and all
/// storages of the same numbers give the same bits.
#[derive(Debug, Clone)]
pub struct PackedMatrix {
    pub(super) storage: Storage,
    pub(super) out_features: usize,
    pub(super) in_features: usize,
}

#[derive(Debug, Clone)]
pub enum Storage {
    F32(AlignedVec<f32>),
    Bf16(AlignedVec<bf16>),
    F16(AlignedVec<f16>),
    Blocks(BlockPanels),
    MappedBf16(MappedRows<bf16>),
    MappedF16(MappedRows<f16>),
}

/// Runs `$then` with `$panels` bound to the [`Panels`] of a [`PackedMatrix`].
macro_rules! with_panels {
    ($matrix:expr, $panels:ident => $then:expr) => {{
        use $crate::ops::cpu::block_formats::{Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
        use $crate::ops::cpu::blocks::{BlockFormat, with_format};
        use $crate::ops::cpu::{grouped::Grouped, pack::Storage, panels::Plain};
        let in_features = $matrix.in_features;
        match &$matrix.storage {
            Storage::F32(panels) => {
                let $panels = &Plain { panels, in_features };
                $then
            }
            Storage::Bf16(panels) => {
                let $panels = &Plain { panels, in_features };
                $then
            }
            Storage::F16(panels) => {
                let $panels = &Plain { panels, in_features };
                $then
            }
            Storage::Blocks(blocks) => with_format!(blocks.format, F => {
                let $panels = &Grouped(&blocks.view::<F>());
                $then
            }),
            Storage::MappedBf16(rows) => {
                let $panels = &Grouped(rows);
                $then
            }
            Storage::MappedF16(rows) => {
                let $panels = &Grouped(rows);
                $then
            }
        }
    }};
}
pub(super) use with_panels;

/// Number types which a [`PackedMatrix`] can store.
pub trait Weight: Element {
    #[doc(hidden)]
    fn to_f32(self) -> f32;
    #[doc(hidden)]
    fn wrap(panels: AlignedVec<Self>) -> Storage;
}

macro_rules! weight {
    ($type:ty, $variant:ident, $widen:expr) => {
        impl Weight for $type {
            fn to_f32(self) -> f32 {
                $widen(self)
            }

            fn wrap(panels: AlignedVec<Self>) -> Storage {
                Storage::$variant(panels)
            }
        }
    };
}
weight!(f32, F32, |x| x);
weight!(bf16, Bf16, bf16::to_f32);
weight!(f16, F16, f16::to_f32);

impl PackedMatrix {
    /// Pack a row-major matrix of shape [out_features, in_features].
    ///
    /// # Panics
    /// When the number of elements is not `out_features · in_features`.
    pub fn pack<T: Weight>(rows: &[T], out_features: usize, in_features: usize) -> Self {
        assert_eq!(rows.len(), out_features * in_features, "matrix size");
        let panels = out_features.div_ceil(LANES);
        let mut packed = AlignedVec::<T>::for_weights(panels * in_features * LANES);
        fill(&mut packed, rows, out_features, in_features);
        Self {
            storage: T::wrap(packed),
            out_features,
            in_features,
        }
    }

    /// Interleave the rows `[out_features][in_features / block]` of a GGUF file's quantised matrix.
    ///
    /// # Panics
    /// When `in_features` is not a multiple of the block or `rows` has not so many bytes.
    pub fn pack_blocks(
        format: BlockFormat,
        rows: &[u8],
        out_features: usize,
        in_features: usize,
    ) -> Self {
        Self {
            storage: Storage::Blocks(BlockPanels::pack(format, rows, out_features, in_features)),
            out_features,
            in_features,
        }
    }

    /// A matrix that stays in its file.
    pub fn mapped_bf16(rows: MappedRows<bf16>) -> Self {
        Self {
            out_features: rows.out_features,
            in_features: rows.in_features,
            storage: Storage::MappedBf16(rows),
        }
    }

    /// As [`PackedMatrix::mapped_bf16`].
    pub fn mapped_f16(rows: MappedRows<f16>) -> Self {
        Self {
            out_features: rows.out_features,
            in_features: rows.in_features,
            storage: Storage::MappedF16(rows),
        }
    }

    /// Replace all weights: in place and rounded to the stored type where that is plain numbers, which
    /// weights that train are; else the matrix becomes f32.
    ///
    /// # Panics
    /// When the number of elements is not `out_features · in_features`.
    pub fn repack_from(&mut self, rows: &[f32]) {
        let (n, k) = (self.out_features, self.in_features);
        assert_eq!(rows.len(), n * k, "matrix size");
        match &mut self.storage {
            Storage::F32(packed) => fill(packed, rows, n, k),
            Storage::Bf16(packed) => fill_narrow(packed, rows, n, k, bf16::from_f32),
            Storage::F16(packed) => fill_narrow(packed, rows, n, k, f16::from_f32),
            Storage::Blocks(_) | Storage::MappedBf16(_) | Storage::MappedF16(_) => {
                *self = Self::pack(rows, n, k);
            }
        }
    }

    /// Rows of W, which are the features it gives.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Columns of W, which are the features it takes.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// Format of the numbers that products see.
    pub fn dtype(&self) -> DType {
        match &self.storage {
            Storage::F32(_) | Storage::Blocks(_) => DType::F32,
            Storage::Bf16(_) | Storage::MappedBf16(_) => DType::BF16,
            Storage::F16(_) | Storage::MappedF16(_) => DType::F16,
        }
    }

    /// Bytes of memory held by the weights; of those in a mapped file, their bytes there.
    pub fn bytes(&self) -> usize {
        match &self.storage {
            Storage::F32(panels) => size_of_val(&panels[..]),
            Storage::Bf16(panels) => size_of_val(&panels[..]),
            Storage::F16(panels) => size_of_val(&panels[..]),
            Storage::Blocks(blocks) => blocks.bytes(),
            Storage::MappedBf16(rows) => size_of_val(rows.elements()),
            Storage::MappedF16(rows) => size_of_val(rows.elements()),
        }
    }

    /// W as row-major `f32`, shape [out_features, in_features].
    pub fn unpack(&self) -> Vec<f32> {
        let (n, k) = (self.out_features, self.in_features);
        let mut rows = vec![0.0; n * k];
        if k > 0 {
            let isa = Isa::current();
            with_panels!(self, panels => {
                rows.par_chunks_mut(LANES * k).enumerate().for_each(|(panel, rows)| {
                    // As many inputs at a time as stay in the cache, whole blocks of them.
                    let mut wide = [0.0; LANES * 64];
                    for start in (0..k).step_by(64) {
                        let terms = start..(start + 64).min(k);
                        let wide = &mut wide[..terms.len() * LANES];
                        panels.widen(isa, panel, terms.clone(), wide);
                        for (lane, row) in rows.chunks_exact_mut(k).enumerate() {
                            gather(wide, lane, &mut row[terms.clone()]);
                        }
                    }
                });
            });
        }
        rows
    }

    /// Wᵀ in `f32`: products with it have the bits of those with W the other way round.
    pub fn transposed(&self) -> Self {
        let (n, k) = (self.out_features, self.in_features);
        let isa = Isa::current();
        let mut panels = AlignedVec::<f32>::zeroed(k.div_ceil(LANES) * n * LANES);
        with_panels!(self, from => {
            for (column, to) in panels.chunks_exact_mut((n * LANES).max(1)).enumerate() {
                let inputs = column * LANES..((column + 1) * LANES).min(k);
                let mut whole = to.chunks_exact_mut(LANES * LANES);
                for (panel, to) in whole.by_ref().enumerate() {
                    from.turn(isa, panel, inputs.clone(), to);
                }
                let rest = whole.into_remainder();
                if !rest.is_empty() {
                    let mut last = [0.0; LANES * LANES];
                    from.turn(isa, n / LANES, inputs, &mut last);
                    rest.copy_from_slice(&last[..rest.len()]);
                }
            }
        });
        Self {
            storage: Storage::F32(panels),
            out_features: k,
            in_features: n,
        }
    }

    /// Row `index` of W widened to `f32`: an embedding looked up in a tied head.
    ///
    /// # Panics
    /// When `index` is not below `out_features` or `out` has not `in_features` elements.
    pub fn row(&self, index: usize, out: &mut [f32]) {
        let k = self.in_features;
        assert!(index < self.out_features, "row {index} of a packed matrix");
        assert_eq!(out.len(), k, "row length");
        let (panel, lane) = (index / LANES, index % LANES);
        let plain = panel * k * LANES..(panel + 1) * k * LANES;
        match &self.storage {
            Storage::F32(panels) => gather(&panels[plain], lane, out),
            Storage::Bf16(panels) => gather(&panels[plain], lane, out),
            Storage::F16(panels) => gather(&panels[plain], lane, out),
            Storage::MappedBf16(rows) => gather_row(&rows.elements()[index * k..], out),
            Storage::MappedF16(rows) => gather_row(&rows.elements()[index * k..], out),
            Storage::Blocks(_) => {
                let isa = Isa::current();
                let mut wide = [0.0; LANES * LANES];
                with_panels!(self, panels => {
                    for (group, out) in out.chunks_exact_mut(LANES).enumerate() {
                        panels.widen(isa, panel, group * LANES..(group + 1) * LANES, &mut wide);
                        gather(&wide, lane, out);
                    }
                });
            }
        }
    }
}

/// Lane `lane` of every vector of sixteen.
fn gather<T: Weight>(vectors: &[T], lane: usize, out: &mut [f32]) {
    for (out, x) in out.iter_mut().zip(vectors[lane..].iter().step_by(LANES)) {
        *out = x.to_f32();
    }
}

fn gather_row<T: Weight>(row: &[T], out: &mut [f32]) {
    for (out, x) in out.iter_mut().zip(row) {
        *out = x.to_f32();
    }
}

fn fill<T: Copy + Send + Sync>(packed: &mut [T], rows: &[T], n: usize, k: usize) {
    fill_narrow(packed, rows, n, k, |x| x);
}

/// Transpose sixteen rows at a time, in parallel over panels.
fn fill_narrow<T: Copy + Send + Sync, U: Copy + Send + Sync>(
    packed: &mut [U],
    rows: &[T],
    n: usize,
    k: usize,
    narrow: impl Fn(T) -> U + Sync,
) {
    if k == 0 {
        return;
    }
    let pack_panel = |(index, panel): (usize, &mut [U])| {
        for (lane, row) in rows[index * LANES * k..]
            .chunks_exact(k)
            .take(LANES.min(n - index * LANES))
            .enumerate()
        {
            for (slot, &x) in panel[lane..].iter_mut().step_by(LANES).zip(row) {
                *slot = narrow(x);
            }
        }
    };
    let size = k * LANES;
    if par::threads_for(8 * n * k) == 1 {
        packed
            .chunks_exact_mut(size)
            .enumerate()
            .for_each(pack_panel);
    } else {
        packed
            .par_chunks_exact_mut(size)
            .enumerate()
            .for_each(pack_panel);
    }
}

/// Rows of `stride` floats, of which the first `k` count, into panels `[ceil(n / 16)][k][16]`;
/// missing rows become zero lanes.
#[inline(always)]
fn pack_rows_generic<S: Simd>(
    s: S,
    rows: &[f32],
    stride: usize,
    n: usize,
    k: usize,
    panels: &mut [f32],
) {
    let whole = k / LANES * LANES;
    for (index, panel) in panels.chunks_exact_mut(k * LANES).enumerate() {
        let first = index * LANES;
        let count = LANES.min(n - first);
        let rows = &rows[first * stride..(first + count - 1) * stride + k];
        for column in (0..whole).step_by(LANES) {
            let mut block = [s.zero(); LANES];
            for (i, row) in block.iter_mut().enumerate().take(count) {
                // SAFETY: i·stride + column + 16 ≤ (count − 1)·stride + k = rows.len().
                *row = unsafe { s.load_ptr(rows.as_ptr().add(i * stride + column)) };
            }
            s.transpose(&mut block);
            let to = &mut panel[column * LANES..(column + LANES) * LANES];
            for (to, v) in to.as_chunks_mut::<LANES>().0.iter_mut().zip(&block) {
                s.store(to, *v);
            }
        }
        let rest = panel[whole * LANES..].chunks_exact_mut(LANES);
        for (column, lanes) in (whole..k).zip(rest) {
            lanes.fill(0.0);
            for (lane, x) in lanes.iter_mut().zip(rows[column..].iter().step_by(stride)) {
                *lane = *x;
            }
        }
    }
}

/// Columns become rows: `to[j · to_stride + i] = from[i · stride + j]` for i < rows, j < columns.
#[inline(always)]
fn turn_generic<S: Simd>(
    s: S,
    from: &[f32],
    stride: usize,
    rows: usize,
    columns: usize,
    to: &mut [f32],
    to_stride: usize,
) {
    assert!(rows == 0 || from.len() >= (rows - 1) * stride + columns);
    assert!(columns == 0 || to.len() >= (columns - 1) * to_stride + rows);
    let (whole_rows, whole_columns) = (rows / LANES * LANES, columns / LANES * LANES);
    for i in (0..whole_rows).step_by(LANES) {
        for j in (0..whole_columns).step_by(LANES) {
            let mut block = [s.zero(); LANES];
            for (r, row) in block.iter_mut().enumerate() {
                // SAFETY: row i + r < rows and columns j..j + 16 ≤ columns exist.
                *row = unsafe { s.load_ptr(from.as_ptr().add((i + r) * stride + j)) };
            }
            s.transpose(&mut block);
            for (r, row) in block.iter().enumerate() {
                // SAFETY: column j + r < columns and rows i..i + 16 ≤ rows have their place.
                unsafe { s.store_ptr(to.as_mut_ptr().add((j + r) * to_stride + i), *row) };
            }
        }
    }
    for i in 0..rows {
        let start = if i < whole_rows { whole_columns } else { 0 };
        for j in start..columns {
            to[j * to_stride + i] = from[i * stride + j];
        }
    }
}

dispatch! { pub(super) fn turn(from: &[f32], stride: usize, rows: usize, columns: usize, to: &mut [f32], to_stride: usize) = turn_generic }
dispatch! { pub(super) fn pack_rows(rows: &[f32], stride: usize, n: usize, k: usize, panels: &mut [f32]) = pack_rows_generic }
