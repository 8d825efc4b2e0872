//! What the tests of the kernels share.

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
