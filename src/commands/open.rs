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
    /// Adapter: a safetensors file, its one-line text form, a run directory or a PEFT directory (eval:
    /// repeatable, or several with commas between)
    #[arg(long, value_name = "ADAPTER")]
    pub adapter: Vec<String>,
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

/// A model and the adapters on it that were named.
pub struct OpenedSeveral {
    pub model: Model,
    /// Each as the user named it.
    pub adapters: Vec<(String, Adapter)>,
    /// Of the runs that the adapters belong to.
    pub configs: Vec<Config>,
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
        self.names_with(self.only_adapter()?, progress)
    }

    /// The adapter of a command that takes one.
    ///
    /// # Errors
    /// [`Error::Config`] where several are given.
    pub fn only_adapter(&self) -> Result<Option<&str>> {
        match &self.adapter[..] {
            [] => Ok(None),
            [only] => Ok(Some(only)),
            several => Err(Error::config(format!(
                "--adapter is given {} times: this command takes one adapter",
                several.len()
            ))),
        }
    }

    fn names_with(&self, adapter: Option<&str>, progress: Progress) -> Result<Names> {
        let run_of_adapter = adapter
            .map(Path::new)
            .filter(|path| path.is_dir())
            .and_then(|path| directory::find(path).ok());
        if let Some(model) = &self.model {
            let (adapter, config) = match run_of_adapter {
                Some(run) => (Some(adapter_of(&run)?), Some(directory::config_of(&run)?)),
                None => (adapter.map(str::to_owned), None),
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
        let adapter = match (adapter, run_of_adapter) {
            (Some(adapter), None) => adapter.to_owned(),
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

impl ModelArgs {
    /// Loads the model and every adapter that is named. Adapters with equal A and B hold them in common.
    ///
    /// # Errors
    /// As [`Self::open`]; adapters of runs on different models; the same adapter twice.
    pub fn open_several(&self, global: &GlobalArgs) -> Result<OpenedSeveral> {
        let given = separate(&self.adapter);
        if given.len() < 2 {
            let only = Self {
                adapter: given,
                ..self.clone()
            };
            let opened = only.open(global)?;
            return Ok(OpenedSeveral {
                model: opened.model,
                adapters: opened
                    .adapter_name
                    .into_iter()
                    .zip(opened.adapter)
                    .collect(),
                configs: opened.config.into_iter().collect(),
            });
        }
        let progress = Progress::new(global.quiet);
        let names = given
            .iter()
            .map(|adapter| self.names_with(Some(adapter), progress))
            .collect::<Result<Vec<_>>>()?;
        check_several(&names)?;
        let sources = names
            .iter()
            .filter_map(|name| Some((name.adapter.as_deref()?, name)))
            .map(|(name, _)| Ok((name, AdapterSource::open(name)?)))
            .collect::<Result<Vec<_>>>()?;
        let section = names[0].config.as_ref();
        let section = section.map(|c| (&c.model, c.train.seed));
        let model = load_model(&names[0].model, section, global)?;
        let mut adapters: Vec<(String, Adapter)> = Vec::with_capacity(sources.len());
        for (name, source) in sources {
            let mut adapter = put_on(&source, &model, progress)?;
            for (_, other) in &adapters {
                adapter.share_factors(other)?;
            }
            adapters.push((name.to_owned(), adapter));
        }
        let configs = names.into_iter().filter_map(|name| name.config).collect();
        Ok(OpenedSeveral {
            model,
            adapters,
            configs,
        })
    }
}

/// The adapters of `--adapter A,B --adapter C`. A comma in the name of a file that is there separates
/// nothing.
fn separate(given: &[String]) -> Vec<String> {
    let parts = |name: &String| match Path::new(name).exists() {
        true => vec![name.clone()],
        false => name.split(',').map(|part| part.trim().to_owned()).collect(),
    };
    let parts = given.iter().flat_map(parts);
    parts.filter(|part| !part.is_empty()).collect()
}

/// Adapters that are compared are different, and on one model.
fn check_several(names: &[Names]) -> Result<()> {
    for (i, name) in names.iter().enumerate() {
        let shown = name.adapter.as_deref().unwrap_or_default();
        if names[..i].iter().any(|other| other.adapter == name.adapter) {
            return Err(Error::config(format!("--adapter names {shown} twice")));
        }
        if name.model != names[0].model {
            return Err(Error::config(format!(
                "--adapter {shown} belongs to the model {}, the first one to {}: several adapters are \
                 evaluated on one model (--model)",
                name.model, names[0].model
            )));
        }
    }
    Ok(())
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
