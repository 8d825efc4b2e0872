//! The model and the adapter that a command's arguments name.

use std::path::{Path, PathBuf};

use clap::Args;

use crate::adapter::{Adapter, AdapterSource, ModuleKind, SvdCache};
use crate::cli::GlobalArgs;
use crate::config::{Config, ModelSection};
use crate::model::{LoadOptions, Model, OpenOptions};
use crate::run::progress::Progress;
use crate::run::{checkpoint, directory};
use crate::{Error, Result};

/// Which model and which adapter.
#[derive(Debug, Clone, Default, Args)]
pub struct ModelArgs {
    /// Hugging Face directory, .gguf file or hub id [default: the model of --run]
    #[arg(long, value_name = "MODEL")]
    pub model: Option<String>,
    /// Adapter: a safetensors file, its one-line text form, a run directory or a PEFT directory
    #[arg(long, value_name = "ADAPTER")]
    pub adapter: Option<String>,
    /// Run whose model and last adapter are taken [default without --model: the newest]
    #[arg(long, value_name = "RUN", conflicts_with_all = ["model", "adapter"])]
    pub run: Option<PathBuf>,
}

/// What [`ModelArgs`] name, before anything is read.
#[derive(Debug, Clone, PartialEq)]
pub struct Names {
    pub model: String,
    pub adapter: Option<String>,
    /// Of the run that the adapter belongs to.
    pub config: Option<Config>,
}

/// A model, and an adapter on it if one was named.
pub struct Opened {
    pub model: Model,
    pub adapter: Option<Adapter>,
    /// As the user named it.
    pub adapter_name: Option<String>,
    /// Of the run that the adapter belongs to.
    pub config: Option<Config>,
}

impl ModelArgs {
    /// Fills in what was not given from the run: the named one, that of the adapter, the newest.
    ///
    /// # Errors
    /// No such run, or none at all.
    pub fn names(&self, progress: Progress) -> Result<Names> {
        let run_of_adapter = self
            .adapter
            .as_deref()
            .map(Path::new)
            .filter(|path| path.is_dir())
            .and_then(|path| directory::find(path).ok());
        if let Some(model) = &self.model {
            let (adapter, config) = match run_of_adapter {
                Some(run) => (Some(adapter_of(&run)?), Some(directory::config_of(&run)?)),
                None => (self.adapter.clone(), None),
            };
            return Ok(Names {
                model: model.clone(),
                adapter,
                config,
            });
        }
        let run = match (&self.run, &run_of_adapter) {
            (Some(run), _) => directory::find(run)?,
            (None, Some(run)) => run.clone(),
            (None, None) => {
                let run = directory::newest()?;
                progress.line(&format!("the newest run is {}", run.display()));
                run
            }
        };
        let config = directory::config_of(&run)?;
        // An adapter that is no run of its own goes onto the newest run's model.
        let adapter = match (&self.adapter, run_of_adapter) {
            (Some(adapter), None) => adapter.clone(),
            _ => adapter_of(&run)?,
        };
        Ok(Names {
            model: config.model.path.clone(),
            adapter: Some(adapter),
            config: Some(config),
        })
    }

    /// Loads what [`Self::names`] gives.
    pub fn open(&self, global: &GlobalArgs) -> Result<Opened> {
        let progress = Progress::new(global.quiet);
        let names = self.names(progress)?;
        let section = names.config.as_ref().map(|c| (&c.model, c.train.seed));
        // An adapter that cannot be read is refused before the model takes its time.
        let adapter = names.adapter.as_deref().map(AdapterSource::open);
        let adapter = adapter.transpose()?;
        let model = load_model(&names.model, section, global)?;
        let adapter = adapter
            .map(|adapter| put_on(&adapter, &model, progress))
            .transpose()?;
        Ok(Opened {
            model,
            adapter,
            adapter_name: names.adapter,
            config: names.config,
        })
    }
}

fn adapter_of(run: &Path) -> Result<String> {
    checkpoint::last_adapter(&directory::checkpoints(run))
        .map(|path| path.display().to_string())
        .ok_or_else(|| {
            Error::data(format!(
                "{} has no checkpoint to take an adapter from",
                run.display()
            ))
        })
}

/// The model as `--device` and `--dtype` want it, else as the run had it whose `[model]` section
/// and seed are given.
pub fn load_model(
    source: &str,
    run: Option<(&ModelSection, u64)>,
    global: &GlobalArgs,
) -> Result<Model> {
    let dtype = global.dtype.or(run.map(|(section, _)| section.dtype));
    let device = global.device.or(run.map(|(section, _)| section.device));
    let random = run.filter(|(section, _)| section.random_init);
    let options = LoadOptions {
        device: device.unwrap_or_default().open()?,
        dtype: dtype.unwrap_or_default().to_dtype(),
        mmap: global.mmap || run.is_some_and(|(section, _)| section.mmap),
        open: OpenOptions {
            quiet: global.quiet,
            random_init: random.map(|(_, seed)| seed),
        },
        ..LoadOptions::default()
    };
    Model::load(source, &options)
}

fn put_on(adapter: &AdapterSource, model: &Model, progress: Progress) -> Result<Adapter> {
    let total = model.decoder.config.num_hidden_layers * ModuleKind::ALL.len();
    let bar = progress.bar("decomposing weights", total as u64);
    let cache = SvdCache::user();
    let adapter = adapter.onto(model.base(), &model.decoder, &cache, &|done, _| {
        bar.set_position(done as u64);
    });
    bar.clear();
    adapter
}
