//! The two halves of a low-rank side path: into a few dimensions and out again.

use super::buffer::{Shared, with_scratch};
use super::isa::{Isa, dispatch};
use super::par;
use super::simd::{LANES, Simd};

/// `out = x · aᵀ`: x `[T, k]`, a `[r, k]`, out `[T, r]`.
///
/// # Panics
/// When a slice has the wrong length.
pub fn low_rank_down(x: &[f32], a: &[f32], r: usize, out: &mut [f32]) {
    let isa = Isa::current();
    let k = a.len() / r;
    let rows = out.len() / r;
    assert!(a.len() == r * k && out.len() == rows * r && x.len() == rows * k);
    let out = Shared::new(out);
    par::run_rows(rows, 2 * r * k, |rows| {
        // SAFETY: tasks own different rows.
        let out = unsafe { out.range(rows.start * r..rows.end * r) };
        down_rows(isa, &x[rows.start * k..rows.end * k], a, r, out);
    });
}

/// `y += z · bᵀ`: z `[T, r]`, b `[n, r]`, y `[T, n]`.
///
/// # Panics
/// When a slice has the wrong length.
pub fn low_rank_up(z: &[f32], b: &[f32], r: usize, y: &mut [f32]) {
    let isa = Isa::current();
    let n = b.len() / r;
    let rows = z.len() / r;
    assert!(b.len() == r * n && z.len() == rows * r && y.len() == rows * n);
    with_scratch(r * n, |columns| {
        for (i, column) in columns.chunks_exact_mut(n).enumerate() {
            for (slot, b) in column.iter_mut().zip(b[i..].iter().step_by(r)) {
                *slot = *b;
            }
        }
        let (y, columns) = (Shared::new(y), &*columns);
        par::run_rows(rows, 2 * r * n, |rows| {
            // SAFETY: tasks own different rows.
            let y = unsafe { y.range(rows.start * n..rows.end * n) };
            up_rows(isa, &z[rows.start * r..rows.end * r], columns, r, y);
        });
    });
}

/// Products of M rows with N directions, each in sixteen lanes by index; short rows in order.
#[inline(always)]
fn dots<S: Simd, const M: usize, const N: usize>(
    s: S,
    x: &[f32],
    a: &[f32],
    k: usize,
) -> [[f32; N]; M] {
    let mut out = [[0.0; N]; M];
    if k < LANES {
        for i in 0..M {
            for j in 0..N {
                for p in 0..k {
                    out[i][j] = x[i * k + p].mul_add(a[j * k + p], out[i][j]);
                }
            }
        }
        return out;
    }
    let whole = k / LANES * LANES;
    let mut sums = [[s.zero(); N]; M];
    assert!(x.len() >= M * k && a.len() >= N * k);
    for p in (0..whole).step_by(LANES) {
        let mut directions = [s.zero(); N];
        for j in 0..N {
            // SAFETY: j·k + p + 16 ≤ N·k ≤ a.len().
            directions[j] = unsafe { s.load_ptr(a.as_ptr().add(j * k + p)) };
        }
        for i in 0..M {
            // SAFETY: i·k + p + 16 ≤ M·k ≤ x.len().
            let x = unsafe { s.load_ptr(x.as_ptr().add(i * k + p)) };
            for j in 0..N {
                sums[i][j] = s.fma(x, directions[j], sums[i][j]);
            }
        }
    }
    for i in 0..M {
        for j in 0..N {
            if whole < k {
                let x = s.load_part(&x[i * k + whole..(i + 1) * k], 0.0);
                let a = s.load_part(&a[j * k + whole..(j + 1) * k], 0.0);
                sums[i][j] = s.fma(x, a, sums[i][j]);
            }
            out[i][j] = s.sum(sums[i][j]);
        }
    }
    out
}

#[inline(always)]
fn down_tile<S: Simd, const M: usize>(s: S, x: &[f32], a: &[f32], r: usize, out: &mut [f32]) {
    let k = a.len() / r;
    let mut j = 0;
    while j < r {
        let from = &a[j * k..];
        if j + 2 <= r {
            let sums = dots::<S, M, 2>(s, x, from, k);
            for i in 0..M {
                out[i * r + j] = sums[i][0];
                out[i * r + j + 1] = sums[i][1];
            }
            j += 2;
        } else {
            let sums = dots::<S, M, 1>(s, x, from, k);
            for i in 0..M {
                out[i * r + j] = sums[i][0];
            }
            j += 1;
        }
    }
}

