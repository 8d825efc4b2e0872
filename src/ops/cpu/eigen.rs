//! Eigenvalues and eigenvectors of a small symmetric matrix in f64: Householder reduction to
//! tridiagonal form, then implicit QR steps with Wilkinson's shift (Golub & Van Loan, *Matrix
//! Computations*, §8.3).

use super::isa::{Isa, dispatch};
use super::simd::Simd;

/// Decomposes the symmetric `n`×`n` matrix `a` (row-major).
///
/// Returns the eigenvalues in descending order and the eigenvectors as the rows of an `n`×`n`
/// matrix in the same order. Always terminates; with NaN in `a` the result holds NaN.
pub fn symmetric_eigen(a: Vec<f64>, n: usize) -> (Vec<f64>, Vec<f64>) {
    eigen_on(Isa::current(), a, n)
}

dispatch! { fn eigen_on(a: Vec<f64>, n: usize) -> (Vec<f64>, Vec<f64>) = eigen_generic }

/// The compiler makes vectors of the loops below, as wide as the instruction set has them; it never
/// changes the order of a sum, so that the bits are the same.
#[inline(always)]
fn eigen_generic<S: Simd>(_s: S, mut a: Vec<f64>, n: usize) -> (Vec<f64>, Vec<f64>) {
    debug_assert_eq!(a.len(), n * n);
    let (mut diagonal, mut off, mut vectors) = tridiagonalize(&mut a, n);
    diagonalize(&mut diagonal, &mut off, &mut vectors, n);

    let mut order: Vec<usize> = (0..n).collect();
    // The sort is stable, so equal values keep one fixed order.
    order.sort_by(|&i, &j| diagonal[j].total_cmp(&diagonal[i]));
    let values = order.iter().map(|&i| diagonal[i]).collect();
    let rows = order
        .iter()
        .flat_map(|&i| vectors[i * n..][..n].iter().copied())
        .collect();
    (values, rows)
}

/// Reduces `a` to T = Qᵀ a Q. Returns T's diagonal, its off-diagonal, and Qᵀ by rows.
#[inline(always)]
fn tridiagonalize(a: &mut [f64], n: usize) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    // Reflection k is H = 1 − β v vᵀ with v zero up to and including entry k.
    let mut reflections: Vec<(f64, Vec<f64>)> = Vec::new();
    for k in 0..n.saturating_sub(2) {
        let mut v: Vec<f64> = a[k * n + k + 1..(k + 1) * n].to_vec();
        let norm = dot(&v, &v).sqrt();
        if norm == 0.0 {
            reflections.push((0.0, v));
            continue;
        }
        let head = v[0];
        v[0] += norm.copysign(head);
        let beta = 2.0 / dot(&v, &v);

        // a ← H a H on the trailing block: a −= v wᵀ + w vᵀ.
        let trailing = |row: usize| (k + 1 + row) * n + k + 1..(k + 2 + row) * n;
        let mut w: Vec<f64> = (0..v.len())
            .map(|i| beta * dot(&a[trailing(i)], &v))
            .collect();
        let shift = beta * dot(&w, &v) / 2.0;
        w.iter_mut().zip(&v).for_each(|(w, v)| *w -= shift * v);
        for i in 0..v.len() {
            let (vi, wi) = (v[i], w[i]);
            for ((x, vj), wj) in a[trailing(i)].iter_mut().zip(&v).zip(&w) {
                *x -= vi * wj + wi * vj;
            }
        }
        a[k * n + k + 1] = -norm.copysign(head);
        reflections.push((beta, v));
    }
    let diagonal = (0..n).map(|i| a[i * n + i]).collect();
    let off = (0..n.saturating_sub(1)).map(|i| a[i * n + i + 1]).collect();

    let mut rows = vec![0.0; n * n];
    for (i, row) in rows.chunks_exact_mut(n.max(1)).enumerate() {
        row[i] = 1.0;
        for (k, (beta, v)) in reflections.iter().enumerate().rev() {
            let tail = &mut row[k + 1..];
            let along = beta * dot(tail, v);
            tail.iter_mut().zip(v).for_each(|(x, v)| *x -= along * v);
        }
    }
    (diagonal, off, rows)
}

/// Diagonalises the tridiagonal matrix, turning the rows of `vectors` along.
#[inline(always)]
fn diagonalize(d: &mut [f64], e: &mut [f64], vectors: &mut [f64], n: usize) {
    let mut hi = n.saturating_sub(1);
    // Two or three steps a value are usual; the bound only guards against NaN.
    for _ in 0..60 * n.max(1) {
        let negligible = |k: usize| e[k].abs() <= f64::EPSILON * (d[k].abs() + d[k + 1].abs());
        while hi > 0 && negligible(hi - 1) {
            hi -= 1;
        }
        if hi == 0 {
            return;
        }
        let mut lo = hi - 1;
        while lo > 0 && !negligible(lo - 1) {
            lo -= 1;
        }
        qr_step(d, e, vectors, n, lo, hi);
    }
}

