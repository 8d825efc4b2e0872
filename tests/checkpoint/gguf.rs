//! GGUF files against the Hugging Face directories they were made of, and hostile ones.

use std::collections::BTreeMap;
use std::path::PathBuf;

use tempfile::TempDir;
use tinylora::model::{Arch, Dtype, LoadOptions, ModelConfig, RopeScaling};

use crate::support::{
    TOKENIZERS, Tensors, config, config_json, load, logits, open, refusal, strings, tensors,
    weight_bytes,
};

/// A metadata value as it is written.
#[derive(Clone)]
enum Meta {
    U32(u32),
    F32(f32),
    Bool(bool),
    Str(String),
    Strs(Vec<String>),
    I32s(Vec<i32>),
    Raw(u32, Vec<u8>),
}

fn string(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

impl Meta {
    fn bytes(&self) -> Vec<u8> {
        let (kind, value) = match self {
            Self::U32(n) => (4u32, n.to_le_bytes().to_vec()),
            Self::F32(x) => (6, x.to_le_bytes().to_vec()),
            Self::Bool(b) => (7, vec![u8::from(*b)]),
            Self::Str(s) => (8, string(s)),
            Self::Strs(list) => (9, array(8, list.len(), list.iter().flat_map(|s| string(s)))),
            Self::I32s(list) => {
                let bytes = list.iter().flat_map(|n| n.to_le_bytes());
                (9, array(5, list.len(), bytes))
            }
            Self::Raw(kind, bytes) => (*kind, bytes.clone()),
        };
        [kind.to_le_bytes().to_vec(), value].concat()
    }
}

fn array(kind: u32, len: usize, items: impl Iterator<Item = u8>) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend_from_slice(&(len as u64).to_le_bytes());
    bytes.extend(items);
    bytes
}

/// A tensor as it is written: dimensions fastest first, type number, data.
#[derive(Clone)]
struct Block {
    dims: Vec<u64>,
    kind: u32,
    data: Vec<u8>,
}

impl Block {
    fn f32(shape: &[usize], values: &[f32]) -> Self {
        Self {
            dims: shape.iter().rev().map(|&d| d as u64).collect(),
            kind: 0,
            data: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        }
    }

    /// Q8_0 with scale 1/128, which is exact for the test values.
    fn q8_0(shape: &[usize], values: &[f32]) -> Self {
        let scale = half::f16::from_f32(1.0 / 128.0);
        let data = values.chunks(32).flat_map(|block| {
            let mut bytes = scale.to_le_bytes().to_vec();
            bytes.extend(block.iter().map(|v| (v * 128.0) as i8 as u8));
            bytes
        });
        Self {
            kind: 8,
            data: data.collect(),
            ..Self::f32(shape, values)
        }
    }

    /// Q4_0 with scale 1/8 of values that are multiples of it in [-1, 1).
    fn q4_0(shape: &[usize], values: &[f32]) -> Self {
        let scale = half::f16::from_f32(0.125);
        let data = values.chunks(32).flat_map(|block| {
            let nibble = |v: f32| (v * 8.0 + 8.0) as u8;
            let mut bytes = scale.to_le_bytes().to_vec();
            bytes.extend((0..16).map(|i| nibble(block[i]) | nibble(block[i + 16]) << 4));
            bytes
        });
        Self {
            kind: 2,
            data: data.collect(),
            ..Self::f32(shape, values)
        }
    }

    fn bf16(shape: &[usize], values: &[f32]) -> Self {
        let bytes = |&v: &f32| half::bf16::from_f32(v).to_le_bytes();
        Self {
            kind: 30,
            data: values.iter().flat_map(bytes).collect(),
            ..Self::f32(shape, values)
        }
    }
}

#[derive(Clone)]
struct Gguf {
    metadata: BTreeMap<String, Meta>,
    tensors: BTreeMap<String, Block>,
}

