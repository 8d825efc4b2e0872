//! The decomposition against an exact one (one-sided Jacobi in f64).

use candle_core::{Device, Tensor};

use super::super::modules::ModuleKind;
use super::*;
use crate::ops::random::Stream;

const ID: ModuleId = ModuleId {
    layer: 0,
    kind: ModuleKind::Q,
};

/// Row-major f32 weights.
struct Dense {
    rows: Vec<f32>,
    shape: [usize; 2],
}

fn decompose(w: &Dense, rank: usize) -> Result<Svd> {
    truncated_svd(
        ID,
        &PackedMatrix::pack(&w.rows, w.shape[0], w.shape[1]),
        rank,
    )
}

fn noise(index: u32, n: usize) -> Vec<f64> {
    Stream {
        seed: 3,
        domain: 97,
        index,
    }
    .normals(n)
}

/// A random matrix plus strong directions of the given sizes.
fn matrix(out: usize, inner: usize, spikes: &[f64]) -> Dense {
    let mut w = noise(0, out * inner);
    for (k, spike) in spikes.iter().enumerate() {
        let u = noise(2 * k as u32 + 1, out);
        let v = noise(2 * k as u32 + 2, inner);
        let scale = spike / ((out * inner) as f64).sqrt();
        for (i, u) in u.iter().enumerate() {
            w[i * inner..][..inner]
                .iter_mut()
                .zip(&v)
                .for_each(|(w, v)| *w += scale * u * v);
        }
    }
    Dense {
        rows: w.into_iter().map(|x| x as f32 * 0.02).collect(),
        shape: [out, inner],
    }
}

/// Exact singular values and right vectors of Wᵀ's columns, by one-sided Jacobi rotations.
fn jacobi(w: &Dense) -> (Vec<f64>, Vec<Vec<f64>>) {
    let [out, inner] = w.shape;
    // Columns of W, rotated among themselves until orthogonal.
    let mut columns: Vec<Vec<f64>> = (0..inner)
        .map(|j| (0..out).map(|i| f64::from(w.rows[i * inner + j])).collect())
        .collect();
    let mut v: Vec<Vec<f64>> = (0..inner)
        .map(|j| (0..inner).map(|i| f64::from(u8::from(i == j))).collect())
        .collect();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    for _ in 0..30 {
        let mut largest = 0.0f64;
        for p in 0..inner {
            for q in p + 1..inner {
                let (a, b) = (dot(&columns[p], &columns[p]), dot(&columns[q], &columns[q]));
                let c = dot(&columns[p], &columns[q]);
                if c.abs() <= 1e-15 * (a * b).sqrt() {
                    continue;
                }
                largest = largest.max(c.abs() / (a * b).sqrt());
                let angle = 0.5 * (2.0 * c).atan2(a - b);
                let (sin, cos) = angle.sin_cos();
                for set in [&mut columns, &mut v] {
                    let (low, high) = set.split_at_mut(q);
                    for (x, y) in low[p].iter_mut().zip(&mut high[0]) {
                        (*x, *y) = (cos * *x + sin * *y, cos * *y - sin * *x);
                    }
                }
            }
        }
        if largest < 1e-14 {
            break;
        }
    }
    let values: Vec<f64> = columns.iter().map(|c| dot(c, c).sqrt()).collect();
    let mut order: Vec<usize> = (0..inner).collect();
    order.sort_by(|&i, &j| values[j].total_cmp(&values[i]));
    (
        order.iter().map(|&i| values[i]).collect(),
        order.iter().map(|&i| v[i].clone()).collect(),
    )
}

/// Sine of the largest angle between the rows of `vt` and the span of `exact`, from above.
fn subspace_sine(vt: &[f32], exact: &[Vec<f64>]) -> f64 {
    let n = exact[0].len();
    let mut worst = 0.0f64;
    for row in vt.chunks_exact(n) {
        let mut rest: Vec<f64> = row.iter().map(|&x| f64::from(x)).collect();
        for e in exact {
            let along: f64 = e.iter().zip(&rest).map(|(x, y)| x * y).sum();
            rest.iter_mut().zip(e).for_each(|(x, e)| *x -= along * e);
        }
        worst += rest.iter().map(|x| x * x).sum::<f64>();
    }
    worst.sqrt()
}

fn check_orthonormal(svd: &Svd) {
    let (m, n, r) = (svd.out_features(), svd.in_features(), svd.rank());
    for i in 0..r {
        for j in 0..r {
            let expected = f64::from(u8::from(i == j));
            let rows: f64 = (0..n)
                .map(|c| f64::from(svd.vt[i * n + c] * svd.vt[j * n + c]))
                .sum();
            let columns: f64 = (0..m)
                .map(|c| f64::from(svd.u[c * r + i] * svd.u[c * r + j]))
                .sum();
            assert!((rows - expected).abs() < 1e-4, "V {i} {j}: {rows}");
            assert!((columns - expected).abs() < 1e-4, "U {i} {j}: {columns}");
        }
    }
}

