//! `tinylora sweep`: many training runs on one loaded model, a table and figures of what they give.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use serde_json::Map;

use super::train::print;
use crate::adapter::AdapterSpec;
use crate::cli::GlobalArgs;
use crate::config::{Config, Source};
use crate::model::{Checkpoint as Pretrained, Model, ModelConfig};
use crate::run::directory::{CONFIG, RUNS, RunDirectory};
use crate::run::job::{self, Job, Place};
use crate::run::plan::{self, WeightBytes};
use crate::run::progress::Progress;
use crate::run::{fs, signals};
use crate::sweep::file::SweepFile;
use crate::sweep::grid::{self, Point};
use crate::sweep::results::{Opening, RunResult, SweepDirectory};
use crate::sweep::summary::Summary;
use crate::sweep::{figure, table};
use crate::{Error, Result};

/// Arguments of `tinylora sweep`.
#[derive(Debug, Args)]
pub struct SweepArgs {
    /// Description of the sweep: a path, a file in configs/, or the name of a built-in one
    #[arg(long, value_name = "FILE")]
    config: String,
    /// Override a key of every run by its dotted name, as in eval.limit=64 (repeatable)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Folder of the sweep [default: runs/<name of the description>]
    #[arg(long, value_name = "DIR")]
    sweep_dir: Option<PathBuf>,
    /// Go on with the sweep in its folder: finished runs stay, the others are finished
    #[arg(long)]
    resume: bool,
    /// List the runs with their trained parameters, then stop
    #[arg(long)]
    dry_run: bool,
}

/// Runs the command.
pub fn run(args: &SweepArgs, global: &GlobalArgs, out: &mut dyn Write) -> Result<()> {
    let progress = Progress::new(global.quiet);
    let source = Source::find_sweep(&args.config)?;
    let file = SweepFile::parse(&source)?;
    let points = grid::expand(&source, &file, &overrides(args, global)?)?;
    let Some(first) = points.first() else {
        return Err(Error::config(format!("{}: nothing to run", source.origin)));
    };
    let path = match &args.sweep_dir {
        Some(path) => path.clone(),
        None => Path::new(RUNS).join(&source.name),
    };
    if !args.dry_run {
        SweepDirectory::check(&path, args.resume)?;
    }

    // Everything that can be refused is refused before weights are read and before the first run.
    first.config.model.device.open()?;
    let open = job::open_options(&first.config, global.quiet);
    let mut pretrained = Pretrained::open(&first.config.model.path, &open)?;
    if let Some(today) = first.config.data.today {
        pretrained.tokenizer.set_today(today);
    }
    let data_hashes = check_data(&points, &pretrained, global.quiet)?;
    if args.dry_run {
        return print(out, &listing(&points, &pretrained.config));
    }
    let model = job::load_model(&first.config, pretrained, global.quiet)?;
    check_adapters(&points, &model, progress)?;

    let mut sweep = SweepDirectory::open(Opening {
        path: &path,
        resume: args.resume,
        description: &source.text,
        model_hash: &model.hash,
        data_hashes,
        runs: grid::definition(&points)?,
    })?;
    signals::install()?;
    let trained = train_all(&points, &model, &mut sweep, progress);
    let title = file.title.as_deref().unwrap_or(&source.name);
    // What is done is shown in any case.
    if let Some(summary) = Summary::new(sweep.results()) {
        let text = table::table(&summary);
        fs::write_atomic(&path.join("table.txt"), text.as_bytes())?;
        print(out, &text)?;
        for file in figure::write(&summary, title, &path)? {
            progress.line(&format!("figure {}", file.display()));
        }
    }
    trained.map_err(|error| match error {
        Error::Interrupted(what) => Error::Interrupted(format!(
            "{what}; go on with the same command and --resume ({} of {} runs are done)",
            sweep.results().len(),
            points.len()
        )),
        other => other,
    })
}

fn overrides(args: &SweepArgs, global: &GlobalArgs) -> Result<Vec<String>> {
    if global.seed.is_some() {
        let message = "--seed: the seeds of a sweep are in its file";
        return Err(Error::config(message));
    }
    let mut overrides = args.overrides.clone();
    overrides.extend(global.device.map(|d| format!("model.device={d}")));
    overrides.extend(global.dtype.map(|d| format!("model.dtype={}", d.name())));
    overrides.extend(global.mmap.then(|| "model.mmap=true".to_owned()));
    Ok(overrides)
}

/// Reads the problems of every kind of run once; gives their hashes.
fn check_data(points: &[Point], pretrained: &Pretrained, quiet: bool) -> Result<Vec<String>> {
    // What is learnt from and how it is asked does not depend on these.
    let rest = |config: &Config| Config {
        adapter: AdapterSpec::default(),
        optim: Default::default(),
        train: Default::default(),
        ..config.clone()
    };
    let mut seen: Vec<Config> = Vec::new();
    let mut hashes = Vec::new();
    for point in points {
        let kind = rest(&point.config);
        if !seen.contains(&kind) {
            hashes.push(load(point, pretrained, quiet)?.data.hash());
            seen.push(kind);
        }
    }
    Ok(hashes)
}

fn load(point: &Point, pretrained: &Pretrained, quiet: bool) -> Result<Job> {
    let context = pretrained.config.max_position_embeddings;
    Job::new(point.config.clone(), &pretrained.tokenizer, context, quiet)
}

