//! `tinylora train`: configuration → model, data, adapter → training → adapter file.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use serde_json::json;

use crate::adapter::AdapterKind;
use crate::cli::GlobalArgs;
use crate::config::{Config, Method, Source};
use crate::model::Checkpoint as Pretrained;
use crate::ranks::Ranks;
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

/// Runs the command, on every rank.
pub fn run(
    args: &TrainArgs,
    global: &GlobalArgs,
    ranks: &Ranks,
    out: &mut dyn Write,
) -> Result<()> {
    let started = Instant::now();
    let quiet = global.quiet || !ranks.is_root();
    let progress = Progress::new(quiet);
    let resumed = ranks.from_root(|| resumed_run(args))?;
    let source = ranks.from_root(|| match (&args.config, &resumed) {
        (Some(name), _) => Source::find(name),
        (None, Some(run)) => directory::config_source(run),
        (None, None) => Source::find(QUICK_START),
    })?;
    let mut config = Config::load(&source, &overrides(args, global))?;
    check_ranks(&config, ranks, progress)?;

    // Everything that can be refused is refused before a folder is made or weights are read.
    let device = config.model.device.open()?;
    let open = job::open_options(&config, quiet);
    let mut pretrained = Pretrained::open(&config.model.path, &open)?;
    keep_today(&mut config, resumed.as_deref(), &mut pretrained, ranks)?;
    let context = pretrained.config.max_position_embeddings;
    let job = Job::new(config, &pretrained.tokenizer, context, quiet)?;
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
        return match ranks.is_root() {
            true => print(out, &text),
            false => Ok(()),
        };
    }

    let directory = ranks.on_root(|| match (&resumed, &args.run_dir) {
        (Some(run), _) => RunDirectory::open(run),
        (None, Some(path)) => RunDirectory::create_at(path),
        (None, None) => {
            let name = config.train.run_name.as_deref().unwrap_or(&source.name);
            RunDirectory::create_new(name)
        }
    })?;
    if let Some(directory) = &directory {
        progress.line(&format!("run directory {}", directory.path().display()));
    }
    let model = job::load_model(config, pretrained, quiet)?;
    let place = Place {
        ranks: ranks.clone(),
        directory: directory.as_ref(),
        resume: resumed.is_some(),
        shared: None,
        sizes: plan.sizes,
        progress,
        together: None,
    };
    let outcome = job
        .train(&model, &place)
        .map_err(|error| how_to_go_on(error, directory.as_ref()))?;
    let Some(directory) = directory else {
        return Ok(());
    };

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

/// What does not go with several processes is refused, what is a waste is said.
fn check_ranks(config: &Config, ranks: &Ranks, progress: Progress) -> Result<()> {
    if ranks.is_alone() {
        return Ok(());
    }
    let kind = config.adapter.kind;
    if !matches!(kind, AdapterKind::TinyLora | AdapterKind::LoraXs) {
        return Err(Error::config(format!(
            "adapter.type = \"{}\" trains in one process: its gradient is as large as its weights, and \
             the bits of its sum depend on who adds what; use tinylora or lora-xs with several",
            kind.name()
        )));
    }
    let (per_step, key) = match config.method {
        Method::Grpo => (config.grpo.prompts_per_step, "grpo.prompts_per_step"),
        Method::Sft => (config.sft.examples_per_step, "sft.examples_per_step"),
    };
    if per_step < ranks.size() {
        progress.line(&format!(
            "{key} = {per_step}: of {} processes some have nothing to do",
            ranks.size()
        ));
    }
    Ok(())
}

/// Adds to an error that leaves a checkpoint how the run goes on.
fn how_to_go_on(error: Error, directory: Option<&RunDirectory>) -> Error {
    let Some(directory) = directory else {
        return error;
    };
    let path = directory.path().display();
    let command = format!("go on with: tinylora train --resume {path}");
    match error {
        Error::Interrupted(what) => Error::Interrupted(format!("{what}; {command}")),
        Error::Lost(what) => Error::Lost(format!("{what}; {command}")),
        other => other,
    }
}

/// A run sees the same day from its start to its end, on whatever day it goes on.
fn keep_today(
    config: &mut Config,
    run: Option<&Path>,
    pretrained: &mut Pretrained,
    ranks: &Ranks,
) -> Result<()> {
    let given = config.data.today;
    let tokenizer = &mut pretrained.tokenizer;
    config.data.today = ranks.from_root(|| {
        let earlier = match (given, run) {
            (None, Some(run)) => directory::config_of(run)?.data.today,
            _ => given,
        };
        Ok(earlier.or(tokenizer.today()))
    })?;
    if let Some(today) = config.data.today {
        tokenizer.set_today(today);
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
