//! `tinylora bench`: how fast this machine samples and trains, against its own peak.

use std::io::Write;
use std::time::Instant;

use clap::Args;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::adapter::{Adapter, AdapterSpec, SvdCache};
use crate::cli::GlobalArgs;
use crate::config::{DataConfig, GrpoConfig};
use crate::data::prompts::Template;
use crate::model::{Batch, Flops, Keep, LoadOptions, Model, OpenOptions, pack};
use crate::ops::cpu::PackedMatrix;
use crate::ops::{Span, head};
use crate::rollout::{Completion, Engine, NativeEngine, Request, SamplingParams};
use crate::run::environment;
use crate::run::progress::{Bar, Progress};
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
    /// Print one JSON object instead of the table
    #[arg(long)]
    json: bool,
}

fn positive() -> clap::builder::RangedU64ValueParser<u64> {
    clap::value_parser!(u64).range(1..=1 << 20)
}

/// What one timed pass of a phase did.
#[derive(Debug, Clone, Copy)]
struct Pass {
    seconds: f64,
    tokens: usize,
    flops: f64,
}

/// The passes of a phase put together.
#[derive(Debug, Serialize)]
struct Phase {
    /// Median over the passes.
    seconds: f64,
    seconds_min: f64,
    seconds_max: f64,
    tokens: usize,
    tokens_per_s: f64,
    gflops: f64,
    share_of_peak: f64,
}

/// Runs the command.
pub fn run(args: &BenchArgs, global: &GlobalArgs, out: &mut dyn Write) -> Result<()> {
    let progress = Progress::new(global.quiet);
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
    let spec = AdapterSpec::default();
    let adapter = Adapter::new(
        &spec,
        model.base(),
        &model.decoder,
        &SvdCache::disabled(),
        &|_, _| {},
    )?;
    let svd_s = started.elapsed().as_secs_f64();

    let bar = progress.bar("bench", args.repeats + 1);
    let peak = gemm_peak_gflops();
    let bench = Bench {
        args,
        model: &model,
        adapter: &adapter,
        prompts: &prompts,
        seed: global.seed.unwrap_or(42),
    };
    let phases = bench.phases(peak, &bar)?;
    bar.finish();

    let report = Report {
        model: &model.name,
        peak,
        svd_s,
        load_s,
        phases: &phases,
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

struct Bench<'a> {
    args: &'a BenchArgs,
    model: &'a Model,
    adapter: &'a Adapter,
    prompts: &'a [Vec<u32>],
    seed: u64,
}

/// Names of the phases, in the order of [`Bench::pass`].
const PHASES: [&str; 5] = ["prefill", "rollout", "forward", "backward", "step"];

impl Bench<'_> {
    /// All phases, `repeats` times after one pass to warm up.
    fn phases(&self, peak: f64, bar: &Bar) -> Result<Vec<(&'static str, Phase)>> {
        let mut passes = Vec::new();
        for number in 0..=self.args.repeats {
            let pass = self.pass(number)?;
            if number > 0 {
                passes.push(pass);
            }
            bar.inc(1);
        }
        let of = |index: usize| passes.iter().map(|pass| pass[index]).collect::<Vec<_>>();
        Ok(PHASES
            .iter()
            .enumerate()
            .map(|(index, name)| (*name, Phase::new(&of(index), peak)))
            .collect())
    }

    /// One step with every group's backward computed, in its parts.
    fn pass(&self, step: u64) -> Result<[Pass; 5]> {
        let prefill = self.prefill()?;
        let (rollout, completions) = self.rollout(step)?;
        let (forward, backward) = self.update(&completions)?;
        // The rollout prefills by itself.
        let parts = [rollout, forward, backward];
        let step = Pass {
            seconds: parts.iter().map(|p| p.seconds).sum(),
            tokens: rollout.tokens,
            flops: parts.iter().map(|p| p.flops).sum(),
        };
        Ok([prefill, rollout, forward, backward, step])
    }

    fn flops(&self) -> Flops<'_> {
        Flops::new(&self.model.decoder.config)
    }

    /// All prompts as one batch.
    fn prefill(&self) -> Result<Pass> {
        let decoder = &self.model.decoder;
        let started = Instant::now();
        let mut cache = decoder.new_cache();
        let (mut tokens, mut spans) = (Vec::new(), Vec::new());
        for prompt in self.prompts {
            spans.push(Span {
                row: tokens.len(),
                len: prompt.len(),
                slot: cache.alloc(None, prompt.len()),
                pos: 0,
            });
            tokens.extend_from_slice(prompt);
        }
        let hidden = decoder.forward(Some(self.adapter), &tokens, &spans, &mut cache)?;
        wait(&hidden)?;
        Ok(Pass {
            seconds: started.elapsed().as_secs_f64(),
            tokens: tokens.len(),
            flops: spans.iter().map(|s| self.flops().tokens(0, s.len)).sum(),
        })
    }

    /// Samples every group.
    fn rollout(&self, step: u64) -> Result<(Pass, Vec<Vec<Completion>>)> {
        let n = self.args.num_generations as usize;
        let requests: Vec<Request> = self
            .prompts
            .iter()
            .enumerate()
            .map(|(id, prompt)| Request {
                id: id as u64,
                prompt: prompt.clone(),
                n,
            })
            .collect();
        let params = SamplingParams {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            max_tokens: self.args.max_tokens as usize,
            stop: Vec::new(),
            eos: self.model.tokenizer.eos_ids().to_vec(),
            seed: self.seed,
            step,
        };
        let Model {
            decoder, tokenizer, ..
        } = self.model;
        let mut engine = NativeEngine::new(decoder, tokenizer, 64);
        let started = Instant::now();
        let completions = engine.generate(
            Some(self.adapter),
            &requests,
            &params,
            &mut |_, _, _| {},
            &mut |_, _, _| {},
        )?;
        let seconds = started.elapsed().as_secs_f64();
        let flops = self.flops();
        let mut work = 0.0;
        for (prompt, group) in self.prompts.iter().zip(&completions) {
            work += flops.tokens(0, prompt.len()) + flops.head();
            for completion in group {
                let decoded = completion.tokens.len() - 1;
                work += flops.tokens(prompt.len(), decoded) + decoded as f64 * flops.head();
            }
        }
        let tokens = completions.iter().flatten().map(|c| c.tokens.len()).sum();
        let pass = Pass {
            seconds,
            tokens,
            flops: work,
        };
        Ok((pass, completions))
    }

    /// The update on all groups, packed as the trainer packs them.
    fn update(&self, completions: &[Vec<Completion>]) -> Result<(Pass, Pass)> {
        let decoder = &self.model.decoder;
        let flops = self.flops();
        let mut gradients = self.adapter.gradients();
        let zero = Pass {
            seconds: 0.0,
            tokens: 0,
            flops: 0.0,
        };
        let (mut forward, mut backward) = (zero, zero);
        let rows = |(prompt, group): (&Vec<u32>, &Vec<Completion>)| {
            prompt.len() + group.iter().map(|c| c.tokens.len() - 1).sum::<usize>()
        };
        let sizes: Vec<usize> = self.prompts.iter().zip(completions).map(rows).collect();
        for run in pack(&sizes, GrpoConfig::default().micro_batch_tokens) {
            let mut batch = Batch::default();
            for (prompt, group) in self.prompts[run.clone()].iter().zip(&completions[run]) {
                let sampled: Vec<&[u32]> = group.iter().map(|c| &c.tokens[..]).collect();
                batch.push_group(prompt, &sampled)?;
            }
            let keep = Keep::choose(None, &decoder.config, batch.tokens.len());
            let (layout, targets) = (&batch.layout, batch.targets.len());

            let started = Instant::now();
            let tape = decoder.forward_train(Some(self.adapter), &batch.tokens, layout, keep)?;
            wait(&tape.hidden)?;
            forward.seconds += started.elapsed().as_secs_f64();
            forward.tokens += batch.tokens.len();
            forward.flops += flops.batch(layout);

            let started = Instant::now();
            let hidden = batch.gather(&tape.hidden)?;
            let coefficients: Vec<f64> = (0..targets).map(|i| 1.0 - (i % 2) as f64 * 2.0).collect();
            let matrix = decoder.head(Some(self.adapter));
            let (dgathered, _) =
                head::backward(&hidden, matrix, &batch.targets, 1.0, &coefficients, None)?;
            let dhidden = batch.scatter(&dgathered, &tape.hidden)?;
            decoder.backward(
                self.adapter,
                tape,
                &dhidden,
                &batch.row_sequences,
                &mut gradients,
            )?;
            backward.seconds += started.elapsed().as_secs_f64();
            backward.tokens += batch.tokens.len();
            // Logits, and their gradient times the head.
            backward.flops += flops.batch_backward(layout) + 2.0 * targets as f64 * flops.head();
            if keep == Keep::Inputs {
                backward.flops += flops.batch(layout);
            }
        }
        Ok((forward, backward))
    }
}

