//! A sweep's summary as a text table.

use std::fmt::Write;

use super::summary::{Cell, Score, Summary};
use crate::eval::align;

/// A row for every size of every curve, with remarks underneath.
pub fn table(summary: &Summary) -> String {
    let mut head = vec!["method", "size", "parameters", "learning rate"];
    let metrics: Vec<&str> = summary.metrics.iter().map(String::as_str).collect();
    head.extend(&metrics);
    head.extend(["share of gain", "seeds"]);
    let mut rows = vec![head.into_iter().map(String::from).collect::<Vec<_>>()];
    rows.extend(summary.cells.iter().map(|cell| row(summary, cell)));

    let mut text = String::new();
    for (metric, score) in metrics.iter().zip(&summary.untrained) {
        let _ = writeln!(text, "untrained {} {metric}: {}", summary.data, show(score));
    }
    text.push('\n');
    text.push_str(&align(&rows, 2));
    text.push('\n');
    for remark in remarks(summary) {
        let _ = writeln!(text, "{remark}");
    }
    text
}

fn row(summary: &Summary, cell: &Cell) -> Vec<String> {
    let end = if cell.at_end { "*" } else { "" };
    let mut row = vec![
        cell.series.join(", "),
        cell.size.clone(),
        cell.trained_parameters.to_string(),
    ];
    if cell.scores.is_empty() {
        row.push("diverged".to_owned());
        row.extend(summary.metrics.iter().map(|_| "-".to_owned()));
    } else {
        row.push(match cell.learning_rate {
            0.0 => "-".to_owned(),
            rate => format!("{rate}{end}"),
        });
        row.extend(cell.scores.iter().map(show));
    }
    row.push(match summary.share_of_gain(cell) {
        Some(share) => format!("{:.0} %", 100.0 * share),
        None => "-".to_owned(),
    });
    row.push(cell.seeds.to_string());
    row
}

fn remarks(summary: &Summary) -> Vec<String> {
    let mut remarks = Vec::new();
    let metric = &summary.metrics[0];
    if summary.cells.iter().any(|c| c.rates > 1) {
        remarks.push(format!(
            "learning rate: the best of those tried by mean {metric} on the evaluation problems, \
             which flatters sizes with more of them"
        ));
    }
    if summary.cells.iter().any(|c| c.at_end) {
        remarks.push("*: at the end of those tried; a better one may lie outside".to_owned());
    }
    if summary.cells.iter().any(|c| c.seeds > 1) {
        remarks.push("±: standard error of the mean over seeds".to_owned());
    }
    let diverged: usize = summary.cells.iter().map(|c| c.diverged).sum();
    if diverged > 0 {
        remarks.push(format!(
            "{diverged} runs diverged (see results.jsonl); their learning rates are not considered"
        ));
    }
    remarks
}

fn show(score: &Score) -> String {
    match score.stderr {
        Some(stderr) => format!("{:.3} ± {stderr:.3}", score.mean),
        None => format!("{:.3}", score.mean),
    }
}
