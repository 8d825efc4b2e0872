//! `tinylora train`: configuration → model, data, adapter → training → adapter file.

use std::path::PathBuf;

use clap::Args;

use crate::cli::GlobalArgs;
use crate::config::{Config, Source};
use crate::{Error, Result};

/// Arguments of `tinylora train`.
#[derive(Debug, Args)]
pub struct TrainArgs {
    /// Configuration: a path, a file in configs/, or the name of a built-in one
    #[arg(long, value_name = "FILE")]
    config: Option<String>,
    /// Override a key by its dotted name, as in train.max_steps=100 (repeatable)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Run directory; otherwise a new one under runs/
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Go on from the latest good checkpoint of RUN (default: --run-dir, else the newest run)
    #[arg(long, value_name = "RUN", num_args = 0..=1)]
    resume: Option<Option<PathBuf>>,
    /// Print the resolved configuration, trained parameters, memory plan and one prompt, then stop
    #[arg(long)]
    dry_run: bool,
    /// Print one JSON object on stdout at the end
    #[arg(long)]
    json: bool,
}

/// Configuration the quick start uses.
const QUICK_START: &str = "mini.toml";

/// Runs the command.
pub fn run(args: TrainArgs, global: &GlobalArgs) -> Result<()> {
    let config = resolve(&args, global)?;
    print!("{}", config.to_toml()?);
    Err(Error::Internal("training is not wired yet".to_owned()))
}

fn resolve(args: &TrainArgs, global: &GlobalArgs) -> Result<Config> {
    let mut overrides = args.overrides.clone();
    overrides.extend(global.device.map(|d| format!("model.device={d}")));
    overrides.extend(global.dtype.map(|d| format!("model.dtype={}", d.name())));
    overrides.extend(global.seed.map(|s| format!("train.seed={s}")));
    let source = Source::find(args.config.as_deref().unwrap_or(QUICK_START))?;
    Config::load(&source, &overrides)
}
