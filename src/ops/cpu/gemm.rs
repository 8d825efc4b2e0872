//! Products with packed weights in both directions, and the gradient of a weight.
//!
//! Every result is a sum of blocks of [`DEPTH`] terms, each block a chain of fused multiply-adds
//! in order, the blocks added in order. Tiles, tasks and threads divide results only.

use super::buffer::{Shared, with_scratch};
use super::isa::Isa;
use super::pack::{PackedMatrix, turn, with_panels};
use super::panels::Panels;
use super::par;
use super::simd::LANES;
use super::tile::{DEPTH, Lhs, Mode, Out, Rhs, group_width, product};
use std::ops::Range;

/// Floats of the left factor which a task takes at once: they stay in the second-level cache while
/// all panels pass.
const ROW_DATA: usize = 256 * 1024;
/// Multiply-adds that make a task worth its own hand-out.
const TASK: usize = 2_000_000;

impl PackedMatrix {
    /// `y = x · Wᵀ (+ bias)` for `m` rows: x `[m, in]`, y `[m, out]`, bias `[out]`.
    ///
    /// # Panics
    /// When a slice has the wrong length.
    pub fn forward(&self, x: &[f32], m: usize, bias: Option<&[f32]>, y: &mut [f32]) {
        let isa = Isa::current();
        assert_eq!(x.len(), m * self.in_features, "input of a linear layer");
        assert_eq!(y.len(), m * self.out_features, "output of a linear layer");
        if let Some(bias) = bias {
            assert_eq!(bias.len(), self.out_features, "bias of a linear layer");
        }
        with_panels!(self, panels => self.forward_as(isa, panels, x, m, bias, y));
    }

    /// `dx (+)= g · W` for `m` rows: g `[m, out]`, dx `[m, in]`; added to dx if `accumulate`.
    ///
    /// # Panics
    /// When a slice has the wrong length.
    pub fn backward(&self, g: &[f32], m: usize, dx: &mut [f32], accumulate: bool) {
        let isa = Isa::current();
        assert_eq!(g.len(), m * self.out_features, "gradient of a linear layer");
        assert_eq!(dx.len(), m * self.in_features, "gradient of an input");
        with_panels!(self, panels => self.backward_as(isa, panels, g, m, dx, accumulate));
    }

    fn forward_as<P: Panels>(
        &self,
        isa: Isa,
        panels: &P,
        x: &[f32],
        m: usize,
        bias: Option<&[f32]>,
        y: &mut [f32],
    ) {
        let (n, k) = (self.out_features, self.in_features);
        if k == 0 {
            y.fill(0.0);
        }
        let y = Shared::new(y);
        Plan::new(m, n, k, k).run(|rows, columns| {
            let lhs = Lhs::rows(&x[rows.start * k..], k);
            let out = Out {
                start: y.at(rows.start * n + columns.start),
                row: n,
                mode: Mode::Set,
            };
            // SAFETY: the plan gives every pair of row and column to one task; they lie inside x,
            // W and y.
            unsafe {
                forward_block(isa, panels, k, lhs, rows.len(), columns.clone(), out);
                if let Some(bias) = bias {
                    for row in rows {
                        let y = y.range(row * n + columns.start..row * n + columns.end);
                        for (y, b) in y.iter_mut().zip(&bias[columns.clone()]) {
                            *y += b;
                        }
                    }
                }
            }
        });
    }

    fn backward_as<P: Panels>(
        &self,
        isa: Isa,
        panels: &P,
        g: &[f32],
        m: usize,
        dx: &mut [f32],
        accumulate: bool,
    ) {
        let (n, k) = (self.out_features, self.in_features);
        if n == 0 && !accumulate {
            dx.fill(0.0);
        }
        let dx = Shared::new(dx);
        // A block of depth passes all rows of a task before the next one.
        Plan::new(m, k, n, DEPTH).run(|rows, columns| {
            let lhs = Lhs::rows(&g[rows.start * n..], n);
            let out = Out {
                start: dx.at(rows.start * k + columns.start),
                row: k,
                mode: if accumulate { Mode::Add } else { Mode::Set },
            };
            // SAFETY: the plan gives every pair of row and column to one task; they lie inside g,
            // W and dx.
            unsafe { backward_block(isa, panels, k, lhs, rows.len(), 0..n, columns, out) };
        });
    }
}

/// How a product of `m` rows and `n` columns is divided into tasks.
struct Plan {
    m: usize,
    n: usize,
    /// Tasks take multiples of so many columns.
    width: usize,
    row_blocks: usize,
    column_blocks: usize,
    threads: usize,
}

