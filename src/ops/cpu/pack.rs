//! Weights in panels of sixteen outputs: what one vector of the micro-kernel reads.

use super::buffer::AlignedVec;
use super::isa::{Isa, dispatch};
use super::par;
use super::simd::{LANES, Simd};
use super::tile::Element;
use half::{bf16, f16};

/// A matrix W of shape [out, in], stored as panels `[ceil(out / 16)][in][16]` in `f32`, `bf16` or
/// `f16`; missing outputs of the last panel are zero.
///
/// Both directions of a linear layer read the same storage, see `forward` and `backward`.
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
}

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

    /// Replace all weights in place, rounded to the stored type: for weights that train.
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

    /// Bytes of memory held by the weights.
    pub fn bytes(&self) -> usize {
        match &self.storage {
            Storage::F32(panels) => size_of_val(&panels[..]),
            Storage::Bf16(panels) => size_of_val(&panels[..]),
            Storage::F16(panels) => size_of_val(&panels[..]),
        }
    }

    /// W as row-major `f32`, shape [out_features, in_features].
    pub fn unpack(&self) -> Vec<f32> {
        let mut rows = vec![0.0; self.out_features * self.in_features];
        if self.in_features > 0 {
            for (index, row) in rows.chunks_exact_mut(self.in_features).enumerate() {
                self.row(index, row);
            }
        }
        rows
    }

    /// Row `index` of W widened to `f32`: an embedding looked up in a tied head.
    ///
    /// # Panics
    /// When `index` is not below `out_features` or `out` has not `in_features` elements.
    pub fn row(&self, index: usize, out: &mut [f32]) {
        assert!(index < self.out_features, "row {index} of a packed matrix");
        assert_eq!(out.len(), self.in_features, "row length");
        fn gather<T: Weight>(panels: &[T], index: usize, out: &mut [f32]) {
            let start = index / LANES * out.len() * LANES + index % LANES;
            let column = panels[start..].iter().step_by(LANES);
            for (out, x) in out.iter_mut().zip(column) {
                *out = x.to_f32();
            }
        }
        match &self.storage {
            Storage::F32(panels) => gather(panels, index, out),
            Storage::Bf16(panels) => gather(panels, index, out),
            Storage::F16(panels) => gather(panels, index, out),
        }
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
    use rayon::prelude::*;
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

/// Widen `count` vectors of sixteen.
#[inline(always)]
fn widen_generic<S: Simd, E: Element>(s: S, from: &[E], to: &mut [f32]) {
    assert!(from.len() == to.len() && to.len().is_multiple_of(LANES));
    for i in (0..to.len()).step_by(LANES) {
        // SAFETY: i + 16 ≤ both lengths by the assertion.
        unsafe {
            let v = E::load(s, from.as_ptr().add(i));
            s.store_ptr(to.as_mut_ptr().add(i), v);
        }
    }
}

/// From a panel, 16 outputs × `depth` inputs, to its transpose: for up to 16 inputs one vector of
/// outputs each becomes for 16 outputs one vector of inputs each.
#[inline(always)]
fn transpose_generic<S: Simd, E: Element>(s: S, from: &[E], inputs: usize, to: &mut [f32]) {
    assert!(inputs <= LANES && from.len() >= inputs * LANES && to.len() >= LANES * LANES);
    let mut block = [s.zero(); LANES];
    if inputs == LANES {
        for i in 0..LANES {
            // SAFETY: (i + 1)·16 ≤ 256 = inputs·16 ≤ from.len().
            block[i] = unsafe { E::load(s, from.as_ptr().add(i * LANES)) };
        }
    } else {
        for i in 0..LANES {
            if i < inputs {
                // SAFETY: (i + 1)·16 ≤ inputs·16 ≤ from.len().
                block[i] = unsafe { E::load(s, from.as_ptr().add(i * LANES)) };
            }
        }
    }
    s.transpose(&mut block);
    for (i, row) in block.iter().enumerate() {
        // SAFETY: (i + 1)·16 ≤ 256 ≤ to.len().
        unsafe { s.store_ptr(to.as_mut_ptr().add(i * LANES), *row) };
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
dispatch! { fn widen_f32(from: &[f32], to: &mut [f32]) = widen_generic }
dispatch! { fn widen_bf16(from: &[bf16], to: &mut [f32]) = widen_generic }
dispatch! { fn widen_f16(from: &[f16], to: &mut [f32]) = widen_generic }
dispatch! { fn transpose_f32(from: &[f32], inputs: usize, to: &mut [f32]) = transpose_generic }
dispatch! { fn transpose_bf16(from: &[bf16], inputs: usize, to: &mut [f32]) = transpose_generic }
dispatch! { fn transpose_f16(from: &[f16], inputs: usize, to: &mut [f32]) = transpose_generic }

/// Panel operations of an element type, by instruction set.
pub(super) trait PanelElement: Element {
    /// Whether the micro-kernel gains from widened panels when they are read more than once.
    const NARROW: bool;
    /// Widen whole vectors.
    fn widen(isa: Isa, from: &[Self], to: &mut [f32]);
    /// Write the 16 × `inputs` block at `from` as 16 vectors of inputs, missing inputs zero.
    fn transpose(isa: Isa, from: &[Self], inputs: usize, to: &mut [f32]);
}

impl PanelElement for f32 {
    const NARROW: bool = false;
    fn widen(isa: Isa, from: &[Self], to: &mut [f32]) {
        widen_f32(isa, from, to);
    }
    fn transpose(isa: Isa, from: &[Self], inputs: usize, to: &mut [f32]) {
        transpose_f32(isa, from, inputs, to);
    }
}

impl PanelElement for bf16 {
    const NARROW: bool = true;
    fn widen(isa: Isa, from: &[Self], to: &mut [f32]) {
        widen_bf16(isa, from, to);
    }
    fn transpose(isa: Isa, from: &[Self], inputs: usize, to: &mut [f32]) {
        transpose_bf16(isa, from, inputs, to);
    }
}

impl PanelElement for f16 {
    const NARROW: bool = true;
    fn widen(isa: Isa, from: &[Self], to: &mut [f32]) {
        widen_f16(isa, from, to);
    }
    fn transpose(isa: Isa, from: &[Self], inputs: usize, to: &mut [f32]) {
        transpose_f16(isa, from, inputs, to);
    }
}
