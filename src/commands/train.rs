//! `tinylora train`: configuration → model, data, adapter → training → adapter file.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use serde_json::json;

use crate::adapter::{Adapter, SvdCache};
use crate::cli::GlobalArgs;
use crate::config::{Config, Method, Source};
use crate::model::{Checkpoint as Pretrained, LoadOptions, Model, OpenOptions};
use crate::run::checkpoint::{Checkpoint, Identity, Store};
use crate::run::directory::{self, RunDirectory};
use crate::run::environment::Environment;
use crate::run::evaluation::Evaluator;
use crate::run::logs::Logs;
use crate::run::problems::{self, TrainingData};
use crate::run::progress::Progress;
use crate::run::training::{Evaluation, Session};
use crate::run::{plan, plot, signals};
use crate::{Error, Result, report};

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

/// Configuration without `--config`.
const QUICK_START: &str = "mini.toml";

/// Runs the command.
pub fn run(args: &TrainArgs, global: &GlobalArgs, out: &mut dyn Write) -> Result<()> {
    let started = Instant::now();
    let progress = Progress::new(global.quiet);
    let resumed = resumed_run(args)?;
    let source = match (&args.config, &resumed) {
        (Some(name), _) => Source::find(name)?,
        (None, Some(run)) => directory::config_source(run)?,
        (None, None) => Source::find(QUICK_START)?,
    };
    let mut config = Config::load(&source, &overrides(args, global))?;
    problems::complete(&mut config)?;

    // Everything that can be refused is refused before a folder is made or weights are read.
    let device = config.model.device.open()?;
    let open = OpenOptions {
        random_init: config.model.random_init.then_some(config.train.seed),
        quiet: global.quiet,
    };
    let pretrained = Pretrained::open(&config.model.path, &open)?;
    let context = pretrained.config.max_position_embeddings;
    let data = TrainingData::load(&config, &pretrained.tokenizer, context, global.quiet)?;
    let sets = Evaluator::load(&config, &pretrained.tokenizer)?;
    if args.dry_run {
        let text = plan_text(&config, &pretrained, &data)?;
        return print(out, &text);
    }

    let directory = match (&resumed, &args.run_dir) {
        (Some(run), _) => RunDirectory::open(run)?,
        (None, Some(path)) => RunDirectory::create_at(path)?,
        (None, None) => {
            let name = config.train.run_name.as_deref().unwrap_or(&source.name);
            RunDirectory::create_new(name)?
        }
    };
    progress.line(&format!("run directory {}", directory.path().display()));
    if resumed.is_none() {
        directory.write_config(&config)?;
    }

    let load = LoadOptions {
        device,
        dtype: config.model.dtype.to_dtype(),
        open,
        ..LoadOptions::default()
    };
    let model = Model::from_checkpoint(pretrained, &load)?;
    Environment::of(&model, &load.device).record(&directory)?;
    let identity = Identity {
        model: model.hash.clone(),
        data: data.hash(),
        config: config.defining_keys()?,
    };
    let mut store = Store::open(&directory.checkpoints(), config.train.save_total_limit)?;
    let checkpoint = latest(&mut store, &directory, &identity, progress)?;
    if resumed.is_some() {
        directory.write_config(&config)?;
    }

    let adapter = make_adapter(&config, &model, progress)?;
    let trained_parameters = adapter.num_parameters();
    let total_steps = config
        .train
        .max_steps
        .unwrap_or_else(|| data.steps(&config));
    progress.line(&format!(
        "{} with {trained_parameters} trained parameters, {} problems, {total_steps} steps",
        model.name,
        data.len()
    ));
    let mut trainer = data.trainer(&config, &model, adapter, total_steps)?;
    let mut evaluations = Vec::new();
    let mut lengths = Default::default();
    if let Some(checkpoint) = checkpoint {
        trainer.restore(&checkpoint.state)?;
        progress.line(&format!("going on after step {}", checkpoint.state.step));
        (evaluations, lengths) = (checkpoint.evaluations, checkpoint.logs);
    }

    signals::install()?;
    let evaluator = Evaluator::new(&config, sets, &model, &directory, progress)?;
    let mut evaluate = |step: u64, adapter: &Adapter| evaluator.evaluate(step, &model, adapter);
    let mut session = Session {
        config: &config.train,
        total_steps,
        identity,
        store,
        logs: Logs::open(&directory, &lengths)?,
        progress,
        evaluations,
        evaluate: (!config.eval.data.is_empty()).then_some(&mut evaluate),
        write_adapter: &Adapter::save,
        curve: Vec::new(),
    };
    session.run(&mut *trainer).map_err(|error| match error {
        Error::Interrupted(what) => Error::Interrupted(format!(
            "{what}; go on with: tinylora train --resume {}",
            directory.path().display()
        )),
        other => other,
    })?;
    let (evaluations, curve) = (session.evaluations, session.curve);

    let path = directory.adapter();
    trainer.adapter().save(&path)?;
    let summary = Summary {
        run: directory.path(),
        steps: total_steps,
        seconds: started.elapsed().as_secs_f64(),
        trained_parameters,
        before: evaluations.iter().find(|e| e.step == 0),
        after: evaluations.iter().rfind(|e| e.step == total_steps),
    };
    let what = match config.method {
        Method::Grpo => "reward",
        Method::Sft => "loss",
    };
    progress.line(&plot::curve(what, &curve, 64, 8));
    progress.line(&summary.scores());
    let size = trained_parameters * config.adapter.dtype.size();
    progress.line(&format!(
        "adapter saved to {}: {trained_parameters} numbers, {}",
        path.display(),
        plan::bytes(size)
    ));
    report::after_training(directory.path(), progress);
    if args.json {
        print(out, &format!("{}\n", summary.to_json()))?;
    }
    Ok(())
}

