//! The damped Fisher matrix as a metric on few parameters.

use crate::ops::cpu::symmetric_eigen;

/// F̃ = F + λ·diag(F), by the eigenvectors of D^−½ F̃ D^−½, D the diagonal of F.
///
/// A parameter without any effect (a zero on the diagonal) is left out: its share of every solution is
/// 0. So are directions in which F̃ is singular, which only an undamped one is.
#[derive(Debug)]
pub struct Metric {
    p: usize,
    /// 1/√D, 0 where D is.
    scale: Vec<f64>,
    /// Descending.
    values: Vec<f64>,
    /// Rows.
    vectors: Vec<f64>,
}

/// Eigenvalues below this share of the largest hold little but the rounding of f32.
const SINGULAR: f64 = 1e-6;

impl Metric {
    /// Of F `[p, p]` with relative damping λ.
    pub fn new(fisher: &[f64], p: usize, damping: f64) -> Self {
        let scale: Vec<f64> = (0..p)
            .map(|i| match fisher[i * p + i] {
                x if x > 0.0 => 1.0 / x.sqrt(),
                _ => 0.0,
            })
            .collect();
        let mut matrix = vec![0.0; p * p];
        for i in 0..p {
            for j in 0..p {
                matrix[i * p + j] = fisher[i * p + j] * scale[i] * scale[j];
            }
            matrix[i * p + i] = if scale[i] > 0.0 { 1.0 + damping } else { 0.0 };
        }
        let (values, vectors) = symmetric_eigen(matrix, p);
        Self {
            p,
            scale,
            values,
            vectors,
        }
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
        let scaled: Vec<f64> = x.iter().zip(&self.scale).map(|(x, s)| x * s).collect();
        let mut solution = vec![0.0; self.p];
        for (value, vector) in self.pairs() {
            let share = dot(vector, &scaled) / value;
            for ((out, v), s) in solution.iter_mut().zip(vector).zip(&self.scale) {
                *out += share * v * s;
            }
        }
        solution
    }

    /// Trace of F̃⁻¹ M, M `[p, p]`.
    pub fn trace(&self, m: &[f64]) -> f64 {
        let mut sum = 0.0;
        for (value, vector) in self.pairs() {
            for i in 0..self.p {
                let row = &m[i * self.p..][..self.p];
                let scaled = row.iter().zip(&self.scale).map(|(m, s)| m * s);
                let inner: f64 = scaled.zip(vector).map(|(m, v)| m * v).sum();
                sum += vector[i] * self.scale[i] * inner / value;
            }
        }
        sum
    }

    /// Largest over smallest eigenvalue of F̃ with its diagonal scaled to 1 + λ.
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

    /// A F̃ that is not diagonal, with wildly different units.
    fn fisher() -> Vec<f64> {
        let units = [1.0, 1e-4, 300.0];
        let rows = [[2.0, 0.7, -0.3], [0.7, 1.0, 0.2], [-0.3, 0.2, 0.5]];
        (0..9)
            .map(|k| rows[k / 3][k % 3] * units[k / 3] * units[k % 3])
            .collect()
    }

    #[test]
    fn it_solves_the_dense_system() {
        let (fisher, x) = (fisher(), [1.0, -2.0e-4, 50.0]);
        let metric = Metric::new(&fisher, 3, 0.25);
        let solution = metric.solve(&x);
        for i in 0..3 {
            let mut back = dot(&fisher[i * 3..][..3], &solution);
            back += 0.25 * fisher[i * 3 + i] * solution[i];
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
