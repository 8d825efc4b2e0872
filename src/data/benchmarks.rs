//! The benchmarks: where each comes from, what its columns are, how it is asked and scored.

use std::path::{Path, PathBuf};

use super::Problem;
use super::answers::AnswerRule;
use super::dataset::{Columns, Dataset, ReadOptions, read_files};
use super::hub::{HubRepo, RepoKind};
use super::mini;
use crate::config::FieldMapping;
use crate::reward::Grader;
use crate::{Error, Result};

/// A score of a task, named as in lm-evaluation-harness: `exact_match,strict-match`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metric {
    pub filter: &'static str,
    pub grader: Grader,
}

impl Metric {
    /// "exact_match,<filter>".
    pub fn key(&self) -> String {
        format!("exact_match,{}", self.filter)
    }

    /// A grader under its own name.
    pub fn of(grader: Grader) -> Self {
        let filter = match grader {
            Grader::LmEvalStrict => "strict-match",
            Grader::LmEvalFlexible => "flexible-extract",
            other => other.name(),
        };
        Self { filter, grader }
    }
}

/// One split: the hub files that make it up, in order.
#[derive(Debug, Clone, Copy)]
pub struct Split {
    pub name: &'static str,
    /// Empty: the files are embedded in the program.
    pub repo: &'static str,
    pub revision: &'static str,
    pub files: &'static [&'static str],
    /// Row counts known to be right; published copies differ in one case.
    pub rows: &'static [usize],
}

/// A data set with its task.
#[derive(Debug, Clone, Copy)]
pub struct Benchmark {
    pub name: &'static str,
    pub splits: &'static [Split],
    /// Columns in the hub's files, tried before the usual names.
    pub problem: &'static str,
    /// Empty: the answer is the last box of the solution.
    pub answer: &'static str,
    pub solution: &'static str,
    pub rule: AnswerRule,
    pub metrics: &'static [Grader],
    /// Name of the prompt template.
    pub prompt: &'static str,
    /// Tokens a completion may have.
    pub max_tokens: usize,
    /// Whose training split few-shot examples come from.
    pub shots_from: &'static str,
}

const NUMBER_METRICS: &[Grader] = &[
    Grader::LmEvalStrict,
    Grader::LmEvalFlexible,
    Grader::Gsm8k,
    Grader::Equiv,
];
const MATH_METRICS: &[Grader] = &[Grader::Math, Grader::Equiv];

const fn split(
    name: &'static str,
    repo: &'static str,
    files: &'static [&'static str],
    rows: &'static [usize],
) -> Split {
    Split {
        name,
        repo,
        revision: "main",
        files,
        rows,
    }
}

/// A benchmark with boxed answers; the entries of the table change what differs.
const BOXED: Benchmark = Benchmark {
    name: "",
    splits: &[],
    problem: "problem",
    answer: "answer",
    solution: "solution",
    rule: AnswerRule::Verbatim,
    metrics: MATH_METRICS,
    prompt: "qwen-boxed",
    max_tokens: 3072,
    shots_from: "math",
};