impl Plan {
    /// `m` × `n` sums of `depth` terms, of which a task needs `at_once` of every row at one time.
    fn new(m: usize, n: usize, depth: usize, at_once: usize) -> Self {
        let work = m * n * depth;
        // A product of few rows waits for memory rather than for arithmetic.
        let threads = par::threads_for(2 * work + 6 * n * depth);
        let row_blocks = m.div_ceil((ROW_DATA / at_once.max(1)).clamp(48, 512));
        let wanted = if threads == 1 {
            1
        } else {
            (work / TASK).clamp(threads, 4 * threads)
        };
        let row_blocks = row_blocks.max(1);
        let wanted = wanted.div_ceil(row_blocks);
        // Whole tiles for every task where that gives all tasks the same number of them.
        let tile = group_width(Isa::current(), m.div_ceil(row_blocks), n);
        let fewest = threads.div_ceil(row_blocks);
        let equal = (fewest..=wanted)
            .rev()
            .find(|&blocks| n.div_ceil(tile).is_multiple_of(blocks) && blocks <= n.div_ceil(tile));
        let (width, column_blocks) = match equal {
            Some(blocks) => (tile, blocks),
            None => (LANES, wanted.min(n.div_ceil(LANES)).max(1)),
        };
        Self {
            m,
            n,
            width,
            row_blocks,
            column_blocks,
            threads,
        }
    }

    fn run(&self, task: impl Fn(Range<usize>, Range<usize>) + Sync) {
        let units = self.n.div_ceil(self.width);
        par::run(self.row_blocks * self.column_blocks, self.threads, |i| {
            let rows = par::piece(self.m, self.row_blocks, i / self.column_blocks);
            let columns = par::piece(units, self.column_blocks, i % self.column_blocks);
            task(
                rows,
                columns.start * self.width..(columns.end * self.width).min(self.n),
            );
        });
    }
}

/// The blocks of a reduction of `depth` terms: start, length, and what to do with the result.
pub(super) fn blocks(depth: usize, first: Mode) -> impl Iterator<Item = (usize, usize, Mode)> {
    (0..depth).step_by(DEPTH).map(move |start| {
        let mode = if start == 0 { first } else { Mode::Add };
        (start, DEPTH.min(depth - start), mode)
    })
}

/// `rows` × `columns` of x·Wᵀ, from the first row and column of `x` and `out` on.
///
/// A group of panels passes all its blocks of depth before the next one, so that its results stay
/// in the cache.
///
/// # Safety
/// `x` has `rows` rows of `k` elements, W has these columns (the first a multiple of 16), `out`
/// has room for them and no other thread uses it.
unsafe fn forward_block<P: Panels>(
    isa: Isa,
    panels: &P,
    k: usize,
    x: Lhs,
    rows: usize,
    columns: Range<usize>,
    out: Out,
) {
    // SAFETY: the caller's promise.
    if unsafe { panels.few(isa, columns.clone(), rows, x, out) } {
        return;
    }
    let width = group_width(isa, rows, columns.len());
    let in_place = panels.in_place(rows);
    let wide = if in_place.is_some() { 0 } else { width * DEPTH };
    with_scratch(wide, |wide| {
        for first in columns.clone().step_by(width) {
            let count = width.min(columns.end - first);
            let panel = first / LANES;
            for (start, depth, mode) in blocks(k, out.mode) {
                let lhs = x.from(start);
                let terms = start..start + depth;
                let out = Out {
                    start: out.start.wrapping_add(first - columns.start),
                    mode,
                    ..out
                };
                // SAFETY: rows, columns and terms exist by the caller's promise.
                unsafe {
                    if let Some(panels) = in_place {
                        let next = match start + depth < k {
                            true => (panel * k + start + depth) * LANES,
                            false => (first + width) / LANES * k * LANES,
                        };
                        let last = panel + count.div_ceil(LANES) - 1;
                        assert!(panels.len() >= (last * k + terms.end) * LANES);
                        let rhs = Rhs {
                            start: panels.as_ptr().add((panel * k + start) * LANES),
                            panel: k * LANES,
                            step: LANES,
                            next: panels.as_ptr().wrapping_add(next),
                        };
                        product(isa, rows, count, depth, lhs, rhs, out);
                    } else {
                        for index in 0..count.div_ceil(LANES) {
                            let wide = &mut wide[index * depth * LANES..][..depth * LANES];
                            panels.widen(isa, panel + index, terms.clone(), wide);
                        }
                        let rhs = Rhs::panels(wide, depth);
                        product(isa, rows, count, depth, lhs, rhs, out);
                    }
                }
            }
        }
    });
}

