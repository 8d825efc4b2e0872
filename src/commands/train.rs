//! `tinylora train`: configuration → model, data, adapter → training → adapter file.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use serde_json::json;

use crate::cli::GlobalArgs;
use crate::config::{Config, Method, Source};
use crate::model::Checkpoint as Pretrained;
use crate::run::directory::{self, RunDirectory};
use crate::run::job::{self, Job, Outcome, Place};
use crate::run::plan::{self, Plan, Room, Setting, WeightBytes};
use crate::run::progress::Progress;
use crate::run::training::Evaluation;
use crate::run::{memory, plot};
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

    // Everything that can be refused is refused before a folder is made or weights are read.
    let device = config.model.device.open()?;
    let open = job::open_options(&config, global.quiet);
    let mut pretrained = Pretrained::open(&config.model.path, &open)?;
    keep_today(&mut config, resumed.as_deref(), &mut pretrained)?;
    let context = pretrained.config.max_position_embeddings;
    let job = Job::new(config, &pretrained.tokenizer, context, global.quiet)?;
    let config = &job.config;
    let (raw, shape) = (&pretrained.weights, &pretrained.config);
    let weights = WeightBytes::of_checkpoint(raw, shape, &config.model)?;
    let on_cpu = device.is_cpu();
    let plan = job.plan(&Setting {
        model: &pretrained.config,
        weights,
        on_cpu,
        room: Room::now(config.model.memory_gb, on_cpu, 0),
        runs: 1,
    })?;
    if args.dry_run {
        let text = plan_text(&job, &pretrained, &plan)?;
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
    let model = job::load_model(config, pretrained, global.quiet)?;
    let place = Place {
        directory: &directory,
        resume: resumed.is_some(),
        shared: None,
        sizes: plan.sizes,
        progress,
        together: None,
    };
    let outcome = job.train(&model, &place).map_err(|error| match error {
        Error::Interrupted(what) => Error::Interrupted(format!(
            "{what}; go on with: tinylora train --resume {}",
            directory.path().display()
        )),
        other => other,
    })?;

    let summary = Summary {
        run: directory.path(),
        seconds: started.elapsed().as_secs_f64(),
        outcome: &outcome,
        plan: &plan,
    };
    let what = match config.method {
        Method::Grpo => "reward",
        Method::Sft => "loss",
    };
    progress.line(&plot::curve(what, &outcome.curve, 64, 8));
    progress.line(&summary.scores());
    let size = outcome.trained_parameters * config.adapter.dtype.size();
    progress.line(&format!(
        "adapter saved to {}: {} numbers, {}",
        outcome.adapter.display(),
        outcome.trained_parameters,
        plan::bytes(size)
    ));
    if let Some(text) = plan.compared() {
        progress.line(&text);
    }
    if let Some(text) = &outcome.text {
        progress.line(&format!("as text, for --adapter: {text}"));
    }
    report::after_training(directory.path(), progress);
    if args.json {
        print(out, &format!("{}\n", summary.to_json()))?;
    }
    Ok(())
}

/// A run sees the same day from its start to its end, on whatever day it goes on.
fn keep_today(config: &mut Config, run: Option<&Path>, pretrained: &mut Pretrained) -> Result<()> {
    if let (None, Some(run)) = (config.data.today, run) {
        config.data.today = directory::config_of(run)?.data.today;
    }
    match config.data.today {
        Some(today) => pretrained.tokenizer.set_today(today),
        None => config.data.today = pretrained.tokenizer.today(),
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
    overrides.extend(global.mmap.then(|| "model.mmap=true".to_owned()));
    overrides.extend(global.seed.map(|s| format!("train.seed={s}")));
    overrides
}

/// Writes to stdout.
pub(super) fn print(out: &mut dyn Write, text: &str) -> Result<()> {
    out.write_all(text.as_bytes())
        .map_err(|e| Error::data(format!("cannot write to stdout: {e}")))
}

/// `--dry-run`: what would be done, as a configuration file with remarks.
fn plan_text(job: &Job, pretrained: &Pretrained, plan: &Plan) -> Result<String> {
    let Job { config, data, .. } = job;
    let model = &pretrained.config;
    let steps = job.steps();
    let trained = plan::trained_parameters(config, model);
    let size = plan::bytes(trained * config.adapter.dtype.size());
    let mut remarks = vec![
        format!("{} problems, {steps} steps", data.len()),
        format!("{trained} trained parameters, {size}"),
    ];
    remarks.extend(plan.to_string().lines().map(str::to_owned));
    remarks.push("the first prompt as the model sees it:".to_owned());
    remarks.extend(data.first_prompt().lines().map(|line| format!("  {line}")));
    let remarks: String = remarks.iter().map(|line| format!("# {line}\n")).collect();
    Ok(format!("{}\n{remarks}", config.to_toml()?))
}

/// What a finished run has to say.
struct Summary<'a> {
    run: &'a Path,
    seconds: f64,
    outcome: &'a Outcome,
    plan: &'a Plan,
}

impl Summary<'_> {
    fn to_json(&self) -> serde_json::Value {
        let scores = |e: Option<&Evaluation>| e.map(|e| e.scores.clone()).unwrap_or_default();
        json!({
            "run_dir": self.run,
            "steps": self.outcome.steps,
            "seconds": self.seconds,
            "trained_parameters": self.outcome.trained_parameters,
            "planned_memory_bytes": self.plan.peak(),
            "peak_memory_bytes": memory::peak(),
            "eval_before": scores(self.outcome.before()),
            "eval_after": scores(self.outcome.after()),
        })
    }

    /// A line a metric: before → after, each with its standard error.
    fn scores(&self) -> String {
        let (Some(before), Some(after)) = (self.outcome.before(), self.outcome.after()) else {
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
