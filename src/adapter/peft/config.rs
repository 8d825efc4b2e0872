//! `adapter_config.json`: what PEFT was asked to make.

use std::path::Path;

use serde_json::{Map, Value};

use super::ModuleId;
use super::lora::LoraConfig;
use super::targets::Targets;
use super::tensors::TensorFile;
use super::tinylora::TinyLoraConfig;
use crate::run::fs;
use crate::{Error, Result};

/// Larger ranks and vectors than any model can use.
const MAX_SIZE: u64 = 1 << 16;

/// The two kinds of adapter that are read.
#[derive(Debug)]
pub(super) enum PeftConfig {
    Lora(LoraConfig),
    TinyLora(TinyLoraConfig),
}

impl PeftConfig {
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path)?;
        Self::parse(&text).map_err(|cause| Error::file("read", path, cause))
    }

    pub fn parse(text: &str) -> Result<Self, String> {
        let object: Map<String, Value> = serde_json::from_str(text).map_err(|e| e.to_string())?;
        let keys = Keys(object);
        match keys.string("peft_type")? {
            Some("LORA") => LoraConfig::parse(&keys).map(Self::Lora),
            Some("TINYLORA") => TinyLoraConfig::parse(&keys).map(Self::TinyLora),
            Some(other) => Err(format!(
                "peft_type {other:?} is not read; LORA and TINYLORA are"
            )),
            None => Err("peft_type is missing: it is no PEFT adapter".into()),
        }
    }

    pub fn targets(&self) -> &Targets {
        match self {
            Self::Lora(config) => &config.targets,
            Self::TinyLora(config) => &config.targets,
        }
    }

    /// Names of the tensors A and B.
    pub fn names(&self, id: ModuleId) -> [String; 2] {
        let (a, b) = match self {
            Self::Lora(_) => ("lora_A.weight", "lora_B.weight"),
            Self::TinyLora(_) => ("tinylora_A", "tinylora_B"),
        };
        [a, b].map(|part| tensor_name(id, part))
    }

    /// Rank of a module of shape `(out, in)`.
    pub fn rank(&self, id: ModuleId, (out, inner): (usize, usize)) -> usize {
        match self {
            Self::Lora(config) => config.rank(id),
            // A matrix has no more singular vectors than that.
            Self::TinyLora(config) => config.r.min(out).min(inner),
        }
    }

    /// What a module's B A is multiplied by.
    pub fn factor(&self, id: ModuleId) -> f64 {
        match self {
            Self::Lora(config) => config.factor(id),
            Self::TinyLora(_) => 1.0,
        }
    }

    /// That factor when it is the same everywhere.
    pub fn common_factor(&self, modules: &[ModuleId]) -> Option<f64> {
        let mut factors = modules.iter().map(|&id| self.factor(id));
        let first = factors.next()?;
        factors.all(|factor| factor == first).then_some(first)
    }

    /// Checks the tensors besides A and B, and names them.
    pub fn check_others(
        &self,
        file: &TensorFile,
        modules: &[ModuleId],
        ranks: &[usize],
    ) -> Result<Vec<String>> {
        match self {
            Self::Lora(_) => Ok(Vec::new()),
            Self::TinyLora(config) => config.check(file, modules, ranks),
        }
    }
}

/// The name of a module's tensor in PEFT's file.
pub(super) fn tensor_name(id: ModuleId, part: &str) -> String {
    format!("base_model.model.{id}.{part}")
}

/// Whether a key is as good as not given.
pub(super) fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text == "none" || text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

/// The keys of the file, by type.
pub(super) struct Keys(Map<String, Value>);

impl Keys {
    pub fn value(&self, key: &str) -> &Value {
        self.0.get(key).unwrap_or(&Value::Null)
    }

    /// Refuses the file when one of these keys is set.
    pub fn refuse(&self, keys: &[&str], why: &str) -> Result<(), String> {
        match keys.iter().find(|key| !is_off(self.value(key))) {
            Some(key) => Err(format!(
                "{key} = {} is not supported: {why}",
                self.value(key)
            )),
            None => Ok(()),
        }
    }

    pub fn string(&self, key: &str) -> Result<Option<&str>, String> {
        match self.value(key) {
            Value::Null => Ok(None),
            Value::String(text) => Ok(Some(text)),
            other => Err(format!("{key} = {other} is no string")),
        }
    }

    pub fn bool(&self, key: &str, default: bool) -> Result<bool, String> {
        match self.value(key) {
            Value::Null => Ok(default),
            Value::Bool(b) => Ok(*b),
            other => Err(format!("{key} = {other} is neither true nor false")),
        }
    }

    /// A rank or a number of dimensions.
    pub fn size(&self, key: &str, default: usize) -> Result<usize, String> {
        match self.value(key) {
            Value::Null => Ok(default),
            value => size(key, value),
        }
    }

    pub fn number(&self, key: &str, default: f64) -> Result<f64, String> {
        match self.value(key) {
            Value::Null => Ok(default),
            value => number(key, value),
        }
    }

    pub fn map(&self, key: &str) -> Result<Map<String, Value>, String> {
        match self.value(key) {
            Value::Null => Ok(Map::new()),
            Value::Object(map) => Ok(map.clone()),
            other => Err(format!("{key} = {other} is no table")),
        }
    }

    pub fn targets(&self) -> Result<Targets, String> {
        Targets::parse(
            self.value("target_modules"),
            self.value("exclude_modules"),
            self.value("layers_to_transform"),
        )
    }
}

pub(super) fn size(key: &str, value: &Value) -> Result<usize, String> {
    match value.as_u64() {
        Some(n) if (1..=MAX_SIZE).contains(&n) => Ok(n as usize),
        _ => Err(format!("{key} = {value} is not between 1 and {MAX_SIZE}")),
    }
}

pub(super) fn number(key: &str, value: &Value) -> Result<f64, String> {
    let number = value.as_f64().filter(|x| x.is_finite());
    number.ok_or_else(|| format!("{key} = {value} is no number"))
}
