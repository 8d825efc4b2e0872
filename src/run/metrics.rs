//! The metrics of one step: ordered names with numbers.

use serde::Serialize;
use serde_json::{Map, Value};

/// Name → value in the order of writing. A name written twice keeps its place and the last value.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepMetrics(Vec<(String, f64)>);

impl StepMetrics {
    pub fn set(&mut self, name: impl Into<String>, value: f64) {
        let name = name.into();
        match self.0.iter_mut().find(|(n, _)| *n == name) {
            Some((_, old)) => *old = value,
            None => self.0.push((name, value)),
        }
    }

    pub fn get(&self, name: &str) -> Option<f64> {
        self.0.iter().find(|(n, _)| n == name).map(|(_, v)| *v)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, f64)> {
        self.0.iter().map(|(n, v)| (n.as_str(), *v))
    }

    /// Appends all of `other`, each name with `prefix` in front.
    pub fn extend_prefixed(&mut self, prefix: &str, other: &Self) {
        for (name, value) in other.iter() {
            self.set(format!("{prefix}{name}"), value);
        }
    }

    /// As a JSON object; a value that is not finite becomes `null`, as JSON has no NaN.
    pub fn to_json(&self) -> Map<String, Value> {
        self.iter()
            .map(|(name, value)| (name.to_owned(), Value::from(value)))
            .collect()
    }
}

impl Serialize for StepMetrics {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.to_json().serialize(serializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_is_that_of_writing_and_nan_is_null() {
        let mut metrics = StepMetrics::default();
        metrics.set("reward", 0.5);
        metrics.set("kl", f64::NAN);
        metrics.set("entropy", 0.25);
        metrics.set("reward", 1.0);
        let text = serde_json::to_string(&metrics).unwrap();
        assert_eq!(text, r#"{"reward":1.0,"kl":null,"entropy":0.25}"#);
    }
}
