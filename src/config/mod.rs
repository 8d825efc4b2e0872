//! TOML file and `--set` overrides → one validated [`Config`].
//!
//! The rest of the program never sees raw input. Each section is a struct in its own file; which
//! keys exist, and what each takes, is asked of serde ([`schema`]).

mod builtin;
mod data;
mod grpo;
mod model;
mod optim;
mod parse;
#[cfg(test)]
mod reference;
mod reward;
mod rollout;
mod schema;
mod sft;
mod sizes;
#[cfg(test)]
mod tests;
mod train;

use std::fmt::Display;
use std::path::Path;

use serde::{Deserialize, Serialize};

pub use data::{DataConfig, FieldMapping, OnBadRow};
pub use grpo::{
    GrpoConfig, ImportanceSamplingLevel, ImportanceSamplingMode, LossType, ScaleRewards,
};
pub use model::{DeviceSpec, ModelSection, WeightDtype};
pub use optim::{LrSchedulerType, OptimConfig, OptimizerKind};
pub use reward::RewardConfig;
pub use rollout::{RolloutConfig, RolloutEngine};
pub(crate) use schema::nearest;
pub use sft::SftConfig;
pub use sizes::Sizes;
pub use train::{EvalConfig, Method, TrainConfig};

use crate::adapter::AdapterSpec;
use crate::{Error, Result};

/// Everything a training run is defined by: one section a field.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// `grpo` (reinforcement learning) or `sft` (next-token loss on the data's solutions).
    pub method: Method,
    pub model: ModelSection,
    pub data: DataConfig,
    pub adapter: AdapterSpec,
    pub train: TrainConfig,
    pub optim: OptimConfig,
    pub grpo: GrpoConfig,
    pub reward: RewardConfig,
    pub rollout: RolloutConfig,
    pub sft: SftConfig,
    pub eval: EvalConfig,
}

/// Keys a resumed run may change: they have no part in what is learnt or recorded.
/// (The model and the problems are compared by their contents.)
const FREE_ON_RESUME: &[&str] = &[
    "model.path",
    "model.device",
    "model.memory_gb",
    "data.train",
    "data.data_dir",
    "rollout.max_batch_size",
    "rollout.base_url",
    "rollout.server",
    "rollout.adapter_dir",
    "rollout.max_concurrency",
    "rollout.request_timeout",
    "rollout.max_retries",
    "grpo.activation_memory_gb",
    "train.run_name",
    "train.save_steps",
    "train.save_total_limit",
    "train.max_dead_steps",
    "train.ddp_timeout",
];

impl Config {
    /// Reads a configuration, applies `key=value` overrides in order, and checks the whole.
    ///
    /// # Errors
    /// [`Error::Config`] naming the file and line or the override, the key, and what is expected.
    pub fn load(source: &Source, overrides: &[String]) -> Result<Self> {
        Self::layered(source, &[Layer::Overrides(overrides)])
    }

