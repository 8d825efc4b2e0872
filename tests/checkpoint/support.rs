//! Small checkpoints written on the spot, in both formats.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use safetensors::{Dtype as StDtype, View};
use serde_json::{Value, json};
use tempfile::TempDir;
use tinylora::Error;
use tinylora::model::{
    Arch, Checkpoint, LoadOptions, Model, ModelConfig, OpenOptions, Weight, expected_tensors,
};
use tinylora::ops::Span;
use tinylora::ops::linear::Matrix;

/// `tests/fixtures/checkpoint/tokenizers.json`.
pub static TOKENIZERS: LazyLock<Value> = LazyLock::new(|| {
    let text = include_str!("../fixtures/checkpoint/tokenizers.json");
    serde_json::from_str(text).expect("the fixture is JSON")
});

pub fn tokens() -> Vec<String> {
    strings(&TOKENIZERS["tokens"])
}

pub fn strings(list: &Value) -> Vec<String> {
    let list = list.as_array().expect("a list");
    let text = |v: &Value| v.as_str().expect("a string").to_string();
    list.iter().map(text).collect()
}

pub fn open(source: &Path) -> Result<Checkpoint, Error> {
    Checkpoint::open(&source.display().to_string(), &OpenOptions::default())
}

/// The message of the refusal, which must have exit code 3.
pub fn refusal(source: &Path) -> String {
    match open(source) {
        Ok(_) => panic!("{} was accepted", source.display()),
        Err(error) => {
            assert_eq!(error.exit_code(), 3, "{error}");
            error.to_string()
        }
    }
}

/// `config.json` of a model with all dimensions different.
pub fn config_json(arch: Arch) -> Value {
    json!({
        "architectures": [arch.class_name()],
        "model_type": arch.name(),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 64,
        "vocab_size": tokens().len(),
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": arch == Arch::Llama,
        "max_position_embeddings": 256,
        "eos_token_id": 2,
        "bos_token_id": 0,
    })
}

pub fn config(json: &Value) -> ModelConfig {
    let map = json.as_object().expect("an object");
    ModelConfig::from_hf_json(map, None, "config.json").expect("a valid configuration")
}

/// Multiples of 1/128 below 1, exact in every float format; different for every tensor.
pub fn values(name: &str, len: usize) -> Vec<f32> {
    let seed = name
        .bytes()
        .fold(7u32, |h, b| h.wrapping_mul(31).wrapping_add(u32::from(b)));
    (0..len as u32)
        .map(|i| {
            let hash = seed.wrapping_add(i).wrapping_mul(2_654_435_761) >> 16;
            (hash % 255) as f32 / 128.0 - 127.0 / 128.0
        })
        .collect()
}

pub type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

pub fn tensors(config: &ModelConfig) -> Tensors {
    expected_tensors(config)
        .into_iter()
        .map(|(name, shape)| {
            let values = values(&name, shape.iter().product());
            (name, (shape, values))
        })
        .collect()
}

/// A tensor for the safetensors writer.
pub struct Stored {
    pub dtype: StDtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Stored {
    pub fn new(dtype: StDtype, shape: &[usize], values: &[f32]) -> Self {
        let bytes = match dtype {
            StDtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            StDtype::F16 => values
                .iter()
                .flat_map(|&v| half::f16::from_f32(v).to_le_bytes())
                .collect(),
            StDtype::BF16 => values
                .iter()
                .flat_map(|&v| half::bf16::from_f32(v).to_le_bytes())
                .collect(),
            StDtype::I64 => values
                .iter()
                .flat_map(|&v| (v as i64).to_le_bytes())
                .collect(),
            other => panic!("no writer for {other:?}"),
        };
        Self {
            dtype,
            shape: shape.to_vec(),
            bytes,
        }
    }
}

impl View for &Stored {
    fn dtype(&self) -> StDtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        self.bytes.as_slice().into()
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

pub fn stored(tensors: &Tensors, dtype: StDtype) -> BTreeMap<String, Stored> {
    let one = |(name, (shape, values)): (&String, &(Vec<usize>, Vec<f32>))| {
        (name.clone(), Stored::new(dtype, shape, values))
    };
    tensors.iter().map(one).collect()
}

pub fn safetensors_bytes(tensors: &BTreeMap<String, Stored>) -> Vec<u8> {
    safetensors::serialize(tensors, None).expect("serialised")
}

/// A Hugging Face directory that can be changed before it is opened.
pub struct HfDir {
    pub dir: TempDir,
    pub config: Value,
    pub tensors: BTreeMap<String, Stored>,
}

impl HfDir {
    pub fn new(arch: Arch, dtype: StDtype) -> Self {
        let config_json = config_json(arch);
        let tensors = stored(&tensors(&config(&config_json)), dtype);
        let made = Self {
            dir: tempfile::tempdir().expect("a temporary folder"),
            config: config_json,
            tensors,
        };
        made.write("tokenizer.json", tokenizer_json().to_string());
        made
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, content).expect("written");
        path
    }

    /// Writes configuration and weights, gives the directory.
    pub fn finish(&self) -> &Path {
        self.write("config.json", self.config.to_string());
        self.write("model.safetensors", safetensors_bytes(&self.tensors));
        self.dir.path()
    }
}

/// The fixture's vocabulary with the rule of SmolLM2.
pub fn tokenizer_json() -> Value {
    let tokens = tokens();
    let vocab: serde_json::Map<String, Value> = tokens
        .iter()
        .enumerate()
        .map(|(id, token)| (token.clone(), id.into()))
        .collect();
    let merges: Vec<Value> = strings(&TOKENIZERS["merges"])
        .iter()
        .map(|merge| json!(merge.split_once(' ').expect("a pair")))
        .collect();
    let types = TOKENIZERS["types"].as_array().expect("a list");
    let added: Vec<Value> = (0..tokens.len())
        .filter(|&id| types[id] != 1)
        .map(|id| {
            json!({"id": id, "content": tokens[id], "special": types[id] == 3,
                   "single_word": false, "lstrip": false, "rstrip": false, "normalized": false})
        })
        .collect();
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": true},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "fuse_unk": false,
                  "byte_fallback": false, "vocab": vocab, "merges": merges},
    })
}

pub fn load(source: &Path, options: LoadOptions) -> Model {
    Model::load(&source.display().to_string(), &options).expect("loaded")
}

/// Bytes in which a model holds its matrices.
pub fn weight_bytes(model: &Model) -> usize {
    let matrices = model.decoder.weights.named();
    let sizes = matrices.iter().map(|(_, weight)| match weight {
        Weight::Matrix(Matrix::Packed(matrix)) => matrix.bytes(),
        _ => 0,
    });
    sizes.sum()
}

/// Bits of the logits after some tokens.
pub fn logits(model: &Model) -> Vec<u32> {
    let decoder = &model.decoder;
    let mut cache = decoder.new_cache();
    let tokens = [3, 1, 4, 1, 5];
    let span = Span {
        row: 0,
        len: tokens.len(),
        slot: cache.alloc(None, tokens.len()),
        pos: 0,
    };
    let hidden = decoder.forward(&None.into(), &tokens, &[span], &mut cache, None);
    let logits = decoder.logits(&None.into(), &hidden.expect("hidden states"));
    let logits = logits.expect("logits").flatten_all().expect("one row");
    let logits = logits.to_vec1::<f32>().expect("numbers");
    logits.into_iter().map(f32::to_bits).collect()
}
