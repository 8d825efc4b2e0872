//! What a checkpoint says about its own shape: [`ModelConfig`], checked before anything is allocated.
//!
//! Reading and writing Hugging Face's `config.json` is in [`super::config_json`], reading GGUF
//! metadata in [`super::gguf`]; both end in [`ModelConfig::check`].

use crate::error::{Error, Result};

/// Families the decoder knows. They differ in the bias of q, k and v only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arch {
    /// Qwen2 and Qwen2.5: q, k and v have a bias.
    Qwen2,
    /// Llama 3, 3.1, 3.2 and models of the same shape (SmolLM2, …).
    Llama,
}

impl Arch {
    /// `model_type` of config.json and `general.architecture` of GGUF.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qwen2 => "qwen2",
            Self::Llama => "llama",
        }
    }

    /// The class name in `architectures` of config.json.
    pub fn class_name(self) -> &'static str {
        match self {
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Llama => "LlamaForCausalLM",
        }
    }
}

/// Element type of a stored tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    F32,
    F16,
    Bf16,
}

impl Dtype {
    pub fn size_in_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// The nearest value of this format.
    pub fn round(self, x: f32) -> f32 {
        match self {
            Self::F32 => x,
            Self::F16 => half::f16::from_f32(x).to_f32(),
            Self::Bf16 => half::bf16::from_f32(x).to_f32(),
        }
    }

    /// The spelling of config.json (`torch_dtype`, `dtype`).
    pub fn torch_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }
}

/// Rotary position embedding: base and how the frequencies are stretched.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the geometric sequence of wavelengths.
    pub theta: f64,
    pub scaling: RopeScaling,
}

/// Change of the inverse frequencies `theta^(-2i/head_dim)`.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    None,
    /// Llama 3.1's rule: long wavelengths are divided by `factor`, short ones kept, a linear
    /// transition between.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position_embeddings: usize,
    },
    /// One divisor for each of the `head_dim / 2` frequencies (GGUF's `rope_freqs.weight`).
    Factors(Vec<f32>),
}

impl RopeConfig {
    /// The `head_dim / 2` inverse frequencies in radians per position, scaling included.
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f64> {
        let base = (0..head_dim / 2)
            .map(|i| self.theta.powf(-((2 * i) as f64) / head_dim as f64))
            .collect::<Vec<_>>();
        match &self.scaling {
            RopeScaling::None => base,
            RopeScaling::Factors(factors) => base
                .iter()
                .zip(factors)
                .map(|(frequency, &factor)| frequency / f64::from(factor))
                .collect(),
            &RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => base
                .iter()
                .map(|&frequency| {
                    // Turns of the rotation within the original context.
                    let turns =
                        original_max_position_embeddings as f64 * frequency / std::f64::consts::TAU;
                    let keep = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    let keep = keep.clamp(0.0, 1.0);
                    (1.0 - keep) * frequency / factor + keep * frequency
                })
                .collect(),
        }
    }
}

/// Everything the decoder needs to know about a checkpoint besides its weights.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    pub arch: Arch,
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub intermediate_size: usize,
    pub vocab_size: usize,
    pub rms_norm_eps: f64,
    pub rope: RopeConfig,
    /// The output head is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// q, k and v have a bias; o never has one.
    pub attention_bias: bool,
    pub max_position_embeddings: usize,
    /// Ids that end a completion, in the order the files name them, without repetition.
    pub eos_token_ids: Vec<u32>,
    pub bos_token_id: Option<u32>,
    /// What the checkpoint says its weights are stored in, if it says so.
    pub dtype: Option<Dtype>,
}

