//! From the rows of a file to [`Problem`]s: field mapping, cleaning, and what to do with bad rows.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::Problem;
use super::answers::{AnswerRule, last_boxed};
use super::parquet::read_parquet;
use super::rows::{Limits, Row, RowSink, kind_of, read_json_array, read_json_lines};
use crate::config::{FieldMapping, OnBadRow};
use crate::{Error, Result};

/// The problems of one split, and what was left out on the way.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// A benchmark's name, or the file's.
    pub name: String,
    pub split: String,
    pub problems: Vec<Problem>,
    pub report: LoadReport,
}

/// What happened while a data set was read.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LoadReport {
    /// Files read, in order.
    pub files: Vec<PathBuf>,
    /// Rows seen, good or bad.
    pub rows: usize,
    /// Rows whose reference answer is empty: nothing can be graded against them.
    pub empty_answers: usize,
    /// Rows of another difficulty level than asked for.
    pub other_levels: usize,
    /// Rows that could not be used.
    pub bad: usize,
    /// The first bad rows, with file and line.
    pub bad_examples: Vec<String>,
}

impl LoadReport {
    /// "1319 rows" and what was left out of them, for the log.
    pub fn summary(&self) -> String {
        let mut text = format!("{} rows", self.rows);
        for (count, what) in [
            (self.empty_answers, "without an answer"),
            (self.other_levels, "of other levels"),
            (self.bad, "not usable"),
        ] {
            if count > 0 {
                text.push_str(&format!(", {count} {what} left out"));
            }
        }
        text
    }
}

/// Formats a data file can have, told from its extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    JsonLines,
    Json,
    Parquet,
}

impl Format {
    /// By extension (`.jsonl`, `.ndjson`, `.json`, `.parquet`).
    pub fn of(path: &Path) -> Result<Self> {
        let extension = path
            .extension()
            .and_then(|e| e.to_str())
            .unwrap_or_default()
            .to_ascii_lowercase();
        match extension.as_str() {
            "jsonl" | "ndjson" => Ok(Self::JsonLines),
            "json" => Ok(Self::Json),
            "parquet" => Ok(Self::Parquet),
            _ => Err(Error::config(format!(
                "{}: the data format is told from the extension; use .jsonl, .json or .parquet",
                path.display()
            ))),
        }
    }
}

/// Which columns hold what, the first that is present being taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Columns {
    pub problem: Vec<String>,
    pub answer: Vec<String>,
    pub solution: Vec<String>,
    pub id: Vec<String>,
    pub level: Vec<String>,
}

impl Columns {
    /// The usual names.
    pub fn usual() -> Self {
        let names = |names: &[&str]| names.iter().map(|n| n.to_string()).collect();
        Self {
            problem: names(&["problem", "question"]),
            answer: names(&["answer", "final_answer"]),
            solution: names(&["solution"]),
            id: names(&["id", "unique_id"]),
            level: names(&["level"]),
        }
    }

    /// These names, each replaced by the user's where one is given.
    pub fn mapped(mut self, mapping: &FieldMapping) -> Self {
        for (ours, theirs) in [
            (&mut self.problem, &mapping.problem),
            (&mut self.answer, &mapping.answer),
            (&mut self.solution, &mapping.solution),
            (&mut self.id, &mapping.id),
            (&mut self.level, &mapping.level),
        ] {
            if let Some(name) = theirs {
                *ours = vec![name.clone()];
            }
        }
        self
    }

    /// Whether a root column is needed for any of the fields.
    fn wants(&self, column: &str) -> bool {
        [
            &self.problem,
            &self.answer,
            &self.solution,
            &self.id,
            &self.level,
        ]
        .into_iter()
        .flatten()
        .any(|name| name == column || name.split('.').next() == Some(column))
    }
}

/// How files are turned into problems.
#[derive(Debug, Clone)]
pub struct ReadOptions {
    pub columns: Columns,
    pub rule: AnswerRule,
    pub on_bad_row: OnBadRow,
    /// Stop after so many problems.
    pub limit: Option<usize>,
    /// Difficulty levels wanted; empty takes all.
    pub levels: Vec<u8>,
    pub limits: Limits,
}

impl Default for ReadOptions {
    fn default() -> Self {
        Self {
            columns: Columns::usual(),
            rule: AnswerRule::Number,
            on_bad_row: OnBadRow::Error,
            limit: None,
            levels: Vec::new(),
            limits: Limits::default(),
        }
    }
}

