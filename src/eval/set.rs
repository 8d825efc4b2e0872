//! A task to evaluate: problems, their prompts, and how the answers are scored.

use std::path::{Path, PathBuf};

use crate::config::{FieldMapping, OnBadRow};
use crate::data::dataset::{Columns, ReadOptions};
use crate::data::prompts::{Prompt, Template};
use crate::data::{self, BenchmarkOptions, Dataset, LoadReport, Metric, Problem};
use crate::model::Tokenizer;
use crate::reward::Grader;
use crate::{Error, Result};

/// What to evaluate on and how to ask.
#[derive(Debug, Clone)]
pub struct SetOptions {
    pub data_dir: Option<PathBuf>,
    /// Only the first so many problems.
    pub limit: Option<usize>,
    /// Instead of the benchmark's own template.
    pub template: Option<Template>,
    /// Strings that end a completion, instead of the template's own.
    pub stop: Option<Vec<String>>,
    /// Graders instead of the task's own.
    pub graders: Vec<Grader>,
    pub fields: FieldMapping,
    pub on_bad_row: OnBadRow,
    pub quiet: bool,
}

impl Default for SetOptions {
    fn default() -> Self {
        Self {
            data_dir: None,
            limit: None,
            template: None,
            stop: None,
            graders: Vec::new(),
            fields: FieldMapping::default(),
            on_bad_row: OnBadRow::Error,
            quiet: true,
        }
    }
}

/// Problems with prompts, ready for [`super::evaluate`].
#[derive(Debug, Clone)]
pub struct EvalSet {
    /// Name of the task in results: the benchmark's, or the file's.
    pub name: String,
    pub split: String,
    /// Where the problems come from: a hub id or a file.
    pub source: String,
    pub problems: Vec<Problem>,
    /// One a problem.
    pub prompts: Vec<Prompt>,
    pub template: Template,
    /// Strings that end a completion.
    pub stop: Vec<String>,
    pub metrics: Vec<Metric>,
    /// Tokens a completion may have unless the options say otherwise.
    pub max_tokens: usize,
    pub report: LoadReport,
}

/// Tokens a completion may have on user data.
const FILE_MAX_TOKENS: usize = 1024;

impl EvalSet {
    /// The test split of a benchmark, or a `.jsonl`, `.json` or `.parquet` file.
    ///
    /// # Errors
    /// Unknown name, unreadable data, a checkpoint without the chat template that the prompt
    /// wants, few-shot examples that do not exist.
    pub fn load(name_or_path: &str, tokenizer: &Tokenizer, options: &SetOptions) -> Result<Self> {
        let path = Path::new(name_or_path);
        let is_file = path.extension().is_some() || path.components().count() > 1;
        if is_file && data::benchmarks::find(name_or_path).is_none() {
            return Self::from_file(path, tokenizer, options);
        }
        let benchmark = data::benchmark(name_or_path)?;
        let benchmark_options = BenchmarkOptions {
            data_dir: options.data_dir.clone(),
            limit: options.limit,
            fields: options.fields.clone(),
            quiet: options.quiet,
            ..BenchmarkOptions::default()
        };
        let dataset = benchmark.load("test", &benchmark_options)?;
        let template = match &options.template {
            Some(template) => template.clone(),
            None => benchmark.prompt.parse()?,
        };
        let shots = benchmark.shots(template.num_shots(), &benchmark_options)?;
        let mut set = Self::new(
            dataset,
            template,
            &shots,
            metrics(options, benchmark.metrics()),
            tokenizer,
        )?;
        set.max_tokens = benchmark.max_tokens;
        set.stop = options.stop.clone().unwrap_or(set.stop);
        Ok(set)
    }

    /// The problems of a file, asked as GSM8K is and graded by every grader unless the options say
    /// otherwise.
    pub fn from_file(path: &Path, tokenizer: &Tokenizer, options: &SetOptions) -> Result<Self> {
        let template = options.template.clone().unwrap_or(Template::Gsm8k);
        // A file has no training split: its own first rows are the examples, and not scored.
        let shots = template.num_shots();
        let read = ReadOptions {
            columns: Columns::usual().mapped(&options.fields),
            on_bad_row: options.on_bad_row,
            limit: options.limit.map(|limit| limit + shots),
            ..ReadOptions::default()
        };
        let mut dataset = data::load_file(path, &read)?;
        if shots >= dataset.problems.len() {
            return Err(Error::config(format!(
                "{}: {shots} few-shot examples leave no problem to evaluate",
                path.display()
            )));
        }
        let scored = dataset.problems.split_off(shots);
        let shots = std::mem::replace(&mut dataset.problems, scored);
        let all = Grader::ALL.into_iter().map(Metric::of).collect();
        let mut set = Self::new(dataset, template, &shots, metrics(options, all), tokenizer)?;
        set.stop = options.stop.clone().unwrap_or(set.stop);
        Ok(set)
    }

    /// Renders the prompts of a data set.
    pub fn new(
        dataset: Dataset,
        template: Template,
        shots: &[Problem],
        metrics: Vec<Metric>,
        tokenizer: &Tokenizer,
    ) -> Result<Self> {
        let prompts = dataset
            .problems
            .iter()
            .map(|problem| template.render(tokenizer, &problem.problem, shots))
            .collect::<Result<Vec<_>>>()?;
        let source = match data::benchmarks::find(&dataset.name) {
            Some(benchmark) => benchmark.splits[0].repo.to_string(),
            None => dataset
                .report
                .files
                .first()
                .map_or_else(|| dataset.name.clone(), |f| f.display().to_string()),
        };
        Ok(Self {
            name: dataset.name,
            split: dataset.split,
            source,
            problems: dataset.problems,
            prompts,
            stop: template.stop(),
            template,
            metrics,
            max_tokens: FILE_MAX_TOKENS,
            report: dataset.report,
        })
    }

    /// Tokens of the longest prompt.
    pub fn longest_prompt(&self) -> usize {
        self.prompts
            .iter()
            .map(|p| p.tokens.len())
            .max()
            .unwrap_or(0)
    }
}

fn metrics(options: &SetOptions, own: Vec<Metric>) -> Vec<Metric> {
    if options.graders.is_empty() {
        own
    } else {
        options.graders.iter().map(|&g| Metric::of(g)).collect()
    }
}
