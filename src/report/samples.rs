//! Completions: before against after on the same problem, and those of training over time.
//!
//! Logs may be far larger than memory. Of the evaluations only a verdict and a place in the file
//! are kept of each problem; training completions are read at a few places spread over the file.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::lines::Lines;
use crate::reward::{Graded, Grader};
use crate::run::evaluation::{ProblemRow, ProblemsHeader, problems_file};

/// Characters of a text that are shown: its beginning and, since answers stand there, its end.
const MAX_TEXT: usize = 3000;
/// Problems of an evaluation that are looked at.
const MAX_PROBLEMS: usize = 100_000;
/// Evaluations (data set, greedy or sampled) of a run that are looked at.
const MAX_SETS: usize = 12;
/// Rows of one group of completions that are looked at.
const MAX_GROUP: usize = 256;

/// What became of a problem: right before, right after.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Change {
    Fixed,
    Broken,
    StillWrong,
    StillRight,
}

impl Change {
    pub const ALL: [Self; 4] = [
        Self::Fixed,
        Self::Broken,
        Self::StillWrong,
        Self::StillRight,
    ];

    fn of(before: bool, after: bool) -> Self {
        match (before, after) {
            (false, true) => Self::Fixed,
            (true, false) => Self::Broken,
            (false, false) => Self::StillWrong,
            (true, true) => Self::StillRight,
        }
    }

    pub fn title(self) -> &'static str {
        match self {
            Self::Fixed => "wrong → right",
            Self::Broken => "right → wrong",
            Self::StillWrong => "wrong both times",
            Self::StillRight => "right both times",
        }
    }

    /// Name of its class on the page.
    pub fn class(self) -> &'static str {
        match self {
            Self::Fixed => "fixed",
            Self::Broken => "broken",
            Self::StillWrong => "wrong",
            Self::StillRight => "right",
        }
    }
}

/// A completion and its grade.
#[derive(Debug, Clone)]
pub struct Answer {
    pub text: String,
    pub num_tokens: u64,
    pub truncated: bool,
    pub graded: Graded,
}

/// One problem's completions before and after.
#[derive(Debug, Clone)]
pub struct Pair {
    pub id: String,
    pub problem: String,
    pub gold: String,
    pub change: Change,
    pub before: Answer,
    pub after: Answer,
}

/// One data set before and after.
#[derive(Debug, Clone)]
pub struct Comparison {
    /// As in the file's name: `mini`, `sampled_mini`.
    pub set: String,
    pub steps: (u64, u64),
    /// The metric that decides what is right.
    pub metric: String,
    /// Of all problems, in the order of [`Change::ALL`].
    pub counts: [usize; 4],
    pub pairs: Vec<Pair>,
}

/// One completion of training.
#[derive(Debug, Clone, Deserialize)]
pub struct TrainingRow {
    pub step: u64,
    #[serde(default)]
    pub problem: String,
    #[serde(default)]
    pub prompt: String,
    #[serde(default)]
    pub completion: String,
    #[serde(default)]
    pub answer: String,
    #[serde(default)]
    pub extracted: Option<String>,
    #[serde(default)]
    pub reward: Option<f64>,
    #[serde(default)]
    pub advantage: Option<f64>,
    #[serde(default)]
    pub num_tokens: u64,
    #[serde(default)]
    pub finish: String,
}

/// One group of training: its best and its worst completion.
#[derive(Debug, Clone)]
pub struct TrainingGroup {
    pub rows: Vec<TrainingRow>,
    /// Completions in the group.
    pub size: usize,
    pub mean_reward: f64,
}

/// Compares the first evaluation of each data set with the last. Remarks say what is missing.
pub fn comparisons(folder: &Path, limit: usize, remarks: &mut Vec<String>) -> Vec<Comparison> {
    let mut comparisons = Vec::new();
    for (set, logs) in logs(folder).into_iter().take(MAX_SETS) {
        let [first, .., last] = logs.as_slice() else {
            continue;
        };
        match compare(folder, &set, first, last, limit) {
            Ok(Some(comparison)) => comparisons.push(comparison),
            Ok(None) => {}
            Err(cause) => remarks.push(format!("evaluations/ of {set}: {cause}")),
        }
    }
    comparisons
}

