//! The configuration file: sections with their defaults and checks.

mod data;
mod grpo;
mod optim;
mod sft;

use std::fmt::Display;

pub use data::{DataConfig, FieldMapping, OnBadRow};
pub use grpo::{
    GrpoConfig, ImportanceSamplingLevel, ImportanceSamplingMode, LossType, ScaleRewards,
};
pub use optim::{LrSchedulerType, OptimConfig};
pub use sft::SftConfig;

use crate::{Error, Result};

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
