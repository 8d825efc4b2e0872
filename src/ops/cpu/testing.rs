//! What the tests of the kernels share.

use super::isa::Isa;
use super::pack::PackedMatrix;

/// A size, or under Miri, which takes thousands of times as long, a smaller one that has the same cases.
pub(super) const fn size<T: Copy>(full: T, miri: T) -> T {
    if cfg!(miri) { miri } else { full }
}

/// Values of both signs between −1 and 1, the same on every run.
pub(super) fn noise(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 8_388_608.0 - 1.0
        })
        .collect()
}

/// Every element within `scale` millionths of 1 + |wanted|.
#[track_caller]
pub(super) fn assert_near(got: &[f32], want: &[f64], scale: f64) {
    assert_eq!(got.len(), want.len());
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        assert!(
            (f64::from(g) - w).abs() <= 1e-6 * scale * (1.0 + w.abs()),
            "element {i}: {g} instead of {w}"
        );
    }
}

/// Run `f` in a pool of its own.
pub(super) fn on_threads<T: Send>(threads: usize, f: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .expect("a thread pool")
        .install(f)
}

/// Products with `matrix` have the bits of those with the same numbers in f32, for any number of rows,
/// on every instruction set and any number of threads.
#[track_caller]
pub(super) fn assert_products(matrix: &PackedMatrix, wide: &[f32]) {
    let (n, k) = (matrix.out_features(), matrix.in_features());
    // Products of up to eight rows differ from those of more.
    let m = size(37, 9);
    let several: &[usize] = size(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 37], &[1, 5, 9]);
    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&matrix.unpack()), bits(wide));
    let (mut row, last) = (vec![0.0; k], n - 1);
    matrix.row(last, &mut row);
    assert_eq!(bits(&row), bits(&wide[last * k..]));
    let (x, g, bias) = (noise(m * k, 8), noise(m * n, 9), noise(n, 10));
    let reference = PackedMatrix::pack(wide, n, k);
    let (mut y, mut dx) = (vec![0.0; m * n], vec![0.0; m * k]);
    reference.forward(&x, m, Some(&bias), &mut y);
    reference.backward(&g, m, &mut dx, false);
    let mut turned = vec![0.0; m * k];
    matrix.transposed().forward(&g, m, None, &mut turned);
    assert_eq!(bits(&turned), bits(&dx), "by the transpose");
    for isa in Isa::available() {
        for &rows in several {
            let (mut part, mut dpart) = (vec![0.0; rows * n], vec![0.0; rows * k]);
            isa.with(|| {
                matrix.forward(&x[..rows * k], rows, Some(&bias), &mut part);
                matrix.backward(&g[..rows * n], rows, &mut dpart, false);
            });
            assert_eq!(part, y[..rows * n], "{isa:?}, {rows} rows");
            assert_eq!(dpart, dx[..rows * k], "{isa:?}, {rows} rows");
        }
    }
    for &threads in size(&[1, 2, 5][..], &[2]) {
        on_threads(threads, || {
            let (mut y2, mut dx2) = (vec![0.0; m * n], vec![0.0; m * k]);
            matrix.forward(&x, m, Some(&bias), &mut y2);
            matrix.backward(&g, m, &mut dx2, false);
            assert_eq!((y2, dx2), (y.clone(), dx.clone()), "{threads} threads");
        });
    }
}
