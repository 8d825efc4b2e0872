//! Token ids and texts on many real and random strings, against what `scripts/tokenizer_oracle.py`
//! made in the folder that `TINYLORA_TOKENIZER_ORACLE` names. Skipped, and says so, without it.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use tinylora::model::{Checkpoint, OpenOptions, TextStream, Tokenizer};

#[derive(Deserialize)]
struct Row {
    text: String,
    ids: Vec<u32>,
    /// Tokens that encoding with special tokens adds.
    extra: usize,
    /// Text of the ids without special tokens.
    decoded: String,
}

fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut stream = TextStream::new(true);
    let mut text: String = ids.iter().map(|&id| stream.push(tokenizer, id)).collect();
    text.push_str(&stream.finish(tokenizer));
    text
}

fn compare(folder: &Path) {
    let source = std::fs::read_to_string(folder.join("source")).expect("a source");
    let options = OpenOptions {
        random_init: (!source.ends_with(".gguf")).then_some(0),
        ..OpenOptions::default()
    };
    let started = std::time::Instant::now();
    let tokenizer = Checkpoint::open(&source, &options)
        .expect("opened")
        .tokenizer;
    let opened = started.elapsed();
    let rows = std::fs::File::open(folder.join("ids.jsonl")).expect("ids");
    let (mut texts, mut tokens) = (0, 0);
    for line in BufReader::new(rows).lines() {
        let row: Row = serde_json::from_str(&line.expect("a line")).expect("a row");
        let ids = tokenizer.encode(&row.text, false).expect("encoded");
        assert_eq!(ids, row.ids, "{:?}", row.text);
        let special = tokenizer.encode(&row.text, true).expect("encoded");
        assert_eq!(special.len() - ids.len(), row.extra);
        assert_eq!(tokenizer.decode(&ids, true), row.decoded);
        assert_eq!(streamed(&tokenizer, &ids), row.decoded);
        texts += 1;
        tokens += ids.len();
    }
    let name = folder.file_name().unwrap_or_default().display();
    println!("{name}: {texts} texts, {tokens} tokens equal; opened in {opened:?}");
}

#[test]
fn oracle_ids_are_equal() {
    let Some(folder) = std::env::var_os("TINYLORA_TOKENIZER_ORACLE").map(PathBuf::from) else {
        println!("skipped: TINYLORA_TOKENIZER_ORACLE is not set (scripts/tokenizer_oracle.py)");
        return;
    };
    let mut compared = 0;
    for entry in std::fs::read_dir(&folder).expect("listed") {
        let path = entry.expect("an entry").path();
        if path.join("ids.jsonl").exists() {
            compare(&path);
            compared += 1;
        }
    }
    assert!(compared > 0, "nothing to compare in {}", folder.display());
}

/// A GGUF file of the Llama family against the directory that transformers made of it, in the
/// folder of `scripts/oracle.py`.
#[test]
fn oracle_gguf_weights_are_equal() {
    let Some(folder) = std::env::var_os("TINYLORA_ORACLE").map(PathBuf::from) else {
        println!("skipped: TINYLORA_ORACLE is not set (scripts/oracle.py makes its folder)");
        return;
    };
    let open = |name: &str| {
        let source = folder.join(name).display().to_string();
        Checkpoint::open(&source, &OpenOptions::default()).expect("opened")
    };
    let (gguf, directory) = (open("SmolLM2-135M-Instruct.Q4_1.gguf"), open("smollm2"));
    let mut largest = 0.0f32;
    for name in directory.weights.names() {
        let ours = gguf.weights.get_f32(name).expect(name);
        let theirs = directory.weights.get_f32(name).expect(name);
        assert_eq!(ours.len(), theirs.len(), "{name}");
        let differences = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs());
        largest = differences.fold(largest, f32::max);
    }
    println!("largest difference of a weight: {largest:e}");
    assert!(largest <= 1e-6, "{largest}");
    assert_eq!(gguf.config.eos_token_ids, directory.config.eos_token_ids);
    assert_eq!(gguf.config.rope, directory.config.rope);
}