/// The logs of every data set, by step.
fn logs(folder: &Path) -> BTreeMap<String, Vec<(u64, PathBuf)>> {
    let mut found: BTreeMap<String, Vec<(u64, PathBuf)>> = BTreeMap::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let parsed = path
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| {
                let name = name.strip_prefix("step-")?.strip_suffix(".jsonl")?;
                let (step, set) = name.split_once('-')?;
                Some((step.parse::<u64>().ok()?, set.to_owned()))
            });
        if let Some((step, set)) = parsed {
            found.entry(set).or_default().push((step, path));
        }
    }
    for logs in found.values_mut() {
        logs.sort();
    }
    found
}

/// The problems of a data set and how they are graded.
struct Problems {
    metric: String,
    grader: Grader,
    /// Index → place of the row, reference answer.
    rows: HashMap<usize, (u64, String)>,
    lines: Lines,
}

impl Problems {
    fn read(folder: &Path, set: &str) -> Result<Self, String> {
        let plain = set.strip_prefix("sampled_").unwrap_or(set);
        let candidates = [problems_file(folder, set), problems_file(folder, plain)];
        let path = candidates
            .iter()
            .find(|path| path.is_file())
            .ok_or_else(|| {
                format!("problems-{plain}.jsonl is missing, so completions cannot be graded")
            })?;
        let text = |e: io::Error| format!("problems-{plain}.jsonl: {e}");
        let mut lines = Lines::open(path).map_err(text)?;
        let header = lines.read::<ProblemsHeader>().map_err(text)?;
        let (_, header) = header.ok_or_else(|| format!("problems-{plain}.jsonl has no header"))?;
        let grader = header
            .grader
            .parse()
            .map_err(|e: crate::Error| e.to_string())?;
        let mut rows = HashMap::new();
        while let Some((place, row)) = lines.read::<ProblemRow>().map_err(text)? {
            if rows.len() >= MAX_PROBLEMS {
                break;
            }
            rows.insert(row.index, (place, row.answer));
        }
        Ok(Self {
            metric: header.metric,
            grader,
            rows,
            lines,
        })
    }
}

/// A line of an evaluation's log.
#[derive(Deserialize)]
struct EvaluationRow {
    problem: usize,
    sample: usize,
    text: String,
    #[serde(default)]
    num_tokens: u64,
    #[serde(default)]
    finish: String,
}

/// A problem's verdict and the place of its completion.
type Verdicts = HashMap<usize, (bool, u64)>;

fn verdicts(lines: &mut Lines, problems: &Problems) -> io::Result<Verdicts> {
    let mut verdicts = Verdicts::new();
    while let Some((place, row)) = lines.read::<EvaluationRow>()? {
        if row.sample != 0 || verdicts.len() >= MAX_PROBLEMS {
            continue;
        }
        if let Some((_, gold)) = problems.rows.get(&row.problem) {
            let graded = problems.grader.grade(gold, &row.text);
            verdicts.insert(row.problem, (graded.correct, place));
        }
    }
    // The header is the one line of another kind.
    lines.damaged = lines.damaged.saturating_sub(1);
    Ok(verdicts)
}

