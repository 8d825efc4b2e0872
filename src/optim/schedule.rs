//! Learning-rate schedules, as transformers' `get_scheduler` defines them.

use std::f64::consts::PI;

use crate::config::{LrSchedulerType, OptimConfig};

/// The learning rate of every update of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    kind: LrSchedulerType,
    peak: f64,
    warmup: u64,
    total: u64,
}

impl Schedule {
    /// For a run of `total` updates.
    pub fn new(config: &OptimConfig, total: u64) -> Self {
        Self {
            kind: config.lr_scheduler_type,
            peak: config.learning_rate,
            warmup: config.warmup_updates(total),
            total,
        }
    }

    /// Learning rate of the update that follows `done` others. With warm-up the first one is 0.
    pub fn rate(&self, done: u64) -> f64 {
        self.peak * self.factor(done)
    }

    /// [`Self::rate`] as a share of the largest.
    pub fn factor(&self, done: u64) -> f64 {
        if self.kind == LrSchedulerType::Constant {
            return 1.0;
        }
        if done < self.warmup {
            return done as f64 / self.warmup as f64;
        }
        let falling = self.total.saturating_sub(self.warmup).max(1) as f64;
        match self.kind {
            LrSchedulerType::Constant | LrSchedulerType::ConstantWithWarmup => 1.0,
            LrSchedulerType::Linear => self.total.saturating_sub(done) as f64 / falling,
            LrSchedulerType::Cosine => {
                let progress = (done - self.warmup) as f64 / falling;
                (0.5 * (1.0 + (PI * progress).cos())).max(0.0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn agrees_with_transformers() {
        let text = include_str!("../../tests/fixtures/torch_optim.json");
        let fixture: Value = serde_json::from_str(text).unwrap();
        let cases = fixture["schedules"].as_array().unwrap();
        assert_eq!(cases.len(), 24);
        for case in cases {
            let config = OptimConfig {
                learning_rate: 1.0,
                lr_scheduler_type: serde_json::from_value(case["name"].clone()).unwrap(),
                warmup_steps: case["warmup"].as_f64().unwrap(),
                ..OptimConfig::default()
            };
            let schedule = Schedule::new(&config, case["total"].as_u64().unwrap());
            for (done, rate) in case["rates"].as_array().unwrap().iter().enumerate() {
                let (got, expected) = (schedule.rate(done as u64), rate.as_f64().unwrap());
                assert!(
                    (got - expected).abs() < 1e-12,
                    "{schedule:?} {done}: {got} {expected}"
                );
            }
        }
    }
}