/// Every benchmark known by name.
pub const BENCHMARKS: &[Benchmark] = &[
    Benchmark {
        name: "gsm8k",
        splits: &[
            split(
                "train",
                "openai/gsm8k",
                &["main/train-00000-of-00001.parquet"],
                &[7473],
            ),
            split(
                "test",
                "openai/gsm8k",
                &["main/test-00000-of-00001.parquet"],
                &[1319],
            ),
        ],
        problem: "question",
        rule: AnswerRule::Number,
        metrics: NUMBER_METRICS,
        prompt: "gsm8k",
        max_tokens: 1024,
        shots_from: "gsm8k",
        ..BOXED
    },
    Benchmark {
        name: mini::NAME,
        splits: &[
            split("train", "", &["train.jsonl"], &[4096]),
            split("test", "", &["test.jsonl"], &[512]),
        ],
        rule: AnswerRule::Number,
        metrics: NUMBER_METRICS,
        prompt: "chat",
        max_tokens: 64,
        shots_from: mini::NAME,
        ..BOXED
    },
    Benchmark {
        name: "svamp",
        splits: &[
            split(
                "train",
                "ChilleD/SVAMP",
                &["data/train-00000-of-00001.parquet"],
                &[700],
            ),
            split(
                "test",
                "ChilleD/SVAMP",
                &["data/test-00000-of-00001.parquet"],
                &[300],
            ),
        ],
        problem: "question_concat",
        answer: "Answer",
        rule: AnswerRule::Number,
        metrics: NUMBER_METRICS,
        prompt: "gsm8k",
        max_tokens: 512,
        shots_from: "svamp",
        ..BOXED
    },
    Benchmark {
        name: "math500",
        splits: &[split(
            "test",
            "HuggingFaceH4/MATH-500",
            &["test.jsonl"],
            &[500],
        )],
        ..BOXED
    },
    Benchmark {
        name: "math",
        splits: &[
            split(
                "train",
                "EleutherAI/hendrycks_math",
                &[
                    "algebra/train-00000-of-00001.parquet",
                    "counting_and_probability/train-00000-of-00001.parquet",
                    "geometry/train-00000-of-00001.parquet",
                    "intermediate_algebra/train-00000-of-00001.parquet",
                    "number_theory/train-00000-of-00001.parquet",
                    "prealgebra/train-00000-of-00001.parquet",
                    "precalculus/train-00000-of-00001.parquet",
                ],
                &[7500],
            ),
            split(
                "test",
                "EleutherAI/hendrycks_math",
                &[
                    "algebra/test-00000-of-00001.parquet",
                    "counting_and_probability/test-00000-of-00001.parquet",
                    "geometry/test-00000-of-00001.parquet",
                    "intermediate_algebra/test-00000-of-00001.parquet",
                    "number_theory/test-00000-of-00001.parquet",
                    "prealgebra/test-00000-of-00001.parquet",
                    "precalculus/test-00000-of-00001.parquet",
                ],
                &[5000],
            ),
        ],
        ..BOXED
    },
    Benchmark {
        // SimpleRL's filtered MATH of levels 3 to 5, which the paper trains on. Its columns are
        // verl's; none of its published descriptions lists them, so several are tried.
        name: "simplerl-math",
        splits: &[split(
            "train",
            "hkust-nlp/SimpleRL-Zoo-Data",
            &["simplelr_qwen_level3to5/train.parquet"],
            &[8523],
        )],
        problem: "extra_info.question",
        answer: "reward_model.ground_truth",
        ..BOXED
    },
    Benchmark {
        name: "minerva_math",
        splits: &[split(
            "test",
            "math-ai/minervamath",
            &["test.jsonl"],
            &[272],
        )],
        problem: "question",
        ..BOXED
    },
    Benchmark {
        name: "gaokao2023en",
        splits: &[split(
            "test",
            "MARIO-Math-Reasoning/Gaokao2023-Math-En",
            &["Gaokao2023-Math-En.jsonl"],
            &[385],
        )],
        problem: "question",
        rule: AnswerRule::DropDollars,
        ..BOXED
    },
    Benchmark {
        name: "olympiadbench",
        splits: &[Split {
            // The hub's copy has 674 rows, the one of Qwen's evaluation 675.
            revision: "refs/convert/parquet",
            ..split(
                "test",
                "Hothan/OlympiadBench",
                &["OE_TO_maths_en_COMP/train/0000.parquet"],
                &[674, 675],
            )
        }],
        problem: "question",
        answer: "final_answer",
        rule: AnswerRule::TrimDollars,
        ..BOXED
    },
    Benchmark {
        name: "college_math",
        splits: &[split(
            "test",
            "qq8933/College_Math_Test",
            &["college-math-test.jsonl"],
            &[2818],
        )],
        problem: "question",
        rule: AnswerRule::DropDollars,
        ..BOXED
    },
    Benchmark {
        name: "aime24",
        splits: &[split(
            "test",
            "HuggingFaceH4/aime_2024",
            &["data/train-00000-of-00001.parquet"],
            &[30],
        )],
        rule: AnswerRule::Integer,
        ..BOXED
    },
    Benchmark {
        name: "amc23",
        splits: &[split(
            "test",
            "math-ai/amc23",
            &["test-00000-of-00001.parquet"],
            &[40],
        )],
        problem: "question",
        rule: AnswerRule::Integer,
        ..BOXED
    },
];