/// `rows` × `columns` of g·W over the `terms` (outputs of W) of `g`, from the first row, term and
/// column of `g` and `out` on.
///
/// Panels are transposed into scratch memory, where they serve all rows.
///
/// # Safety
/// `g` has `rows` rows of `terms`, the first a multiple of [`DEPTH`], which W has as outputs, and
/// W has `columns` as inputs; `out` has room for them and no other thread uses it.
#[allow(clippy::too_many_arguments)]
unsafe fn backward_block<P: Panels>(
    isa: Isa,
    panels: &P,
    k: usize,
    g: Lhs,
    rows: usize,
    terms: Range<usize>,
    columns: Range<usize>,
    out: Out,
) {
    let width = group_width(isa, rows, columns.len());
    with_scratch(width * DEPTH, |turned| {
        for (start, depth, mode) in blocks(terms.len(), out.mode) {
            let sources = depth.div_ceil(LANES);
            let panel = sources * LANES;
            for first in columns.clone().step_by(width) {
                let count = width.min(columns.end - first);
                for index in 0..count.div_ceil(LANES) {
                    let column = first + index * LANES;
                    let inputs = LANES.min(k - column);
                    for source in 0..sources {
                        let term = (terms.start + start) / LANES + source;
                        panels.turn(
                            isa,
                            term,
                            column..column + inputs,
                            &mut turned[(index * panel + source * LANES) * LANES..]
                                [..LANES * LANES],
                        );
                    }
                }
                let out = Out {
                    start: out.start.wrapping_add(first - columns.start),
                    mode,
                    ..out
                };
                // SAFETY: `turned` holds whole panels of at least `depth` terms; the rest exists
                // by the caller's promise.
                unsafe {
                    let rhs = Rhs::panels(turned, panel);
                    product(isa, rows, count, depth, g.from(start), rhs, out);
                }
            }
        }
    });
}

/// Gradient of a weight: `dw[n, k] (+)= gᵀ · x` over rows in order, g `[t, n]`, x `[t, k]`;
/// added to dw if `accumulate`.
///
/// # Panics
/// When a slice has the wrong length.
pub fn weight_gradient(g: &[f32], x: &[f32], n: usize, k: usize, dw: &mut [f32], accumulate: bool) {
    let isa = Isa::current();
    let t = g.len().checked_div(n).unwrap_or(0);
    assert_eq!(g.len(), t * n, "gradient of a linear layer");
    assert_eq!(x.len(), t * k, "input of a linear layer");
    assert_eq!(dw.len(), n * k, "gradient of a weight");
    if t == 0 && !accumulate {
        dw.fill(0.0);
    }
    let first = if accumulate { Mode::Add } else { Mode::Set };
    let dw = Shared::new(dw);
    Plan::new(n, k, t, t).run(|rows, columns| {
        let width = group_width(isa, rows.len(), columns.len());
        // The factors are copied into compact blocks, since rows far apart in memory would evict
        // each other from the first-level cache.
        with_scratch((width + rows.len()) * DEPTH, |scratch| {
            let (right, left) = scratch.split_at_mut(width * DEPTH);
            for (start, depth, mode) in blocks(t, first) {
                let from = &g[start * n + rows.start..];
                turn(isa, from, n, depth, rows.len(), left, DEPTH);
                for group in columns.clone().step_by(width) {
                    let group = group..(group + width).min(columns.end);
                    copy_panels(x, k, start..start + depth, group.clone(), right);
                    // SAFETY: `left` holds `depth` rows, `right` whole panels of `depth` terms;
                    // the plan gives this part of dw to one task.
                    unsafe {
                        let lhs = Lhs::rows(left, DEPTH);
                        let out = Out {
                            start: dw.at(rows.start * k + group.start),
                            row: k,
                            mode,
                        };
                        let rhs = Rhs::panels(right, depth);
                        product(isa, rows.len(), group.len(), depth, lhs, rhs, out);
                    }
                }
            }
        });
    });
}