impl Gguf {
    fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend_from_slice(&3u32.to_le_bytes());
        out.extend_from_slice(&(self.tensors.len() as u64).to_le_bytes());
        out.extend_from_slice(&(self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            out.extend(string(key));
            out.extend(value.bytes());
        }
        let mut data: Vec<u8> = Vec::new();
        for (name, block) in &self.tensors {
            out.extend(string(name));
            out.extend_from_slice(&(block.dims.len() as u32).to_le_bytes());
            for dim in &block.dims {
                out.extend_from_slice(&dim.to_le_bytes());
            }
            out.extend_from_slice(&block.kind.to_le_bytes());
            out.extend_from_slice(&(data.len() as u64).to_le_bytes());
            data.extend_from_slice(&block.data);
            data.resize(data.len().next_multiple_of(32), 0);
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(data);
        out
    }

    fn write(&self) -> (TempDir, PathBuf) {
        write(&self.bytes())
    }
}

fn write(bytes: &[u8]) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("tiny.gguf");
    std::fs::write(&path, bytes).expect("written");
    (dir, path)
}

/// Rows of each head reordered as llama.cpp's converter does: pairs (i, i + half) become
/// neighbours.
fn interleave(values: &[f32], heads: usize, row: usize) -> Vec<f32> {
    let head_dim = values.len() / (heads * row);
    let mut out = Vec::new();
    for head in values.chunks(head_dim * row) {
        for pair in 0..head_dim / 2 {
            for half in 0..2 {
                let from = (half * head_dim / 2 + pair) * row;
                out.extend_from_slice(&head[from..from + row]);
            }
        }
    }
    out
}

fn gguf_name(hf: &str) -> String {
    [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers.", "blk."),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.", "attn_"),
        ("mlp.", "ffn_"),
        ("_proj", ""),
    ]
    .iter()
    .fold(hf.to_string(), |name, (from, to)| name.replace(from, to))
}

/// A small file that is read without complaint.
pub fn tiny() -> (TempDir, PathBuf) {
    gguf(Arch::Llama, "smollm", |_, shape, values| {
        Block::f32(shape, values)
    })
    .write()
}

/// A file of the same model as [`config_json`], each tensor encoded by `encode`.
fn gguf(arch: Arch, pre: &str, encode: impl Fn(&str, &[usize], &[f32]) -> Block) -> Gguf {
    let config = config(&config_json(arch));
    let name = arch.name();
    let u32 = |n: usize| Meta::U32(n as u32);
    let types = TOKENIZERS["types"].as_array().expect("a list");
    let types = types.iter().map(|t| t.as_i64().expect("a type") as i32);
    let metadata = [
        ("general.architecture".to_string(), Meta::Str(name.into())),
        (format!("{name}.block_count"), u32(config.num_hidden_layers)),
        (
            format!("{name}.context_length"),
            u32(config.max_position_embeddings),
        ),
        (format!("{name}.embedding_length"), u32(config.hidden_size)),
        (
            format!("{name}.feed_forward_length"),
            u32(config.intermediate_size),
        ),
        (
            format!("{name}.attention.head_count"),
            u32(config.num_attention_heads),
        ),
        (
            format!("{name}.attention.head_count_kv"),
            u32(config.num_key_value_heads),
        ),
        (format!("{name}.attention.key_length"), u32(config.head_dim)),
        (
            format!("{name}.attention.layer_norm_rms_epsilon"),
            Meta::F32(1e-5),
        ),
        (format!("{name}.rope.freq_base"), Meta::F32(10000.0)),
        ("tokenizer.ggml.model".into(), Meta::Str("gpt2".into())),
        ("tokenizer.ggml.pre".into(), Meta::Str(pre.into())),
        (
            "tokenizer.ggml.tokens".into(),
            Meta::Strs(strings(&TOKENIZERS["tokens"])),
        ),
        (
            "tokenizer.ggml.merges".into(),
            Meta::Strs(strings(&TOKENIZERS["merges"])),
        ),
        (
            "tokenizer.ggml.token_type".into(),
            Meta::I32s(types.collect()),
        ),
        ("tokenizer.ggml.eos_token_id".into(), Meta::U32(2)),
        ("tokenizer.ggml.bos_token_id".into(), Meta::U32(0)),
        (
            "tokenizer.chat_template".into(),
            Meta::Str("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}".into()),
        ),
    ];
    let heads = |hf: &str| match arch {
        Arch::Llama if hf.ends_with("q_proj.weight") => Some(config.num_attention_heads),
        Arch::Llama if hf.ends_with("k_proj.weight") => Some(config.num_key_value_heads),
        _ => None,
    };
    let tensors = source_tensors(&config)
        .into_iter()
        .map(|(hf, (shape, values))| {
            let values = match heads(&hf) {
                Some(heads) => interleave(&values, heads, shape[1]),
                None => values,
            };
            (gguf_name(&hf), encode(&hf, &shape, &values))
        });
    Gguf {
        metadata: metadata.into_iter().collect(),
        tensors: tensors.collect(),
    }
}

