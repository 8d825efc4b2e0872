//! `tinylora generate`: completions of one prompt, as text on stdout.

use std::io::Write;

use clap::Args;

use super::open::{ModelArgs, Opened};
use super::side_by_side;
use crate::adapter::Adapter;
use crate::cli::GlobalArgs;
use crate::model::{ChatMessage, Model, TextStream};
use crate::rollout::{Completion, Engine, FinishReason, NativeEngine, Request, SamplingParams};
use crate::{Error, Result};

/// Arguments of `tinylora generate`.
#[derive(Debug, Args)]
pub struct GenerateArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Raw text to go on from
    #[arg(long, value_name = "TEXT", required_unless_present = "chat")]
    prompt: Option<String>,
    /// A user's message, put into the checkpoint's chat format
    #[arg(long, value_name = "TEXT", conflicts_with = "prompt")]
    chat: Option<String>,
    /// Most tokens of a completion
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_tokens: usize,
    /// 0 is greedy [default: 0, or 1 with several completions]
    #[arg(long, value_name = "T")]
    temperature: Option<f64>,
    /// Nucleus mass; 1 keeps every token
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f64,
    /// Number of tokens kept; 0 keeps all
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Keep tokens at least this likely compared with the likeliest; 0 keeps all
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    min_p: f64,
    /// String that ends a completion (repeatable)
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Number of completions
    #[arg(short, long = "num", value_name = "N", default_value_t = 1)]
    n: usize,
    /// Show the base model's completions beside the adapter's
    #[arg(long)]
    compare: bool,
}

/// Runs the command.
pub fn run(args: &GenerateArgs, global: &GlobalArgs, out: &mut dyn Write) -> Result<()> {
    let mut params = args.params(global)?;
    let opened = args.model.open(global)?;
    if args.compare && opened.adapter.is_none() {
        return Err(Error::config(
            "--compare needs an --adapter to compare with",
        ));
    }
    let prompt = args.tokens(&opened.model)?;
    let context = opened.model.decoder.config.max_position_embeddings;
    let room = context.saturating_sub(prompt.len());
    if room == 0 {
        return Err(Error::config(format!(
            "the prompt has {} tokens, the model's context {context}",
            prompt.len()
        )));
    }
    params.max_tokens = params.max_tokens.min(room);
    params.eos = opened.model.tokenizer.eos_ids().to_vec();
    let request = Request {
        id: 0,
        prompt,
        n: args.n,
    };
    if args.compare {
        return compare(&opened, &request, &params, out);
    }
    print(
        &opened.model,
        opened.adapter.as_ref(),
        &request,
        &params,
        out,
    )
}

impl GenerateArgs {
    /// The sampling parameters without what the model decides.
    fn params(&self, global: &GlobalArgs) -> Result<SamplingParams> {
        let temperature = self
            .temperature
            .unwrap_or(if self.n > 1 { 1.0 } else { 0.0 });
        let share = |p: f64| p.is_finite() && (0.0..=1.0).contains(&p);
        for (ok, flag, advice) in [
            (self.n >= 1, "-n", "at least 1"),
            (self.max_tokens >= 1, "--max-tokens", "at least 1"),
            (
                temperature.is_finite() && temperature >= 0.0,
                "--temperature",
                "0 (greedy) or more",
            ),
            (
                temperature > 0.0 || self.n == 1,
                "--temperature",
                "above 0 for several completions, which would all be the same",
            ),
            (
                share(self.top_p) && self.top_p > 0.0,
                "--top-p",
                "above 0 and at most 1",
            ),
            (share(self.min_p), "--min-p", "from 0 to 1"),
            (
                !self.stop.iter().any(String::is_empty),
                "--stop",
                "a text that is not empty",
            ),
        ] {
            if !ok {
                return Err(Error::config(format!("{flag} must be {advice}")));
            }
        }
        Ok(SamplingParams {
            temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            max_tokens: self.max_tokens,
            stop: self.stop.clone(),
            eos: Vec::new(),
            seed: global.seed.unwrap_or(0),
            step: 0,
        })
    }