/// Until a GPU has done what `tensor` depends on.
fn wait(tensor: &candle_core::Tensor) -> Result<()> {
    Ok(tensor.device().synchronize()?)
}

impl Phase {
    fn new(passes: &[Pass], peak: f64) -> Self {
        let mut sorted = passes.to_vec();
        sorted.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
        let Pass {
            seconds,
            tokens,
            flops,
        } = sorted[sorted.len() / 2];
        let gflops = flops / seconds / 1e9;
        Self {
            seconds,
            seconds_min: sorted[0].seconds,
            seconds_max: sorted[sorted.len() - 1].seconds,
            tokens,
            tokens_per_s: tokens as f64 / seconds,
            gflops,
            share_of_peak: gflops / peak,
        }
    }
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
    peak: f64,
    svd_s: f64,
    load_s: f64,
    phases: &'a [(&'static str, Phase)],
}

impl Report<'_> {
    fn to_json(&self) -> Value {
        let mut object = Map::new();
        object.insert("gemm_peak_gflops".into(), json!(self.peak));
        object.insert("svd_s".into(), json!(self.svd_s));
        object.insert("load_s".into(), json!(self.load_s));
        for (name, phase) in self.phases {
            object.insert((*name).into(), json!(phase));
        }
        object.insert("peak_rss_mb".into(), json!(peak_rss_mb()));
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
        match peak_rss_mb() {
            Some(peak) => writeln!(f, "peak memory {peak:.0} MB"),
            None => Ok(()),
        }
    }
}

/// Largest resident memory of this process so far, where the system tells (Linux).
fn peak_rss_mb() -> Option<f64> {
    let peak = environment::file_field("/proc/self/status", "VmHWM")?;
    let kib: f64 = peak.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024.0 / 1e6)
}