fn compare(
    folder: &Path,
    set: &str,
    first: &(u64, PathBuf),
    last: &(u64, PathBuf),
    limit: usize,
) -> Result<Option<Comparison>, String> {
    let mut problems = Problems::read(folder, set)?;
    let text = |e: io::Error| e.to_string();
    let mut logs = [
        Lines::open(&first.1).map_err(text)?,
        Lines::open(&last.1).map_err(text)?,
    ];
    let before = verdicts(&mut logs[0], &problems).map_err(text)?;
    let after = verdicts(&mut logs[1], &problems).map_err(text)?;

    let mut by_change: BTreeMap<Change, Vec<usize>> = BTreeMap::new();
    for (problem, (right, _)) in &before {
        if let Some((now, _)) = after.get(problem) {
            by_change
                .entry(Change::of(*right, *now))
                .or_default()
                .push(*problem);
        }
    }
    for problems in by_change.values_mut() {
        problems.sort_unstable();
    }
    let all = |change: &Change| by_change.get(change).map_or(&[][..], Vec::as_slice);
    let counts = Change::ALL.map(|change| all(&change).len());

    let chosen = Change::ALL.iter().zip(shares(counts, limit));
    let mut pairs = Vec::new();
    for (change, share) in chosen {
        for &index in spread(all(change), share).iter() {
            let (place, gold) = &problems.rows[&index];
            let (place, gold) = (*place, gold.clone());
            problems.lines.seek(place).map_err(text)?;
            let row = problems.lines.read::<ProblemRow>().map_err(text)?;
            let Some((_, row)) = row else { continue };
            let places = [before[&index].1, after[&index].1];
            let mut answers = Vec::with_capacity(2);
            for (log, place) in logs.iter_mut().zip(places) {
                log.seek(place).map_err(text)?;
                let found = log.read::<EvaluationRow>().map_err(text)?;
                answers.extend(found.map(|(_, row)| Answer {
                    graded: shortened(problems.grader.grade(&gold, &row.text)),
                    num_tokens: row.num_tokens,
                    truncated: row.finish == "length",
                    text: shorten(&row.text),
                }));
            }
            let Ok([before, after]) = <[Answer; 2]>::try_from(answers) else {
                continue;
            };
            pairs.push(Pair {
                id: shorten(&row.id),
                problem: shorten(&row.problem),
                gold: shorten(&gold),
                change: *change,
                before,
                after,
            });
        }
    }
    Ok((counts.iter().sum::<usize>() > 0).then(|| Comparison {
        set: set.to_owned(),
        steps: (first.0, last.0),
        metric: problems.metric,
        counts,
        pairs,
    }))
}

/// How many of each kind to show: what changed comes first, what one kind leaves goes to the others.
fn shares(counts: [usize; 4], limit: usize) -> [usize; 4] {
    let mut shares = [0; 4];
    for (share, (count, part)) in shares.iter_mut().zip(counts.iter().zip([3, 3, 1, 1])) {
        *share = (*count).min((limit * part / 8).max(1));
    }
    let mut left = limit.saturating_sub(shares.iter().sum());
    for (share, count) in shares.iter_mut().zip(counts) {
        let more = left.min(count - *share);
        *share += more;
        left -= more;
    }
    shares
}

/// `n` of the items, evenly spread.
fn spread(items: &[usize], n: usize) -> Vec<usize> {
    let n = n.min(items.len());
    (0..n).map(|i| items[i * items.len() / n]).collect()
}

/// Groups of completions at `count` places spread evenly over `completions.jsonl`.
pub fn training(path: &Path, count: usize) -> io::Result<(Vec<TrainingGroup>, Option<String>)> {
    let mut lines = Lines::open(path)?;
    let size = lines.size()?;
    let mut groups: Vec<TrainingGroup> = Vec::new();
    for i in 0..count as u64 {
        lines.seek_to_line(size / count as u64 * i)?;
        if let Some(group) = next_group(&mut lines, i == 0)? {
            let key = |g: &TrainingGroup| g.rows.first().map(|r| (r.step, r.problem.clone()));
            if groups.iter().all(|old| key(old) != key(&group)) {
                groups.push(group);
            }
        }
    }
    groups.sort_by_key(|group| group.rows.first().map_or(0, |row| row.step));
    Ok((groups, lines.remark("completions.jsonl")))
}

