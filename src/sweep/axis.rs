//! Axes of a figure: where a value lies, and which values are worth a tick.

/// A grid line, at a place in the drawing.
#[derive(Debug, Clone, PartialEq)]
pub struct Tick {
    pub at: f64,
    /// Minor ticks have none.
    pub label: Option<String>,
}

/// Logarithmic axis of numbers above 0.
#[derive(Debug, Clone, Copy)]
pub struct Log {
    /// Decimal logarithms.
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Log {
    /// An axis between two places of the drawing that shows all `values` with some room.
    pub fn around(values: impl Iterator<Item = f64>, from: f64, to: f64) -> Self {
        let logs = values.filter(|v| *v > 0.0).map(f64::log10);
        let (low, high) = span(logs).unwrap_or((0.0, 1.0));
        let room = (0.04 * (high - low)).max(0.08);
        Self {
            low: low - room,
            high: high + room,
            from,
            to,
        }
    }

    pub fn place(&self, value: f64) -> f64 {
        self.place_log(value.log10())
    }

    fn place_log(&self, log: f64) -> f64 {
        self.from + (log - self.low) / (self.high - self.low) * (self.to - self.from)
    }

    /// Powers of ten; with few of them also their multiples.
    pub fn ticks(&self) -> Vec<Tick> {
        let decades = self.high - self.low;
        let labelled: &[u32] = match decades {
            d if d < 1.2 => &[1, 2, 3, 4, 5, 6, 8],
            d if d < 3.0 => &[1, 2, 5],
            _ => &[1],
        };
        let mut ticks = Vec::new();
        for exponent in self.low.floor() as i32..=self.high.floor() as i32 {
            for digit in 1..10 {
                let value = f64::from(digit) * 10f64.powi(exponent);
                let log = value.log10();
                if log < self.low || log > self.high {
                    continue;
                }
                let label = labelled.contains(&digit).then(|| count(value));
                // Without a label only where lines do not become a wall.
                if label.is_some() || decades < 3.0 {
                    let at = self.place_log(log);
                    ticks.push(Tick { at, label });
                }
            }
        }
        ticks
    }
}

/// Linear axis of shares, labelled in per cent.
#[derive(Debug, Clone, Copy)]
pub struct Share {
    low: f64,
    step: f64,
    steps: u32,
    from: f64,
    to: f64,
}

impl Share {
    /// An axis between two places of the drawing, of whole steps around all `values`.
    pub fn around(values: impl Iterator<Item = f64>, from: f64, to: f64) -> Self {
        let (low, high) = span(values).unwrap_or((0.0, 1.0));
        // Small differences are not blown up to the height of the figure.
        let room = ((0.1 - (high - low)) / 2.0).max(0.0);
        let low = (low - room).clamp(0.0, 0.9);
        let high = (high + room).clamp(low + 0.1, 1.0);
        let wanted = (high - low) / 7.0;
        let steps = [0.02, 0.05, 0.1, 0.2];
        let step = steps.into_iter().find(|s| *s >= wanted).unwrap_or(0.2);
        // A hair of slack, so that 0.3 is not above 3 × 0.1.
        let first = (low / step + 1e-9).floor();
        let last = (high / step - 1e-9).ceil().max(first + 1.0);
        Self {
            low: first * step,
            step,
            steps: (last - first) as u32,
            from,
            to,
        }
    }

    /// Values outside, as error bars beyond 0 or 1 are, lie on the edge.
    pub fn place(&self, value: f64) -> f64 {
        let range = self.step * f64::from(self.steps);
        let share = ((value - self.low) / range).clamp(0.0, 1.0);
        self.from + share * (self.to - self.from)
    }

    pub fn ticks(&self) -> Vec<Tick> {
        let tick = |i: u32| {
            let value = self.low + self.step * f64::from(i);
            Tick {
                at: self.place(value),
                label: Some(format!("{:.0} %", 100.0 * value)),
            }
        };
        (0..=self.steps).map(tick).collect()
    }
}

/// Smallest and largest finite value.
fn span(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let finite = values.filter(|v| v.is_finite());
    finite.fold(None, |span, v| match span {
        None => Some((v, v)),
        Some((low, high)) => Some((f64::min(low, v), f64::max(high, v))),
    })
}

/// `1`, `200`, `10k`, `1M`.
fn count(value: f64) -> String {
    match value {
        v if v >= 1e9 => format!("{:.0}G", v / 1e9),
        v if v >= 1e6 => format!("{:.0}M", v / 1e6),
        v if v >= 1e3 => format!("{:.0}k", v / 1e3),
        v => format!("{v:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(ticks: Vec<Tick>) -> Vec<String> {
        ticks.into_iter().filter_map(|t| t.label).collect()
    }

    #[test]
    fn a_wide_range_has_the_powers_of_ten() {
        let axis = Log::around([1.0, 13.0, 749_824.0].into_iter(), 0.0, 100.0);
        assert_eq!(
            labels(axis.ticks()),
            ["1", "10", "100", "1k", "10k", "100k", "1M"]
        );
        assert!(axis.place(1.0) > 2.0 && axis.place(749_824.0) < 98.0);
    }

    #[test]
    fn a_narrow_range_has_more() {
        let axis = Log::around([7.0, 49.0].into_iter(), 0.0, 100.0);
        assert_eq!(
            labels(axis.ticks()),
            ["6", "8", "10", "20", "30", "40", "50"]
        );
        let axis = Log::around([13.0].into_iter(), 0.0, 100.0);
        assert!((axis.place(13.0) - 50.0).abs() < 1e-9);
    }

    #[test]
    fn shares_are_whole_steps_within_zero_and_one() {
        let axis = Share::around([0.383, 0.962].into_iter(), 0.0, 100.0);
        let expected = [
            "30 %", "40 %", "50 %", "60 %", "70 %", "80 %", "90 %", "100 %",
        ];
        assert_eq!(labels(axis.ticks()), expected);
        let axis = Share::around([-0.01, 0.3].into_iter(), 0.0, 100.0);
        assert_eq!(labels(axis.ticks()).first().unwrap(), "0 %");
        assert_eq!(labels(axis.ticks()).last().unwrap(), "30 %");
        assert_eq!(axis.place(-0.01), 0.0);
        let flat = Share::around([1.0, 1.0].into_iter(), 0.0, 100.0);
        let expected = ["90 %", "92 %", "94 %", "96 %", "98 %", "100 %"];
        assert_eq!(labels(flat.ticks()), expected);
        let flat = Share::around([0.125].into_iter(), 0.0, 100.0);
        assert!((flat.place(0.125) - 50.0).abs() < 10.0);
        let all = Share::around([0.0, 1.0].into_iter(), 0.0, 100.0);
        assert_eq!(labels(all.ticks()).len(), 6);
    }
}