/// Multiples of 1/8, so that four bits hold them.
fn source_tensors(config: &ModelConfig) -> Tensors {
    let mut tensors = tensors(config);
    for (_, values) in tensors.values_mut() {
        values
            .iter_mut()
            .for_each(|v| *v = (*v * 8.0).floor() / 8.0);
    }
    tensors
}

fn plain(arch: Arch, pre: &str) -> Gguf {
    gguf(arch, pre, |_, shape, values| Block::f32(shape, values))
}

/// As quantised files are: matrices in blocks, norms and biases in f32.
fn quantised(hf: &str, shape: &[usize], values: &[f32]) -> Block {
    match shape {
        [_] => Block::f32(shape, values),
        _ if hf.contains("embed") => Block::q8_0(shape, values),
        _ if hf.contains("down_proj") => Block::bf16(shape, values),
        _ => Block::q4_0(shape, values),
    }
}

#[test]
fn configuration_and_weights_are_those_of_the_directory() {
    for (arch, pre) in [(Arch::Llama, "smollm"), (Arch::Qwen2, "qwen2")] {
        for encode in [quantised, |_: &str, shape: &[usize], values: &[f32]| {
            Block::f32(shape, values)
        }] {
            let (_dir, path) = gguf(arch, pre, encode).write();
            let checkpoint = open(&path).expect("opened");
            let mut expected = config(&config_json(arch));
            expected.dtype = Some(Dtype::F32);
            assert_eq!(checkpoint.config, expected);
            let expected = source_tensors(&expected);
            let names: Vec<&str> = checkpoint.weights.names().collect();
            assert_eq!(names, expected.keys().collect::<Vec<_>>());
            for (name, (shape, values)) in &expected {
                assert_eq!(&checkpoint.weights.info(name).unwrap().shape, shape);
                assert_eq!(&checkpoint.weights.get_f32(name).unwrap(), values, "{name}");
            }
            assert_eq!(checkpoint.weights.hash().unwrap().len(), 64);
        }
    }
}

#[test]
fn blocks_are_kept_and_give_the_bits_of_the_widened_file() {
    for (arch, pre) in [(Arch::Llama, "smollm"), (Arch::Qwen2, "qwen2")] {
        let (_dir, path) = gguf(arch, pre, quantised).write();
        let kept = load(&path, LoadOptions::default());
        let widened = load(
            &path,
            LoadOptions {
                dtype: Some(Dtype::F32),
                ..LoadOptions::default()
            },
        );
        assert!(weight_bytes(&kept) * 3 < weight_bytes(&widened));
        assert_eq!(logits(&kept), logits(&widened));
    }
}