    /// As [`Self::load`] with several layers over the file, the last one on top.
    pub fn layered(source: &Source, layers: &[Layer<'_>]) -> Result<Self> {
        let mut values = parse::Values::default();
        values.add_file(&source.text, &source.origin)?;
        for layer in layers {
            match layer {
                Layer::Keys { keys, origin } => values.add_keys(keys, origin)?,
                Layer::Overrides(assignments) => {
                    for assignment in *assignments {
                        values.add_override(assignment)?;
                    }
                }
            }
        }
        let config = values.finish()?;
        config.validate()?;
        Ok(config)
    }

    /// Every range and cross-check, before anything long starts.
    fn validate(&self) -> Result<()> {
        self.model.validate()?;
        self.data.validate()?;
        self.adapter.validate()?;
        self.train.validate()?;
        self.optim.validate()?;
        self.rollout.validate()?;
        self.eval.validate()?;
        self.reward.validate()?;
        let (funcs, weights) = (self.reward.funcs.len().max(1), &self.grpo.reward_weights);
        check(
            weights.as_ref().is_none_or(|w| w.len() == funcs),
            "grpo.reward_weights",
            format_args!("{:?}", weights.as_deref().unwrap_or_default()),
            || format!("must be one number for each of the {funcs} reward.funcs"),
        )?;
        match self.method {
            Method::Grpo => self.grpo.validate()?,
            Method::Sft => self.sft.validate()?,
        }
        if self.optim.kind == OptimizerKind::Natural {
            self.check_natural()?;
        }
        Ok(())
    }

    /// The natural gradient is that of samples at the policy that drew them.
    fn check_natural(&self) -> Result<()> {
        let reason = match () {
            () if self.method == Method::Sft => "method = \"sft\"",
            () if self.grpo.updates_per_step() > 1 => {
                "several updates on one generation batch (grpo.steps_per_generation, \
                 grpo.num_iterations)"
            }
            () if self.grpo.beta != 0.0 => "a KL term (grpo.beta)",
            () if self.rollout.engine != RolloutEngine::Native => {
                "completions of another engine (rollout.engine)"
            }
            () => return Ok(()),
        };
        Err(Error::config(format!(
            "optim.type: \"natural\" does not go with {reason}; use \"adamw\""
        )))
    }

    /// The resolved configuration as a file. It reads back to an equal [`Config`].
    pub fn to_toml(&self) -> Result<String> {
        let mut text = toml::to_string(self)
            .map_err(|e| Error::Internal(format!("cannot write the configuration: {e}")))?;
        for name in parse::unset_against_default(self)? {
            let (table, key) = name.rsplit_once('.').unwrap_or(("", name));
            let header = format!("[{table}]\n");
            text = text.replacen(&header, &format!("{header}{key} = \"none\"\n"), 1);
        }
        Ok(text)
    }

    /// The keys that define the run, by dotted name, for the check on resuming.
    pub fn defining_keys(&self) -> Result<serde_json::Map<String, serde_json::Value>> {
        let value = serde_json::to_value(self)
            .map_err(|e| Error::Internal(format!("cannot write the configuration: {e}")))?;
        let mut keys = serde_json::Map::new();
        flatten("", value, &mut keys);
        keys.retain(|name, _| !FREE_ON_RESUME.contains(&name.as_str()));
        if self.optim.is_independent_of_length() {
            // The steps already done would have been the same in a run of any length.
            keys.retain(|name, _| name != "train.max_steps" && name != "train.num_train_epochs");
        }
        Ok(keys)
    }
}

fn flatten(
    prefix: &str,
    value: serde_json::Value,
    keys: &mut serde_json::Map<String, serde_json::Value>,
) {
    match value {
        serde_json::Value::Object(table) => {
            for (key, value) in table {
                let name = match prefix {
                    "" => key,
                    _ => format!("{prefix}.{key}"),
                };
                flatten(&name, value, keys);
            }
        }
        serde_json::Value::Null => {}
        value => {
            keys.insert(prefix.to_owned(), value);
        }
    }
}

/// Keys that stand over those of a configuration file.
#[derive(Debug, Clone, Copy)]
pub enum Layer<'a> {
    /// Dotted names with TOML values; `origin` says in messages where they stand.
    Keys {
        keys: &'a [(String, toml::Value)],
        origin: &'a str,
    },
    /// `key=value` as after `--set`.
    Overrides(&'a [String]),
}

/// The text of a configuration and where it came from.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Source {
    /// Shown in messages: the path, or `built-in NAME`.
    pub origin: String,
    /// Short name for the run directory: the file's name without its ending.
    pub name: String,
    pub text: String,
}

impl Source {
    /// Finds a configuration: a path, else a file in `configs/`, else the built-in of that name.
    ///
    /// # Errors
    /// [`Error::Config`] naming the built-ins and the nearest of them.
    pub fn find(name: &str) -> Result<Self> {
        Self::find_among(name, builtin::TRAINING)
    }

    /// Finds the description of a sweep in the same places.
    pub fn find_sweep(name: &str) -> Result<Self> {
        Self::find_among(name, builtin::SWEEPS)
    }

    fn find_among(name: &str, builtins: builtin::List) -> Result<Self> {
        let in_folder = Path::new("configs").join(name);
        for candidate in [Path::new(name), &in_folder] {
            if candidate.is_file() {
                return Self::read(candidate);
            }
        }
        if let Some(text) = builtin::get(builtins, name) {
            return Ok(Self {
                origin: format!("built-in {name}"),
                name: stem(Path::new(name)),
                text: text.to_owned(),
            });
        }
        let names = || builtins.iter().map(|(name, _)| *name);
        let mut message = format!(
            "no configuration {name}: it is no file, not in configs/, and not built in ({})",
            names().collect::<Vec<_>>().join(", ")
        );
        if let Some(near) = schema::nearest(name, names()) {
            message.push_str(&format!("; did you mean {near}?"));
        }
        Err(Error::Config(message))
    }

    /// Reads a configuration file.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .map_err(|e| Error::config(format!("cannot read {}: {e}", path.display())))?;
        Ok(Self {
            origin: path.display().to_string(),
            name: stem(path),
            text,
        })
    }
}

fn stem(path: &Path) -> String {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    stem.chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || "-_.".contains(c) {
                c
            } else {
                '-'
            }
        })
        .collect()
}

/// `Error::Config` of the form `key = value: what to do` unless `ok`.
pub(crate) fn check(
    ok: bool,
    key: &str,
    value: impl Display,
    advice: impl FnOnce() -> String,
) -> Result<()> {
    if ok {
        return Ok(());
    }
    Err(Error::config(format!("{key} = {value}: {}", advice())))
}
