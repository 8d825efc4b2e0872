//! `tinylora eval`: benchmark scores with standard errors.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;

use super::eval_subjects::{Questioner, Subject, folder_names};
use super::open::{ModelArgs, OpenedSeveral};
use crate::cli::GlobalArgs;
use crate::config::{Config, FieldMapping, OnBadRow, RolloutConfig, RolloutEngine};
use crate::data::prompts::Template;
use crate::eval::{EvalOptions, EvalSet, RunReport, SetOptions, TaskReport, table};
use crate::ranks::Ranks;
use crate::reward::Grader;
use crate::rollout::{Engines, Site};
use crate::run::progress::Progress;
use crate::run::{clock, fs, signals};
use crate::{Error, Result};

/// Arguments of `tinylora eval`.
#[derive(Debug, Args)]
pub struct EvalArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Benchmarks by name: gsm8k, svamp, math500, minerva_math, gaokao2023en, olympiadbench,
    /// college_math, aime24, amc23, math
    #[arg(
        long,
        value_name = "NAME",
        value_delimiter = ',',
        required_unless_present = "data"
    )]
    benchmark: Vec<String>,
    /// A .jsonl, .json or .parquet file with problems and answers (repeatable)
    #[arg(long, value_name = "FILE")]
    data: Vec<PathBuf>,
    /// Folder with <name>/<split>.jsonl files, looked into before the hub
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Column of --data that holds the problem
    #[arg(long, value_name = "COLUMN")]
    problem_field: Option<String>,
    /// Column of --data that holds the answer
    #[arg(long, value_name = "COLUMN")]
    answer_field: Option<String>,
    /// Leave rows of --data out that cannot be used, instead of stopping
    #[arg(long)]
    skip_bad_rows: bool,
    /// Only the first N problems of each task
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Completions of each problem: gives avg@K and pass@k
    #[arg(long, value_name = "K", default_value_t = 1)]
    samples_per_problem: usize,
    /// Most tokens of a completion [default: the task's own number]
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,
    /// 0 is greedy [default: 0, or 1 with several completions]
    #[arg(long, value_name = "T")]
    temperature: Option<f64>,
    /// Nucleus mass; 1 keeps every token
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f64,
    /// Raw prompts with N worked examples before the problem, as lm-evaluation-harness asks
    #[arg(long, value_name = "N", conflicts_with = "prompt")]
    few_shot: Option<usize>,
    /// Prompt template: gsm8k, qwen-boxed, chat, plain, few-shot-N, or a text with {problem}
    /// [default: the task's own]
    #[arg(long, value_name = "TEMPLATE")]
    prompt: Option<Template>,
    /// String that ends a completion, instead of the template's own (repeatable)
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Graders instead of the task's own
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    reward: Vec<Grader>,
    /// Also evaluate the model without the adapter, and compare the two
    #[arg(long)]
    base: bool,
    /// Completions decoded at once; changes memory and speed, not the result
    #[arg(long, value_name = "N", default_value_t = 64)]
    batch_size: usize,
    /// What samples: native, vllm or llama-server
    #[arg(long, value_name = "NAME", default_value = "native")]
    engine: RolloutEngine,
    /// Address of a server of --engine (repeatable: they share the work)
    #[arg(long, value_name = "URL")]
    base_url: Vec<String>,
    /// Program and arguments that start a llama-server when there is no --base-url
    #[arg(long, value_name = "PROGRAM", num_args = 1.., value_terminator = ";", default_value = "llama-server")]
    server: Vec<String>,
    /// Folder with adapters for the servers, which they see under the same path [default: one in --out,
    /// else a temporary one]
    #[arg(long, value_name = "DIR")]
    adapter_dir: Option<PathBuf>,
    /// Folder for results, samples and completions; an interrupted evaluation goes on from there
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Print the results object instead of the table
    #[arg(long)]
    json: bool,
}

