//! First inputs for targets whose files the repository does not carry: whole files of very small
//! models, so that what is fuzzed lies behind the first checks.

use std::path::Path;

use half::f16;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use tinylora::adapter::{Adapter, AdapterSpec, SvdCache};
use tinylora::model::{LoadOptions, Model, ModelConfig, Tokenizer, expected_tensors};
use tinylora::run::checkpoint::{Checkpoint, Store};

use crate::{mini_with, small_config};

/// Adds a first input to the folder that `TINYLORA_FUZZ_SEEDS` names, if any.
pub fn add(name: &str, make: impl FnOnce() -> Vec<u8>) {
    let Some(folder) = std::env::var_os("TINYLORA_FUZZ_SEEDS") else {
        return;
    };
    std::fs::write(Path::new(&folder).join(name), make()).expect("written");
}

/// `model.safetensors` of the small model.
pub fn weights() -> Vec<u8> {
    let tensors = expected_tensors(&small_config());
    let bytes: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, shape)| {
            values(shape)
                .flat_map(|x| f16::from_f32(x).to_le_bytes())
                .collect()
        })
        .collect();
    let views = tensors
        .into_iter()
        .zip(&bytes)
        .map(|((name, shape), bytes)| {
            let view = TensorView::new(Dtype::F16, shape, bytes).expect("as long as its shape");
            (name, view)
        });
    safetensors::serialize(views, None).expect("serialised")
}

fn values(shape: &[usize]) -> impl Iterator<Item = f32> {
    (0..shape.iter().product::<usize>()).map(|i| ((37 * i) % 29) as f32 / 16.0 - 0.875)
}

/// The small model as a GGUF file, its matrices in the formats that have blocks.
pub fn gguf() -> Vec<u8> {
    let config = small_config();
    let folder = mini_with("config.json", include_bytes!("../../data/mini/config.json"));
    let mini = ModelConfig::from_hf_dir(&folder).expect("the embedded model");
    let tokenizer = Tokenizer::from_hf_dir(&folder, &mini).expect("its tokenizer");
    let tokens: Vec<String> = (0..config.vocab_size as u32)
        .map(|id| {
            tokenizer
                .id_to_token(id)
                .unwrap_or_else(|| format!("<unused {id}>"))
        })
        .collect();
    let json: serde_json::Value =
        serde_json::from_slice(include_bytes!("../../data/mini/tokenizer.json")).expect("JSON");
    let merges: Vec<String> = json["model"]["merges"]
        .as_array()
        .expect("merges")
        .iter()
        .map(|merge| match merge.as_str() {
            Some(text) => text.to_owned(),
            None => format!(
                "{} {}",
                merge[0].as_str().unwrap(),
                merge[1].as_str().unwrap()
            ),
        })
        .collect();

    let n = |n: usize| Meta::U32(n as u32);
    let text = |text: &str| Meta::Text(text.to_owned());
    let metadata = [
        ("general.architecture", text("qwen2")),
        ("qwen2.block_count", n(config.num_hidden_layers)),
        ("qwen2.context_length", n(config.max_position_embeddings)),
        ("qwen2.embedding_length", n(config.hidden_size)),
        ("qwen2.feed_forward_length", n(config.intermediate_size)),
        ("qwen2.attention.head_count", n(config.num_attention_heads)),
        (
            "qwen2.attention.head_count_kv",
            n(config.num_key_value_heads),
        ),
        ("qwen2.attention.layer_norm_rms_epsilon", Meta::F32(1e-5)),
        ("qwen2.rope.freq_base", Meta::F32(1e4)),
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.pre", text("qwen2")),
        ("tokenizer.ggml.tokens", Meta::Texts(tokens)),
        ("tokenizer.ggml.merges", Meta::Texts(merges)),
        ("tokenizer.ggml.eos_token_id", n(3)),
        ("tokenizer.chat_template", text("{{ messages[0].content }}")),
    ];
    let names = [
        ("model.embed_tokens", "token_embd"),
        ("model.layers.", "blk."),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("model.norm", "output_norm"),
    ];
    let tensors = expected_tensors(&config);
    let mut out = b"GGUF\x03\0\0\0".to_vec();
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        put_text(&mut out, key);
        value.put(&mut out);
    }
    let mut data = Vec::new();
    for (number, (name, shape)) in tensors.iter().enumerate() {
        let name = names
            .iter()
            .fold(name.clone(), |name, (hf, gguf)| name.replace(hf, gguf));
        put_text(&mut out, &name);
        out.extend((shape.len() as u32).to_le_bytes());
        for size in shape.iter().rev() {
            out.extend((*size as u64).to_le_bytes());
        }
        // F32, Q4_0, Q8_0: type number and bytes of a block, F32 "blocks" being single numbers.
        let (kind, block, bytes) = match (shape.len(), number % 2) {
            (1, _) => (0u32, 1, 4),
            (_, 0) => (8, 32, 34),
            _ => (2, 32, 18),
        };
        out.extend(kind.to_le_bytes());
        out.extend((data.len() as u64).to_le_bytes());
        let length = shape.iter().product::<usize>() / block * bytes;
        data.extend((0..length).map(|i| if bytes == 4 { 0 } else { (i % 23) as u8 }));
        data.resize(data.len().next_multiple_of(32), 0);
    }
    out.resize(out.len().next_multiple_of(32), 0);
    out.extend(data);
    out
}