#[test]
fn ids_are_those_of_the_library_for_every_known_rule() {
    let cases = TOKENIZERS["cases"].as_object().expect("cases");
    assert_eq!(cases.len(), 4);
    for (pre, cases) in cases {
        let (_dir, path) = plain(Arch::Llama, pre).write();
        let tokenizer = open(&path).expect("opened").tokenizer;
        for case in cases.as_array().expect("a list") {
            let text = case["text"].as_str().expect("a text");
            let ids = |key: &str| -> Vec<u32> {
                serde_json::from_value::<Vec<u32>>(case[key].clone()).expect("ids")
            };
            let encoded = tokenizer.encode(text, false).unwrap();
            assert_eq!(encoded, ids("ids"), "{pre}: {text:?}");
            let encoded = tokenizer.encode(text, true).unwrap();
            assert_eq!(encoded, ids("ids_with_special"), "{pre}: {text:?}");
        }
        assert_eq!(tokenizer.eos_ids(), [2]);
        let message = tinylora::model::ChatMessage::new("user", "hi");
        let chat = tokenizer.apply_chat_template(&[message], true).unwrap();
        assert_eq!(chat, "<|endoftext|>hi<|im_end|>");
    }
}

#[test]
fn rope_factors_that_follow_llama3s_rule_are_recognised() {
    let mut file = plain(Arch::Llama, "llama-bpe");
    let rope = |scaling| tinylora::model::RopeConfig {
        theta: 10000.0,
        scaling,
    };
    let rule = RopeScaling::Llama3 {
        factor: 32.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    let unscaled = rope(RopeScaling::None).inverse_frequencies(16);
    let scaled = rope(rule.clone()).inverse_frequencies(16);
    let factors: Vec<f32> = (0..8).map(|i| (unscaled[i] / scaled[i]) as f32).collect();
    let mut open_with = |factors: &[f32]| {
        let block = Block::f32(&[factors.len()], factors);
        file.tensors.insert("rope_freqs.weight".into(), block);
        let (dir, path) = file.write();
        (dir, path)
    };
    // With eight frequencies down to 10000^(-7/8) the last is stretched in full.
    assert_eq!(factors[7], 32.0);
    let (_dir, path) = open_with(&factors);
    assert_eq!(open(&path).unwrap().config.rope.scaling, rule);

    let other = [1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0];
    let (_dir, path) = open_with(&other);
    let config = open(&path).unwrap().config;
    assert_eq!(config.rope.scaling, RopeScaling::Factors(other.to_vec()));
    let frequencies = config.rope.inverse_frequencies(16);
    assert!((frequencies[7] * 7.0 / unscaled[7] - 1.0).abs() < 1e-12);
    let error = config.to_hf_json(Dtype::F32).unwrap_err().to_string();
    assert!(error.contains("rope_freqs"), "{error}");

    for bad in [&[1.0f32; 7][..], &[0.0; 8], &[f32::NAN; 8]] {
        let (_dir, path) = open_with(bad);
        assert!(refusal(&path).contains("rope factor"));
    }
}

#[test]
fn what_is_not_known_is_refused() {
    let set = |key: &str, value: Meta| {
        let mut file = plain(Arch::Llama, "smollm");
        file.metadata.insert(key.into(), value);
        file
    };
    let str = |s: &str| Meta::Str(s.into());
    let list = |items: &[&str]| Meta::Strs(items.iter().map(|s| s.to_string()).collect());
    for (file, said) in [
        (
            set("tokenizer.ggml.pre", str("default")),
            "\"default\" is not known",
        ),
        (set("tokenizer.ggml.pre", str("")), "not known"),
        (set("tokenizer.ggml.model", str("llama")), "\"llama\""),
        (set("tokenizer.ggml.tokens", list(&["a", "a"])), "\"a\""),
        (
            set("tokenizer.ggml.tokens", Meta::U32(3)),
            "tokenizer.ggml.tokens",
        ),
        (
            set("tokenizer.ggml.merges", list(&["Ġ Ġthereabouts"])),
            "merge",
        ),
        (set("tokenizer.ggml.merges", list(&["ab"])), "merge"),
        (set("tokenizer.ggml.eos_token_id", Meta::U32(446)), "446"),
        (set("tokenizer.ggml.eos_token_id", str("x")), "eos_token_id"),
        (set("general.architecture", str("gemma3")), "gemma3"),
        (set("llama.embedding_length", Meta::U32(64)), "has shape"),
        (set("llama.block_count", Meta::U32(3)), "model.layers.2"),
        (set("llama.block_count", Meta::U32(1)), "model.layers.1"),
        (set("llama.block_count", Meta::U32(0)), "num_hidden_layers"),
        (
            set("llama.attention.head_count", Meta::U32(0)),
            "num_attention_heads",
        ),
        (
            set("llama.rope.dimension_count", Meta::U32(8)),
            "rope.dimension_count",
        ),
        (set("llama.rope.scaling.type", str("yarn")), "yarn"),
        (
            set("llama.rope.freq_base", Meta::F32(f32::NAN)),
            "freq_base",
        ),
        (set("llama.expert_count", Meta::U32(8)), "expert_count"),
        (set("general.alignment", Meta::U32(0)), "alignment"),
        (set("general.alignment", Meta::U32(24)), "alignment"),
        (set("x", Meta::Bool(true)), ""),
        (set("x", Meta::Raw(7, vec![2])), "\"x\""),
        (set("x", Meta::Raw(13, vec![0; 8])), "\"x\""),
        (
            set("x", Meta::Raw(9, array(9, 0, [].into_iter()))),
            "nested",
        ),
        (
            set("x", Meta::Raw(9, array(4, 1 << 40, [].into_iter()))),
            "\"x\"",
        ),
        (
            set("x", Meta::Raw(8, u64::MAX.to_le_bytes().to_vec())),
            "\"x\"",
        ),
    ] {
        let (_dir, path) = file.write();
        if said.is_empty() {
            open(&path).expect("a harmless key");
            continue;
        }
        let error = refusal(&path);
        assert!(error.contains(said), "{said}: {error}");
        assert!(error.contains("tiny.gguf"), "{error}");
    }
}

#[test]
fn tensors_that_lie_are_refused() {
    let name = "blk.0.ffn_up.weight";
    let set = |dims: &[u64], kind: u32| {
        let mut file = plain(Arch::Llama, "smollm");
        let block = file.tensors.get_mut(name).expect("there");
        block.dims = dims.to_vec();
        block.kind = kind;
        file
    };
    for (file, said) in [
        (set(&[32, u64::MAX], 0), "end of the file"),
        (
            set(&[u64::MAX, u64::MAX, u64::MAX, u64::MAX], 0),
            "end of the file",
        ),
        (set(&[1 << 62, 4], 0), "end of the file"),
        (set(&[], 0), "dimensions"),
        (set(&[1; 5], 0), "dimensions"),
        (set(&[33, 64], 8), "whole blocks"),
        (set(&[32, 64], 24), "element type 24"),
        (set(&[32, 64], u32::MAX), "element type"),
        (set(&[64, 32], 0), "has shape"),
    ] {
        let (_dir, path) = file.write();
        let error = refusal(&path);
        assert!(
            error.contains("ffn_up") || error.contains("up_proj"),
            "{error}"
        );
        assert!(error.contains(said), "{said}: {error}");
    }
    let mut file = plain(Arch::Llama, "smollm");
    file.tensors
        .insert("blk.0.extra.weight".into(), Block::f32(&[1], &[0.0]));
    let (_dir, path) = file.write();
    assert!(refusal(&path).contains("no place"));
}

#[test]
fn truncated_files_are_refused_wherever_they_end() {
    let whole = gguf(Arch::Llama, "smollm", quantised).bytes();
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("tiny.gguf");
    let ends = (0..40).chain((40..whole.len() - 32).step_by(997));
    for end in ends {
        std::fs::write(&path, &whole[..end]).expect("written");
        let error = refusal(&path);
        assert!(error.contains("tiny.gguf"), "{end}: {error}");
    }
    for (position, byte) in [(0, b'X'), (4, 9), (4, 1), (8, 0xff), (15, 0x7f), (23, 0x7f)] {
        let mut changed = whole.clone();
        changed[position] = byte;
        std::fs::write(&path, changed).expect("written");
        refusal(&path);
    }
    let mut big_endian = whole;
    big_endian[4..8].copy_from_slice(&3u32.to_be_bytes());
    std::fs::write(&path, big_endian).expect("written");
    assert!(refusal(&path).contains("big-endian"));
}
