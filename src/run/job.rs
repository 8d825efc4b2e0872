//! One training from a configuration to an adapter file, on a model that is already loaded.
//!
//! `train` does one of these; `sweep` does many on the same model.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::checkpoint::{Checkpoint, Identity, Store};
use super::directory::RunDirectory;
use super::environment::Environment;
use super::evaluation::{Claimed, Evaluator};
use super::logs::Logs;
use super::plan::{self, Plan, Setting, Workload};
use super::problems::{self, TrainingData};
use super::progress::{Bar, Progress};
use super::signals;
use super::state::TrainState;
use super::training::{Evaluation, Records, Session};
use crate::adapter::{Adapter, SvdCache};
use crate::config::{Config, Sizes};
use crate::eval::EvalSet;
use crate::lockstep::Seat;
use crate::model::{Checkpoint as Pretrained, LoadOptions, Model, OpenOptions, Tokenizer};
use crate::ranks::Ranks;
use crate::rollout::{Engines, Site};
use crate::{Error, Result};

/// Everything a training needs besides the model and a folder. Whatever can be refused has been
/// once this exists.
pub struct Job {
    pub config: Config,
    pub data: Arc<TrainingData>,
    sets: Arc<[EvalSet]>,
}

/// Where and how a [`Job`] runs.
pub struct Place<'a> {
    pub ranks: Ranks,
    /// On other ranks than the root there is none.
    pub directory: Option<&'a RunDirectory>,
    /// Go on from the latest good checkpoint in the folder.
    pub resume: bool,
    /// Completions of the untrained model, shared between runs that would ask it the same.
    pub shared: Option<PathBuf>,
    /// What the memory plan chose.
    pub sizes: Sizes,
    pub progress: Progress,
    /// What it is one of several runs in lockstep by.
    pub together: Option<Together<'a>>,
}

/// One of several runs in lockstep.
pub struct Together<'a> {
    pub seat: &'a Seat<'a>,
    /// Its untrained adapter.
    pub adapter: Adapter,
    /// Counts the steps of all runs.
    pub steps: &'a Bar,
    /// Where it says what has to be said of it alone.
    pub notices: Progress,
}

/// What came out.
pub struct Outcome {
    pub steps: u64,
    pub trained_parameters: usize,
    pub evaluations: Vec<Evaluation>,
    /// Mean reward (GRPO) or loss (SFT) of every step of this process.
    pub curve: Vec<f64>,
    /// Where the trained adapter was written.
    pub adapter: PathBuf,
    /// The adapter as a line of text, if it is short enough for one.
    pub text: Option<String>,
}

impl Outcome {
    /// Scores of the untrained model.
    pub fn before(&self) -> Option<&Evaluation> {
        self.evaluations.iter().find(|e| e.step == 0)
    }

    /// Scores at the end.
    pub fn after(&self) -> Option<&Evaluation> {
        self.evaluations.iter().rfind(|e| e.step == self.steps)
    }
}

impl Job {
    /// Reads the problems to train and to evaluate on.
    ///
    /// # Errors
    /// As [`TrainingData::load`] and [`Evaluator::load`].
    pub fn new(
        mut config: Config,
        tokenizer: &Tokenizer,
        context: usize,
        quiet: bool,
    ) -> Result<Self> {
        problems::complete(&mut config)?;
        let data = TrainingData::load(&config, tokenizer, context, quiet)?.into();
        let sets = Evaluator::load(&config, tokenizer)?.into();
        Ok(Self { config, data, sets })
    }

    /// A job on the same problems, whose configuration differs in what has no part in them: the sections
    /// `adapter`, `optim` and `train`.
    ///
    /// # Errors
    /// A prompt template that is none.
    pub fn with_config(&self, mut config: Config) -> Result<Self> {
        problems::complete(&mut config)?;
        Ok(Self {
            config,
            data: Arc::clone(&self.data),
            sets: Arc::clone(&self.sets),
        })
    }