#[inline(always)]
fn down_generic<S: Simd>(s: S, x: &[f32], a: &[f32], r: usize, out: &mut [f32]) {
    let k = a.len() / r;
    let rows = out.len() / r;
    let mut i = 0;
    while i < rows {
        let (x, out) = (&x[i * k..], &mut out[i * r..]);
        if i + 4 <= rows {
            down_tile::<S, 4>(s, x, a, r, out);
            i += 4;
        } else {
            down_tile::<S, 1>(s, x, a, r, out);
            i += 1;
        }
    }
}

/// Add M rows; `columns` holds b transposed, `[r, n]`.
#[inline(always)]
fn up_tile<S: Simd, const M: usize>(s: S, z: &[f32], columns: &[f32], r: usize, y: &mut [f32]) {
    let n = columns.len() / r;
    for p in (0..n).step_by(LANES) {
        let width = LANES.min(n - p);
        let mut sums = [s.zero(); M];
        for j in 0..r {
            let column = &columns[j * n + p..][..width];
            let column = match column.first_chunk::<LANES>() {
                Some(column) => s.load(column),
                None => s.load_part(column, 0.0),
            };
            for i in 0..M {
                sums[i] = s.fma(s.splat(z[i * r + j]), column, sums[i]);
            }
        }
        for i in 0..M {
            let y = &mut y[i * n + p..][..width];
            match y.first_chunk_mut::<LANES>() {
                Some(y) => s.store(y, s.add(s.load(y), sums[i])),
                None => s.store_part(y, s.add(s.load_part(y, 0.0), sums[i])),
            }
        }
    }
}

#[inline(always)]
fn up_generic<S: Simd>(s: S, z: &[f32], columns: &[f32], r: usize, y: &mut [f32]) {
    let n = columns.len() / r;
    let rows = z.len() / r;
    let mut i = 0;
    while i < rows {
        let (z, y) = (&z[i * r..], &mut y[i * n..]);
        if i + 4 <= rows {
            up_tile::<S, 4>(s, z, columns, r, y);
            i += 4;
        } else {
            up_tile::<S, 1>(s, z, columns, r, y);
            i += 1;
        }
    }
}

dispatch! { fn down_rows(x: &[f32], a: &[f32], r: usize, out: &mut [f32]) = down_generic }
dispatch! { fn up_rows(z: &[f32], columns: &[f32], r: usize, y: &mut [f32]) = up_generic }

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_near, noise, on_threads, size};
    use super::*;

    #[test]
    fn matches_f64_with_the_same_bits_everywhere() {
        for &(t, n, r) in size(
            &[
                (1, 1, 1),
                (7, 33, 2),
                (9, 20, 3),
                (130, 576, 2),
                (66, 100, 64),
            ][..],
            &[(1, 1, 1), (7, 33, 2), (9, 20, 3)],
        ) {
            let (x, a) = (noise(t * n, 1), noise(r * n, 2));
            let (z, b, y) = (noise(t * r, 3), noise(n * r, 4), noise(t * n, 5));
            let run = |rows: usize| {
                let mut down = vec![f32::NAN; rows * r];
                low_rank_down(&x[..rows * n], &a, r, &mut down);
                let mut up = y[..rows * n].to_vec();
                low_rank_up(&z[..rows * r], &b, r, &mut up);
                (down, up)
            };
            let mut want_down = vec![0.0; t * r];
            let mut want_up: Vec<f64> = y.iter().map(|&y| f64::from(y)).collect();
            for i in 0..t {
                for j in 0..r {
                    for p in 0..n {
                        want_down[i * r + j] += f64::from(x[i * n + p]) * f64::from(a[j * n + p]);
                        want_up[i * n + p] += f64::from(z[i * r + j]) * f64::from(b[p * r + j]);
                    }
                }
            }
            let (down, up) = run(t);
            assert_near(&down, &want_down, 10.0);
            assert_near(&up, &want_up, 10.0);
            for isa in Isa::available() {
                assert_eq!(isa.with(|| run(t)), (down.clone(), up.clone()));
                assert_eq!(isa.with(|| run(1)), (down[..r].to_vec(), up[..n].to_vec()));
            }
            assert_eq!(on_threads(3, || run(t)), (down, up));
        }
    }
}
