//! `tinylora sweep`: many training runs on one loaded model, a table and figures of what they give.

use std::io::Write;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use clap::Args;

use super::train::print;
use crate::adapter::AdapterSpec;
use crate::cli::GlobalArgs;
use crate::config::Source;
use crate::model::{Checkpoint as Pretrained, Model, ModelConfig};
use crate::ranks::Ranks;
use crate::run::directory::RUNS;
use crate::run::progress::Progress;
use crate::run::{fs, signals};
use crate::run::{job, plan};
use crate::sweep::file::SweepFile;
use crate::sweep::grid::{self, Point};
use crate::sweep::jobs::Jobs;
use crate::sweep::results::{Opening, SweepDirectory};
use crate::sweep::summary::Summary;
use crate::sweep::training::Training;
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
    /// Most runs that are trained in lockstep, on one pass of the model; 1: one after the other [default: as
    /// the description says, else as many as fit into memory, up to 8]
    #[arg(long, value_name = "N")]
    lockstep: Option<NonZeroUsize>,
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
    let context = pretrained.config.max_position_embeddings;
    let jobs = Jobs::read(&points, &pretrained.tokenizer, context, global.quiet)?;
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
        data_hashes: jobs.hashes(),
        runs: grid::definition(&points)?,
    })?;
    signals::install()?;
    let training = Training {
        points: &points,
        model: &model,
        jobs: &jobs,
        lockstep: args.lockstep.or(file.lockstep),
        progress,
    };
    let trained = training.run(&mut sweep);
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

/// Makes every adapter that rests on decompositions once: they are in the cache from then on, and
/// a rank that is too large for the model is known.
fn check_adapters(points: &[Point], model: &Model, progress: Progress) -> Result<()> {
    let mut seen: Vec<&AdapterSpec> = Vec::new();
    for Point { name, config, .. } in points {
        if config.adapter.needs_svd() && !seen.contains(&&config.adapter) {
            job::make_adapter(config, model, &Ranks::alone(), progress).map_err(
                |error| match error {
                    Error::Config(message) => Error::config(format!("{name}: {message}")),
                    other => other,
                },
            )?;
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
