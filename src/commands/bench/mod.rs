//! `tinylora bench`: how fast this machine samples and trains, against its own peak.

mod decode;
mod phases;

use std::io::Write;
use std::time::Instant;

use clap::Args;
use serde_json::{Map, Value, json};

use self::decode::Decode;
use self::phases::{Bench, Phase};
use crate::adapter::{Adapter, SvdCache};
use crate::cli::GlobalArgs;
use crate::config::{Config, DataConfig, Sizes, Source};
use crate::data::prompts::Template;
use crate::model::{LoadOptions, Model, OpenOptions};
use crate::ops::cpu::PackedMatrix;
use crate::run::memory;
use crate::run::progress::Progress;
use crate::{Error, Result, data};

/// Arguments of `tinylora bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// Hugging Face directory, .gguf file, hub id, or `mini`
    #[arg(long, value_name = "MODEL", default_value = "mini")]
    model: String,
    /// Prompts of a step
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = positive())]
    prompts: u64,
    /// Completions of each prompt
    #[arg(long, value_name = "G", default_value_t = 8, value_parser = positive())]
    num_generations: u64,
    /// Most tokens of a completion
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = positive())]
    max_tokens: u64,
    /// Benchmark's name or file that the prompts come from
    #[arg(long, value_name = "FILE", default_value = "mini")]
    data: String,
    /// Steps that are timed, after one that is not; the median counts
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = positive())]
    repeats: u64,
    /// Also decode this many sequences at once, 64 tokens each behind prompts of 100
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = positive())]
    decode: Vec<u64>,
    /// A key of the configuration, such as adapter.u or grpo.micro_batch_tokens; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print one JSON object instead of the table
    #[arg(long)]
    json: bool,
}

fn positive() -> clap::builder::RangedU64ValueParser<u64> {
    clap::value_parser!(u64).range(1..=1 << 20)
}

/// Runs the command.
pub fn run(args: &BenchArgs, global: &GlobalArgs, out: &mut dyn Write) -> Result<()> {
    let progress = Progress::new(global.quiet);
    let defaults = Source {
        origin: "the defaults".into(),
        name: "bench".into(),
        // A configuration names its model.
        text: "[model]\npath = \"mini\"\n".into(),
    };
    let config = Config::load(&defaults, &args.set)?;
    let source = DataConfig {
        train: args.data.clone(),
        limit: Some(args.prompts as usize),
        ..DataConfig::default()
    };
    let problems = data::load(&source, global.quiet)?.problems;
    if problems.len() < args.prompts as usize {
        return Err(Error::config(format!(
            "--prompts {}: {} has {} problems",
            args.prompts,
            args.data,
            problems.len()
        )));
    }

    let started = Instant::now();
    let options = LoadOptions {
        device: global.device.unwrap_or_default().open()?,
        dtype: global.dtype.and_then(|dtype| dtype.to_dtype()),
        mmap: global.mmap,
        open: OpenOptions {
            quiet: global.quiet,
            ..OpenOptions::default()
        },
        ..LoadOptions::default()
    };
    let model = Model::load(&args.model, &options)?;
    let load_s = started.elapsed().as_secs_f64();
    // The chat format where the checkpoint has one.
    let render = |template: &Template| -> Result<Vec<Vec<u32>>> {
        problems
            .iter()
            .map(|p| Ok(template.render(&model.tokenizer, &p.problem, &[])?.tokens))
            .collect()
    };
    let prompts = render(&Template::Gsm8k).or_else(|_| render(&Template::Plain))?;
    check_context(&prompts, args, &model)?;

    let started = Instant::now();
    let adapter = Adapter::new(
        &config.adapter,
        model.base(),
        &model.decoder,
        &SvdCache::disabled(),
        &|_, _| {},
    )?;
    let svd_s = started.elapsed().as_secs_f64();

    let bar = progress.bar("bench", args.repeats + 1 + args.decode.len() as u64);
    let peak = gemm_peak_gflops();
    let bench = Bench {
        args,
        config: &config.grpo,
        sizes: Sizes::of(&config),
        model: &model,
        adapter: &adapter,
        prompts: &prompts,
        seed: global.seed.unwrap_or(42),
    };
    let phases = bench.phases(peak, &bar)?;
    let peak_rss_mb = memory::peak().map(|bytes| bytes as f64 / 1e6);
    let mut decode = Vec::new();
    for &sequences in &args.decode {
        decode.push(Decode::measure(&bench, sequences as usize)?);
        bar.inc(1);
    }
    bar.finish();

    let report = Report {
        model: &model.name,
        parameters: adapter.num_parameters(),
        peak,
        svd_s,
        load_s,
        phases: &phases,
        decode: &decode,
        peak_rss_mb,
    };
    let text = match args.json {
        true => format!("{:#}\n", report.to_json()),
        false => report.to_string(),
    };
    out.write_all(text.as_bytes())
        .map_err(|e| Error::data(format!("cannot write to stdout: {e}")))
}

