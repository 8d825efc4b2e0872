//! `tinylora score`: log-probabilities of given completions, as the trainer computes them.

use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::Value;

use super::open::ModelArgs;
use crate::adapter::Adapter;
use crate::cli::GlobalArgs;
use crate::data::rows::{Limits, Row, read_json_lines};
use crate::model::{Batch, Model};
use crate::run::progress::Progress;
use crate::{Error, Result};

/// Arguments of `tinylora score`.
#[derive(Debug, Args)]
pub struct ScoreArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// JSON Lines with `prompt` and `completion`, raw text: no special tokens are added
    file: PathBuf,
}

/// Runs the command: the rows with `prompt_ids`, `completion_ids` and `logprobs` (natural
/// logarithm, temperature 1) on `out`.
pub fn run(args: &ScoreArgs, global: &GlobalArgs, out: &mut dyn Write) -> Result<()> {
    // A file that cannot be read is refused before the model takes its time.
    let rows = read_rows(&args.file)?;
    let opened = args.model.open(global)?;
    let progress = Progress::new(global.quiet);
    let bar = progress.bar("scoring", rows.len() as u64);
    score_rows(
        &args.file,
        rows,
        &opened.model,
        opened.adapter.as_ref(),
        &mut |row| {
            bar.inc(1);
            serde_json::to_writer(&mut *out, &row)
                .map_err(std::io::Error::from)
                .and_then(|()| writeln!(out))
                .map_err(|e| Error::data(format!("stdout: {e}")))
        },
    )?;
    bar.finish();
    Ok(())
}

/// A row and its place in the file.
type Placed = (String, Row);

fn read_rows(path: &Path) -> Result<Vec<Placed>> {
    let limits = Limits::default();
    let (mut rows, mut bytes) = (Vec::new(), 0usize);
    read_json_lines(path, &limits, &mut |place, row| {
        let row = row.map_err(|why| at(path, place, &why))?;
        for key in ["prompt", "completion"] {
            match row.get(key) {
                Some(Value::String(text)) => bytes += text.len(),
                Some(_) => return Err(at(path, place, &format!("has a {key} that is no text"))),
                None => return Err(at(path, place, &format!("has no {key}"))),
            }
        }
        if bytes > limits.kept_bytes {
            return Err(at(path, place, "is one too many: cut the file into parts"));
        }
        rows.push((place.to_string(), row));
        Ok(ControlFlow::Continue(()))
    })?;
    if rows.is_empty() {
        return Err(Error::data(format!("{} holds no row", path.display())));
    }
    Ok(rows)
}

fn at(path: &Path, place: &str, why: &str) -> Error {
    Error::data(format!("{} {place} {why}", path.display()))
}

/// Rows of one forward pass: enough to use every core, few enough to bound memory.
const BATCH_TOKENS: usize = 2048;

fn score_rows(
    path: &Path,
    rows: Vec<Placed>,
    model: &Model,
    adapter: Option<&Adapter>,
    emit: &mut dyn FnMut(Row) -> Result<()>,
) -> Result<()> {
    let context = model.decoder.config.max_position_embeddings;
    let (mut batch, mut waiting) = (Batch::default(), Vec::new());
    for (place, mut row) in rows {
        let encode = |key: &str| {
            let text = row.get(key).and_then(Value::as_str).unwrap_or_default();
            model.tokenizer.encode(text, false)
        };
        let (prompt, completion) = (encode("prompt")?, encode("completion")?);
        let length = prompt.len() + completion.len();
        if length > context {
            return Err(at(
                path,
                &place,
                &format!("has {length} tokens, the model's context {context}"),
            ));
        }
        if prompt.is_empty() && !completion.is_empty() {
            return Err(at(
                path,
                &place,
                "has an empty prompt: the first token of a completion needs one before it",
            ));
        }
        if !completion.is_empty() {
            if !batch.tokens.is_empty() && batch.tokens.len() + length > BATCH_TOKENS {
                flush(model, adapter, &mut batch, &mut waiting, emit)?;
            }
            batch.push_sequence(&prompt, &completion)?;
        }
        let scored = !completion.is_empty();
        row.insert("prompt_ids".to_string(), prompt.into());
        row.insert("completion_ids".to_string(), completion.into());
        waiting.push((row, scored));
    }
    flush(model, adapter, &mut batch, &mut waiting, emit)
}

/// Scores the batch and gives its rows out in their order.
fn flush(
    model: &Model,
    adapter: Option<&Adapter>,
    batch: &mut Batch,
    waiting: &mut Vec<(Row, bool)>,
    emit: &mut dyn FnMut(Row) -> Result<()>,
) -> Result<()> {
    let batch = std::mem::take(batch);
    let logprobs = if batch.targets.is_empty() {
        Vec::new()
    } else {
        model.decoder.score(adapter, &batch, 1.0)?.logprobs
    };
    let mut by_completion = batch.by_completion(&logprobs);
    for (mut row, scored) in waiting.drain(..) {
        let own: &[f64] = if scored {
            by_completion.next().unwrap_or_default()
        } else {
            &[]
        };
        row.insert("logprobs".to_string(), own.to_vec().into());
        emit(row)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_checked_before_anything_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.jsonl");
        for (content, why) in [
            ("", "holds no row"),
            ("{\"prompt\": \"a\"}", "line 1 has no completion"),
            (
                "\n{\"prompt\": 1, \"completion\": \"a\"}",
                "line 2 has a prompt that is no text",
            ),
            ("[]", "line 1 holds a list"),
        ] {
            std::fs::write(&path, content).unwrap();
            let error = read_rows(&path).unwrap_err();
            assert_eq!(error.exit_code(), 3);
            assert!(error.to_string().contains(why), "{error}");
        }
    }
}
