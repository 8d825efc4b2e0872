//! The description of a sweep: what all runs share, and along which axes they differ.
//!
//! ```toml
//! base = "mini.toml"                  # training configuration that all runs start from
//! seeds = [1, 2, 3]
//! learning_rates = [0.01, 0.02]       # unless a size or a method has its own
//! lockstep = 4                        # most runs that share passes; unset: as many as fit, up to 8
//! set = { eval.limit = 256 }          # keys of the configuration, for every run
//!
//! [[method]]
//! name = "grpo"
//! set = { train.max_steps = 30 }
//!
//! [[size]]
//! name = "13"
//! adapter = { n_tie = 4 }
//! learning_rates = { grpo = [0.02], sft = [0.05] }
//!
//! [[axis]]                            # none or more: a curve in the figure for every value
//! key = "adapter.tie"
//! values = ["tiled", "structured"]
//! ```

use std::num::NonZeroUsize;

use serde::Deserialize;
use toml::{Table, Value};

use crate::config::{Method, Source, nearest};
use crate::{Error, Result};

/// A sweep as its file has it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SweepFile {
    /// A path, a file in `configs/`, or a built-in one.
    pub base: String,
    pub seeds: Vec<u64>,
    /// Above the figures; unset takes the file's name.
    pub title: Option<String>,
    pub learning_rates: Option<Rates>,
    /// Most runs in lockstep; 1 trains one after the other.
    pub lockstep: Option<NonZeroUsize>,
    #[serde(default)]
    pub set: Table,
    pub method: Vec<MethodAxis>,
    pub size: Vec<Size>,
    #[serde(default)]
    pub axis: Vec<Axis>,
}

/// A way of training with its own keys.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MethodAxis {
    pub name: Method,
    #[serde(default)]
    pub set: Table,
    pub learning_rates: Option<Rates>,
}

/// A named adapter: a point on the axis of trained parameters.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Size {
    pub name: String,
    /// Keys of `[adapter]`.
    #[serde(default)]
    pub adapter: Table,
    pub learning_rates: Option<Rates>,
}

/// Any other key of the configuration with the values to compare.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Axis {
    pub key: String,
    pub values: Vec<Value>,
}

/// Learning rates to try.
#[derive(Debug, Clone, Deserialize)]
#[serde(
    untagged,
    expecting = "expected a list of numbers, or { grpo = [...], sft = [...] }"
)]
pub enum Rates {
    All(Vec<f64>),
    Each(RatesByMethod),
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RatesByMethod {
    grpo: Option<Vec<f64>>,
    sft: Option<Vec<f64>>,
}

impl Rates {
    pub fn of(&self, method: Method) -> Option<&[f64]> {
        match (self, method) {
            (Self::All(rates), _) => Some(rates),
            (Self::Each(each), Method::Grpo) => each.grpo.as_deref(),
            (Self::Each(each), Method::Sft) => each.sft.as_deref(),
        }
    }
}

impl SweepFile {
    /// Reads the text.
    ///
    /// # Errors
    /// [`Error::Config`] naming file, line and the nearest known key.
    pub fn parse(source: &Source) -> Result<Self> {
        let Source { origin, text, .. } = source;
        toml::from_str(text).map_err(|e| {
            let start = e.span().map_or(0, |span| span.start.min(text.len()));
            let line = 1 + text[..start].matches('\n').count();
            let message = e.message().replace('\n', " ");
            Error::config(format!("{origin}:{line}: {}", with_suggestion(&message)))
        })
    }
}

/// serde says "unknown field `a`, expected one of `b`, `c`": adds which of them was meant.
fn with_suggestion(message: &str) -> String {
    let Some(rest) = message.strip_prefix("unknown field `") else {
        return message.to_owned();
    };
    let mut names = rest.split('`').step_by(2);
    let unknown = names.next().unwrap_or_default();
    let hint = nearest(unknown, names.filter(|name| !name.is_empty()))
        .map_or_else(String::new, |near| format!("; did you mean {near}?"));
    format!("unknown key {unknown}{hint}")
}

/// The keys of a table by dotted name.
pub fn flatten(prefix: &str, table: &Table) -> Vec<(String, Value)> {
    let mut keys = Vec::new();
    for (key, value) in table {
        let name = match prefix {
            "" => key.clone(),
            _ => format!("{prefix}.{key}"),
        };
        match value {
            Value::Table(inner) => keys.extend(flatten(&name, inner)),
            value => keys.push((name, value.clone())),
        }
    }
    keys
}
