//! The figure of a sweep: score against number of trained parameters, a curve for each method and
//! axis value, as in Figures 1, 2, 7 and 8 of the paper.

use std::path::{Path, PathBuf};

use super::chart::{Chart, Curve, Point, Reference};
use super::summary::Summary;
use crate::Result;
use crate::run::fs;

/// Writes `accuracy.svg` and `.png`, and `sampled_accuracy` where that was measured.
pub fn write(summary: &Summary, title: &str, folder: &Path) -> Result<Vec<PathBuf>> {
    let mut written = Vec::new();
    for (index, name) in ["accuracy", "sampled_accuracy"].iter().enumerate() {
        let Some(chart) = chart(summary, index, title) else {
            continue;
        };
        let svg = folder.join(format!("{name}.svg"));
        fs::write_atomic(&svg, chart.to_svg()?.as_bytes())?;
        let png = folder.join(format!("{name}.png"));
        fs::write_atomic(&png, &chart.to_png()?)?;
        written.extend([svg, png]);
    }
    Ok(written)
}

/// The figure of one metric by its number; `None` when there is nothing to draw.
pub fn chart(summary: &Summary, metric: usize, title: &str) -> Option<Chart> {
    let name = summary.metrics.get(metric)?;
    let curves = summary.curves();
    let one_method = curves.iter().all(|c| c[0] == curves[0][0]);
    let legend = |series: &[String]| match series {
        [method] => method.to_uppercase(),
        [_, values @ ..] if one_method => values.join(", "),
        [method, values @ ..] => format!("{}, {}", method.to_uppercase(), values.join(", ")),
        [] => String::new(),
    };
    let mut references = vec![Reference {
        name: "untrained".to_owned(),
        y: summary.untrained.get(metric)?.mean,
    }];
    let full = summary.cells.iter().find(|c| c.adapter == "full");
    if let Some((cell, score)) = full.and_then(|c| Some((c, c.scores.get(metric)?))) {
        let series = legend(&cell.series);
        references.push(Reference {
            name: format!("full fine-tuning ({series})"),
            y: score.mean,
        });
    }
    let curves: Vec<Curve> = curves
        .iter()
        .map(|series| {
            let cells = summary.cells.iter().filter(|c| c.series == *series);
            let points = cells.filter_map(|cell| {
                let score = cell.scores.get(metric)?;
                Some(Point {
                    x: cell.trained_parameters as f64,
                    y: score.mean,
                    error: score.stderr,
                })
            });
            Curve {
                name: legend(series),
                points: points.collect(),
            }
        })
        .collect();
    let note = match summary.cells.iter().any(|c| c.seeds > 1) {
        true => "bars: standard error of the mean over seeds".to_owned(),
        false => String::new(),
    };
    let accuracy = match metric {
        0 => "accuracy",
        _ => "accuracy of samples",
    };
    let metric = name.trim_start_matches("sampled_");
    Some(Chart {
        title: title.to_owned(),
        x_label: "trained parameters".to_owned(),
        y_label: format!("{accuracy} on {} ({metric})", summary.data),
        curves,
        references,
        note,
    })
}