    /// What the run takes and the sizes that make it fit, on the CPU or on a GPU.
    ///
    /// # Errors
    /// As [`Plan::make`].
    pub fn plan(&self, setting: &Setting<'_>) -> Result<Plan> {
        let config = &self.config;
        let sets = self.sets.iter();
        let samples = config.eval.samples_per_problem;
        let longest = config.grpo.max_completion_length;
        let evaluation = sets.map(|set| plan::Evaluation {
            prompt: set.longest_prompt(),
            shared: Workload::common(set.prompts.iter().map(|p| &p.tokens[..])),
            completion: config.eval.max_tokens.unwrap_or(longest),
            completions: set.problems.len() * samples,
        });
        let workload = Workload {
            lengths: self.data.lengths(config),
            shared: self.data.common_tokens(),
            evaluation: evaluation.reduce(plan::Evaluation::larger),
        };
        Plan::make(config, &workload, setting)
    }

    /// Steps of the whole run.
    pub fn steps(&self) -> u64 {
        let epochs = || self.data.steps(&self.config);
        self.config.train.max_steps.unwrap_or_else(epochs)
    }

    /// Trains, evaluates and saves into the run directory, which gets its `config.toml` first.
    ///
    /// # Errors
    /// Those of [`Session::run`]; a checkpoint of another run.
    pub fn train(&self, model: &Model, place: &Place<'_>) -> Result<Outcome> {
        let (config, data) = (&self.config, &self.data);
        let (ranks, progress) = (&place.ranks, place.progress);
        ranks.set_timeout(Duration::from_secs(config.train.ddp_timeout));
        let identity = Identity {
            model: model.hash.clone(),
            data: data.hash(),
            config: config.defining_keys()?,
        };
        // Before anything is made of it: a rank with another configuration computes something else.
        let compared = serde_json::to_vec(&(env!("CARGO_PKG_VERSION"), &identity))
            .map_err(|e| Error::Internal(format!("cannot compare ranks: {e}")))?;
        ranks.agree("program, configuration, model or data", &compared)?;
        let mut records = None;
        let start = ranks.from_root(|| {
            let (begun, start) = self.begin(model, place, &identity)?;
            records = Some(begun);
            Ok(start)
        })?;

        let together = place.together.as_ref();
        let adapter = match together {
            Some(together) => together.adapter.clone(),
            None => make_adapter(config, model, ranks, progress)?,
        };
        let trained_parameters = adapter.num_parameters();
        let total_steps = self.steps();
        progress.line(&format!(
            "{} with {trained_parameters} trained parameters, {} problems, {total_steps} steps",
            model.name,
            data.len()
        ));
        let sizes = place.sizes;
        let engines = self.engines(model, Some(&adapter), place)?;
        let shared = (&engines, ranks);
        let mut trainer = data.trainer(config, model, adapter, total_steps, sizes, shared)?;
        if let Some(state) = &start.state {
            trainer.restore(state)?;
            progress.line(&format!("going on after step {}", state.step));
        }

        signals::install()?;
        let evaluator = self.evaluator(model, place, &engines)?;
        let mut evaluate = |step: u64, adapter: &Adapter| evaluator.evaluate(step, adapter);
        let mut session = Session {
            config: &config.train,
            total_steps,
            identity,
            ranks: ranks.clone(),
            records,
            progress,
            of_all: together.map(|together| together.steps),
            evaluations: start.evaluations()?,
            dead_steps: start.dead_steps,
            evaluate: (!config.eval.data.is_empty()).then_some(&mut evaluate),
            write_adapter: &Adapter::save,
            curve: Vec::new(),
        };
        session.run(&mut *trainer)?;
        let (evaluations, curve) = (session.evaluations, session.curve);
        let mut path = PathBuf::new();
        if let Some(directory) = place.directory {
            path = directory.adapter();
            trainer.adapter().save(&path)?;
        }
        Ok(Outcome {
            steps: total_steps,
            trained_parameters,
            evaluations,
            curve,
            adapter: path,
            text: trainer.adapter().short_text(),
        })
    }