const BAD_EXAMPLES: usize = 10;

/// Reads the files of one split, in order.
///
/// # Errors
/// A file that cannot be opened or is broken as a whole; a bad row when `on_bad_row` is `error`;
/// no usable row at all.
pub fn read_files(
    name: &str,
    split: &str,
    files: &[PathBuf],
    options: &ReadOptions,
) -> Result<Dataset> {
    let mut dataset = Dataset {
        name: name.to_string(),
        split: split.to_string(),
        problems: Vec::new(),
        report: LoadReport::default(),
    };
    let mut kept_bytes = 0usize;
    for path in files {
        if options.limit.is_some_and(|n| dataset.problems.len() >= n) {
            break;
        }
        dataset.report.files.push(path.clone());
        read_one(path, options, &mut dataset, &mut kept_bytes)?;
    }
    if dataset.problems.is_empty() && options.limit != Some(0) {
        let shown: Vec<String> = files.iter().map(|f| f.display().to_string()).collect();
        let why = match dataset.report.bad_examples.first() {
            Some(example) => format!("; the first: {example}"),
            None => String::new(),
        };
        return Err(Error::data(format!(
            "{} has no usable problem ({}{why})",
            shown.join(", "),
            dataset.report.summary()
        )));
    }
    Ok(dataset)
}

fn read_one(
    path: &Path,
    options: &ReadOptions,
    dataset: &mut Dataset,
    kept_bytes: &mut usize,
) -> Result<()> {
    let columns = &options.columns;
    let sink: &mut RowSink = &mut |place, row| {
        let Dataset {
            split,
            problems,
            report,
            ..
        } = &mut *dataset;
        let fallback_id = format!("{split}/{}", report.rows);
        report.rows += 1;
        match row.and_then(|row| to_problem(&row, columns, options, fallback_id)) {
            Ok(Outcome::Problem(problem)) => {
                *kept_bytes += problem.problem.len()
                    + problem.answer.len()
                    + problem.solution.as_ref().map_or(0, String::len);
                if *kept_bytes > options.limits.kept_bytes {
                    return Err(Error::data(format!(
                        "{}: more than {} bytes of problems; set a limit on their number",
                        path.display(),
                        options.limits.kept_bytes
                    )));
                }
                problems.push(problem);
            }
            Ok(Outcome::EmptyAnswer) => report.empty_answers += 1,
            Ok(Outcome::OtherLevel) => report.other_levels += 1,
            Err(why) => {
                let message = format!("{} {place} {why}", path.display());
                if options.on_bad_row == OnBadRow::Error {
                    return Err(Error::data(format!(
                        "{message} (on_bad_row = \"skip\" leaves such rows out)"
                    )));
                }
                report.bad += 1;
                if report.bad_examples.len() < BAD_EXAMPLES {
                    report.bad_examples.push(message);
                }
            }
        }
        Ok(match options.limit {
            Some(limit) if problems.len() >= limit => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        })
    };
    match Format::of(path)? {
        Format::JsonLines => read_json_lines(path, &options.limits, sink),
        Format::Json => read_json_array(path, &options.limits, sink),
        Format::Parquet => read_parquet(path, &options.limits, &|c| columns.wants(c), sink),
    }
}

enum Outcome {
    Problem(Problem),
    EmptyAnswer,
    OtherLevel,
}