impl ModelConfig {
    /// Columns of q (and rows of o): heads × head_dim.
    pub fn q_size(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Columns of k and of v: key/value heads × head_dim.
    pub fn kv_size(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Number of weights, tied head counted once.
    pub fn num_parameters(&self) -> usize {
        let tensors = expected_tensors(self);
        tensors
            .iter()
            .map(|(_, shape)| shape.iter().product::<usize>())
            .sum()
    }

    /// Refuses numbers that no real checkpoint has, so that later products cannot overflow and
    /// nothing absurd is allocated. `origin` names the file in the message.
    pub fn check(&self, origin: &str) -> Result<()> {
        let bounded = [
            ("hidden_size", self.hidden_size, 1 << 17),
            ("num_hidden_layers", self.num_hidden_layers, 1 << 10),
            ("num_attention_heads", self.num_attention_heads, 1 << 10),
            ("num_key_value_heads", self.num_key_value_heads, 1 << 10),
            ("head_dim", self.head_dim, 1 << 10),
            ("intermediate_size", self.intermediate_size, 1 << 20),
            ("vocab_size", self.vocab_size, 1 << 22),
            (
                "max_position_embeddings",
                self.max_position_embeddings,
                1 << 28,
            ),
        ];
        for (key, value, limit) in bounded {
            if value == 0 || value > limit {
                return Err(Error::data(format!(
                    "{origin}: {key} = {value} is outside 1..={limit}"
                )));
            }
        }
        let refuse = |message: String| Err(Error::data(format!("{origin}: {message}")));
        if !self.head_dim.is_multiple_of(2) {
            return refuse(format!(
                "head_dim = {} is odd; rotary embedding turns pairs",
                self.head_dim
            ));
        }
        if !self
            .num_attention_heads
            .is_multiple_of(self.num_key_value_heads)
        {
            return refuse(format!(
                "num_attention_heads = {} is not a multiple of num_key_value_heads = {}",
                self.num_attention_heads, self.num_key_value_heads
            ));
        }
        if !(self.rms_norm_eps > 0.0 && self.rms_norm_eps < 1.0) {
            return refuse(format!(
                "rms_norm_eps = {} is outside (0, 1)",
                self.rms_norm_eps
            ));
        }
        if !(self.rope.theta > 1.0 && self.rope.theta < 1e15) {
            return refuse(format!(
                "rope theta = {} is outside (1, 1e15)",
                self.rope.theta
            ));
        }
        if let Err(message) = self.check_rope_scaling() {
            return refuse(message);
        }
        let ids = self.eos_token_ids.iter().chain(&self.bos_token_id);
        for &id in ids {
            if id as usize >= self.vocab_size {
                return refuse(format!(
                    "special token id {id} is outside the vocabulary of {}",
                    self.vocab_size
                ));
            }
        }
        Ok(())
    }

    fn check_rope_scaling(&self) -> std::result::Result<(), String> {
        match &self.rope.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Factors(factors) => {
                if factors.len() != self.head_dim / 2 {
                    return Err(format!(
                        "{} rope factors for {} frequencies",
                        factors.len(),
                        self.head_dim / 2
                    ));
                }
                match factors.iter().find(|f| !(f.is_finite() && **f > 0.0)) {
                    Some(factor) => Err(format!("rope factor {factor} is not positive")),
                    None => Ok(()),
                }
            }
            &RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                let sane = factor.is_finite()
                    && factor >= 1.0
                    && low_freq_factor > 0.0
                    && high_freq_factor.is_finite()
                    && high_freq_factor > low_freq_factor
                    && (1..=1 << 28).contains(&original_max_position_embeddings);
                if sane {
                    Ok(())
                } else {
                    Err(format!(
                        "llama3 rope scaling makes no sense: {:?}",
                        self.rope.scaling
                    ))
                }
            }
        }
    }
}

/// Every tensor the decoder reads, by Hugging Face name, with its shape (`[out, in]` for
/// matrices). The order is that of the forward pass.
pub fn expected_tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let hidden = config.hidden_size;
    let (q, kv, ff) = (config.q_size(), config.kv_size(), config.intermediate_size);
    let mut tensors = vec![(
        "model.embed_tokens.weight".to_string(),
        vec![config.vocab_size, hidden],
    )];
    for layer in 0..config.num_hidden_layers {
        let mut add = |name: &str, shape: Vec<usize>| {
            tensors.push((format!("model.layers.{layer}.{name}"), shape));
        };
        add("input_layernorm.weight", vec![hidden]);
        for (name, rows) in [("q", q), ("k", kv), ("v", kv)] {
            add(&format!("self_attn.{name}_proj.weight"), vec![rows, hidden]);
            if config.attention_bias {
                add(&format!("self_attn.{name}_proj.bias"), vec![rows]);
            }
        }
        add("self_attn.o_proj.weight", vec![hidden, q]);
        add("post_attention_layernorm.weight", vec![hidden]);
        add("mlp.gate_proj.weight", vec![ff, hidden]);
        add("mlp.up_proj.weight", vec![ff, hidden]);
        add("mlp.down_proj.weight", vec![hidden, ff]);
    }
    tensors.push(("model.norm.weight".to_string(), vec![hidden]));
    if !config.tie_word_embeddings {
        tensors.push((
            "lm_head.weight".to_string(),
            vec![config.vocab_size, hidden],
        ));
    }
    tensors
}