/// Where benchmark files are looked for, and what is taken of them.
#[derive(Debug, Clone, Default)]
pub struct BenchmarkOptions {
    /// Folder with `<name>/<split>.jsonl`, `.json` or `.parquet`; else `TINYLORA_DATA_DIR`.
    pub data_dir: Option<PathBuf>,
    pub limit: Option<usize>,
    /// Difficulty levels wanted; empty takes all.
    pub levels: Vec<u8>,
    /// Columns to take instead of the table's, for copies that name them otherwise.
    pub fields: FieldMapping,
    /// No download bar.
    pub quiet: bool,
}

/// The benchmark of that name; the error names the nearest one.
pub fn benchmark(name: &str) -> Result<&'static Benchmark> {
    find(name).ok_or_else(|| {
        let known: Vec<&str> = BENCHMARKS.iter().map(|b| b.name).collect();
        let nearest = known
            .iter()
            .max_by(|a, b| strsim::jaro_winkler(name, a).total_cmp(&strsim::jaro_winkler(name, b)))
            .filter(|n| strsim::jaro_winkler(name, n) > 0.8)
            .map(|n| format!(" (did you mean {n}?)"))
            .unwrap_or_default();
        Error::config(format!(
            "unknown benchmark {name:?}{nearest}; known: {}",
            known.join(", ")
        ))
    })
}

/// The benchmark of that name, if there is one.
pub fn find(name: &str) -> Option<&'static Benchmark> {
    BENCHMARKS.iter().find(|b| b.name == name)
}

impl Benchmark {
    pub fn metrics(&self) -> Vec<Metric> {
        self.metrics.iter().map(|&g| Metric::of(g)).collect()
    }

    /// Worked examples for few-shot prompts: the first of the training split, in order.
    pub fn shots(&self, count: usize, options: &BenchmarkOptions) -> Result<Vec<Problem>> {
        if count == 0 {
            return Ok(Vec::new());
        }
        let options = BenchmarkOptions {
            limit: Some(count),
            ..options.clone()
        };
        Ok(benchmark(self.shots_from)?
            .load("train", &options)?
            .problems)
    }