/// One implicit QR step on rows `lo..=hi` of the tridiagonal matrix.
#[inline(always)]
fn qr_step(d: &mut [f64], e: &mut [f64], vectors: &mut [f64], n: usize, lo: usize, hi: usize) {
    let half = (d[hi - 1] - d[hi]) / 2.0;
    let last = e[hi - 1];
    let shift = d[hi] - last * last / (half + half.hypot(last).copysign(half));
    let (mut x, mut z) = (d[lo] - shift, e[lo]);
    for k in lo..hi {
        let r = x.hypot(z);
        let (c, s) = if r == 0.0 { (1.0, 0.0) } else { (x / r, z / r) };
        if k > lo {
            e[k - 1] = r;
        }
        let (a, b, t) = (d[k], e[k], d[k + 1]);
        d[k] = c * c * a + 2.0 * c * s * b + s * s * t;
        d[k + 1] = s * s * a - 2.0 * c * s * b + c * c * t;
        e[k] = c * s * (t - a) + (c - s) * (c + s) * b;
        if k + 1 < hi {
            z = s * e[k + 1];
            e[k + 1] *= c;
            x = e[k];
        }
        let (upper, lower) = vectors[k * n..(k + 2) * n].split_at_mut(n);
        for (p, q) in upper.iter_mut().zip(lower) {
            (*p, *q) = (c * *p + s * *q, c * *q - s * *p);
        }
    }
}

/// Four running sums, so that the compiler may use vector registers.
#[inline(always)]
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 4];
    let (a4, b4) = (a.chunks_exact(4), b.chunks_exact(4));
    let tail: f64 = a4
        .remainder()
        .iter()
        .zip(b4.remainder())
        .map(|(x, y)| x * y)
        .sum();
    for (x, y) in a4.zip(b4) {
        for lane in 0..4 {
            sums[lane] += x[lane] * y[lane];
        }
    }
    (sums[0] + sums[2]) + (sums[1] + sums[3]) + tail
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::random::Stream;

    fn check(a: Vec<f64>, n: usize) -> Vec<f64> {
        let (values, vectors) = symmetric_eigen(a.clone(), n);
        let scale = values.iter().fold(1e-300f64, |m, x| m.max(x.abs()));
        for i in 0..n {
            let v = &vectors[i * n..][..n];
            for j in 0..n {
                let image = dot(&a[j * n..][..n], v);
                assert!((image - values[i] * v[j]).abs() < 1e-13 * scale * n as f64);
                let expected = f64::from(u8::from(i == j));
                assert!((dot(v, &vectors[j * n..][..n]) - expected).abs() < 1e-13 * n as f64);
            }
        }
        assert!(values.windows(2).all(|w| w[0] >= w[1]));
        values
    }

    #[test]
    fn random_symmetric_matrices() {
        for n in [1, 2, 3, 4, 7, 30, 65] {
            let raw = Stream {
                seed: 5,
                domain: 98,
                index: n as u32,
            }
            .normals(n * n);
            let a = (0..n * n)
                .map(|at| raw[at] + raw[at % n * n + at / n])
                .collect();
            check(a, n);
        }
    }

    #[test]
    fn special_matrices() {
        assert_eq!(check(vec![0.0; 25], 5), [0.0; 5]);
        let identity: Vec<f64> = (0..36).map(|i| f64::from(u8::from(i % 7 == 0))).collect();
        assert_eq!(check(identity, 6), [1.0; 6]);
        assert!((check(vec![1.0; 64], 8)[0] - 8.0).abs() < 1e-13, "rank one");
        // The second-difference matrix has eigenvalues 2 − 2 cos(πk/(n+1)).
        let n = 12usize;
        let a = (0..n * n).map(|at| match (at / n).abs_diff(at % n) {
            0 => 2.0,
            1 => -1.0,
            _ => 0.0,
        });
        for (i, value) in check(a.collect(), n).iter().enumerate() {
            let angle = std::f64::consts::PI * (n - i) as f64 / (n + 1) as f64;
            assert!((value - (2.0 - 2.0 * angle.cos())).abs() < 1e-13);
        }
        let graded = check(
            (0..9)
                .map(|i| [1e8, 1.0, 1e-8][i / 3] * [1e8, 1.0, 1e-8][i % 3])
                .collect(),
            3,
        );
        assert!((graded[0] / 1e16 - 1.0).abs() < 1e-12);
        assert!(
            symmetric_eigen(vec![f64::NAN; 16], 4)
                .0
                .iter()
                .all(|x| x.is_nan())
        );
        assert!(symmetric_eigen(vec![], 0).0.is_empty());
    }
}
