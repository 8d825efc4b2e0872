//! The damped Fisher matrix as a metric on few parameters.

use crate::ops::cpu::symmetric_eigen;

/// F̃ = F + λ·m·I, m the mean of F's diagonal, by its eigenvectors.
///
/// The damping is the same for all parameters, not relative to the diagonal entry of each: a parameter
/// with little effect has a small entry there, and would go furthest on noise alone.
///
/// Directions in which F̃ is singular, which only an undamped one is, are left out of every solution.
#[derive(Debug)]
pub struct Metric {
    p: usize,
    /// Descending.
    values: Vec<f64>,
    /// Rows.
    vectors: Vec<f64>,
}

/// Eigenvalues below this share of the largest hold little but the rounding of the scores.
const SINGULAR: f64 = 1e-10;

impl Metric {
    /// Of F `[p, p]` with damping λ.
    pub fn new(fisher: &[f64], p: usize, damping: f64) -> Self {
        let diagonal = |i: usize| i * p + i;
        let mean = (0..p).map(|i| fisher[diagonal(i)]).sum::<f64>() / p as f64;
        let mut matrix = fisher.to_vec();
        (0..p).for_each(|i| matrix[diagonal(i)] += damping * mean);
        let (values, vectors) = symmetric_eigen(matrix, p);
        Self { p, values, vectors }
    }

    /// Eigenvalues that count, with their vectors.
    fn pairs(&self) -> impl Iterator<Item = (f64, &[f64])> {
        let floor = self.values.first().copied().unwrap_or(0.0) * SINGULAR;
        self.values
            .iter()
            .copied()
            .zip(self.vectors.chunks_exact(self.p))
            .filter(move |(value, _)| *value > floor)
    }

    /// F̃⁻¹ x.
    pub fn solve(&self, x: &[f64]) -> Vec<f64> {
        let mut solution = vec![0.0; self.p];
        for (value, vector) in self.pairs() {
            let share = dot(vector, x) / value;
            let cells = solution.iter_mut().zip(vector);
            cells.for_each(|(out, v)| *out += share * v);
        }
        solution
    }

    /// Trace of F̃⁻¹ M, M `[p, p]`.
    pub fn trace(&self, m: &[f64]) -> f64 {
        let mut sum = 0.0;
        for (value, vector) in self.pairs() {
            let rows = m.chunks_exact(self.p).zip(vector);
            sum += rows.map(|(row, v)| v * dot(row, vector)).sum::<f64>() / value;
        }
        sum
    }

    /// Largest over smallest eigenvalue of F̃.
    pub fn condition_number(&self) -> f64 {
        let mut pairs = self.pairs();
        let largest = pairs.next().map_or(1.0, |(value, _)| value);
        largest / pairs.last().map_or(largest, |(value, _)| value)
    }
}

/// The inner product.
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_solves_the_dense_system() {
        let fisher = [2.0, 0.7, -0.03, 0.7, 1.0, 0.02, -0.03, 0.02, 0.005];
        let x = [1.0, -2.0, 0.5];
        let metric = Metric::new(&fisher, 3, 0.25);
        let solution = metric.solve(&x);
        for i in 0..3 {
            let mut back = dot(&fisher[i * 3..][..3], &solution);
            back += 0.25 * (3.005 / 3.0) * solution[i];
            assert!((back - x[i]).abs() < 1e-9 * x[i].abs(), "{back} {}", x[i]);
        }
        // tr F̃⁻¹ (x xᵀ) = xᵀ F̃⁻¹ x.
        let outer: Vec<f64> = (0..9).map(|k| x[k / 3] * x[k % 3]).collect();
        let (trace, norm) = (metric.trace(&outer), dot(&x, &solution));
        assert!((trace - norm).abs() < 1e-9 * norm, "{trace} {norm}");
        assert!(metric.condition_number() > 1.0);
    }

    #[test]
    fn what_is_singular_is_left_out() {
        // A parameter twice, and one without effect.
        let fisher = [1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0];
        let solution = Metric::new(&fisher, 3, 0.0).solve(&[2.0, 2.0, 5.0]);
        assert!((solution[0] - 1.0).abs() < 1e-9 && (solution[1] - 1.0).abs() < 1e-9);
        assert_eq!(solution[2], 0.0);
        assert_eq!(Metric::new(&[0.0], 1, 0.1).solve(&[1.0]), [0.0]);
    }
}