/// Runs the command, on every rank.
pub fn run(args: &EvalArgs, global: &GlobalArgs, ranks: &Ranks, out: &mut dyn Write) -> Result<()> {
    let (started, clock) = (clock::now(), Instant::now());
    args.check()?;
    let global = &GlobalArgs {
        quiet: global.quiet || !ranks.is_root(),
        ..global.clone()
    };
    let opened = args.model.open_several(global)?;
    if args.base && opened.adapters.is_empty() {
        return Err(Error::config("--base needs an --adapter to compare with"));
    }
    let options = args.options(&opened, global);
    let sets = args.sets(&opened, global.quiet)?;
    for set in &sets {
        // A task that cannot be run is refused before an hour of others.
        options.sampling(set)?;
    }
    let subjects = args.subjects(&opened);
    ranks.on_root(|| {
        let mut folders = subjects.iter().filter_map(|s| s.folder.as_deref());
        folders.try_for_each(fs::create_dir_all)
    })?;
    let temporary = tempfile::tempdir()
        .map_err(|e| Error::data(format!("cannot make a temporary folder: {e}")))?;
    let beside = args.out.as_deref().unwrap_or(temporary.path());
    let engines = args.engines(&opened, &sets, &options, ranks, &beside.join("adapters"))?;
    let questioner = Questioner {
        model: &opened.model,
        batch_size: args.batch_size,
        options: &options,
        progress: Progress::new(global.quiet),
        ranks,
    };
    signals::install()?;
    // Of every subject but the model without an adapter, which stands beside them.
    let mut tasks: Vec<Vec<TaskReport>> = Vec::new();
    tasks.resize_with(opened.adapters.len().max(1), Vec::new);
    for set in sets {
        let mut results = questioner.ask(&subjects, &set, &engines)?.into_iter();
        let base = if args.base { results.next() } else { None };
        for (tasks, result) in tasks.iter_mut().zip(results) {
            let (set, base) = (set.clone(), base.clone());
            tasks.push(TaskReport { set, result, base });
        }
    }
    if !ranks.is_root() {
        return Ok(());
    }
    let seconds = clock.elapsed().as_secs_f64();
    let names = opened.adapters.iter().map(|(name, _)| Some(name.clone()));
    let names = names.chain(opened.adapters.is_empty().then_some(None));
    let reports: Vec<RunReport> = names
        .zip(tasks)
        .map(|(adapter, tasks)| RunReport {
            model: opened.model.name.clone(),
            adapter,
            dtype: global.dtype.unwrap_or_default().name().to_string(),
            device: global.device.unwrap_or_default().to_string(),
            seed: options.seed,
            limit: args.limit,
            started,
            seconds,
            tasks,
        })
        .collect();
    let with_folders = reports.iter().zip(args.folders(&opened));
    for (report, folder) in with_folders {
        let path = report.write(&folder)?;
        questioner
            .progress
            .line(&format!("results in {}", path.display()));
    }
    let text = args.text(&reports);
    out.write_all(text.as_bytes())
        .map_err(|e| Error::data(format!("stdout: {e}")))
}

impl EvalArgs {
    fn check(&self) -> Result<()> {
        for (ok, flag, advice) in [
            (self.limit != Some(0), "--limit", "at least 1"),
            (
                self.samples_per_problem >= 1,
                "--samples-per-problem",
                "at least 1",
            ),
            (self.batch_size >= 1, "--batch-size", "at least 1"),
            (
                !self.stop.iter().any(String::is_empty),
                "--stop",
                "a text that is not empty",
            ),
            (
                self.top_p > 0.0 && self.top_p <= 1.0,
                "--top-p",
                "above 0 and at most 1",
            ),
        ] {
            if !ok {
                return Err(Error::config(format!("{flag} must be {advice}")));
            }
        }
        // A mistyped name is refused before the model is loaded.
        for name in &self.benchmark {
            crate::data::benchmark(name)?;
        }
        Ok(())
    }

    /// Folders of the adapters' results under `--out`: that one itself where there is one adapter at most;
    /// none without `--out`.
    fn folders(&self, opened: &OpenedSeveral) -> Vec<PathBuf> {
        let names: Vec<String> = opened
            .adapters
            .iter()
            .map(|(name, _)| name.clone())
            .collect();
        match (&self.out, &names[..]) {
            (None, _) => Vec::new(),
            (Some(out), [] | [_]) => vec![out.clone()],
            (Some(out), several) => folder_names(several)
                .into_iter()
                .map(|name| out.join(name))
                .collect(),
        }
    }