/// One row as a problem. The error reads after "line N".
fn to_problem(
    row: &Row,
    columns: &Columns,
    options: &ReadOptions,
    fallback_id: String,
) -> Result<Outcome, String> {
    let problem = required_text(row, &columns.problem, "problem")?;
    if problem.trim().is_empty() {
        return Err("has an empty problem".to_string());
    }
    if !options.levels.is_empty() {
        let level = find(row, &columns.level).and_then(level_of);
        if !level.is_some_and(|level| options.levels.contains(&level)) {
            return Ok(Outcome::OtherLevel);
        }
    }
    let mut solution = match find(row, &columns.solution) {
        None | Some(Value::Null) => None,
        Some(value) => Some(text_of(value, "solution", "\n\n")?),
    };
    let raw_answer = match find(row, &columns.answer) {
        Some(value) if !value.is_null() => text_of(value, "answer", ", ")?,
        _ => match solution.as_deref() {
            // MATH as published: the answer is the last box of the solution.
            Some(text) => last_boxed(text)
                .ok_or("has neither an answer nor a \\boxed{} in its solution")?
                .to_string(),
            None => return Err(missing(row, &columns.answer, "answer")),
        },
    };
    if solution.is_none() && raw_answer.contains("####") {
        // GSM8K as published: the answer column is the worked solution.
        solution = Some(raw_answer.clone());
    }
    let answer = options.rule.clean(&raw_answer);
    if answer.is_empty() {
        return Ok(Outcome::EmptyAnswer);
    }
    let id = match find(row, &columns.id) {
        None | Some(Value::Null) => fallback_id,
        Some(value) => text_of(value, "id", "/")?,
    };
    for (what, text) in [
        ("problem", Some(&problem)),
        ("answer", Some(&answer)),
        ("solution", solution.as_ref()),
        ("id", Some(&id)),
    ] {
        if text.is_some_and(|t| t.contains('\0')) {
            return Err(format!("has a NUL character in its {what}"));
        }
    }
    Ok(Outcome::Problem(Problem {
        id,
        problem,
        answer,
        solution,
    }))
}

fn required_text(row: &Row, names: &[String], what: &str) -> Result<String, String> {
    match find(row, names) {
        None | Some(Value::Null) => Err(missing(row, names, what)),
        Some(value) => text_of(value, what, "\n\n"),
    }
}

fn missing(row: &Row, names: &[String], what: &str) -> String {
    let mut present: Vec<&str> = row.keys().map(String::as_str).take(20).collect();
    if row.len() > present.len() {
        present.push("…");
    }
    format!(
        "has no {what} (looked for: {}; the row has: {}; data.fields.{what} names the column)",
        names.join(", "),
        if present.is_empty() {
            "nothing".to_string()
        } else {
            present.join(", ")
        },
    )
}

/// The first of the columns that the row has, nested values by a dotted name.
fn find<'a>(row: &'a Row, names: &[String]) -> Option<&'a Value> {
    names.iter().find_map(|name| {
        row.get(name).or_else(|| {
            let mut parts = name.split('.');
            let mut value = row.get(parts.next()?)?;
            for part in parts {
                value = match value {
                    Value::Object(fields) => fields.get(part)?,
                    Value::Array(items) => items.get(part.parse::<usize>().ok()?)?,
                    _ => return None,
                };
            }
            Some(value)
        })
    })
}

/// A text, a number as written, or a list of them joined by `separator`.
fn text_of(value: &Value, what: &str, separator: &str) -> Result<String, String> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Number(number) => Ok(number.to_string()),
        Value::Array(items) if !items.iter().any(Value::is_array) => items
            .iter()
            .map(|item| text_of(item, what, separator))
            .collect::<Result<Vec<_>, _>>()
            .map(|texts| texts.join(separator)),
        Value::Bool(truth) => Ok(truth.to_string()),
        other => Err(format!(
            "has {} as its {what}, where a text is wanted",
            kind_of(other)
        )),
    }
}

