//! TinyLoRA + GRPO on candle: teach a language model to reason with a handful of numbers.
//!
//! The way of a training step, and the modules it passes through:
//! [`config`] → prompts ([`data`]) → completions ([`rollout`]) → rewards ([`reward`]) →
//! advantages and loss ([`grpo`]) → gradient of the adapter ([`model`], [`ops`], [`adapter`]) →
//! [`optim`] → metrics and checkpoints ([`run`]).

pub mod adapter;
pub mod bounded;
pub mod cli;
pub mod commands;
pub mod config;
pub mod data;
pub mod error;
pub mod eval;
pub mod export;
pub mod grpo;
pub mod lockstep;
pub mod model;
pub mod ops;
pub mod optim;
pub mod ranks;
pub mod report;
pub mod reward;
pub mod rollout;
pub mod run;
pub mod sft;
pub mod sweep;

pub use error::{Error, Result};