enum Meta {
    U32(u32),
    F32(f32),
    Text(String),
    Texts(Vec<String>),
}

impl Meta {
    fn put(&self, out: &mut Vec<u8>) {
        let kind: u32 = match self {
            Self::U32(_) => 4,
            Self::F32(_) => 6,
            Self::Text(_) => 8,
            Self::Texts(_) => 9,
        };
        out.extend(kind.to_le_bytes());
        match self {
            Self::U32(n) => out.extend(n.to_le_bytes()),
            Self::F32(x) => out.extend(x.to_le_bytes()),
            Self::Text(text) => put_text(out, text),
            Self::Texts(texts) => {
                out.extend(8u32.to_le_bytes());
                out.extend((texts.len() as u64).to_le_bytes());
                texts.iter().for_each(|text| put_text(out, text));
            }
        }
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// An adapter of the embedded model, as a file.
pub fn adapter_file() -> Vec<u8> {
    adapter().to_bytes().expect("serialised")
}

/// The same as a line of text.
pub fn adapter_text() -> Vec<u8> {
    let text = adapter().short_text();
    text.expect("13 numbers are short").into_bytes()
}

fn adapter() -> Adapter {
    let folder = tinylora::data::mini::directory().expect("the embedded model");
    let source = folder.display().to_string();
    let model = Model::load(&source, &LoadOptions::default()).expect("the embedded model");
    let (spec, cache) = (AdapterSpec::default(), SvdCache::disabled());
    Adapter::new(&spec, model.base(), &model.decoder, &cache, &|_, _| ()).expect("an adapter")
}

/// A checkpoint as its target takes it.
pub fn checkpoint() -> Vec<u8> {
    let place = tempfile::tempdir().expect("a folder");
    let mut saved = Checkpoint::default();
    saved.identity.model = "0".repeat(64);
    saved
        .identity
        .config
        .insert("train.seed".to_owned(), 42.into());
    saved.logs.insert("metrics.jsonl".to_owned(), 120);
    saved.state.step = 1;
    saved.state.parameters = vec![0.5; 13];
    saved.state.optimizer.updates = 1;
    saved.state.optimizer.first_moment = vec![0.25; 13];
    saved.state.optimizer.second_moment = vec![0.125; 13];
    let mut store = Store::open(place.path(), 0).expect("opened");
    store
        .save(&saved, |path| {
            std::fs::write(path, []).map_err(|e| tinylora::Error::file("write", path, e))
        })
        .expect("saved");
    let part =
        |name: &str| std::fs::read(place.path().join("step-000001").join(name)).expect("read");
    [part("manifest.json"), vec![0], part("state.safetensors")].concat()
}
