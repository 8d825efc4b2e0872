//! Every run of a sweep, with its configuration resolved and checked.

use std::collections::HashSet;

use serde_json::{Map, Value as Json};
use toml::Value;

use super::file::{Axis, MethodAxis, Size, SweepFile, flatten};
use crate::config::{Config, Layer, Method, OptimizerKind, Source};
use crate::run::checkpoint::Identity;
use crate::{Error, Result};

/// One run.
#[derive(Debug, Clone)]
pub struct Point {
    /// Name of its run directory.
    pub name: String,
    /// Name of the size.
    pub size: String,
    /// Value of every axis, by key.
    pub axes: Map<String, Json>,
    /// Method, learning rate and seed among the rest.
    pub config: Config,
}

impl Point {
    /// The natural gradient has none.
    pub fn learning_rate(&self) -> Option<f64> {
        match self.config.optim.kind {
            OptimizerKind::Adamw => Some(self.config.optim.learning_rate),
            OptimizerKind::Natural => None,
        }
    }
}

/// Where the file has what the grid sets itself.
fn place_of(key: &str) -> Option<&'static str> {
    match key {
        "optim.learning_rate" => Some("learning rates are in learning_rates"),
        "train.seed" => Some("seeds are in seeds"),
        "method" | "train.method" => Some("methods are in [[method]]"),
        _ => None,
    }
}

/// All runs, in order of execution: seeds outermost, so that a sweep that was stopped early has
/// whole curves of the first ones.
///
/// `overrides` are `key=value` for every run, over the keys of the file.
///
/// # Errors
/// [`Error::Config`] naming the place in the file, or the run, and what is wrong with it.
pub fn expand(sweep: &Source, file: &SweepFile, overrides: &[String]) -> Result<Vec<Point>> {
    let base = Source::find(&file.base)?;
    let grid = Grid {
        origin: &sweep.origin,
        base,
        file,
        overrides,
    };
    grid.check()?;
    let mut points = Vec::new();
    for &seed in &file.seeds {
        for method in &file.method {
            for axes in combinations(&file.axis) {
                for size in &file.size {
                    for rate in grid.rates(size, method)? {
                        let point = grid.point(method, &axes, size, rate, seed)?;
                        let has_rate = point.learning_rate().is_some();
                        points.push(point);
                        if !has_rate {
                            break; // one run stands for all
                        }
                    }
                }
            }
        }
    }
    let mut names = HashSet::new();
    if let Some(point) = points.iter().find(|p| !names.insert(&p.name)) {
        let name = &point.name;
        return Err(grid.error(format!("two runs would be called {name}: rename a size")));
    }
    grid.check_shared(&points)?;
    Ok(points)
}

/// What the runs are defined by, to be compared when a sweep is resumed: keys that all have in
/// common under `all runs: …`, the others under the run's name.
pub fn definition(points: &[Point]) -> Result<Map<String, Json>> {
    let keys: Vec<_> = points
        .iter()
        .map(|p| p.config.defining_keys())
        .collect::<Result<_>>()?;
    let common = |name: &String, value: &Json| keys.iter().all(|k| k.get(name) == Some(value));
    let mut definition = Map::new();
    for (point, keys) in points.iter().zip(&keys) {
        for (name, value) in keys {
            let owner = if common(name, value) {
                "all runs"
            } else {
                &point.name
            };
            definition.insert(format!("{owner}: {name}"), value.clone());
        }
    }
    Ok(definition)
}

/// What differs between two definitions; only the first few, as one change touches many runs.
pub fn differences(before: &Map<String, Json>, now: &Map<String, Json>) -> Option<String> {
    const SHOWN: usize = 4;
    let identity = |config: &Map<String, Json>| Identity {
        config: config.clone(),
        ..Identity::default()
    };
    let mut lines = identity(before).differences(&identity(now));
    if lines.is_empty() {
        return None;
    }
    let more = lines.len().saturating_sub(SHOWN);
    // What all runs share says most.
    lines.sort_by_key(|line| !line.starts_with("all runs"));
    lines.truncate(SHOWN);
    if more > 0 {
        lines.push(format!("and {more} more"));
    }
    Some(lines.join("; "))
}

struct Grid<'a> {
    origin: &'a str,
    base: Source,
    file: &'a SweepFile,
    overrides: &'a [String],
}

type Chosen<'a> = Vec<(&'a str, &'a Value)>;

impl<'a> Grid<'a> {
    fn error(&self, message: impl std::fmt::Display) -> Error {
        Error::config(format!("{}: {message}", self.origin))
    }

