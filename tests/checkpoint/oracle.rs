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
