//! One metric over the steps of a run, in bounded memory.

/// Points kept; twice as many are read before neighbours are put together.
const MAX_POINTS: usize = 2048;

/// What is known of a metric.
#[derive(Debug, Clone, Default)]
pub struct Series {
    /// (step, value), each the mean of `stride` rows of the log.
    points: Vec<(f64, f64)>,
    stride: usize,
    /// Sums of the point being put together, and their number.
    pending: (f64, f64, usize),
    pub count: usize,
    pub first: f64,
    pub last: f64,
    pub min: f64,
    pub max: f64,
    pub sum: f64,
}

impl Series {
    /// Adds a row of the log. `value` is finite.
    pub fn push(&mut self, step: u64, value: f64) {
        if self.count == 0 {
            self.stride = 1;
            (self.first, self.min, self.max) = (value, value, value);
        }
        self.count += 1;
        self.last = value;
        self.min = self.min.min(value);
        self.max = self.max.max(value);
        self.sum += value;
        self.pending.0 += step as f64;
        self.pending.1 += value;
        self.pending.2 += 1;
        if self.pending.2 < self.stride {
            return;
        }
        self.points.extend(self.pending_point());
        self.pending = (0.0, 0.0, 0);
        if self.points.len() >= 2 * MAX_POINTS {
            self.points = thinned(&self.points, 2);
            self.stride *= 2;
        }
    }

    fn pending_point(&self) -> Option<(f64, f64)> {
        let (step, value, n) = self.pending;
        (n > 0).then(|| (step / n as f64, value / n as f64))
    }

    /// At most `limit` points, each the mean of neighbouring ones.
    pub fn points(&self, limit: usize) -> Vec<(f64, f64)> {
        let mut points = self.points.clone();
        points.extend(self.pending_point());
        match points.len().div_ceil(limit.max(1)) {
            0 | 1 => points,
            factor => thinned(&points, factor),
        }
    }

    /// Whether every value was the same.
    pub fn is_constant(&self) -> bool {
        self.min == self.max
    }
}

/// Means of `factor` neighbours.
fn thinned(points: &[(f64, f64)], factor: usize) -> Vec<(f64, f64)> {
    let mean = |chunk: &[(f64, f64)], of: fn(&(f64, f64)) -> f64| {
        chunk.iter().map(of).sum::<f64>() / chunk.len() as f64
    };
    let chunks = points.chunks(factor);
    chunks
        .map(|chunk| (mean(chunk, |p| p.0), mean(chunk, |p| p.1)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_series_is_kept_as_it_is() {
        let mut series = Series::default();
        for step in 1..=5 {
            series.push(step, step as f64 * 2.0);
        }
        let points = series.points(1000);
        assert_eq!(points[0], (1.0, 2.0));
        assert_eq!(points[4], (5.0, 10.0));
        assert_eq!(
            (series.first, series.last, series.min, series.max),
            (2.0, 10.0, 2.0, 10.0)
        );
        assert_eq!(series.points(2), [(2.0, 4.0), (4.5, 9.0)]);
        assert!(!series.is_constant());
    }

    #[test]
    fn a_long_series_takes_bounded_memory_and_keeps_its_mean() {
        let mut series = Series::default();
        let n = 1_000_003u64;
        for step in 0..n {
            series.push(step, step as f64);
        }
        assert!(series.points.len() < 2 * MAX_POINTS);
        let points = series.points(500);
        assert!(points.len() <= 500, "{}", points.len());
        assert!(points.iter().all(|(x, y)| (x - y).abs() < 1e-6));
        assert_eq!(series.count as u64, n);
        assert!(points[points.len() - 1].0 > 0.99 * n as f64);
    }
}