fn check_context(prompts: &[Vec<u32>], args: &BenchArgs, model: &Model) -> Result<()> {
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let context = model.decoder.config.max_position_embeddings;
    if longest + args.max_tokens as usize > context {
        return Err(Error::config(format!(
            "--max-tokens {}: with the longest prompt of {longest} tokens that is more than the \
             model's context of {context}",
            args.max_tokens
        )));
    }
    Ok(())
}

/// The best rate of f32 products seen on this CPU, in GFLOP/s, over a few large shapes.
fn gemm_peak_gflops() -> f64 {
    let mut best = 0.0f64;
    for (m, n, k) in [(1024, 1024, 1024), (512, 2048, 1024), (1024, 1536, 576)] {
        let w: Vec<f32> = (0..n * k).map(|i| (i % 7) as f32 - 3.0).collect();
        let w = PackedMatrix::pack(&w, n, k);
        let x = vec![0.5; m * k];
        let mut y = vec![0.0; m * n];
        for _ in 0..8 {
            let started = Instant::now();
            w.forward(&x, m, None, &mut y);
            let rate = 2.0 * (m * n * k) as f64 / started.elapsed().as_secs_f64() / 1e9;
            best = best.max(rate);
        }
    }
    best
}

struct Report<'a> {
    model: &'a str,
    /// Trained numbers.
    parameters: usize,
    peak: f64,
    svd_s: f64,
    load_s: f64,
    phases: &'a [(&'static str, Phase)],
    decode: &'a [Decode],
    /// After the phases.
    peak_rss_mb: Option<f64>,
}

impl Report<'_> {
    fn to_json(&self) -> Value {
        let mut object = Map::new();
        object.insert("parameters".into(), json!(self.parameters));
        object.insert("threads".into(), json!(rayon::current_num_threads()));
        object.insert("gemm_peak_gflops".into(), json!(self.peak));
        object.insert("svd_s".into(), json!(self.svd_s));
        object.insert("load_s".into(), json!(self.load_s));
        for (name, phase) in self.phases {
            object.insert((*name).into(), json!(phase));
        }
        object.insert("peak_rss_mb".into(), json!(self.peak_rss_mb));
        if !self.decode.is_empty() {
            object.insert("decode".into(), json!(self.decode));
        }
        Value::Object(object)
    }
}

impl std::fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "{}: load {:.2} s, decomposition {:.2} s, {} threads, f32 products up to {:.0} GFLOP/s",
            self.model,
            self.load_s,
            self.svd_s,
            rayon::current_num_threads(),
            self.peak
        )?;
        writeln!(
            f,
            "{:9}{:>10}{:>18}{:>9}{:>10}{:>10}{:>10}",
            "phase", "seconds", "min–max", "tokens", "tok/s", "GFLOP/s", "of peak"
        )?;
        for (name, p) in self.phases {
            let spread = format!("{:.3}–{:.3}", p.seconds_min, p.seconds_max);
            writeln!(
                f,
                "{name:9}{:>10.3}{spread:>18}{:>9}{:>10.0}{:>10.1}{:>9.0}%",
                p.seconds,
                p.tokens,
                p.tokens_per_s,
                p.gflops,
                100.0 * p.share_of_peak
            )?;
        }
        if let Some(peak) = self.peak_rss_mb {
            writeln!(f, "peak memory {peak:.0} MB")?;
        }
        self.decode
            .iter()
            .try_for_each(|decode| writeln!(f, "{decode}"))
    }
}