/// Copy rows × columns of the row-major `x` (rows of length `row`) into panels
/// `[ceil(columns / 16)][rows][16]`, missing columns zero.
pub(super) fn copy_panels(
    x: &[f32],
    row: usize,
    rows: Range<usize>,
    columns: Range<usize>,
    panels: &mut [f32],
) {
    let depth = rows.len();
    for (panel, column) in panels
        .chunks_exact_mut(depth * LANES)
        .zip(columns.clone().step_by(LANES))
    {
        let width = LANES.min(columns.end - column);
        for (to, index) in panel.chunks_exact_mut(LANES).zip(rows.clone()) {
            let from = &x[index * row + column..][..width];
            to[..width].copy_from_slice(from);
            to[width..].fill(0.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_near, assert_products, noise, on_threads, size};
    use super::*;
    use crate::ops::cpu::Weight;
    use half::{bf16, f16};

    const SHAPES: &[(usize, usize, usize)] = size(
        &[
            (1, 1, 1),
            (1, 576, 200),
            (2, 17, 193),
            (5, 50, 3),
            (9, 130, 385),
            (13, 16, 192),
            (37, 100, 400),
            (70, 61, 577),
            (515, 33, 30),
        ],
        &[
            (1, 1, 1),
            (2, 17, 193),
            (5, 50, 3),
            (9, 33, 194),
            (51, 17, 5),
            (200, 17, 18),
        ],
    );

    #[test]
    fn forward_and_backward_match_f64() {
        for &(m, n, k) in SHAPES {
            let (w, x) = (noise(n * k, 1), noise(m * k, 2));
            let (g, bias) = (noise(m * n, 3), noise(n, 4));
            let packed = PackedMatrix::pack(&w, n, k);
            assert_eq!(packed.unpack(), w);
            let mut y = vec![f32::NAN; m * n];
            packed.forward(&x, m, Some(&bias), &mut y);
            let mut want = vec![0.0; m * n];
            let mut want_dx = vec![0.0; m * k];
            for i in 0..m {
                for j in 0..n {
                    want[i * n + j] = f64::from(bias[j]);
                    for p in 0..k {
                        want[i * n + j] += f64::from(x[i * k + p]) * f64::from(w[j * k + p]);
                        want_dx[i * k + p] += f64::from(g[i * n + j]) * f64::from(w[j * k + p]);
                    }
                }
            }
            assert_near(&y, &want, 10.0);
            let mut dx = vec![f32::NAN; m * k];
            packed.backward(&g, m, &mut dx, false);
            assert_near(&dx, &want_dx, 10.0);
            packed.backward(&g, m, &mut dx, true);
            for want in &mut want_dx {
                *want *= 2.0;
            }
            assert_near(&dx, &want_dx, 10.0);
        }
    }

    #[test]
    fn weight_gradient_matches_f64() {
        for &(t, n, k) in SHAPES {
            let (g, x) = (noise(t * n, 5), noise(t * k, 6));
            let mut want = vec![0.0; n * k];
            for row in 0..t {
                for i in 0..n {
                    for j in 0..k {
                        want[i * k + j] += f64::from(g[row * n + i]) * f64::from(x[row * k + j]);
                    }
                }
            }
            let mut dw = vec![f32::NAN; n * k];
            weight_gradient(&g, &x, n, k, &mut dw, false);
            assert_near(&dw, &want, 10.0);
            let once = dw.clone();
            weight_gradient(&g, &x, n, k, &mut dw, true);
            assert_near(&dw, &want.iter().map(|w| 2.0 * w).collect::<Vec<_>>(), 10.0);
            for isa in Isa::available() {
                let mut again = vec![0.0; n * k];
                isa.with(|| weight_gradient(&g, &x, n, k, &mut again, false));
                assert_eq!(again, once, "{isa:?}");
                on_threads(3, || weight_gradient(&g, &x, n, k, &mut again, false));
                assert_eq!(again, once);
            }
        }
    }

    fn bits_do_not_depend_on_the_company<T: Weight>(convert: impl Fn(f32) -> T) {
        let (n, k) = size((300, 1000), (35, 200));
        let w: Vec<T> = noise(n * k, 7).into_iter().map(convert).collect();
        let wide: Vec<f32> = w.iter().map(|&w| w.to_f32()).collect();
        assert_products(&PackedMatrix::pack(&w, n, k), &wide);
    }

    #[test]
    fn f32_bits() {
        bits_do_not_depend_on_the_company(|x| x);
    }

    #[test]
    fn bf16_bits() {
        bits_do_not_depend_on_the_company(bf16::from_f32);
    }

    #[test]
    fn f16_bits() {
        bits_do_not_depend_on_the_company(f16::from_f32);
    }

    #[test]
    fn rows_can_be_read_and_replaced() {
        let (n, k) = (35, 21);
        let (w, v) = (noise(n * k, 10), noise(n * k, 11));
        let mut packed = PackedMatrix::pack(&w, n, k);
        let mut row = vec![0.0; k];
        packed.row(34, &mut row);
        assert_eq!(row, w[34 * k..]);
        packed.repack_from(&v);
        assert_eq!(packed.unpack(), v);
        let narrow: Vec<bf16> = w.iter().map(|&x| bf16::from_f32(x)).collect();
        let mut packed = PackedMatrix::pack(&narrow, n, k);
        assert_eq!(packed.bytes(), 48 * k * 2);
        packed.repack_from(&v);
        packed.row(17, &mut row);
        assert_eq!(row[3], bf16::from_f32(v[17 * k + 3]).to_f32());
    }
}
