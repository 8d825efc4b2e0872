//! What the finished runs say: for every size and curve the best learning rate, and over seeds the
//! mean score with its standard error.

use serde_json::{Map, Value};

use super::grid::series;
use super::results::RunResult;
use crate::eval::stats::mean_and_stderr;

/// A comparison of all finished runs.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// Data set that is compared on: the first of `eval.data`.
    pub data: String,
    /// Metrics compared: the data set's first, which chooses the learning rate, and the same one
    /// at temperature 1 where it was measured.
    pub metrics: Vec<String>,
    /// Score of the untrained model on each metric, with the evaluation's own standard error.
    pub untrained: Vec<Score>,
    /// In the order of the sweep, smaller adapters first within a curve.
    pub cells: Vec<Cell>,
}

/// One size on one curve, at its best learning rate.
#[derive(Debug, Clone, PartialEq)]
pub struct Cell {
    /// Method, then the value of every axis.
    pub series: Vec<String>,
    pub size: String,
    pub adapter: String,
    pub trained_parameters: usize,
    pub learning_rate: f64,
    /// Learning rates that were tried.
    pub rates: usize,
    /// The best rate is the smallest or largest tried: a better one may lie outside.
    pub at_end: bool,
    pub seeds: usize,
    /// Runs of this size that diverged, over all rates.
    pub diverged: usize,
    /// One a metric; none where every rate has a run that diverged.
    pub scores: Vec<Score>,
}

/// A mean and, when there is more than one seed, its standard error.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Score {
    pub mean: f64,
    pub stderr: Option<f64>,
}

impl Summary {
    /// `None` when no run has both scores yet.
    pub fn new(results: &[RunResult]) -> Option<Self> {
        let whole = results.iter().find(|r| r.diverged.is_none())?;
        let (data, scores) = whole.after.iter().next()?;
        let metrics = metrics(scores.as_object()?)?;
        let mut cells: Vec<Cell> = Vec::new();
        for result in results {
            let key = (series(result.method, &result.axes), &result.size);
            if cells
                .iter()
                .any(|c| (&c.series, &c.size) == (&key.0, key.1))
            {
                continue;
            }
            let same = |r: &&RunResult| {
                (r.method, &r.axes, &r.size) == (result.method, &result.axes, &result.size)
            };
            let runs: Vec<&RunResult> = results.iter().filter(same).collect();
            cells.push(cell(key.0, &runs, data, &metrics));
        }
        let order = order(&cells);
        cells.sort_by_key(|c| {
            let curve = order.iter().position(|s| *s == c.series);
            (curve, c.trained_parameters)
        });
        let untrained = metrics
            .iter()
            .map(|m| untrained(results, data, m))
            .collect();
        Some(Self {
            data: data.clone(),
            metrics,
            untrained,
            cells,
        })
    }

    /// Curves in the order of the sweep.
    pub fn curves(&self) -> Vec<Vec<String>> {
        order(&self.cells)
    }

    /// Share of the largest gain over the untrained model that a cell has, by the first metric.
    pub fn share_of_gain(&self, cell: &Cell) -> Option<f64> {
        let untrained = self.untrained.first()?.mean;
        let best = self.cells.iter().filter_map(|c| c.scores.first());
        let most = best.map(|s| s.mean - untrained).fold(0.0, f64::max);
        let own = cell.scores.first()?.mean - untrained;
        (most > 0.0).then(|| own / most)
    }
}

fn order(cells: &[Cell]) -> Vec<Vec<String>> {
    let mut curves: Vec<Vec<String>> = Vec::new();
    for cell in cells {
        if !curves.contains(&cell.series) {
            curves.push(cell.series.clone());
        }
    }
    curves
}

/// The first metric, and the same one of sampled completions.
fn metrics(scores: &Map<String, Value>) -> Option<Vec<String>> {
    let first = scores.keys().find(|name| !name.ends_with("_stderr"))?;
    let sampled = format!("sampled_{first}");
    let mut names = vec![first.clone()];
    names.extend(scores.contains_key(&sampled).then_some(sampled));
    Some(names)
}

fn value(scores: &Map<String, Value>, data: &str, metric: &str) -> Option<f64> {
    scores.get(data)?.get(metric)?.as_f64()
}

/// Mean over seeds; the same number for every run unless the evaluation samples.
fn untrained(results: &[RunResult], data: &str, metric: &str) -> Score {
    let values: Vec<f64> = results
        .iter()
        .filter_map(|r| value(&r.before, data, metric))
        .collect();
    let errors: Vec<f64> = results
        .iter()
        .filter_map(|r| value(&r.before, data, &format!("{metric}_stderr")))
        .collect();
    Score {
        mean: mean(&values),
        stderr: (!errors.is_empty()).then(|| mean(&errors)),
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

fn cell(series: Vec<String>, runs: &[&RunResult], data: &str, metrics: &[String]) -> Cell {
    let mut rates: Vec<f64> = runs.iter().map(|r| r.learning_rate).collect();
    rates.sort_by(f64::total_cmp);
    rates.dedup();
    let at = |rate: f64| runs.iter().filter(move |r| r.learning_rate == rate);
    let scores = |rate: f64, metric: &str| -> Vec<f64> {
        at(rate)
            .filter_map(|r| value(&r.after, data, metric))
            .collect()
    };
    // A rate that made a run diverge is none to recommend, and one that fewer seeds have finished
    // (in a sweep that is not over) does not compare.
    let whole = |rate: &f64| at(*rate).all(|r| r.diverged.is_none());
    let best = rates.iter().copied().filter(whole).max_by(|&a, &b| {
        let key = |rate| (at(rate).count(), mean(&scores(rate, &metrics[0])));
        let ((n, x), (m, y)) = (key(a), key(b));
        // The smaller of two equally good ones.
        n.cmp(&m).then(x.total_cmp(&y)).then(b.total_cmp(&a))
    });
    let first = runs[0];
    Cell {
        series,
        size: first.size.clone(),
        adapter: first.adapter.clone(),
        trained_parameters: first.trained_parameters,
        learning_rate: best.unwrap_or(f64::NAN),
        rates: rates.len(),
        at_end: rates.len() > 1
            && (best == rates.first().copied() || best == rates.last().copied()),
        seeds: best.map_or(0, |rate| at(rate).count()),
        diverged: runs.iter().filter(|r| r.diverged.is_some()).count(),
        scores: best.map_or_else(Vec::new, |rate| {
            let score = |metric: &String| {
                let (mean, stderr) = mean_and_stderr(&scores(rate, metric));
                Score { mean, stderr }
            };
            metrics.iter().map(score).collect()
        }),
    }
}
