//! `tinylora export`: an adapter, or the model with it, in the format that another program reads.

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use super::open::{ModelArgs, Opened};
use crate::adapter::{AdapterSource, SavedAdapter};
use crate::cli::GlobalArgs;
use crate::config::WeightDtype;
use crate::model::Dtype;
use crate::run::progress::Progress;
use crate::run::{fs, plan};
use crate::{Error, Result, export};

/// Arguments of `tinylora export`.
#[derive(Debug, Args)]
pub struct ExportArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Where to write: a file for tinylora and gguf-lora, a directory for the others
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
    /// What to write
    #[arg(long, value_enum, default_value = "tinylora")]
    format: Format,
}

/// What can be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// The trained numbers and their specification in one small file
    Tinylora,
    /// PEFT's TinyLoRA directory (peft 0.20 and later)
    Peft,
    /// PEFT's LoRA directory, which multiplies out to the same update: for vLLM, SGLang, PEFT, …
    Lora,
    /// llama.cpp's LoRA file (GGUF), the same update once more
    GgufLora,
    /// A Hugging Face model with the update added to its weights (in --dtype)
    Merged,
}

/// Runs the command; the path written is the one line on `out`.
pub fn run(args: &ExportArgs, global: &GlobalArgs, out: &mut dyn Write) -> Result<()> {
    let progress = Progress::new(global.quiet);
    check_target(args)?;
    match args.format {
        Format::Tinylora => write_own(args, global, progress)?,
        _ => write_foreign(args, global, progress)?,
    }
    writeln!(out, "{}", args.out.display())
        .map_err(|e| Error::data(format!("cannot write to stdout: {e}")))
}

/// Refuses a target of the wrong kind before anything is read.
fn check_target(args: &ExportArgs) -> Result<()> {
    let out = &args.out;
    let wrong = |what: &str| Err(Error::config(format!("--out {}: {what}", out.display())));
    if let Some(example) = args.format.file() {
        if out.is_dir() {
            return wrong(&format!(
                "is a directory, give the name of a file such as {example}"
            ));
        }
    } else if out.exists() && !out.is_dir() {
        return wrong("is a file, this format needs a directory");
    }
    // Shards of another model beside the new ones would be read along with them.
    if args.format == Format::Merged && is_occupied(out) {
        return wrong("is not empty, give a directory of its own to the model");
    }
    Ok(())
}

fn is_occupied(dir: &Path) -> bool {
    std::fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some())
}

impl Format {
    /// The usual name of the file, for formats that are one.
    fn file(self) -> Option<&'static str> {
        match self {
            Self::Tinylora => Some("adapter.safetensors"),
            Self::GgufLora => Some("adapter.gguf"),
            Self::Peft | Self::Lora | Self::Merged => None,
        }
    }
}

/// The adapter's own file. One that is such a file already needs no model: what was read and found
/// whole is written again.
fn write_own(args: &ExportArgs, global: &GlobalArgs, progress: Progress) -> Result<()> {
    let name = match args.model.only_adapter()? {
        Some(file) if !Path::new(file).is_dir() => file.to_owned(),
        _ => args.model.names(progress)?.adapter.ok_or_else(no_adapter)?,
    };
    let bytes = if AdapterSource::is_text(&name) || Path::new(&name).is_dir() {
        let adapter = args.model.open(global)?.adapter.ok_or_else(no_adapter)?;
        adapter.to_bytes()?
    } else {
        fs::read(Path::new(&name))?
    };
    let saved = SavedAdapter::from_bytes(&bytes, &name)?;
    fs::write_atomic(&args.out, &bytes)?;
    let count = saved.num_parameters();
    progress.line(&format!(
        "{count} numbers, {}, for {}",
        plan::bytes(count * saved.spec.dtype.size()),
        saved.base.name
    ));
    if let Some(text) = saved.short_text() {
        progress.line(&format!("as text, for --adapter: {text}"));
    }
    Ok(())
}

/// The formats of other programs, which need the model.
fn write_foreign(args: &ExportArgs, global: &GlobalArgs, progress: Progress) -> Result<()> {
    // --dtype is the target's: the base is read as it is, so that numbers are rounded once.
    let target = global.dtype.unwrap_or_default().to_dtype();
    let as_stored = GlobalArgs {
        dtype: Some(WeightDtype::Auto),
        ..global.clone()
    };
    let Opened { model, adapter, .. } = args.model.open(&as_stored)?;
    if args.format == Format::Merged {
        let stored = model.decoder.config.dtype.unwrap_or(Dtype::F32);
        let dtype = target.unwrap_or(stored);
        let report = export::write_merged(&model, adapter.as_ref(), &args.out, dtype)?;
        progress.line(&format!(
            "{} in {}",
            plan::bytes(report.bytes),
            dtype.torch_name()
        ));
        if report.relative_loss > 0.0 {
            progress.line(&format!(
                "rounding to {} lost {:.1} % of the update (relative norm of what it changed); \
                 --format lora keeps all of it",
                dtype.torch_name(),
                100.0 * report.relative_loss
            ));
        }
        return Ok(());
    }
    let adapter = adapter.ok_or_else(no_adapter)?;
    match args.format {
        Format::Peft => export::write_peft(&adapter, &args.out),
        Format::GgufLora => export::write_gguf_lora(&adapter, &model.decoder.config, &args.out),
        _ => export::write_lora(&adapter, &args.out),
    }
}

fn no_adapter() -> Error {
    Error::config("there is no adapter to export: give --adapter or --run")
}