    /// What samples completions, for training and evaluation.
    fn engines<'a>(
        &self,
        model: &'a Model,
        adapter: Option<&Adapter>,
        place: &'a Place<'_>,
    ) -> Result<Engines<'a>> {
        let (config, ranks) = (&self.config, &place.ranks);
        if let Some(together) = &place.together {
            return Ok(Engines::Lockstep(together.seat));
        }
        let folder = ranks.from_root(|| {
            let directory = place.directory.map(RunDirectory::path);
            Ok(directory
                .map(|path| path.join("adapters"))
                .unwrap_or_default())
        })?;
        let site = Site {
            folder: &folder,
            context: self.longest(),
            rank: ranks.rank(),
            ranks: ranks.size(),
            progress: place.progress,
        };
        let batch = place.sizes.max_batch_size;
        Engines::open(&config.rollout, model, adapter, batch, &site)
    }

    /// Tokens of the longest prompt with the longest completion, in training and evaluation.
    fn longest(&self) -> usize {
        let config = &self.config;
        let training = self.data.longest_prompt() + config.grpo.max_completion_length;
        let completion = config
            .eval
            .max_tokens
            .unwrap_or(config.grpo.max_completion_length);
        let prompts = self.sets.iter().map(EvalSet::longest_prompt);
        prompts
            .map(|prompt| prompt + completion)
            .fold(training, usize::max)
    }

    /// What the root does before training: the folder's first files, and the checkpoint to go on from.
    fn begin(
        &self,
        model: &Model,
        place: &Place<'_>,
        identity: &Identity,
    ) -> Result<(Records, Start)> {
        let config = &self.config;
        let directory = place
            .directory
            .ok_or_else(|| Error::Internal("the root has no run directory".to_owned()))?;
        if !place.resume {
            directory.write_config(config)?;
        }
        Environment::of(model, &model.decoder.placement.device).record(directory)?;
        let mut store = Store::open(&directory.checkpoints(), config.train.save_total_limit)?;
        let together = place.together.as_ref();
        let notices = together.map_or(place.progress, |together| together.notices);
        let checkpoint = latest(&mut store, directory, identity, notices)?;
        if place.resume {
            directory.write_config(config)?;
        }
        let (mut start, mut lengths) = (Start::default(), BTreeMap::new());
        if let Some(checkpoint) = checkpoint {
            lengths = checkpoint.logs;
            start = Start::new(
                checkpoint.state,
                &checkpoint.evaluations,
                checkpoint.dead_steps,
            )?;
        }
        let logs = Logs::open(directory, &lengths)?;
        Ok((Records { store, logs }, start))
    }
}

/// Where a run goes on, as the root tells the other ranks.
#[derive(Default, Serialize, Deserialize)]
struct Start {
    state: Option<TrainState>,
    /// As JSON, which is what scores are kept in.
    evaluations: String,
    dead_steps: u64,
}

impl Start {
    fn new(state: TrainState, evaluations: &[Evaluation], dead_steps: u64) -> Result<Self> {
        Ok(Self {
            state: Some(state),
            evaluations: serde_json::to_string(evaluations)
                .map_err(|e| Error::Internal(format!("cannot tell evaluations: {e}")))?,
            dead_steps,
        })
    }

    fn evaluations(&self) -> Result<Vec<Evaluation>> {
        match self.evaluations.as_str() {
            "" => Ok(Vec::new()),
            text => serde_json::from_str(text)
                .map_err(|e| Error::Internal(format!("cannot read evaluations: {e}"))),
        }
    }
}

