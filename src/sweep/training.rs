//! Training the runs of a sweep: in lockstep where they share passes, else one after the other.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use serde_json::{Map, Value};

use super::grid::Point;
use super::jobs::Jobs;
use super::results::{RunResult, SweepDirectory};
use crate::adapter::{Adapter, AdapterKind};
use crate::config::Sizes;
use crate::lockstep::{self, Lockstep, Seat};
use crate::model::Model;
use crate::ranks::Ranks;
use crate::run::directory::{CONFIG, RunDirectory};
use crate::run::evaluation::Claimed;
use crate::run::job::{self, Job, Outcome, Place, Together};
use crate::run::plan::{self, Plan, Room, Setting, WeightBytes};
use crate::run::progress::{Bar, Progress};
use crate::run::signals;
use crate::{Error, Result};

/// Most runs in lockstep where nobody says how many.
const USUAL_LOCKSTEP: usize = 8;

/// What all runs of a sweep have in common.
pub struct Training<'a> {
    pub points: &'a [Point],
    pub model: &'a Model,
    pub jobs: &'a Jobs,
    /// Most runs in lockstep; unset takes as many as fit with the sizes that they have alone.
    pub lockstep: Option<NonZeroUsize>,
    pub progress: Progress,
}

/// A run that is about to begin.
struct Run<'a> {
    point: &'a Point,
    job: Job,
    sizes: Sizes,
}