    fn tokens(&self, model: &Model) -> Result<Vec<u32>> {
        let tokens = match (&self.chat, &self.prompt) {
            (Some(message), _) => {
                let turn = [ChatMessage::new("user", message.clone())];
                let text = model.tokenizer.apply_chat_template(&turn, true)?;
                model.tokenizer.encode(&text, false)?
            }
            (None, prompt) => model
                .tokenizer
                .encode(prompt.as_deref().unwrap_or_default(), true)?,
        };
        if tokens.is_empty() {
            return Err(Error::config("the prompt is empty"));
        }
        Ok(tokens)
    }
}

fn stdout_error(error: std::io::Error) -> Error {
    Error::data(format!("stdout: {error}"))
}

fn sample(
    model: &Model,
    adapter: Option<&Adapter>,
    request: &Request,
    params: &SamplingParams,
    on_token: &mut dyn FnMut(usize, usize, &[u32]),
) -> Result<Vec<Completion>> {
    let mut engine = NativeEngine::new(&model.decoder, &model.tokenizer, 64);
    let requests = std::slice::from_ref(request);
    let mut groups = engine.generate(adapter, requests, params, on_token, &mut |_, _, _| {})?;
    Ok(groups.pop().unwrap_or_default())
}

/// One completion streams; several are printed in order, each under its number.
fn print(
    model: &Model,
    adapter: Option<&Adapter>,
    request: &Request,
    params: &SamplingParams,
    out: &mut dyn Write,
) -> Result<()> {
    if request.n > 1 || !params.stop.is_empty() {
        let completions = sample(model, adapter, request, params, &mut |_, _, _| {})?;
        for (index, completion) in completions.iter().enumerate() {
            if request.n > 1 {
                writeln!(out, "[{}/{}]", index + 1, request.n).map_err(stdout_error)?;
            }
            writeln!(out, "{}", shown(completion)).map_err(stdout_error)?;
        }
        return Ok(());
    }
    let mut stream = TextStream::new(true);
    let mut failure = None;
    let mut printed = 0;
    sample(model, adapter, request, params, &mut |_, _, tokens| {
        let ended = params.eos.contains(&tokens[tokens.len() - 1]);
        for &id in &tokens[printed..tokens.len() - usize::from(ended)] {
            let piece = stream.push(&model.tokenizer, id);
            let written = write!(out, "{piece}").and_then(|()| out.flush());
            failure = failure.take().or(written.err());
        }
        printed = tokens.len();
    })?;
    let rest = stream.finish(&model.tokenizer);
    match failure {
        Some(error) => Err(stdout_error(error)),
        None => writeln!(out, "{rest}").map_err(stdout_error),
    }
}

/// A completion's text, with a mark where it was cut.
fn shown(completion: &Completion) -> String {
    match completion.finish {
        FinishReason::Length => format!("{} […]", completion.text),
        _ => completion.text.clone(),
    }
}

/// Base and adapter beside each other, with the same draws.
fn compare(
    opened: &Opened,
    request: &Request,
    params: &SamplingParams,
    out: &mut dyn Write,
) -> Result<()> {
    let run = |adapter| sample(&opened.model, adapter, request, params, &mut |_, _, _| {});
    let (base, adapted) = (run(None)?, run(opened.adapter.as_ref())?);
    let width = side_by_side::terminal_width();
    for (index, (base, adapted)) in base.iter().zip(&adapted).enumerate() {
        let number = match request.n {
            1 => String::new(),
            n => format!(" [{}/{n}]", index + 1),
        };
        let text = side_by_side::render(
            (&format!("base{number}"), &shown(base)),
            (&format!("adapter{number}"), &shown(adapted)),
            width,
        );
        write!(out, "{text}").map_err(stdout_error)?;
    }
    Ok(())
}