impl Job {
    fn evaluator<'a>(
        &'a self,
        model: &'a Model,
        place: &'a Place<'_>,
        engines: &'a Engines<'a>,
    ) -> Result<Evaluator<'a>> {
        let mut evaluator = Evaluator::new(&self.config, &self.sets, model, place, engines)?;
        if let (Some(folder), true) = (&place.shared, place.ranks.is_root()) {
            evaluator.share_untrained(folder)?;
        }
        Ok(evaluator)
    }

    /// Evaluates the untrained model for the runs that share its completions, as far as none of them has
    /// done it or is about to.
    ///
    /// # Errors
    /// Those of [`Evaluator::evaluate`].
    pub fn evaluate_untrained(
        &self,
        model: &Model,
        place: &Place<'_>,
        adapter: &Adapter,
        claimed: &Claimed,
    ) -> Result<()> {
        if let Some(directory) = place.directory {
            directory.write_config(&self.config)?;
        }
        let engines = self.engines(model, Some(adapter), place)?;
        self.evaluator(model, place, &engines)?
            .evaluate_untrained(adapter, claimed)
    }
}

/// How the configuration wants its checkpoint opened.
pub fn open_options(config: &Config, quiet: bool) -> OpenOptions {
    OpenOptions {
        random_init: config.model.random_init.then_some(config.train.seed),
        quiet,
    }
}

/// Places the checkpoint in memory as the configuration wants it, with a bar of what is read of it:
/// everything once for its hash and once for the weights.
pub fn load_model(config: &Config, pretrained: Pretrained, quiet: bool) -> Result<Model> {
    let touched = pretrained.weights.touched();
    let megabytes = |bytes: usize| bytes as u64 / 1_000_000;
    let total = megabytes(2 * pretrained.weights.stored_bytes());
    let bar = Progress::new(quiet).bar("loading (MB)", total);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                bar.set_position(megabytes(touched.load(Ordering::Relaxed)).min(total));
                std::thread::park_timeout(Duration::from_millis(200));
            }
            bar.clear();
        });
        let model = place(config, pretrained, quiet);
        done.store(true, Ordering::Relaxed);
        watcher.thread().unpark();
        model
    })
}

fn place(config: &Config, pretrained: Pretrained, quiet: bool) -> Result<Model> {
    let options = LoadOptions {
        device: config.model.device.open()?,
        dtype: config.model.dtype.to_dtype(),
        mmap: config.model.mmap,
        open: open_options(config, quiet),
        ..LoadOptions::default()
    };
    Model::from_checkpoint(pretrained, &options)
}

/// The checkpoint to go on from: whole, of this run, and with its logs still there.
fn latest(
    store: &mut Store,
    directory: &RunDirectory,
    identity: &Identity,
    progress: Progress,
) -> Result<Option<Checkpoint>> {
    let usable = |checkpoint: &Checkpoint| {
        if Logs::long_enough(directory, &checkpoint.logs) {
            return Ok(());
        }
        Err(Error::data(format!(
            "the logs of {} end before step {}",
            directory.path().display(),
            checkpoint.state.step
        )))
    };
    let found = store.latest(usable, |line| progress.line(line))?;
    if let Some(checkpoint) = &found {
        let differences = checkpoint.identity.differences(identity);
        if !differences.is_empty() {
            return Err(Error::config(format!(
                "cannot go on with {}: {}",
                directory.path().display(),
                differences.join("; ")
            )));
        }
    }
    Ok(found)
}

/// An untrained adapter as the configuration wants it.
pub fn make_adapter(
    config: &Config,
    model: &Model,
    ranks: &Ranks,
    progress: Progress,
) -> Result<Adapter> {
    let total = model.decoder.config.num_hidden_layers * 7;
    let bar = progress.bar("decomposing weights", total as u64);
    let adapter = Adapter::new(
        &config.adapter,
        model.base(),
        &model.decoder,
        &SvdCache::user().shared(ranks),
        &|done, _| bar.set_position(done as u64),
    );
    bar.clear();
    adapter
}