    fn split(&self, name: &str) -> Result<&'static Split> {
        self.splits.iter().find(|s| s.name == name).ok_or_else(|| {
            let known: Vec<&str> = self.splits.iter().map(|s| s.name).collect();
            Error::config(format!(
                "{} has no split {name:?}, only {}",
                self.name,
                known.join(", ")
            ))
        })
    }

    /// Reads a split from the local folder, the hub's cache or the hub, the first that has it.
    ///
    /// # Errors
    /// No such split; the files are nowhere; a row that cannot be used (benchmark files are
    /// never skipped over).
    pub fn load(&self, split: &str, options: &BenchmarkOptions) -> Result<Dataset> {
        let split = self.split(split)?;
        let files = self.files(split, options)?;
        let mut columns = Columns::usual();
        for (column, ours) in [
            (&mut columns.problem, self.problem),
            (&mut columns.answer, self.answer),
            (&mut columns.solution, self.solution),
        ] {
            column.retain(|name| name != ours);
            column.insert(0, ours.to_string());
        }
        let read = ReadOptions {
            columns: columns.mapped(&options.fields),
            rule: self.rule,
            limit: options.limit,
            levels: options.levels.clone(),
            ..ReadOptions::default()
        };
        let dataset = read_files(self.name, split.name, &files, &read)?;
        let rows = dataset.report.rows;
        if options.limit.is_none() && !split.rows.contains(&rows) {
            tracing::warn!(
                "{} {} has {rows} rows where {:?} are expected: scores do not compare with published ones",
                self.name,
                split.name,
                split.rows
            );
        }
        Ok(dataset)
    }

    fn files(&self, split: &Split, options: &BenchmarkOptions) -> Result<Vec<PathBuf>> {
        let environment = std::env::var_os("TINYLORA_DATA_DIR").map(PathBuf::from);
        let folders: Vec<PathBuf> = [options.data_dir.clone(), environment]
            .into_iter()
            .flatten()
            .map(|dir| dir.join(self.name))
            .collect();
        for folder in &folders {
            let files = local_files(folder, split.name);
            if !files.is_empty() {
                return Ok(files);
            }
        }
        if split.repo.is_empty() {
            let dir = mini::directory()?;
            return Ok(split.files.iter().map(|file| dir.join(file)).collect());
        }
        let repo = HubRepo {
            kind: RepoKind::Dataset,
            id: split.repo,
            revision: split.revision,
        };
        split
            .files
            .iter()
            .map(|file| repo.fetch(file, options.quiet))
            .collect::<Result<_>>()
            .map_err(|cause| {
                let looked: Vec<String> = folders
                    .iter()
                    .map(|f| format!("{}/{}.jsonl", f.display(), split.name))
                    .collect();
                let advice = if looked.is_empty() {
                    format!(
                        "a local copy goes to DIR/{}/{}.jsonl with --data-dir DIR or TINYLORA_DATA_DIR",
                        self.name, split.name
                    )
                } else {
                    format!("there is no {} either", looked.join(" or "))
                };
                Error::data(format!("{} {}: {cause}; {advice}", self.name, split.name))
            })
    }
}

/// `<split>.jsonl`, `.json` or `.parquet`, else the parts `<split>-*.parquet` in order.
fn local_files(folder: &Path, split: &str) -> Vec<PathBuf> {
    for extension in ["jsonl", "json", "parquet"] {
        let path = folder.join(format!("{split}.{extension}"));
        if path.is_file() {
            return vec![path];
        }
    }
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut parts: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.file_name()
                .and_then(|name| name.to_str())
                .is_some_and(|n| n.starts_with(&format!("{split}-")) && n.ends_with(".parquet"))
        })
        .collect();
    parts.sort();
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_unknown_ones_get_a_suggestion() {
        for (i, benchmark) in BENCHMARKS.iter().enumerate() {
            assert_eq!(
                BENCHMARKS.iter().position(|b| b.name == benchmark.name),
                Some(i)
            );
            assert!(!benchmark.splits.is_empty() && !benchmark.metrics.is_empty());
            assert!(find(benchmark.shots_from).unwrap().split("train").is_ok());
        }
        let error = benchmark("gsm8").unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("did you mean gsm8k?"), "{error}");
        assert!(benchmark("gsm8k").unwrap().split("dev").is_err());
    }

    #[test]
    fn a_local_folder_may_hold_parts() {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "train-1.parquet",
            "train-0.parquet",
            "train-x.txt",
            "test.json",
        ] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let names = |files: Vec<PathBuf>| -> Vec<String> {
            let name = |f: &PathBuf| f.file_name().unwrap().to_string_lossy().into_owned();
            files.iter().map(name).collect()
        };
        assert_eq!(
            names(local_files(dir.path(), "train")),
            ["train-0.parquet", "train-1.parquet"]
        );
        assert_eq!(names(local_files(dir.path(), "test")), ["test.json"]);
        assert!(local_files(dir.path(), "dev").is_empty());
    }
}
