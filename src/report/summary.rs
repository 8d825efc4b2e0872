//! A few lines a run for the terminal.

use super::numbers::{count, duration, number, score};
use super::reading::Run;
use crate::run::plan;

/// What the terminal says of a run.
pub fn summary(run: &Run) -> String {
    let mut lines = vec![format!("{} · {}", run.name, run.status.text())];
    let trained = run.numbers.as_ref().map(|numbers| {
        let (n, size) = (count(numbers.count), plan::bytes(numbers.bytes));
        format!(" · {}, {n} numbers, {size}", numbers.spec.kind.name())
    });
    lines.push(format!(
        "  {} · {}{}",
        run.model(),
        run.method_name(),
        trained.unwrap_or_default()
    ));
    let time = duration(run.history.seconds);
    lines.push(format!("  {} steps in {time}", run.steps()));
    let what = match run.history.metric("reward") {
        Some(series) => Some(("reward", series)),
        None => run.history.metric("loss").map(|series| ("loss", series)),
    };
    if let Some((name, series)) = what {
        let (first, last) = (number(series.first), number(series.last));
        lines.push(format!("  {name} {first} → {last}"));
    }
    for found in [run.main_score(), run.sampled_score()]
        .into_iter()
        .flatten()
    {
        let (before, after) = (found.before, found.after);
        lines.push(format!(
            "  {} {}: {} → {}",
            found.set,
            found.metric,
            score(before.0, before.1),
            score(after.0, after.1)
        ));
    }
    for finding in run.history.findings().iter().take(8) {
        lines.push(format!("  {}: {}", finding.subject, finding.what));
    }
    for remark in run.remarks.iter().take(8) {
        lines.push(format!("  {remark}"));
    }
    lines
        .iter()
        .map(|line| format!("{}\n", printable(line)))
        .collect()
}

/// Names come from files: none may command the terminal.
fn printable(line: &str) -> String {
    let shown = line.chars().map(|c| if c.is_control() { '�' } else { c });
    shown.collect()
}
