//! Rotary position embedding in the half-rotation form, in place.

use super::buffer::Shared;
use super::isa::{Isa, dispatch};
use super::par;
use super::simd::{LANES, Simd};

/// Rotate the heads of every row: (x₁, x₂) → (x₁ cos − x₂ sin, x₂ cos + x₁ sin), where x₁ and x₂
/// are the halves of a head.
///
/// x `[T, heads · head_dim]`, `positions` `[T]`, cos and sin `[positions, head_dim / 2]`.
///
/// # Panics
/// When `x` does not have whole heads of an even size for every row, or a position is not in the
/// tables.
pub fn rope(x: &mut [f32], heads: usize, positions: &[u32], cos: &[f32], sin: &[f32]) {
    rotate(x, heads, positions, cos, sin, 1.0);
}

/// Gradient of [`rope`]: the inverse rotation, in place.
///
/// # Panics
/// As [`rope`].
pub fn rope_backward(g: &mut [f32], heads: usize, positions: &[u32], cos: &[f32], sin: &[f32]) {
    rotate(g, heads, positions, cos, sin, -1.0);
}

fn rotate(x: &mut [f32], heads: usize, positions: &[u32], cos: &[f32], sin: &[f32], sign: f32) {
    let isa = Isa::current();
    let rows = positions.len();
    if rows == 0 || x.is_empty() {
        return;
    }
    let width = x.len() / rows;
    assert!(x.len() == width * rows && width.is_multiple_of(2 * heads));
    let x = Shared::new(x);
    par::run_rows(rows, 4 * width, |rows| {
        // SAFETY: tasks own different rows.
        let x = unsafe { x.range(rows.start * width..rows.end * width) };
        rotate_rows(isa, x, width / heads / 2, &positions[rows], cos, sin, sign);
    });
}

#[inline(always)]
fn rotate_generic<S: Simd>(
    s: S,
    x: &mut [f32],
    half: usize,
    positions: &[u32],
    cos: &[f32],
    sin: &[f32],
    sign: f32,
) {
    let width = x.len() / positions.len();
    let sign = s.splat(sign);
    for (row, &position) in x.chunks_exact_mut(width).zip(positions) {
        let at = position as usize * half;
        let (cos, sin) = (&cos[at..at + half], &sin[at..at + half]);
        for head in row.chunks_exact_mut(2 * half) {
            let (first, second) = head.split_at_mut(half);
            let (first, first_rest) = first.as_chunks_mut::<LANES>();
            let (second, second_rest) = second.as_chunks_mut::<LANES>();
            let (cos, cos_rest) = cos.as_chunks::<LANES>();
            let (sin, sin_rest) = sin.as_chunks::<LANES>();
            for (((x1, x2), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                let sin = s.mul(sign, s.load(sin));
                let (y1, y2) = turn(s, s.load(x1), s.load(x2), s.load(cos), sin);
                s.store(x1, y1);
                s.store(x2, y2);
            }
            if !first_rest.is_empty() {
                let x1 = s.load_part(first_rest, 0.0);
                let x2 = s.load_part(second_rest, 0.0);
                let sin = s.mul(sign, s.load_part(sin_rest, 0.0));
                let (y1, y2) = turn(s, x1, x2, s.load_part(cos_rest, 0.0), sin);
                s.store_part(first_rest, y1);
                s.store_part(second_rest, y2);
            }
        }
    }
}

/// Pairs (x1, x2) turned by angles with this cosine and sine.
#[inline(always)]
fn turn<S: Simd>(s: S, x1: S::V, x2: S::V, cos: S::V, sin: S::V) -> (S::V, S::V) {
    let y1 = s.fma(s.sub(s.zero(), x2), sin, s.mul(x1, cos));
    let y2 = s.fma(x1, sin, s.mul(x2, cos));
    (y1, y2)
}

dispatch! { fn rotate_rows(x: &mut [f32], half: usize, positions: &[u32], cos: &[f32], sin: &[f32], sign: f32) = rotate_generic }

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_near, noise, on_threads, size};
    use super::*;

    #[test]
    fn matches_f64_and_is_undone_by_its_backward() {
        for &(t, heads, dim) in size(
            &[(1, 1, 2), (3, 2, 10), (40, 9, 64), (700, 3, 64)][..],
            &[(1, 1, 2), (3, 2, 10), (5, 2, 64)],
        ) {
            let half = dim / 2;
            let angles = noise(50 * half, 4);
            let cos: Vec<f32> = angles.iter().map(|a| (9.0 * a).cos()).collect();
            let sin: Vec<f32> = angles.iter().map(|a| (9.0 * a).sin()).collect();
            let positions: Vec<u32> = (0..t as u32).map(|i| i * 7 % 50).collect();
            let x = noise(t * heads * dim, 5);
            let mut want = vec![0.0; x.len()];
            for i in 0..x.len() {
                let (row, d) = (i / (heads * dim), i % dim);
                let at = positions[row] as usize * half + d % half;
                let (c, s) = (f64::from(cos[at]), f64::from(sin[at]));
                let own = f64::from(x[i]);
                want[i] = if d < half {
                    own * c - f64::from(x[i + half]) * s
                } else {
                    own * c + f64::from(x[i - half]) * s
                };
            }
            let run = || {
                let mut y = x.clone();
                rope(&mut y, heads, &positions, &cos, &sin);
                y
            };
            let mut y = run();
            assert_near(&y, &want, 1.0);
            for isa in Isa::available() {
                assert_eq!(isa.with(run), y);
            }
            assert_eq!(on_threads(3, run), y);
            rope_backward(&mut y, heads, &positions, &cos, &sin);
            let back: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
            assert_near(&y, &back, 1.0);
        }
    }
}