impl Training<'_> {
    /// Trains every run that is not done.
    ///
    /// # Errors
    /// The first failure other than a divergence, which is a result; [`Error::Interrupted`] after a signal.
    pub fn run(&self, sweep: &mut SweepDirectory) -> Result<()> {
        let (all, finished) = (self.points.len(), sweep.finished());
        let is_open = |point: &&Point| !finished.contains(&point.name);
        let mut done = all - self.points.iter().filter(is_open).count();
        if done > 0 {
            self.progress
                .line(&format!("{done} of {all} runs are done already"));
        }
        let bar = self.progress.bar("sweep", all as u64);
        bar.set_position(done as u64);
        let memory_gb = self.points.iter().find_map(|p| p.config.model.memory_gb);
        let weights = WeightBytes::of_model(self.model)?;
        let on_cpu = self.model.decoder.placement.device.is_cpu();
        let setting = Setting {
            model: &self.model.decoder.config,
            weights,
            on_cpu,
            room: Room::now(memory_gb, on_cpu, weights.held),
            runs: 1,
        };
        let mut left = self.points.iter().collect();
        while let Some(mut group) = self.next_group(&mut left, &setting)? {
            group.retain(|run| is_open(&run.point));
            if group.is_empty() {
                continue;
            }
            signals::check()?;
            self.announce(&group, done);
            match &group[..] {
                [run] => {
                    let result = self.train_one(run, sweep)?;
                    self.progress.line(&one_line(&result));
                    sweep.add(result)?;
                }
                _ => self.train_together(&group, &setting, sweep)?,
            }
            done += group.len();
            bar.set_position(done as u64);
        }
        bar.finish();
        Ok(())
    }

    fn announce(&self, group: &[Run<'_>], done: usize) {
        let (first, all) = (done + 1, self.points.len());
        let names: Vec<&str> = group.iter().map(|run| &run.point.name[..]).collect();
        let names = names.join(", ");
        self.progress.line(&match group.len() {
            1 => format!("run {first} of {all}: {names}"),
            n => format!("runs {first} to {} of {all} in lockstep: {names}", done + n),
        });
    }

    /// The first run that is left and those that go with it, taken from what is left; `None` when none is.
    /// Finished ones are among them, so that a sweep that goes on has the groups that it had.
    fn next_group<'a>(
        &self,
        left: &mut Vec<&'a Point>,
        setting: &Setting<'_>,
    ) -> Result<Option<Vec<Run<'a>>>> {
        let Some(&first) = left.first() else {
            return Ok(None);
        };
        let most = self.lockstep.map_or(USUAL_LOCKSTEP, NonZeroUsize::get);
        let others = left[1..].iter().copied().filter(|p| go_together(first, p));
        let chosen: Vec<&Point> = std::iter::once(first).chain(others).take(most).collect();
        let jobs: Vec<Job> = chosen
            .iter()
            .map(|point| self.jobs.of(point))
            .collect::<Result<_>>()?;
        let sizes = match self.lockstep {
            Some(_) => planned(&jobs, setting)?,
            None => (1..=jobs.len())
                .rev()
                .find_map(|count| as_alone(&jobs[..count], setting))
                .map_or_else(|| planned(&jobs[..1], setting), Ok)?,
        };
        let group: Vec<Run<'_>> = chosen
            .into_iter()
            .zip(jobs)
            .zip(sizes)
            .map(|((point, job), sizes)| Run { point, job, sizes })
            .collect();
        left.retain(|p| group.iter().all(|run| run.point.name != p.name));
        Ok(Some(group))
    }

    fn train_one(&self, run: &Run<'_>, sweep: &SweepDirectory) -> Result<RunResult> {
        let started = Instant::now();
        let (directory, resume) = open_directory(&sweep.run(&run.point.name))?;
        let place = Place {
            ranks: Ranks::alone(),
            directory: Some(&directory),
            resume,
            shared: starts_untrained(run).then(|| sweep.untrained()),
            sizes: run.sizes,
            progress: self.progress,
            together: None,
        };
        self.result(run, run.job.train(self.model, &place), started)
    }

    /// Trains several runs on one model at a time, and adds their results in order.
    fn train_together(
        &self,
        group: &[Run<'_>],
        setting: &Setting<'_>,
        sweep: &mut SweepDirectory,
    ) -> Result<()> {
        let started = Instant::now();
        let adapters = self.adapters(group)?;
        let directories = group
            .iter()
            .map(|run| open_directory(&sweep.run(&run.point.name)))
            .collect::<Result<Vec<_>>>()?;
        let steps = group.iter().map(|run| run.job.steps()).sum();
        let label = format!("training {} runs", group.len());
        let steps = self.progress.bar(&label, steps);
        let places = Places {
            group,
            directories: &directories,
            adapters: &adapters,
            untrained: sweep.untrained(),
            steps: &steps,
            notices: self.progress,
        };
        let batches = of_runs(setting, group.len()).batches();
        let least = |size: fn(&Sizes) -> usize| group.iter().map(|run| size(&run.sizes)).min();
        let shared = Lockstep {
            decoder: &self.model.decoder,
            tokenizer: &self.model.tokenizer,
            max_batch_size: batches * least(|sizes| sizes.max_batch_size).unwrap_or(1),
            pass_tokens: least(|sizes| sizes.pass_tokens).unwrap_or(1),
        };
        let claimed = Claimed::default();
        let evaluated = shared.run(group.len(), |number, seat| {
            let (job, place) = (&group[number].job, places.of(number, seat));
            job.evaluate_untrained(self.model, &place, &adapters[number], &claimed)
        });
        lockstep::all(evaluated)?;
        let results = Mutex::new(InOrder::new(sweep, group.len()));
        let trained = shared.run(group.len(), |number, seat| {
            let run = &group[number];
            let outcome = run.job.train(self.model, &places.of(number, seat));
            let result = self.result(run, outcome, started)?;
            self.progress
                .line(&format!("{}: {}", result.run, one_line(&result)));
            let mut results = results.lock().unwrap_or_else(PoisonError::into_inner);
            results.add(number, result)
        });
        steps.finish();
        lockstep::all(trained).map(drop)
    }

    /// The untrained adapters of a group. Those with equal A and B hold them in common.
    fn adapters(&self, group: &[Run<'_>]) -> Result<Vec<Adapter>> {
        let mut adapters: Vec<Adapter> = Vec::with_capacity(group.len());
        for run in group {
            let mut adapter =
                job::make_adapter(&run.job.config, self.model, &Ranks::alone(), self.progress)?;
            for other in &adapters {
                adapter.share_factors(other)?;
            }
            adapters.push(adapter);
        }
        Ok(adapters)
    }

    /// What came out of a run; a divergence too is a result.
    fn result(
        &self,
        run: &Run<'_>,
        outcome: Result<Outcome>,
        started: Instant,
    ) -> Result<RunResult> {
        let Point {
            name,
            size,
            axes,
            config,
        } = run.point;
        let (before, after, diverged) = match outcome {
            Ok(outcome) => {
                let scores = |e: Option<&crate::run::training::Evaluation>| {
                    e.map(|e| e.scores.clone()).unwrap_or_default()
                };
                (scores(outcome.before()), scores(outcome.after()), None)
            }
            // A learning rate too large is a result too.
            Err(Error::Diverged(why)) => (Map::new(), Map::new(), Some(why)),
            Err(error) => return Err(error),
        };
        Ok(RunResult {
            run: name.clone(),
            size: size.clone(),
            method: config.method,
            axes: axes.clone(),
            adapter: config.adapter.kind.name().to_owned(),
            trained_parameters: plan::trained_parameters(config, &self.model.decoder.config),
            learning_rate: run.point.learning_rate().unwrap_or_default(),
            seed: config.train.seed,
            steps: run.job.steps(),
            before,
            after,
            seconds: started.elapsed().as_secs_f64(),
            diverged,
        })
    }
}

/// Where the runs of a group take place.
struct Places<'a> {
    group: &'a [Run<'a>],
    directories: &'a [(RunDirectory, bool)],
    adapters: &'a [Adapter],
    /// Folder for completions of the untrained model.
    untrained: PathBuf,
    steps: &'a Bar,
    notices: Progress,
}