/// The next whole group: rows of one step and one problem.
fn next_group(lines: &mut Lines, mut at_start: bool) -> io::Result<Option<TrainingGroup>> {
    let mut key: Option<(u64, String)> = None;
    let (mut best, mut worst): (Option<TrainingRow>, Option<TrainingRow>) = (None, None);
    let (mut size, mut sum, mut passed) = (0usize, 0.0, 0usize);
    while let Some((_, mut row)) = lines.read::<TrainingRow>()? {
        let this = (row.step, row.problem.clone());
        if key.as_ref().is_some_and(|key| *key != this) {
            if at_start {
                break;
            }
            at_start = true;
        }
        key = Some(this);
        passed += 1;
        // In the middle of a group: its beginning was not seen.
        if !at_start && passed < MAX_GROUP {
            continue;
        }
        if size >= MAX_GROUP {
            break;
        }
        let reward = row.reward.unwrap_or(0.0);
        size += 1;
        sum += reward;
        trim(&mut row);
        let beats = |old: &Option<TrainingRow>, better: fn(f64, f64) -> bool| {
            old.as_ref()
                .is_none_or(|old| better(reward, old.reward.unwrap_or(0.0)))
        };
        if beats(&worst, |new, old| new < old) {
            worst = Some(row.clone());
        }
        if beats(&best, |new, old| new > old) {
            best = Some(row);
        }
    }
    let rows: Vec<TrainingRow> = match (best, worst) {
        (Some(best), Some(worst)) if best.reward != worst.reward => vec![best, worst],
        (best, _) => best.into_iter().collect(),
    };
    Ok((size > 0).then(|| TrainingGroup {
        rows,
        size,
        mean_reward: sum / size as f64,
    }))
}

fn trim(row: &mut TrainingRow) {
    for text in [
        &mut row.problem,
        &mut row.prompt,
        &mut row.completion,
        &mut row.answer,
    ] {
        *text = shorten(text);
    }
    row.extracted = row.extracted.as_deref().map(shorten);
}

fn shortened(graded: Graded) -> Graded {
    Graded {
        extracted: graded.extracted.as_deref().map(shorten),
        ..graded
    }
}

/// The beginning and the end of a long text.
fn shorten(text: &str) -> String {
    let count = text.chars().count();
    if count <= MAX_TEXT {
        return text.to_owned();
    }
    let (head, tail) = (MAX_TEXT * 2 / 3, MAX_TEXT / 3);
    let start: String = text.chars().take(head).collect();
    let end: String = text.chars().skip(count - tail).collect();
    format!(
        "{start}\n[… {} characters left out …]\n{end}",
        count - head - tail
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changed_is_shown_first() {
        assert_eq!(shares([100, 100, 100, 100], 40), [15, 15, 5, 5]);
        assert_eq!(shares([2, 0, 100, 100], 40), [2, 0, 33, 5]);
        assert_eq!(shares([0, 0, 1, 2], 40), [0, 0, 1, 2]);
        assert_eq!(spread(&[1, 2, 3, 4, 5, 6], 3), [1, 3, 5]);
        assert_eq!(spread(&[], 3), [] as [usize; 0]);
    }

    #[test]
    fn long_texts_keep_both_ends() {
        let text = format!("a{}z", "é".repeat(10_000));
        let short = shorten(&text);
        assert!(short.starts_with("aé") && short.ends_with("éz"));
        assert!(short.chars().count() < MAX_TEXT + 60);
        assert!(
            short.contains("[… 7002 characters left out …]"),
            "{}",
            &short[3990..4100]
        );
    }

    #[test]
    fn training_groups_are_whole_and_show_both_ends() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("completions.jsonl");
        let mut text = String::new();
        for step in 1..=50 {
            for problem in 0..4 {
                for sample in 0..8 {
                    let reward = f64::from(u8::from(sample == problem));
                    let row = serde_json::json!({
                        "step": step, "problem": format!("p{problem}"), "completion": "x",
                        "reward": reward, "advantage": reward - 0.125,
                    });
                    text.push_str(&format!("{row}\n"));
                }
            }
        }
        text.push_str("{\"step\":51,\"prob");
        std::fs::write(&path, text).unwrap();
        let (groups, _) = training(&path, 10).unwrap();
        assert_eq!(groups.len(), 10);
        for group in &groups {
            assert_eq!((group.size, group.mean_reward), (8, 0.125));
            let rewards: Vec<_> = group.rows.iter().map(|r| r.reward).collect();
            assert_eq!(rewards, [Some(1.0), Some(0.0)]);
        }
        let steps: Vec<u64> = groups.iter().map(|g| g.rows[0].step).collect();
        assert_eq!(steps[0], 1);
        assert!(steps.is_sorted() && steps[9] >= 45, "{steps:?}");
    }
}
