//! Root-mean-square norm over rows, forward and backward.

use super::buffer::Shared;
use super::isa::{Isa, dispatch};
use super::par;
use super::simd::{LANES, Simd};
use super::tile::DEPTH;
use std::ops::Range;

/// `y = x / √(mean(x²) + ε) ∘ w` for every row: x and y `[T, h]`, w `[h]`.
///
/// # Panics
/// When a slice has the wrong length.
pub fn rms_norm(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
    let (isa, h) = (Isa::current(), w.len());
    assert!(x.len() == y.len() && x.len().is_multiple_of(h));
    let y = Shared::new(y);
    par::run_rows(x.len() / h, 6 * h, |rows| {
        let part = rows.start * h..rows.end * h;
        // SAFETY: tasks own different rows.
        let y = unsafe { y.range(part.clone()) };
        forward_rows(isa, &x[part], w, eps, y);
    });
}

/// dx of [`rms_norm`] given `g = dL/dy`, overwritten; with `dw`, dL/dw is added to it.
///
/// With s = 1/√(mean(x²) + ε), x̂ = s·x and ĝ = g∘w: dx = s (ĝ − x̂ mean(ĝ∘x̂)), dw = Σ_rows g∘x̂.
///
/// # Panics
/// When a slice has the wrong length.
pub fn rms_norm_backward(
    x: &[f32],
    w: &[f32],
    eps: f32,
    g: &[f32],
    dx: &mut [f32],
    dw: Option<&mut [f32]>,
) {
    let (isa, h) = (Isa::current(), w.len());
    assert!(x.len() == g.len() && x.len() == dx.len() && x.len().is_multiple_of(h));
    let rows = x.len() / h;
    let mut scales = vec![0.0; rows];
    let (dx, shared_scales) = (Shared::new(dx), Shared::new(&mut scales));
    par::run_rows(rows, 12 * h, |rows| {
        let part = rows.start * h..rows.end * h;
        // SAFETY: tasks own different rows.
        let (dx, scales) = unsafe { (dx.range(part.clone()), shared_scales.range(rows)) };
        backward_rows(isa, &x[part.clone()], w, eps, &g[part], dx, scales);
    });
    if let Some(dw) = dw {
        assert_eq!(dw.len(), h);
        let dw = Shared::new(dw);
        // Tasks own columns, so that rows are added in order.
        par::run_rows(h.div_ceil(LANES), 4 * LANES * rows, |blocks| {
            let columns = blocks.start * LANES..(blocks.end * LANES).min(h);
            // SAFETY: tasks own different columns.
            let dw = unsafe { dw.range(columns.clone()) };
            weight_columns(isa, x, g, &scales, h, columns, dw);
        });
    }
}

/// Σ a·b over sixteen lanes.
#[inline(always)]
pub(super) fn dot<S: Simd>(s: S, a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut sum = s.zero();
    for (a, b) in a.iter().zip(b) {
        sum = s.fma(s.load(a), s.load(b), sum);
    }
    if !a_rest.is_empty() {
        sum = s.fma(s.load_part(a_rest, 0.0), s.load_part(b_rest, 0.0), sum);
    }
    s.sum(sum)
}

#[inline(always)]
fn scale_of<S: Simd>(s: S, x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(s, x, x) / x.len() as f32 + eps).sqrt()
}

#[inline(always)]
fn forward_generic<S: Simd>(s: S, x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
    let h = w.len();
    let (w_blocks, w_rest) = w.as_chunks::<LANES>();
    for (x, y) in x.chunks_exact(h).zip(y.chunks_exact_mut(h)) {
        let scale = s.splat(scale_of(s, x, eps));
        let (x, x_rest) = x.as_chunks::<LANES>();
        let (y, y_rest) = y.as_chunks_mut::<LANES>();
        for ((x, w), y) in x.iter().zip(w_blocks).zip(y) {
            s.store(y, s.mul(s.mul(s.load(x), scale), s.load(w)));
        }
        if !x_rest.is_empty() {
            let normed = s.mul(s.load_part(x_rest, 0.0), scale);
            s.store_part(y_rest, s.mul(normed, s.load_part(w_rest, 0.0)));
        }
    }
}

/// Σ g·w·x over sixteen lanes.
#[inline(always)]
fn weighted_dot<S: Simd>(s: S, g: &[f32], w: &[f32], x: &[f32]) -> f32 {
    let mut sum = s.zero();
    let ((g, g_rest), (w, w_rest)) = (g.as_chunks::<LANES>(), w.as_chunks::<LANES>());
    let (x, x_rest) = x.as_chunks::<LANES>();
    for ((g, w), x) in g.iter().zip(w).zip(x) {
        sum = s.fma(s.mul(s.load(g), s.load(w)), s.load(x), sum);
    }
    if !g_rest.is_empty() {
        let weighted = s.mul(s.load_part(g_rest, 0.0), s.load_part(w_rest, 0.0));
        sum = s.fma(weighted, s.load_part(x_rest, 0.0), sum);
    }
    s.sum(sum)
}

