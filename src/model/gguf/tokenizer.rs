//! The tokenizer inside a GGUF file, built so that it gives the ids of the original one.
//!
//! A file holds vocabulary, merges and the *name* of the rule that cuts text into pieces before
//! merging. The rules are not in the file, so only names whose rule is known are accepted.

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::tokenizer::SplitDelimiterBehavior;
use tokenizers::{AddedToken, Tokenizer};

use super::file::GgufFile;
use crate::error::Result;

/// `tokenizer.ggml.token_type`: a control token such as `<|im_end|>`.
const CONTROL: i64 = 3;
/// `tokenizer.ggml.token_type`: a token that is matched whole but is ordinary text.
const USER_DEFINED: i64 = 4;

/// How text is cut before merging, by `tokenizer.ggml.pre`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PreTokenizer {
    /// GPT-2's own pattern.
    Gpt2,
    /// Every digit alone, then GPT-2's pattern.
    SmolLm,
    /// One digit at a time; text is normalised to NFC first.
    Qwen2,
    /// Up to three digits at a time; whole pieces that are in the vocabulary are not merged.
    Llama3,
}

impl PreTokenizer {
    fn from_name(name: &str) -> Option<Self> {
        match name {
            "gpt-2" => Some(Self::Gpt2),
            "smollm" => Some(Self::SmolLm),
            "qwen2" => Some(Self::Qwen2),
            "llama-bpe" | "llama3" | "llama-v3" => Some(Self::Llama3),
            _ => None,
        }
    }

    fn build(self) -> tokenizers::Result<PreTokenizerWrapper> {
        let gpt2_pattern = ByteLevel::new(false, true, true);
        Ok(match self {
            Self::Gpt2 => gpt2_pattern.into(),
            Self::SmolLm => {
                Sequence::new(vec![Digits::new(true).into(), gpt2_pattern.into()]).into()
            }
            Self::Qwen2 => split_then_bytes(r"\p{N}")?,
            Self::Llama3 => split_then_bytes(r"\p{N}{1,3}")?,
        })
    }
}

/// The pattern that Qwen2 and Llama 3 share but for the number of digits in a piece.
fn split_then_bytes(digits: &str) -> tokenizers::Result<PreTokenizerWrapper> {
    let alternatives = [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        digits,
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ];
    let pattern = SplitPattern::Regex(alternatives.join("|"));
    let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?;
    Ok(Sequence::new(vec![
        split.into(),
        ByteLevel::new(false, false, false).into(),
    ])
    .into())
}

/// Builds the tokenizer; what depends on the model (end-of-text ids) is left to the caller.
pub(super) fn build(file: &GgufFile) -> Result<Tokenizer> {
    let required_str = |key: &str| file.required(key, file.str(key)?);
    let model = required_str("tokenizer.ggml.model")?;
    if model != "gpt2" {
        return file.refuse(format!(
            "tokenizer model {model:?} is not supported; \"gpt2\" (byte-level BPE) is"
        ));
    }
    let pre_name = required_str("tokenizer.ggml.pre")?;
    let Some(pre) = PreTokenizer::from_name(pre_name) else {
        return file.refuse(format!(
            "pre-tokenizer {pre_name:?} is not known (gpt-2, smollm, qwen2 and llama-bpe are); \
             use the Hugging Face directory of this model, which carries its tokenizer"
        ));
    };
    let tokens_key = "tokenizer.ggml.tokens";
    let tokens = file.required(tokens_key, file.strings(tokens_key)?)?;
    let bpe = build_bpe(file, tokens, pre)?;
    let mut tokenizer = Tokenizer::new(bpe);
    assemble(&mut tokenizer, file, tokens, pre).or_else(|e| file.refuse(e))?;
    Ok(tokenizer)
}

fn build_bpe(file: &GgufFile, tokens: &[String], pre: PreTokenizer) -> Result<BPE> {
    let mut vocab = Vocab::with_capacity(tokens.len());
    for (id, token) in (0u32..).zip(tokens) {
        if let Some(earlier) = vocab.insert(token.clone(), id) {
            return file.refuse(format!("token {token:?} has the ids {earlier} and {id}"));
        }
    }
    let merges_key = "tokenizer.ggml.merges";
    let mut merges = Vec::new();
    for merge in file.required(merges_key, file.strings(merges_key)?)? {
        // The library indexes without asking, so a merge must be of and into known tokens.
        let known = merge.split_once(' ').filter(|(left, right)| {
            [
                left.to_string(),
                right.to_string(),
                format!("{left}{right}"),
            ]
            .iter()
            .all(|part| vocab.contains_key(part))
        });
        match known {
            Some((left, right)) => merges.push((left.to_string(), right.to_string())),
            None => return file.refuse(format!("merge {merge:?} is not of known tokens")),
        }
    }
    let built = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .ignore_merges(pre == PreTokenizer::Llama3)
        .build();
    built.or_else(|e| file.refuse(e))
}

fn assemble(
    tokenizer: &mut Tokenizer,
    file: &GgufFile,
    tokens: &[String],
    pre: PreTokenizer,
) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
    if pre == PreTokenizer::Qwen2 {
        tokenizer.with_normalizer(Some(NFC))?;
    }
    tokenizer.with_pre_tokenizer(Some(pre.build()?));
    tokenizer.with_decoder(Some(ByteLevel::new(false, true, true)));

    let types = file.ints("tokenizer.ggml.token_type")?.unwrap_or(&[]);
    let added = tokens.iter().zip(types).filter_map(|(token, &kind)| {
        let is_added = kind == CONTROL || kind == USER_DEFINED;
        is_added.then(|| AddedToken::from(token.clone(), kind == CONTROL).normalized(false))
    });
    tokenizer.add_tokens(added)?;

    let add_bos = file.bool("tokenizer.ggml.add_bos_token")?;
    let add_eos = file.bool("tokenizer.ggml.add_eos_token")?;
    let mut template = vec!["$A".to_string()];
    let mut special = Vec::new();
    // Llama 3 files made before the key existed mean "yes".
    if add_bos.unwrap_or(pre == PreTokenizer::Llama3) {
        let (token, id) = special_token(file, tokens, "tokenizer.ggml.bos_token_id")?;
        template.insert(0, token.clone());
        special.push((token, id));
    }
    if add_eos == Some(true) {
        let (token, id) = special_token(file, tokens, "tokenizer.ggml.eos_token_id")?;
        template.push(token.clone());
        special.push((token, id));
    }
    if !special.is_empty() {
        let mut builder = TemplateProcessing::builder();
        builder.try_single(template)?.special_tokens(special);
        tokenizer.with_post_processor(Some(builder.build()?));
    }
    Ok(())
}

fn special_token(file: &GgufFile, tokens: &[String], key: &str) -> Result<(String, u32)> {
    let id = file.required(key, file.u32(key)?)?;
    match tokens.get(id as usize) {
        Some(token) => Ok((token.clone(), id)),
        None => file.refuse(format!(
            "{key} = {id}, the file has {} tokens",
            tokens.len()
        )),
    }
}
