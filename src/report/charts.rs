//! What the page's script draws: every metric of every run, grouped, thinned.

use serde_json::{Value, json};

use super::catalog::{Group, Rule, meaning};
use super::history::Metric;
use super::numbers::{number, rounded};
use super::reading::Run;

/// Points of all charts together: what bounds the page's size.
const ALL_POINTS: usize = 60_000;
/// Points of one line, at least and at most.
const POINTS: (usize, usize) = (40, 800);
/// Evaluated metrics drawn over the steps.
const MAX_SCORES: usize = 60;

/// The charts and the steps they share.
#[derive(Default)]
struct Charts {
    /// Lists of steps; most metrics of a run have the same ones.
    steps: Vec<Vec<f64>>,
}

impl Charts {
    fn line(&mut self, run: usize, points: &[(f64, f64)]) -> Value {
        let steps: Vec<f64> = points.iter().map(|p| rounded(p.0)).collect();
        let index = match self.steps.iter().position(|known| *known == steps) {
            Some(index) => index,
            None => {
                self.steps.push(steps);
                self.steps.len() - 1
            }
        };
        let values: Vec<f64> = points.iter().map(|p| rounded(p.1)).collect();
        json!({"run": run, "x": index, "y": values})
    }
}

/// Charts by group, as the script reads them.
pub fn charts(runs: &[Run]) -> Value {
    let lines: usize = runs.iter().map(|run| run.history.metrics.len()).sum();
    let limit = (ALL_POINTS / lines.max(1)).clamp(POINTS.0, POINTS.1);
    let mut charts = Charts::default();
    let mut groups = Vec::new();
    for group in Group::ALL {
        let mut drawn = match group {
            Group::Evaluation => scores(&mut charts, runs),
            _ => Vec::new(),
        };
        let (mut constant, mut repeated) = (Vec::new(), Vec::new());
        for name in names(runs, group) {
            let found: Vec<(usize, &Metric)> = runs
                .iter()
                .enumerate()
                .filter_map(|(i, run)| {
                    Some((i, run.history.metrics.iter().find(|m| m.name == name)?))
                })
                .filter(|(_, metric)| metric.series.count > 0)
                .collect();
            let Some((_, first)) = found.first() else {
                continue;
            };
            let same = found
                .iter()
                .all(|(_, m)| m.series.is_constant() && m.series.first == first.series.first);
            if same {
                constant.push(json!([name, number(first.series.first)]));
                continue;
            }
            let lines: Vec<Value> = found
                .iter()
                .map(|(run, metric)| charts.line(*run, &metric.series.points(limit)))
                .collect();
            // With one reward function its mean is the reward, and so on: one chart says it.
            if let Some(known) = drawn.iter().find(|chart| chart["lines"] == json!(lines)) {
                repeated.push(json!([name, known["name"]]));
                continue;
            }
            let rule = Rule::of(name).filter(|rule| {
                found
                    .iter()
                    .any(|(run, _)| rule.applies_to(runs[*run].method()))
            });
            drawn.push(json!({
                "name": name,
                "about": meaning(name),
                "healthy": rule.map(|rule| json!([rule.low, rule.high.map(|high| high.value())])),
                "lines": lines,
            }));
        }
        if !drawn.is_empty() || !constant.is_empty() {
            groups.push(json!({
                "title": group.title(),
                "charts": drawn,
                "constant": constant,
                "repeated": repeated,
            }));
        }
    }
    let names: Vec<&str> = runs.iter().map(|run| run.name.as_str()).collect();
    json!({"runs": names, "steps": charts.steps, "groups": groups})
}

/// Names of a group's metrics in the order in which the runs have them.
fn names(runs: &[Run], group: Group) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for run in runs {
        for metric in run.history.of_group(group) {
            if !names.contains(&metric.name.as_str()) {
                names.push(&metric.name);
            }
        }
    }
    names
}

/// Evaluations over the steps, where there are more than the two at the ends.
fn scores(charts: &mut Charts, runs: &[Run]) -> Vec<Value> {
    let several = |run: &&Run| run.history.evaluations.len() > 2;
    let mut names: Vec<&str> = Vec::new();
    for run in runs.iter().filter(several) {
        for (name, ..) in run.history.evaluations.iter().flat_map(|e| &e.scores) {
            if !names.contains(&name.as_str()) && names.len() < MAX_SCORES {
                names.push(name);
            }
        }
    }
    let mut drawn: Vec<Value> = Vec::new();
    for name in names {
        let mut lines = Vec::new();
        for (index, run) in runs.iter().enumerate() {
            let points = run.history.score_points(name);
            if points.is_empty() {
                continue;
            }
            let plain: Vec<(f64, f64)> = points.iter().map(|p| (p.0, p.1)).collect();
            let mut line = charts.line(index, &plain);
            let errors: Vec<f64> = points.iter().map(|p| rounded(p.2)).collect();
            line["e"] = json!(errors);
            lines.push(line);
        }
        let values = lines.iter().flat_map(|line| line["y"].as_array()).flatten();
        if values.clone().all(|v| Some(v) == values.clone().next()) {
            continue; // the table of scores says it
        }
        match drawn
            .iter_mut()
            .find(|chart| chart["lines"] == json!(lines))
        {
            Some(chart) => {
                let reading = name.rsplit([',', '/']).next().unwrap_or(name);
                chart["about"] = json!(match chart["about"].as_str() {
                    Some("") | None => format!("and {reading}"),
                    Some(about) => format!("{about}, {reading}"),
                });
            }
            None => drawn.push(json!({"name": name, "about": "", "healthy": null, "lines": lines})),
        }
    }
    drawn
}