/// `3`, `"3"` or `"Level 3"`.
fn level_of(value: &Value) -> Option<u8> {
    match value {
        Value::Number(number) => number.as_u64()?.try_into().ok(),
        Value::String(text) => text.trim().trim_start_matches("Level ").parse().ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, content: &str, options: &ReadOptions) -> Result<Dataset> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        read_files("mine", "train", &[path], options)
    }

    fn skipping() -> ReadOptions {
        ReadOptions {
            on_bad_row: OnBadRow::Skip,
            ..ReadOptions::default()
        }
    }

    #[test]
    fn gsm8k_as_published_needs_no_mapping() {
        let dataset = read(
            "a.jsonl",
            r#"{"question": "1+1?", "answer": "One and one is two.\n#### 1,002"}"#,
            &ReadOptions::default(),
        )
        .unwrap();
        let problem = &dataset.problems[0];
        assert_eq!(problem.problem, "1+1?");
        assert_eq!(problem.answer, "1002");
        assert!(problem.solution.as_ref().unwrap().starts_with("One and"));
        assert_eq!(problem.id, "train/0");
    }

    #[test]
    fn math_as_published_takes_the_last_box() {
        let options = ReadOptions {
            rule: AnswerRule::Verbatim,
            levels: vec![3, 5],
            ..ReadOptions::default()
        };
        let dataset = read(
            "a.json",
            r#"[{"problem": "p", "level": "Level 5", "solution": "so \\boxed{\\frac12}"},
                {"problem": "q", "level": 2, "solution": "\\boxed{2}"},
                {"problem": "r", "level": "Level ?", "solution": "\\boxed{3}"},
                {"problem": "s", "level": 3, "solution": "\\boxed{}"}]"#,
            &options,
        )
        .unwrap();
        assert_eq!(dataset.problems.len(), 1);
        assert_eq!(dataset.problems[0].answer, "\\frac12");
        assert_eq!(dataset.report.other_levels, 2);
        assert_eq!(dataset.report.empty_answers, 1);
        assert_eq!(dataset.report.rows, 4);
    }

    #[test]
    fn nested_columns_are_reached_by_dots() {
        let mapping = FieldMapping {
            problem: Some("prompt.0.content".into()),
            answer: Some("reward_model.ground_truth".into()),
            ..FieldMapping::default()
        };
        let options = ReadOptions {
            columns: Columns::usual().mapped(&mapping),
            ..ReadOptions::default()
        };
        let dataset = read(
            "a.jsonl",
            r#"{"prompt":[{"role":"user","content":"hi"}],"reward_model":{"ground_truth":27.0},"id":7}"#,
            &options,
        )
        .unwrap();
        assert_eq!(dataset.problems[0].problem, "hi");
        assert_eq!(dataset.problems[0].answer, "27");
        assert_eq!(dataset.problems[0].id, "7");
        assert!(options.columns.wants("prompt") && !options.columns.wants("role"));
    }

    #[test]
    fn a_bad_row_stops_with_its_file_and_line() {
        let content = "{\"problem\":\"p\",\"answer\":\"1\"}\n\n{\"text\":\"q\",\"answer\":\"1\"}\n";
        let error = read("rows.jsonl", content, &ReadOptions::default())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("rows.jsonl line 3 has no problem"),
            "{error}"
        );
        assert!(error.contains("the row has: text, answer"), "{error}");
        assert!(error.contains("data.fields.problem"), "{error}");
    }

    #[test]
    fn bad_rows_are_counted_when_skipped() {
        let content = [
            r#"{"problem":"p","answer":"1"}"#,
            r#"{"problem":"p","answer":{}}"#,
            r#"{"problem":"","answer":"1"}"#,
            r#"{"problem":"p\u0000","answer":"1"}"#,
            r#"{"problem":"p"}"#,
            r#"{"problem":"p","answer":[["1"]]}"#,
            r#"{"problem":"p","answer":""}"#,
            r#"{"problem":"p","answer":null,"solution":"no box"}"#,
            "nonsense",
        ]
        .join("\n");
        let dataset = read("a.jsonl", &content, &skipping()).unwrap();
        assert_eq!(dataset.problems.len(), 1);
        assert_eq!(dataset.report.rows, 9);
        assert_eq!(dataset.report.bad, 7);
        assert_eq!(dataset.report.empty_answers, 1);
        assert!(dataset.report.bad_examples[0].contains("line 2"));
        assert_eq!(
            dataset.report.summary(),
            "9 rows, 1 without an answer left out, 7 not usable left out"
        );
    }

    #[test]
    fn a_file_without_a_usable_row_is_an_error() {
        let error = read("a.jsonl", "x\ny\n", &skipping())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("no usable problem") && error.contains("line 1"),
            "{error}"
        );
        assert!(read("a.jsonl", "", &skipping()).is_err());
        assert!(read("a.csv", "x", &skipping()).is_err());
    }

    #[test]
    fn the_limit_ends_the_reading_before_later_faults() {
        let content = "{\"problem\":\"p\",\"answer\":\"1\"}\nnonsense";
        let options = ReadOptions {
            limit: Some(1),
            ..ReadOptions::default()
        };
        assert_eq!(
            read("a.jsonl", content, &options).unwrap().problems.len(),
            1
        );
    }

    #[test]
    fn too_much_text_is_refused() {
        let options = ReadOptions {
            limits: Limits {
                kept_bytes: 3,
                ..Limits::default()
            },
            ..ReadOptions::default()
        };
        let content = "{\"problem\":\"p\",\"answer\":\"1\"}\n".repeat(2);
        assert!(read("a.jsonl", &content, &options).is_err());
    }
}
