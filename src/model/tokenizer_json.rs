//! Parsing `tokenizer.json`, with the checks that the tokenizers library leaves out.

use std::borrow::Cow;
use std::collections::HashSet;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use tokenizers::Tokenizer;

/// Parses the file's bytes.
///
/// The library builds a merge's token in a buffer as long as the longest token, and panics when
/// the result is longer, so a merge into an unknown token is refused here first.
pub(super) fn parse(bytes: &[u8]) -> Result<Tokenizer, String> {
    let file: File = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    if let Some(model) = file.model
        && let (Some(vocab), Some(merges)) = (model.vocab, model.merges)
    {
        check_merges(&vocab, &merges)?;
    }
    Tokenizer::from_bytes(bytes).map_err(|e| e.to_string())
}

fn check_merges(vocab: &Vocab, merges: &[Merge]) -> Result<(), String> {
    let mut merged = String::new();
    for merge in merges {
        let (left, right) = match merge {
            Merge::Pair(left, right) => (left.0.as_ref(), right.0.as_ref()),
            Merge::Text(text) => match text.0.split_once(' ') {
                Some(pair) => pair,
                None => continue,
            },
        };
        merged.clear();
        merged.push_str(left);
        merged.push_str(right);
        if !vocab.0.contains(merged.as_str()) {
            return Err(format!("merge {left:?} {right:?} gives no known token"));
        }
    }
    Ok(())
}

#[derive(Deserialize)]
struct File<'a> {
    #[serde(borrow)]
    model: Option<Model<'a>>,
}

#[derive(Deserialize)]
struct Model<'a> {
    #[serde(borrow)]
    vocab: Option<Vocab<'a>>,
    #[serde(borrow)]
    merges: Option<Vec<Merge<'a>>>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge<'a> {
    Pair(#[serde(borrow)] Token<'a>, #[serde(borrow)] Token<'a>),
    Text(#[serde(borrow)] Token<'a>),
}

/// The tokens of a BPE vocabulary, without their ids; empty for the lists of other models.
struct Vocab<'a>(HashSet<Cow<'a, str>>);

impl<'de: 'a, 'a> Deserialize<'de> for Vocab<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Tokens;
        impl<'de> Visitor<'de> for Tokens {
            type Value = Vocab<'de>;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("a vocabulary")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Vocab<'de>, A::Error> {
                let mut tokens = HashSet::new();
                while let Some((Token(token), IgnoredAny)) = map.next_entry()? {
                    tokens.insert(token);
                }
                Ok(Vocab(tokens))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vocab<'de>, A::Error> {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Vocab(HashSet::new()))
            }
        }
        deserializer.deserialize_any(Tokens)
    }
}

/// A string borrowed from the file unless it contains escapes.
#[derive(Deserialize)]
struct Token<'a>(#[serde(borrow)] Cow<'a, str>);