#[inline(always)]
fn backward_generic<S: Simd>(
    s: S,
    x: &[f32],
    w: &[f32],
    eps: f32,
    g: &[f32],
    dx: &mut [f32],
    scales: &mut [f32],
) {
    let h = w.len();
    let (w_blocks, w_rest) = w.as_chunks::<LANES>();
    for (((x, g), dx), scale) in x
        .chunks_exact(h)
        .zip(g.chunks_exact(h))
        .zip(dx.chunks_exact_mut(h))
        .zip(scales)
    {
        *scale = scale_of(s, x, eps);
        let mean = weighted_dot(s, g, w, x) * *scale / h as f32;
        let (through, scale) = (s.splat(-mean * *scale), s.splat(*scale));
        let (x, x_rest) = x.as_chunks::<LANES>();
        let (g, g_rest) = g.as_chunks::<LANES>();
        let (dx, dx_rest) = dx.as_chunks_mut::<LANES>();
        for (((x, g), w), dx) in x.iter().zip(g).zip(w_blocks).zip(dx) {
            let weighted = s.mul(s.load(g), s.load(w));
            s.store(dx, s.mul(scale, s.fma(s.load(x), through, weighted)));
        }
        if !x_rest.is_empty() {
            let weighted = s.mul(s.load_part(g_rest, 0.0), s.load_part(w_rest, 0.0));
            let x = s.load_part(x_rest, 0.0);
            s.store_part(dx_rest, s.mul(scale, s.fma(x, through, weighted)));
        }
    }
}

/// dw of some columns; rows in order, in blocks of [`DEPTH`].
#[inline(always)]
fn weight_generic<S: Simd>(
    s: S,
    x: &[f32],
    g: &[f32],
    scales: &[f32],
    h: usize,
    columns: Range<usize>,
    dw: &mut [f32],
) {
    for (start, dw) in columns.step_by(LANES).zip(dw.chunks_mut(LANES)) {
        for (block, scales) in scales.chunks(DEPTH).enumerate() {
            let mut sum = s.zero();
            for (i, &scale) in scales.iter().enumerate() {
                let at = (block * DEPTH + i) * h + start;
                let x = s.load_part(&x[at..at + dw.len()], 0.0);
                let g = s.load_part(&g[at..at + dw.len()], 0.0);
                sum = s.fma(g, s.mul(x, s.splat(scale)), sum);
            }
            let before = s.load_part(dw, 0.0);
            s.store_part(dw, s.add(before, sum));
        }
    }
}

dispatch! { fn forward_rows(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) = forward_generic }
dispatch! { fn backward_rows(x: &[f32], w: &[f32], eps: f32, g: &[f32], dx: &mut [f32], scales: &mut [f32]) = backward_generic }
dispatch! { fn weight_columns(x: &[f32], g: &[f32], scales: &[f32], h: usize, columns: Range<usize>, dw: &mut [f32]) = weight_generic }

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_near, noise, on_threads, size};
    use super::*;

    /// y and, for L = Σ g∘y, dx and dw in f64.
    fn reference(x: &[f32], w: &[f32], eps: f64, g: &[f32]) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
        let h = w.len();
        let (mut y, mut dx, mut dw) = (vec![], vec![], vec![0.0; h]);
        for (x, g) in x.chunks(h).zip(g.chunks(h)) {
            let f = |i: usize| f64::from(x[i]);
            let mean = (0..h).map(|i| f(i) * f(i)).sum::<f64>() / h as f64 + eps;
            let s = mean.powf(-0.5);
            let gw = |i: usize| f64::from(g[i]) * f64::from(w[i]);
            let through: f64 = (0..h).map(|i| gw(i) * f(i)).sum();
            for i in 0..h {
                y.push(f(i) * s * f64::from(w[i]));
                dx.push(gw(i) * s - f(i) * s.powi(3) * through / h as f64);
                dw[i] += f64::from(g[i]) * f(i) * s;
            }
        }
        (y, dx, dw)
    }

    #[test]
    fn matches_f64_with_the_same_bits_everywhere() {
        for (t, h) in [(1, 1), (3, 16), (5, 37), size((300, 576), (200, 20))] {
            let (x, w, g) = (noise(t * h, 1), noise(h, 2), noise(t * h, 3));
            let (want_y, want_dx, want_dw) = reference(&x, &w, 1e-5, &g);
            let run = || {
                let (mut y, mut dx) = (vec![f32::NAN; t * h], vec![f32::NAN; t * h]);
                let mut dw = vec![0.0; h];
                rms_norm(&x, &w, 1e-5, &mut y);
                rms_norm_backward(&x, &w, 1e-5, &g, &mut dx, Some(&mut dw));
                (y, dx, dw)
            };
            let (y, dx, dw) = run();
            assert_near(&y, &want_y, 2.0);
            assert_near(&dx, &want_dx, 10.0);
            assert_near(&dw, &want_dw, 10.0);
            for isa in Isa::available() {
                assert_eq!(isa.with(run), (y.clone(), dx.clone(), dw.clone()));
            }
            for threads in [1, 3] {
                assert_eq!(
                    on_threads(threads, run),
                    (y.clone(), dx.clone(), dw.clone())
                );
            }
        }
    }
}
