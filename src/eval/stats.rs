//! The statistics of evaluation: means with standard errors, pass@k, paired comparison.

/// Mean of one value a problem, and its standard error `s/√n` with `s²` over `n − 1`.
///
/// With a 0/1 score of one completion a problem this is √(p(1−p)/(n−1)); with the mean over
/// several completions of each problem it is the standard error clustered by problem. `None` for
/// fewer than two problems.
pub fn mean_and_stderr(values: &[f64]) -> (f64, Option<f64>) {
    let n = values.len();
    if n == 0 {
        return (0.0, None);
    }
    let mean = values.iter().sum::<f64>() / n as f64;
    if n < 2 {
        return (mean, None);
    }
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    let n = n as f64;
    (mean, Some((squares / (n * (n - 1.0))).sqrt()))
}

/// Probability that at least one of `k` completions drawn without replacement from `n`, of which
/// `correct` are right, is right: 1 − C(n−c, k)/C(n, k), the unbiased estimate of pass@k
/// (Chen et al. 2021).
///
/// Expects `correct ≤ n` and `1 ≤ k ≤ n`.
pub fn pass_at_k(n: usize, correct: usize, k: usize) -> f64 {
    debug_assert!(correct <= n && (1..=n).contains(&k));
    if n - correct < k {
        return 1.0;
    }
    let none: f64 = (n - correct + 1..=n)
        .map(|i| 1.0 - k as f64 / i as f64)
        .product();
    1.0 - none
}

/// The numbers of completions for which pass@k is reported: powers of two below `n`, and `n`.
pub fn pass_ks(n: usize) -> Vec<usize> {
    let mut ks: Vec<usize> = std::iter::successors(Some(1usize), |k| k.checked_mul(2))
        .take_while(|&k| k < n)
        .collect();
    ks.push(n);
    ks
}

/// Exact two-sided McNemar test: the probability, were both models equally good, of a split at
/// least as uneven as this among the problems that only one of them solves.
pub fn mcnemar_exact(only_first: usize, only_second: usize) -> f64 {
    let n = only_first + only_second;
    let smaller = only_first.min(only_second);
    if 2 * smaller == n {
        return 1.0;
    }
    // Σ C(n, i) 2⁻ⁿ over i ≤ smaller, in logarithms since 2⁻ⁿ underflows past n = 1074.
    let mut log_term = -(n as f64) * std::f64::consts::LN_2;
    let mut tail = log_term.exp();
    for i in 0..smaller {
        log_term += ((n - i) as f64).ln() - ((i + 1) as f64).ln();
        tail += log_term.exp();
    }
    (2.0 * tail).min(1.0)
}

/// Mean of `second − first` over the same problems, and its standard error. Pairing takes the
/// problems' own difficulty out of the error.
///
/// Expects slices of equal length.
pub fn paired_difference(first: &[f64], second: &[f64]) -> (f64, Option<f64>) {
    debug_assert_eq!(first.len(), second.len());
    let differences: Vec<f64> = first.iter().zip(second).map(|(a, b)| b - a).collect();
    mean_and_stderr(&differences)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn standard_error_of_zero_one_scores_is_lm_evals() {
        let scores: Vec<f64> = (0..1319).map(|i| f64::from(u8::from(i % 3 == 0))).collect();
        let (p, stderr) = mean_and_stderr(&scores);
        assert!((p - 440.0 / 1319.0).abs() < 1e-12);
        assert!((stderr.unwrap() - (p * (1.0 - p) / 1318.0).sqrt()).abs() < 1e-12);
        assert_eq!(mean_and_stderr(&[1.0]), (1.0, None));
        assert_eq!(mean_and_stderr(&[]), (0.0, None));
    }

    #[test]
    fn clustering_ignores_completions_that_only_repeat() {
        // Ten identical completions a problem say no more than one.
        let once = [0.0, 1.0, 1.0, 0.0, 1.0];
        let (_, stderr) = mean_and_stderr(&once);
        let means: Vec<f64> = once
            .iter()
            .map(|v| (0..10).map(|_| v).sum::<f64>() / 10.0)
            .collect();
        assert_eq!(mean_and_stderr(&means).1, stderr);
    }

    #[test]
    fn pass_at_k_is_the_share_of_subsets() {
        // Every k-subset of n completions counted.
        for n in 1..=8usize {
            for correct in 0..=n {
                for k in 1..=n {
                    let subsets = (0u32..1 << n).filter(|s| s.count_ones() as usize == k);
                    let (mut all, mut hit) = (0, 0);
                    for subset in subsets {
                        all += 1;
                        hit += usize::from(subset & ((1u32 << correct) - 1) != 0);
                    }
                    let expected = hit as f64 / all as f64;
                    assert!((pass_at_k(n, correct, k) - expected).abs() < 1e-12);
                }
            }
        }
        assert_eq!(pass_ks(1), [1]);
        assert_eq!(pass_ks(8), [1, 2, 4, 8]);
        assert_eq!(pass_ks(10), [1, 2, 4, 8, 10]);
    }

    #[test]
    fn mcnemar_agrees_with_known_values() {
        // Computed with exact fractions.
        for (b, c, p) in [
            (0, 0, 1.0),
            (5, 5, 1.0),
            (0, 5, 0.0625),
            (3, 10, 0.092285156250),
            (10, 25, 0.016673847800),
            (600, 700, 0.006015793861),
        ] {
            let got = mcnemar_exact(b, c);
            assert!((got - p).abs() < 1e-9, "{b} {c}: {got} {p}");
        }
        // Far past the smallest double: no NaN, no zero by underflow of 2⁻ⁿ alone.
        let p = mcnemar_exact(4900, 5100);
        assert!((p - 0.046585527705).abs() < 1e-9, "{p}");
    }

    proptest! {
        #[test]
        fn probabilities_stay_probabilities(b in 0usize..4000, c in 0usize..4000) {
            let p = mcnemar_exact(b, c);
            prop_assert!((0.0..=1.0).contains(&p));
            prop_assert_eq!(p, mcnemar_exact(c, b));
        }

        #[test]
        fn pass_at_k_grows_with_k(n in 1usize..200, part in 0.0f64..=1.0) {
            let correct = (part * n as f64) as usize;
            let values: Vec<f64> = (1..=n).map(|k| pass_at_k(n, correct, k)).collect();
            prop_assert!((values[0] - correct as f64 / n as f64).abs() < 1e-9);
            prop_assert!(values.windows(2).all(|w| w[1] >= w[0] - 1e-12));
        }
    }
}