/// Makes every adapter that rests on decompositions once: they are in the cache from then on, and
/// a rank that is too large for the model is known.
fn check_adapters(points: &[Point], model: &Model, progress: Progress) -> Result<()> {
    let mut seen: Vec<&AdapterSpec> = Vec::new();
    for Point { name, config, .. } in points {
        if config.adapter.needs_svd() && !seen.contains(&&config.adapter) {
            job::make_adapter(config, model, progress).map_err(|error| match error {
                Error::Config(message) => Error::config(format!("{name}: {message}")),
                other => other,
            })?;
            seen.push(&config.adapter);
        }
    }
    Ok(())
}

/// `--dry-run`: a line a run.
fn listing(points: &[Point], model: &ModelConfig) -> String {
    let head = ["run", "parameters", "learning rate", "seed", "steps"];
    let mut rows = vec![head.map(String::from).to_vec()];
    rows.extend(points.iter().map(|point| {
        let config = &point.config;
        let steps = match config.train.max_steps {
            Some(steps) => steps.to_string(),
            None => format!("{} epochs", config.train.num_train_epochs),
        };
        vec![
            point.name.clone(),
            plan::trained_parameters(config, model).to_string(),
            point.learning_rate().map_or("-".into(), |r| r.to_string()),
            config.train.seed.to_string(),
            steps,
        ]
    }));
    format!("{}{} runs\n", crate::eval::align(&rows, 1), points.len())
}

fn train_all(
    points: &[Point],
    model: &Model,
    sweep: &mut SweepDirectory,
    progress: Progress,
) -> Result<()> {
    let finished = sweep.finished();
    let open: Vec<&Point> = points
        .iter()
        .filter(|p| !finished.contains(&p.name))
        .collect();
    let done = points.len() - open.len();
    if done > 0 {
        progress.line(&format!("{done} of {} runs are done already", points.len()));
    }
    let bar = progress.bar("sweep", points.len() as u64);
    bar.set_position(done as u64);
    for (i, point) in open.into_iter().enumerate() {
        signals::check()?;
        let number = done + i + 1;
        progress.line(&format!("run {number} of {}: {}", points.len(), point.name));
        let result = train_one(point, model, sweep, progress)?;
        progress.line(&one_line(&result));
        sweep.add(result)?;
        bar.set_position(number as u64);
    }
    bar.finish();
    Ok(())
}

fn train_one(
    point: &Point,
    model: &Model,
    sweep: &SweepDirectory,
    progress: Progress,
) -> Result<RunResult> {
    let started = Instant::now();
    let context = model.decoder.config.max_position_embeddings;
    let job = Job::new(point.config.clone(), &model.tokenizer, context, true)?;
    let decoder = &model.decoder;
    let on_cpu = decoder.placement.device.is_cpu();
    let plan = job.plan(&decoder.config, WeightBytes::of_model(model)?, on_cpu)?;
    let path = sweep.run(&point.name);
    let resume = path.join(CONFIG).is_file();
    let directory = match resume {
        true => RunDirectory::open(&path)?,
        false => RunDirectory::create_at(&path)?,
    };
    // LoRA-XS with a random start is not the untrained model at step 0.
    let starts_untrained = point.config.adapter.init_std == 0.0;
    let place = Place {
        directory: &directory,
        resume,
        shared: starts_untrained.then(|| sweep.untrained()),
        sizes: plan.sizes,
        progress,
    };
    let adapter = &point.config.adapter;
    let mut result = RunResult {
        run: point.name.clone(),
        size: point.size.clone(),
        method: point.config.method,
        axes: point.axes.clone(),
        adapter: adapter.kind.name().to_owned(),
        trained_parameters: plan::trained_parameters(&point.config, &model.decoder.config),
        learning_rate: point.learning_rate().unwrap_or_default(),
        seed: point.config.train.seed,
        steps: job.steps(),
        before: Map::new(),
        after: Map::new(),
        seconds: 0.0,
        diverged: None,
    };
    match job.train(model, &place) {
        Ok(outcome) => {
            let scores = |e: Option<&crate::run::training::Evaluation>| {
                e.map(|e| e.scores.clone()).unwrap_or_default()
            };
            result.before = scores(outcome.before());
            result.after = scores(outcome.after());
        }
        // A learning rate too large is a result too.
        Err(Error::Diverged(why)) => result.diverged = Some(why),
        Err(error) => return Err(error),
    }
    result.seconds = started.elapsed().as_secs_f64();
    Ok(result)
}

/// How a run ended: its first metric, before and after.
fn one_line(result: &RunResult) -> String {
    if let Some(why) = &result.diverged {
        return format!("diverged: {why}");
    }
    let first = |scores: &Map<String, serde_json::Value>| {
        let metrics = scores.values().next()?.as_object()?;
        let mut named = metrics
            .iter()
            .filter(|(name, _)| !name.ends_with("_stderr"));
        named.next()?.1.as_f64()
    };
    match (first(&result.before), first(&result.after)) {
        (Some(before), Some(after)) => {
            format!("{before:.3} → {after:.3} in {:.1} s", result.seconds)
        }
        _ => format!("done in {:.1} s", result.seconds),
    }
}
