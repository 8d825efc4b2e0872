//! `config.toml` as text with the lines marked that differ from the defaults.

use std::collections::HashMap;

use toml::Table;

use crate::Result;
use crate::config::{Config, Method};

/// A line of the file.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    pub text: String,
    /// The dotted name and value of a key that differs from its default.
    pub changed: Option<(String, String)>,
}

/// A run's configuration. Read leniently: the keys may be of another version of this program.
#[derive(Debug, Clone, Default)]
pub struct Configuration {
    pub lines: Vec<Line>,
    table: Table,
}

impl Configuration {
    /// # Errors
    /// Only when the defaults cannot be written. Text that is no TOML has no values, but lines.
    pub fn parse(text: &str) -> Result<Self> {
        let defaults = Config::default().to_toml()?;
        let mut default_values = HashMap::new();
        for line in keys(&defaults) {
            if let Some((name, value)) = line.key {
                default_values.insert(name, value);
            }
        }
        let lines = keys(text).map(|line| Line {
            text: line.text.to_owned(),
            changed: line.key.filter(|(name, value)| {
                default_values
                    .get(name)
                    .is_none_or(|default| default != value)
            }),
        });
        Ok(Self {
            lines: lines.collect(),
            table: text.parse().unwrap_or_default(),
        })
    }

    pub fn is_readable(&self) -> bool {
        !self.table.is_empty()
    }

    /// The value of a dotted name as text.
    pub fn get(&self, name: &str) -> Option<String> {
        let mut value: Option<&toml::Value> = None;
        for part in name.split('.') {
            value = match value {
                None => self.table.get(part),
                Some(inner) => inner.get(part),
            };
            value?;
        }
        match value? {
            toml::Value::String(text) => Some(text.clone()),
            other => Some(other.to_string()),
        }
    }

    pub fn method(&self) -> Method {
        match self.get("method").as_deref() {
            Some("sft") => Method::Sft,
            _ => Method::Grpo,
        }
    }

    /// Keys that differ from their defaults, with their values.
    pub fn changed(&self) -> impl Iterator<Item = &(String, String)> {
        self.lines.iter().filter_map(|line| line.changed.as_ref())
    }
}

struct KeyLine<'a> {
    text: &'a str,
    key: Option<(String, String)>,
}

/// The lines of a file as this program writes it: a table's header, or one key with its value.
fn keys(text: &str) -> impl Iterator<Item = KeyLine<'_>> {
    let mut table = String::new();
    text.lines().map(move |line| {
        let trimmed = line.trim();
        if let Some(name) = trimmed.strip_prefix('[').and_then(|t| t.strip_suffix(']')) {
            table = format!("{name}.");
            return KeyLine {
                text: line,
                key: None,
            };
        }
        let key = trimmed
            .split_once(" = ")
            .map(|(name, value)| (format!("{table}{name}"), value.to_owned()));
        KeyLine { text: line, key }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_keys_are_marked_and_values_found() {
        let mut config = Config::default();
        config.adapter.u = 13;
        config.grpo.beta = 0.5;
        let parsed = Configuration::parse(&config.to_toml().unwrap()).unwrap();
        let changed: Vec<_> = parsed.changed().cloned().collect();
        let expected = [("adapter.u", "13"), ("grpo.beta", "0.5")];
        assert_eq!(changed, expected.map(|(k, v)| (k.to_owned(), v.to_owned())));
        assert_eq!(parsed.get("adapter.type").as_deref(), Some("tinylora"));
        assert_eq!(parsed.get("adapter.u").as_deref(), Some("13"));
        assert_eq!(parsed.get("adapter.none.such"), None);
        assert_eq!(parsed.method(), Method::Grpo);
        assert!(parsed.is_readable());
    }

    #[test]
    fn text_that_is_no_toml_has_lines_and_no_values() {
        let parsed = Configuration::parse("<b>\n= = =\n").unwrap();
        assert!(!parsed.is_readable());
        assert_eq!(parsed.lines.len(), 2);
        assert_eq!(parsed.get("method"), None);
    }
}
