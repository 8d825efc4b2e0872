//! Warnings: metrics outside their healthy range, and scores that do not say what they seem to.

use super::catalog::Rule;

/// Ranges of steps kept; further ones are only counted.
const MAX_RANGES: usize = 200;
/// Ranges shown.
const SHOWN: usize = 6;
/// From this share of steps on, being outside is no passing matter.
const OFTEN: f64 = 0.1;

/// Steps at which one metric is outside its range.
#[derive(Debug, Clone)]
pub struct Monitor {
    pub rule: &'static Rule,
    /// Values seen.
    pub seen: usize,
    below: Side,
    above: Side,
}

/// One side of a range.
#[derive(Debug, Clone, Default)]
struct Side {
    /// First and last step of each stretch.
    ranges: Vec<(u64, u64)>,
    more: usize,
    count: usize,
    /// Whether the last value seen was outside here.
    open: bool,
}

impl Side {
    fn push(&mut self, step: u64, outside: bool) {
        if outside {
            self.count += 1;
            if !self.open && self.ranges.len() < MAX_RANGES {
                self.ranges.push((step, step));
            } else if !self.open {
                self.more += 1;
            } else if self.more == 0
                && let Some(last) = self.ranges.last_mut()
            {
                last.1 = step;
            }
        }
        self.open = outside;
    }

    /// `steps 3, 7–12 and 5 more stretches`.
    fn steps(&self) -> String {
        let show = |(from, to): &(u64, u64)| match from == to {
            true => format!("{from}"),
            false => format!("{from}–{to}"),
        };
        let shown: Vec<String> = self.ranges.iter().take(SHOWN).map(show).collect();
        let rest = self.ranges.len().saturating_sub(SHOWN) + self.more;
        let rest = match rest {
            0 => String::new(),
            1 => " and 1 more stretch".to_owned(),
            n => format!(" and {n} more stretches"),
        };
        let what = match self.count {
            1 => "step",
            _ => "steps",
        };
        format!("{what} {}{rest}", shown.join(", "))
    }
}

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Warning,
    Note,
}

/// Something to look at.
#[derive(Debug, Clone, PartialEq)]
pub struct Finding {
    pub level: Level,
    /// Metric or subject.
    pub subject: String,
    /// What was found and where.
    pub what: String,
    /// What it means and what to do.
    pub advice: String,
}

impl Monitor {
    pub fn new(rule: &'static Rule) -> Self {
        Self {
            rule,
            seen: 0,
            below: Side::default(),
            above: Side::default(),
        }
    }

    pub fn push(&mut self, step: u64, value: f64) {
        self.seen += 1;
        self.below.push(step, self.rule.is_below(value));
        self.above.push(step, self.rule.is_above(value));
    }

    /// One finding for each side on which there were values.
    pub fn findings(&self) -> Vec<Finding> {
        let sides = [
            (&self.below, "below", self.rule.below),
            (&self.above, "above", self.rule.above),
        ];
        let found = sides.into_iter().filter(|(side, ..)| side.count > 0);
        found
            .map(|(side, word, advice)| {
                let share = side.count as f64 / self.seen as f64;
                let level = match side.open || share >= OFTEN {
                    true => Level::Warning,
                    false => Level::Note,
                };
                Finding {
                    level,
                    subject: self.rule.metric.to_owned(),
                    what: format!(
                        "{word} its healthy range ({}) at {} of {} steps: {}",
                        self.rule.range(),
                        side.count,
                        self.seen,
                        side.steps()
                    ),
                    advice: advice.to_owned(),
                }
            })
            .collect()
    }
}

/// Steps at which a metric was no number.
#[derive(Debug, Clone, Default)]
pub struct NotFinite(Side);

impl NotFinite {
    pub fn push(&mut self, step: u64, finite: bool) {
        self.0.push(step, !finite);
    }

    pub fn finding(&self, metric: &str) -> Option<Finding> {
        (self.0.count > 0).then(|| Finding {
            level: Level::Warning,
            subject: metric.to_owned(),
            what: format!("not finite at {}", self.0.steps()),
            advice: "Training has left the range of numbers. Lower optim.learning_rate and go on \
                     from a checkpoint before that."
                .to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::catalog::RULES;
    use super::*;

    /// Whether a single value is found fault with, and on which side.
    fn verdict(metric: &str, value: f64) -> &'static str {
        let mut monitor = Monitor::new(Rule::of(metric).unwrap());
        monitor.push(1, value);
        match monitor.findings().as_slice() {
            [] => "healthy",
            [finding] if finding.what.starts_with("below") => "below",
            [finding] if finding.what.starts_with("above") => "above",
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn ranges_at_their_ends() {
        for (metric, value, expected) in [
            ("frac_reward_zero_std", 0.799, "healthy"),
            ("frac_reward_zero_std", 0.8, "above"),
            ("frac_reward_zero_std", 0.0, "healthy"),
            ("grad_norm", 0.000_999, "below"),
            ("grad_norm", 0.001, "healthy"),
            ("grad_norm", 1.0, "healthy"),
            ("grad_norm", 1.000_1, "above"),
            ("entropy", 0.049_9, "below"),
            ("entropy", 0.05, "healthy"),
            ("entropy", 0.5, "healthy"),
            ("entropy", 0.500_1, "above"),
            ("completions/clipped_ratio", 0.299, "healthy"),
            ("completions/clipped_ratio", 0.3, "above"),
            ("clip_ratio/region_mean", 0.099, "healthy"),
            ("clip_ratio/region_mean", 0.1, "above"),
            ("sampling/sampling_logp_difference/mean", 0.0, "healthy"),
            ("sampling/sampling_logp_difference/mean", 0.1, "above"),
        ] {
            assert_eq!(verdict(metric, value), expected, "{metric} {value}");
        }
        for rule in RULES {
            assert_eq!(
                rule.low.is_some(),
                !rule.below.is_empty(),
                "{}",
                rule.metric
            );
            assert_eq!(
                rule.high.is_some(),
                !rule.above.is_empty(),
                "{}",
                rule.metric
            );
        }
    }

    #[test]
    fn steps_are_named_in_stretches() {
        let mut monitor = Monitor::new(Rule::of("entropy").unwrap());
        for step in 1..=100 {
            let low = [3, 7, 8, 9].contains(&step);
            monitor.push(step, if low { 0.01 } else { 0.2 });
        }
        let findings = monitor.findings();
        assert_eq!(findings.len(), 1);
        assert_eq!(
            findings[0].what,
            "below its healthy range (0.05–0.5) at 4 of 100 steps: steps 3, 7–9"
        );
        assert_eq!(findings[0].level, Level::Note);
        // Where it ends outside, it is a warning however short that is.
        monitor.push(101, 0.6);
        let findings = monitor.findings();
        assert_eq!(findings[1].level, Level::Warning);
        assert!(
            findings[1].what.ends_with("step 101"),
            "{}",
            findings[1].what
        );
    }

    #[test]
    fn stretches_without_end_take_bounded_memory() {
        let mut monitor = Monitor::new(Rule::of("entropy").unwrap());
        for step in 0..100_000 {
            monitor.push(step, if step % 2 == 0 { 0.01 } else { 0.2 });
        }
        assert_eq!(monitor.below.ranges.len(), MAX_RANGES);
        let what = &monitor.findings()[0].what;
        assert!(
            what.contains("50000 of 100000 steps: steps 0, 2, 4, 6, 8, 10 and 49994 more"),
            "{what}"
        );
    }
}