/// The run that `--resume` means, if it is there.
fn resumed_run(args: &TrainArgs) -> Result<Option<PathBuf>> {
    match (&args.resume, &args.run_dir) {
        (None, _) => Ok(None),
        (Some(Some(run)), None) => directory::find(run).map(Some),
        (Some(None), Some(path)) => directory::find(path).map(Some),
        (Some(None), None) => directory::newest().map(Some),
        (Some(Some(_)), Some(_)) => Err(Error::config(
            "--resume RUN and --run-dir both name a run directory: give one of them",
        )),
    }
}

fn overrides(args: &TrainArgs, global: &GlobalArgs) -> Vec<String> {
    let mut overrides = args.overrides.clone();
    overrides.extend(global.device.map(|d| format!("model.device={d}")));
    overrides.extend(global.dtype.map(|d| format!("model.dtype={}", d.name())));
    overrides.extend(global.seed.map(|s| format!("train.seed={s}")));
    overrides
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

fn make_adapter(config: &Config, model: &Model, progress: Progress) -> Result<Adapter> {
    let total = model.decoder.config.num_hidden_layers * 7;
    let bar = progress.bar("decomposing weights", total as u64);
    let adapter = Adapter::new(
        &config.adapter,
        model.base(),
        &model.decoder,
        &SvdCache::user(),
        &|done, _| bar.set_position(done as u64),
    );
    bar.clear();
    adapter
}

fn print(out: &mut dyn Write, text: &str) -> Result<()> {
    out.write_all(text.as_bytes())
        .map_err(|e| Error::data(format!("cannot write to stdout: {e}")))
}

/// `--dry-run`: what would be done, as a configuration file with remarks.
fn plan_text(config: &Config, pretrained: &Pretrained, data: &TrainingData) -> Result<String> {
    let model = &pretrained.config;
    let steps = config.train.max_steps.unwrap_or_else(|| data.steps(config));
    let trained = plan::trained_parameters(config, model);
    let size = plan::bytes(trained * config.adapter.dtype.size());
    let mut remarks = vec![
        format!("{} problems, {steps} steps", data.len()),
        format!("{trained} trained parameters, {size}"),
        "memory, about:".to_owned(),
    ];
    let memory = plan::memory(config, model, data.longest_prompt());
    let total = memory.iter().map(|(_, size)| size).sum();
    for (what, size) in memory.into_iter().chain([("in all".to_owned(), total)]) {
        remarks.push(format!("  {:>9}  {what}", plan::bytes(size)));
    }
    remarks.push("the first prompt as the model sees it:".to_owned());
    remarks.extend(data.first_prompt().lines().map(|line| format!("  {line}")));
    let remarks: String = remarks.iter().map(|line| format!("# {line}\n")).collect();
    Ok(format!("{}\n{remarks}", config.to_toml()?))
}

/// What a finished run has to say.
struct Summary<'a> {
    run: &'a Path,
    steps: u64,
    seconds: f64,
    trained_parameters: usize,
    before: Option<&'a Evaluation>,
    after: Option<&'a Evaluation>,
}

impl Summary<'_> {
    fn to_json(&self) -> serde_json::Value {
        let scores = |e: Option<&Evaluation>| e.map(|e| e.scores.clone()).unwrap_or_default();
        json!({
            "run_dir": self.run,
            "steps": self.steps,
            "seconds": self.seconds,
            "trained_parameters": self.trained_parameters,
            "eval_before": scores(self.before),
            "eval_after": scores(self.after),
        })
    }

    /// A line a metric: before → after, each with its standard error.
    fn scores(&self) -> String {
        let (Some(before), Some(after)) = (self.before, self.after) else {
            return String::new();
        };
        let mut lines = Vec::new();
        for (set, metrics) in &after.scores {
            let names = metrics
                .as_object()
                .into_iter()
                .flatten()
                .map(|(name, _)| name);
            for name in names.filter(|n| !n.ends_with("_stderr")) {
                let show = |evaluation: &Evaluation| {
                    let metrics = &evaluation.scores[set];
                    let value = metrics[name].as_f64().unwrap_or(f64::NAN);
                    let stderr = metrics[format!("{name}_stderr")].as_f64();
                    let stderr = stderr.map_or(String::new(), |s| format!(" ± {s:.3}"));
                    format!("{value:.3}{stderr}")
                };
                lines.push(format!("{set} {name}: {} → {}", show(before), show(after)));
            }
        }
        lines.join("\n")
    }
}