    /// What can be told without resolving a run.
    fn check(&self) -> Result<()> {
        let file = self.file;
        for (name, empty) in [
            ("seeds", file.seeds.is_empty()),
            ("[[method]]", file.method.is_empty()),
            ("[[size]]", file.size.is_empty()),
        ] {
            if empty {
                return Err(self.error(format!("{name} is empty: there is nothing to run")));
            }
        }
        let axis_values = |axis: &'a Axis| axis.values.iter().map(Value::to_string).collect();
        let mut lists: Vec<(String, Vec<String>)> = vec![
            (
                "seeds".to_owned(),
                file.seeds.iter().map(u64::to_string).collect(),
            ),
            (
                "[[method]]".to_owned(),
                file.method.iter().map(|m| m.name.name().into()).collect(),
            ),
            (
                "[[size]]".to_owned(),
                file.size.iter().map(|s| s.name.clone()).collect(),
            ),
            (
                "[[axis]]".to_owned(),
                file.axis.iter().map(|a| a.key.clone()).collect(),
            ),
        ];
        for axis in &file.axis {
            if axis.values.is_empty() {
                return Err(self.error(format!("axis {}: values is empty", axis.key)));
            }
            lists.push((format!("axis {}", axis.key), axis_values(axis)));
        }
        for (name, values) in lists {
            let mut seen = HashSet::new();
            if let Some(twice) = values.iter().find(|v| !seen.insert(*v)) {
                return Err(self.error(format!("{name} has {twice} twice")));
            }
        }
        self.check_keys()?;
        self.check_overrides()
    }

    /// Keys that would be lost, as the grid sets them itself, or that make runs incomparable.
    fn check_keys(&self) -> Result<()> {
        let file = self.file;
        let mut set = flatten("", &file.set);
        set.extend(file.method.iter().flat_map(|m| flatten("", &m.set)));
        for (key, _) in set {
            if let Some(place) = place_of(&key) {
                return Err(self.error(format!("{key} cannot be set: {place}")));
            }
        }
        for Axis { key, .. } in &file.axis {
            let why = match (place_of(key), key.split('.').next()) {
                (Some(place), _) => place,
                (None, Some("model")) => "all runs of a sweep share one model",
                (None, Some("eval")) => "scores of different evaluations do not compare",
                _ if self.keys_of_sizes().contains(key) => "sizes have it",
                _ => continue,
            };
            return Err(self.error(format!("{key} cannot be an axis: {why}")));
        }
        Ok(())
    }

    fn keys_of_sizes(&self) -> HashSet<String> {
        let sizes = self.file.size.iter();
        let keys = sizes.flat_map(|size| flatten("adapter", &size.adapter));
        keys.map(|(key, _)| key).collect()
    }

    /// An override of what the grid decides would be lost, or would make runs equal.
    fn check_overrides(&self) -> Result<()> {
        let of_sizes = self.keys_of_sizes();
        for assignment in self.overrides {
            let key = assignment.split('=').next().unwrap_or_default().trim();
            let of_axes = self.file.axis.iter().any(|axis| axis.key == key);
            if place_of(key).is_some() || of_axes || of_sizes.contains(key) {
                return Err(Error::config(format!(
                    "--set {assignment}: the runs of {} differ in {key}; change it there",
                    self.origin
                )));
            }
        }
        Ok(())
    }

    /// The learning rates of a size: its own, else the method's, else those for all. `[None]` where
    /// there are none, which only the natural gradient can do without.
    fn rates(&self, size: &'a Size, method: &'a MethodAxis) -> Result<Vec<Option<f64>>> {
        let own = [
            &size.learning_rates,
            &method.learning_rates,
            &self.file.learning_rates,
        ];
        let mut own = own.into_iter().flatten();
        let (size, method) = (&size.name, method.name);
        let Some(rates) = own.find_map(|rates| rates.of(method)) else {
            return Ok(vec![None]);
        };
        let twice = |i: &usize| rates[..*i].contains(&rates[*i]);
        if let Some(i) = (0..rates.len()).find(twice) {
            let rate = rates[i];
            return Err(self.error(format!("size {size} has the learning rate {rate} twice")));
        }
        if rates.is_empty() {
            return Err(self.error(format!("size {size}: learning_rates is empty")));
        }
        Ok(rates.iter().copied().map(Some).collect())
    }

