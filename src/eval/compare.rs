//! Base model and adapter on the same problems.

use super::runner::EvalResult;
use super::set::EvalSet;
use super::stats::{mcnemar_exact, paired_difference};

/// One metric of two models over the same problems.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// `metric,filter`.
    pub name: String,
    pub base: f64,
    pub adapter: f64,
    /// Mean of adapter − base over problems, and its paired standard error.
    pub difference: f64,
    pub stderr: Option<f64>,
    /// With one completion a problem: problems that only the base (only the adapter) solves, and
    /// the exact McNemar test of them.
    pub mcnemar: Option<McNemar>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct McNemar {
    pub only_base: usize,
    pub only_adapter: usize,
    pub p_value: f64,
}

/// Compares two evaluations of one task, metric by metric.
pub fn compare(set: &EvalSet, base: &EvalResult, adapter: &EvalResult) -> Vec<Comparison> {
    let single = |result: &EvalResult| result.samples.iter().all(|s| s.len() == 1);
    set.metrics
        .iter()
        .enumerate()
        .map(|(index, metric)| {
            let (before, after) = (base.problem_scores(index), adapter.problem_scores(index));
            let (difference, stderr) = paired_difference(&before, &after);
            let mcnemar = (single(base) && single(adapter)).then(|| {
                let count = |won: fn(f64, f64) -> bool| {
                    let pairs = before.iter().zip(&after);
                    pairs.filter(|(b, a)| won(**b, **a)).count()
                };
                let only_base = count(|b, a| b > a);
                let only_adapter = count(|b, a| a > b);
                McNemar {
                    only_base,
                    only_adapter,
                    p_value: mcnemar_exact(only_base, only_adapter),
                }
            });
            let mean = |scores: &[f64]| scores.iter().sum::<f64>() / scores.len().max(1) as f64;
            Comparison {
                name: metric.key(),
                base: mean(&before),
                adapter: mean(&after),
                difference,
                stderr,
                mcnemar,
            }
        })
        .collect()
}
