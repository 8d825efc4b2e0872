//! Long vectors of a decomposition: inner products and projections.

use super::isa::{Isa, dispatch};
use super::simd::{LANES, Simd};

/// Vectors whose f32 sums are emptied into f64: often enough that they lose nothing.
const RUN: usize = 16;

/// a · b: sixteen f32 sums, emptied into f64 after every [`RUN`] vectors.
///
/// # Panics
/// When the lengths differ.
pub fn dot(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len(), "factors of an inner product");
    let mut total = 0.0;
    dot_on(Isa::current(), a, b, &mut total);
    total
}

/// `z −= along · q`
///
/// # Panics
/// When the lengths differ.
pub fn subtract(z: &mut [f32], along: f32, q: &[f32]) {
    assert_eq!(z.len(), q.len(), "terms of a difference");
    subtract_on(Isa::current(), z, along, q);
}

#[inline(always)]
fn dot_generic<S: Simd>(s: S, a: &[f32], b: &[f32], total: &mut f64) {
    for (a, b) in a.chunks(RUN * LANES).zip(b.chunks(RUN * LANES)) {
        let ((a, a_tail), (b, b_tail)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
        let mut sums = s.zero();
        for (a, b) in a.iter().zip(b) {
            sums = s.add(sums, s.mul(s.load(a), s.load(b)));
        }
        *total += s.to_array(sums).iter().map(|&x| f64::from(x)).sum::<f64>();
        let tail = a_tail.iter().zip(b_tail);
        *total += tail.map(|(&a, &b)| f64::from(a * b)).sum::<f64>();
    }
}

#[inline(always)]
fn subtract_generic<S: Simd>(s: S, z: &mut [f32], along: f32, q: &[f32]) {
    let ((z, z_tail), (q, q_tail)) = (z.as_chunks_mut::<LANES>(), q.as_chunks::<LANES>());
    let factor = s.splat(along);
    for (z, q) in z.iter_mut().zip(q) {
        let difference = s.sub(s.load(z), s.mul(factor, s.load(q)));
        s.store(z, difference);
    }
    for (z, q) in z_tail.iter_mut().zip(q_tail) {
        *z -= along * q;
    }
}

dispatch! { fn dot_on(a: &[f32], b: &[f32], total: &mut f64) = dot_generic }
dispatch! { fn subtract_on(z: &mut [f32], along: f32, q: &[f32]) = subtract_generic }

#[cfg(test)]
mod tests {
    use super::super::testing::{noise, size};
    use super::*;

    #[test]
    fn instruction_sets_agree() {
        for len in [0, 1, 16, 17, 255, 256, 257, size(4099, 600)] {
            let (a, b) = (noise(len, 1), noise(len, 2));
            let exact: f64 = a
                .iter()
                .zip(&b)
                .map(|(&a, &b)| f64::from(a) * f64::from(b))
                .sum();
            let want = Isa::Portable.with(|| dot(&a, &b));
            assert!((want - exact).abs() <= 1e-6 * (1.0 + len as f64).sqrt());
            let difference: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a - 0.37 * b).collect();
            for isa in Isa::available() {
                isa.with(|| {
                    assert_eq!(dot(&a, &b).to_bits(), want.to_bits());
                    let mut z = a.clone();
                    subtract(&mut z, 0.37, &b);
                    assert_eq!(z, difference);
                });
            }
        }
    }
}