    /// The model without an adapter first, where that is asked for, then each adapter.
    fn subjects<'a>(&self, opened: &'a OpenedSeveral) -> Vec<Subject<'a>> {
        let base = Subject {
            adapter: None,
            suffix: "",
            label: String::new(),
            folder: self.out.clone(),
        };
        if opened.adapters.is_empty() {
            return vec![base];
        }
        let several = opened.adapters.len() > 1;
        let mut folders = self.folders(opened).into_iter();
        let names: Vec<String> = opened
            .adapters
            .iter()
            .map(|(name, _)| name.clone())
            .collect();
        let adapted = opened.adapters.iter().zip(folder_names(&names));
        let adapted = adapted.map(|((_, adapter), name)| Subject {
            adapter: Some(adapter),
            suffix: "",
            label: match several {
                true => format!(" {name}"),
                false => String::new(),
            },
            folder: folders.next(),
        });
        let base = self.base.then_some(Subject {
            suffix: "_base",
            label: " base".to_owned(),
            ..base
        });
        base.into_iter().chain(adapted).collect()
    }

    /// What goes to stdout.
    fn text(&self, reports: &[RunReport]) -> String {
        let several = reports.len() > 1;
        if self.json {
            let mut values = reports.iter().map(RunReport::to_json);
            return match (several, values.next()) {
                (false, Some(only)) => format!("{only:#}\n"),
                (_, first) => {
                    let all: Vec<_> = first.into_iter().chain(values).collect();
                    format!("{:#}\n", serde_json::Value::from(all))
                }
            };
        }
        let tables = reports
            .iter()
            .map(|report| match (several, &report.adapter) {
                (true, Some(name)) => format!("{name}\n{}", table(report)),
                _ => table(report),
            });
        tables.collect::<Vec<_>>().join("\n")
    }

    fn options(&self, opened: &OpenedSeveral, global: &GlobalArgs) -> EvalOptions {
        let model = &opened.model;
        let several = self.samples_per_problem > 1;
        EvalOptions {
            samples_per_problem: self.samples_per_problem,
            temperature: self.temperature.unwrap_or(if several { 1.0 } else { 0.0 }),
            top_p: self.top_p,
            max_tokens: self.max_tokens,
            seed: global.seed.unwrap_or(0),
            ..EvalOptions::greedy(
                model.tokenizer.eos_ids(),
                model.decoder.config.max_position_embeddings,
            )
        }
    }

    /// What samples, as the arguments say.
    fn engines<'a>(
        &self,
        opened: &'a OpenedSeveral,
        sets: &[EvalSet],
        options: &EvalOptions,
        ranks: &Ranks,
        folder: &Path,
    ) -> Result<Engines<'a>> {
        let config = RolloutConfig {
            engine: self.engine,
            base_url: self.base_url.clone(),
            server: self.server.clone(),
            adapter_dir: self.adapter_dir.clone(),
            ..RolloutConfig::default()
        };
        config.validate()?;
        if self.engine == RolloutEngine::LlamaServer && opened.adapters.len() > 1 {
            return Err(Error::config(
                "--engine llama-server takes one adapter: its servers are started for it",
            ));
        }
        let mut context = 0;
        for set in sets {
            let longest = set.longest_prompt() + options.sampling(set)?.max_tokens;
            context = context.max(longest);
        }
        let site = Site {
            folder,
            context,
            rank: ranks.rank(),
            ranks: ranks.size(),
            progress: Progress::new(!ranks.is_root()),
        };
        let adapter = opened.adapters.first().map(|(_, adapter)| adapter);
        Engines::open(&config, &opened.model, adapter, self.batch_size, &site)
    }

    fn sets(&self, opened: &OpenedSeveral, quiet: bool) -> Result<Vec<EvalSet>> {
        let config = opened.configs.first();
        let trained_on = config.map(|config| &config.data);
        let given = self.few_shot.map(Template::FewShot).or(self.prompt.clone());
        let mut stop = self.stop.clone();
        let asked = |config: &Config| (config.data.prompt.clone(), config.grpo.stop.clone());
        if given.is_none()
            && opened
                .configs
                .windows(2)
                .any(|w| asked(&w[0]) != asked(&w[1]))
        {
            return Err(Error::config(
                "these adapters were trained with different prompts: give --prompt or --few-shot, so \
                 that all are asked the same",
            ));
        }
        let template = match (given, config) {
            // An adapter is asked the way it was trained.
            (None, Some(run)) if run.data.prompt != "auto" => {
                if stop.is_empty() {
                    stop = run.grpo.stop.clone();
                }
                Some(run.data.prompt.parse()?)
            }
            (given, _) => given,
        };
        let data_dir = self.data_dir.clone();
        let options = SetOptions {
            data_dir: data_dir.or(trained_on.and_then(|data| data.data_dir.clone())),
            limit: self.limit,
            template,
            stop: (!stop.is_empty()).then_some(stop),
            graders: self.reward.clone(),
            fields: FieldMapping {
                problem: self.problem_field.clone(),
                answer: self.answer_field.clone(),
                ..FieldMapping::default()
            },
            on_bad_row: match self.skip_bad_rows {
                true => OnBadRow::Skip,
                false => OnBadRow::Error,
            },
            quiet,
        };
        let tokenizer = &opened.model.tokenizer;
        let named = self
            .benchmark
            .iter()
            .map(|n| EvalSet::load(n, tokenizer, &options));
        let files = self
            .data
            .iter()
            .map(|p| EvalSet::from_file(p, tokenizer, &options));
        let progress = Progress::new(quiet);
        let mut sets: Vec<EvalSet> = Vec::new();
        for set in named.chain(files) {
            let set = set?;
            if sets.iter().any(|s| s.name == set.name) {
                return Err(Error::config(format!(
                    "two tasks are named {}: their results would overwrite each other",
                    set.name
                )));
            }
            progress.line(&format!("{}: {}", set.name, set.report.summary()));
            sets.push(set);
        }
        Ok(sets)
    }
}