    fn point(
        &self,
        method: &MethodAxis,
        axes: &Chosen<'_>,
        size: &Size,
        rate: Option<f64>,
        seed: u64,
    ) -> Result<Point> {
        let mut parts = vec![method.name.name().to_owned(), size.name.clone()];
        parts.extend(axes.iter().map(|(key, value)| label(key, value)));
        parts.extend(rate.map(|rate| format!("lr{rate}")));
        parts.push(format!("seed{seed}"));
        let name = file_name(&parts.join("-"));

        let of = |what: &str| format!("{}: {what}", self.origin);
        let shared = flatten("", &self.file.set);
        let of_method = flatten("", &method.set);
        let of_size = flatten("adapter", &size.adapter);
        let of_axes: Vec<(String, Value)> = axes
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).clone()))
            .collect();
        let seed = i64::try_from(seed).unwrap_or(i64::MAX);
        let mut own: Vec<(String, Value)> = vec![
            ("method".to_owned(), method.name.name().into()),
            ("train.seed".to_owned(), seed.into()),
        ];
        own.extend(rate.map(|rate| ("optim.learning_rate".to_owned(), rate.into())));
        let places = [
            of("set"),
            of(&format!("method {}", method.name.name())),
            of(&format!("size {}", size.name)),
            of("axis"),
            of(&name),
        ];
        let layer = |keys, place: usize| Layer::Keys {
            keys,
            origin: &places[place],
        };
        let layers = [
            layer(&shared, 0),
            layer(&of_method, 1),
            Layer::Overrides(self.overrides),
            layer(&of_size, 2),
            layer(&of_axes, 3),
            layer(&own, 4),
        ];
        let config = Config::layered(&self.base, &layers).map_err(|error| match error {
            // A value out of range is reported by key alone.
            Error::Config(m) if !m.starts_with(self.origin) && !m.starts_with("--set") => {
                self.error(format!("{name}: {m}"))
            }
            other => other,
        })?;
        let name = match (config.optim.kind, rate) {
            (OptimizerKind::Adamw, None) => {
                return Err(self.error(format!(
                    "no learning rates for size {} with {}: give learning_rates to the size, to the \
                     method, or to all",
                    size.name,
                    method.name.name()
                )));
            }
            (OptimizerKind::Natural, Some(rate)) => name.replacen(&format!("-lr{rate}-"), "-", 1),
            _ => name,
        };
        let axes = of_axes
            .iter()
            .map(|(key, value)| Ok((key.clone(), serde_json::to_value(value)?)))
            .collect::<Result<_, serde_json::Error>>()
            .map_err(|e| Error::Internal(format!("cannot write an axis: {e}")))?;
        Ok(Point {
            name,
            size: size.name.clone(),
            axes,
            config,
        })
    }

    /// Runs that are to be compared have one model and one evaluation.
    fn check_shared(&self, points: &[Point]) -> Result<()> {
        let Some(first) = points.first() else {
            return Ok(());
        };
        if first.config.eval.data.is_empty() {
            return Err(self.error("eval.data is empty: a sweep compares scores"));
        }
        if first.config.model.random_init && self.file.seeds.len() > 1 {
            return Err(self.error(
                "model.random_init makes another model for every seed, and all runs of a sweep \
                 share one: give one seed",
            ));
        }
        for point in points {
            let (a, b) = (&first.config, &point.config);
            for (section, same) in [("model", a.model == b.model), ("eval", a.eval == b.eval)] {
                if !same {
                    return Err(self.error(format!(
                        "[{section}] of {} and of {} differ: runs that are compared share it",
                        first.name, point.name
                    )));
                }
            }
        }
        Ok(())
    }
}

/// Every choice of one value an axis.
fn combinations(axes: &[Axis]) -> Vec<Chosen<'_>> {
    let mut chosen: Vec<Chosen<'_>> = vec![Vec::new()];
    for axis in axes {
        chosen = chosen
            .iter()
            .flat_map(|head| {
                axis.values.iter().map(move |value| {
                    let mut whole = head.clone();
                    whole.push((axis.key.as_str(), value));
                    whole
                })
            })
            .collect();
    }
    chosen
}

/// A value of an axis in a few letters: `tiled`, `r2`.
fn label(key: &str, value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => format!("{}{other}", key.rsplit('.').next().unwrap_or(key)),
    }
}

/// With the characters that make a folder name on every system.
fn file_name(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    text.chars()
        .map(|c| if plain(c) { c } else { '_' })
        .collect()
}

/// Which curve a run belongs to: its method, then the values of the axes.
pub fn series(method: Method, axes: &Map<String, Json>) -> Vec<String> {
    let mut names = vec![method.name().to_owned()];
    names.extend(axes.iter().map(|(key, value)| match value {
        Json::String(text) => text.clone(),
        other => format!("{} = {other}", key.rsplit('.').next().unwrap_or(key)),
    }));
    names
}