impl Places<'_> {
    fn of<'a>(&'a self, number: usize, seat: &'a Seat<'a>) -> Place<'a> {
        let (run, (directory, resume)) = (&self.group[number], &self.directories[number]);
        Place {
            ranks: Ranks::alone(),
            directory: Some(directory),
            resume: *resume,
            shared: starts_untrained(run).then(|| self.untrained.clone()),
            sizes: run.sizes,
            progress: Progress::Silent,
            together: Some(Together {
                seat,
                adapter: self.adapters[number].clone(),
                steps: self.steps,
                notices: self.notices,
            }),
        }
    }
}

/// Whether two runs may share passes, and gain by it: their frozen weights are the same, and they ask for
/// the same kind of passes.
fn go_together(a: &Point, b: &Point) -> bool {
    let frozen = |point: &Point| point.config.adapter.kind != AdapterKind::Full;
    frozen(a) && frozen(b) && a.config.method == b.config.method
}

/// The sizes of runs in lockstep.
///
/// # Errors
/// [`Error::Config`] with the arithmetic when they do not fit.
fn planned(jobs: &[Job], setting: &Setting<'_>) -> Result<Vec<Sizes>> {
    let plans = plans(jobs, setting).map_err(|error| match (error, jobs.len()) {
        (Error::Config(message), runs) if runs > 1 => Error::config(format!(
            "{runs} runs in lockstep: {message}; or lower --lockstep"
        )),
        (error, _) => error,
    })?;
    Ok(plans.iter().map(|plan| plan.sizes).collect())
}

/// The sizes of runs in lockstep where memory leaves each what it has alone.
fn as_alone(jobs: &[Job], setting: &Setting<'_>) -> Option<Vec<Sizes>> {
    let plans = plans(jobs, setting).ok()?;
    let same = |(plan, job): (&Plan, &Job)| plan.sizes == Sizes::of(&job.config);
    let all = plans.iter().zip(jobs).all(same);
    all.then(|| plans.iter().map(|plan| plan.sizes).collect())
}

fn plans(jobs: &[Job], setting: &Setting<'_>) -> Result<Vec<Plan>> {
    let setting = of_runs(setting, jobs.len());
    jobs.iter().map(|job| job.plan(&setting)).collect()
}

fn of_runs<'a>(setting: &Setting<'a>, runs: usize) -> Setting<'a> {
    Setting {
        runs,
        ..setting.clone()
    }
}

/// LoRA-XS with a random start is not the untrained model at step 0.
fn starts_untrained(run: &Run<'_>) -> bool {
    run.point.config.adapter.init_std == 0.0
}

/// A run's folder, and whether there is something in it to go on from.
fn open_directory(path: &Path) -> Result<(RunDirectory, bool)> {
    let resume = path.join(CONFIG).is_file();
    let directory = match resume {
        true => RunDirectory::open(path)?,
        false => RunDirectory::create_at(path)?,
    };
    Ok((directory, resume))
}

/// Results of runs in lockstep on their way to the sweep's: in the order of the runs, whichever ends first,
/// so that `results.jsonl` does not depend on chance. One behind a run that was interrupted waits until the
/// sweep goes on.
struct InOrder<'a> {
    sweep: &'a mut SweepDirectory,
    waiting: Vec<Option<RunResult>>,
    next: usize,
}

impl<'a> InOrder<'a> {
    fn new(sweep: &'a mut SweepDirectory, runs: usize) -> Self {
        Self {
            sweep,
            waiting: (0..runs).map(|_| None).collect(),
            next: 0,
        }
    }

    fn add(&mut self, number: usize, result: RunResult) -> Result<()> {
        self.waiting[number] = Some(result);
        while let Some(result) = self.waiting.get_mut(self.next).and_then(Option::take) {
            self.sweep.add(result)?;
            self.next += 1;
        }
        Ok(())
    }
}

/// How a run ended: its first metric, before and after.
fn one_line(result: &RunResult) -> String {
    if let Some(why) = &result.diverged {
        return format!("diverged: {why}");
    }
    let first = |scores: &Map<String, Value>| {
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