#[test]
fn agrees_with_an_exact_decomposition() {
    for (out, inner, spikes, rank) in [
        (120, 90, &[60.0, 50.0, 40.0][..], 2),
        (90, 120, &[60.0, 50.0], 2),
        (200, 100, &[25.0, 24.0, 23.0], 3),
        (150, 100, &[], 1),
        (30, 100, &[30.0], 2),
        (100, 100, &[80.0, 70.0, 60.0, 50.0, 40.0], 5),
    ] {
        let w = matrix(out, inner, spikes);
        let svd = decompose(&w, rank).unwrap();
        let (values, vectors) = jacobi(&w);
        for (i, (&actual, expected)) in svd.values().iter().zip(&values).enumerate() {
            let error = (f64::from(actual) / expected - 1.0).abs();
            assert!(
                error < 1e-5,
                "[{out}, {inner}] value {i}: relative error {error:e}"
            );
        }
        let gap = (values[rank - 1] - values[rank]) / values[0];
        let sine = subspace_sine(&svd.vt, &vectors[..rank]);
        assert!(gap > 0.01, "the case is meant to have a gap: {gap}");
        assert!(sine < 1e-3, "[{out}, {inner}]: gap {gap}, sine {sine:e}");
        check_orthonormal(&svd);
        for row in svd.vt.chunks_exact(inner) {
            assert!(largest_entry(row) > 0.0);
        }
        // W v = σ u ties the two sides and the signs together.
        let mut image = vec![0.0; rank * out];
        for (at, y) in image.iter_mut().enumerate() {
            let (row, v) = (
                &w.rows[at % out * inner..][..inner],
                &svd.vt[at / out * inner..],
            );
            *y = row.iter().zip(v).map(|(w, v)| w * v).sum();
        }
        for k in 0..rank {
            for i in 0..out {
                let expected = svd.s[k] * svd.u[i * rank + k];
                assert!((image[k * out + i] - expected).abs() < 1e-4 * svd.s[0]);
            }
        }
    }
}

#[test]
fn a_long_basis_is_restarted_and_large_ranks_work() {
    // No gap to speak of, and far more vectors than a block holds.
    let w = matrix(300, 260, &[]);
    let svd = decompose(&w, 40).unwrap();
    let (values, _) = jacobi(&w);
    for (&actual, expected) in svd.values().iter().zip(&values) {
        assert!(
            (f64::from(actual) / expected - 1.0).abs() < 1e-5,
            "{actual} {expected}"
        );
    }
    check_orthonormal(&svd);
    let whole = decompose(&matrix(40, 30, &[]), 30).unwrap();
    check_orthonormal(&whole);
}

#[test]
fn degenerate_matrices() {
    let zero = Dense {
        rows: vec![0.0; 120 * 100],
        shape: [120, 100],
    };
    let svd = decompose(&zero, 3).unwrap();
    assert_eq!(svd.values(), [0.0; 3]);
    check_orthonormal(&svd);
    assert!(svd.factors(Sigma::Output).1.iter().all(|&x| x == 0.0));

    let mut rank_one = zero;
    for i in 0..120 {
        for j in 0..100 {
            rank_one.rows[i * 100 + j] = (i + 1) as f32 * if j % 2 == 0 { 1.0 } else { -0.5 };
        }
    }
    let svd = decompose(&rank_one, 12).unwrap();
    assert!(svd.values()[0] > 1000.0 && svd.values()[1] < 0.01);
    check_orthonormal(&svd);

    let identity = Dense {
        rows: (0..100 * 100)
            .map(|at| f32::from(u8::from(at % 101 == 0)))
            .collect(),
        shape: [100, 100],
    };
    let svd = decompose(&identity, 20).unwrap();
    assert!(svd.values().iter().all(|s| (s - 1.0).abs() < 1e-5));
    check_orthonormal(&svd);

    let mut broken = matrix(80, 70, &[]);
    broken.rows[77] = f32::NAN;
    let error = decompose(&broken, 2).unwrap_err();
    assert_eq!(error.exit_code(), 3);
    assert!(
        error
            .to_string()
            .contains("model.layers.0.self_attn.q_proj.weight"),
        "{error}"
    );
    let error = decompose(&identity, 101).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("adapter.r = 101"), "{error}");
}

#[test]
fn many_matrices_in_order_and_the_same_bits_for_any_number_of_threads() {
    let matrices: Vec<Matrix> = (0..7)
        .map(|i| {
            let w = matrix(70 + i, 90, &[30.0 + i as f64, 20.0]);
            if i == 3 {
                let tensor = Tensor::from_vec(w.rows, (73, 90), &Device::Cpu).unwrap();
                return Matrix::Dense(tensor);
            }
            Matrix::Packed(PackedMatrix::pack(&w.rows, w.shape[0], w.shape[1]))
        })
        .collect();
    let maps: Vec<(ModuleId, &Matrix)> = ModuleId::all(1).zip(&matrices).collect();
    let seen = Mutex::new(Vec::new());
    let all = decompose_all(&maps, 2, &|done, total| {
        seen.lock().unwrap().push((done, total))
    });
    let all = all.unwrap();
    assert_eq!(
        seen.into_inner().unwrap(),
        (1..=7).map(|i| (i, 7)).collect::<Vec<_>>()
    );
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        for ((id, w), expected) in maps.iter().zip(&all) {
            let w = PackedMatrix::pack(&w.to_f32().unwrap(), expected.out_features(), 90);
            assert_eq!(
                &pool.install(|| truncated_svd(*id, &w, 2)).unwrap(),
                expected
            );
        }
    }
    assert!(decompose_all(&[], 2, &|_, _| ()).unwrap().is_empty());
    assert!(decompose_all(&maps, 80, &|_, _| ()).is_err());
}
