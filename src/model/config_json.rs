//! Hugging Face's `config.json` and `generation_config.json`: reading into [`ModelConfig`], and
//! writing one for an exported checkpoint.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::config::{Arch, Dtype, ModelConfig, RopeConfig, RopeScaling};
use crate::error::{Error, Result};

/// Larger files are not configuration.
const MAX_CONFIG_BYTES: u64 = 16 << 20;

impl ModelConfig {
    /// Reads `config.json` of a directory and, where there is one, `generation_config.json`.
    pub fn from_hf_dir(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let config = read_json_object(&path)?;
        let generation_path = dir.join("generation_config.json");
        let generation = match generation_path.exists() {
            true => Some(read_json_object(&generation_path)?),
            false => None,
        };
        Self::from_hf_json(&config, generation.as_ref(), &path.display().to_string())
    }

    /// Interprets the two JSON objects; `origin` names the file in messages.
    pub fn from_hf_json(
        config: &Map<String, Value>,
        generation: Option<&Map<String, Value>>,
        origin: &str,
    ) -> Result<Self> {
        let fields = Fields {
            map: config,
            origin,
            section: "",
        };
        let arch = read_arch(&fields)?;
        refuse_unsupported(&fields, arch)?;

        let hidden_size = fields.required_usize("hidden_size")?;
        let num_attention_heads = fields.required_usize("num_attention_heads")?;
        let num_key_value_heads = match (fields.usize("num_key_value_heads")?, arch) {
            (Some(heads), _) => heads,
            // Llama files older than grouped-query attention do not name it.
            (None, Arch::Llama) => num_attention_heads,
            (None, Arch::Qwen2) => fields.required_usize("num_key_value_heads")?,
        };
        let head_dim = match fields.usize("head_dim")? {
            Some(dim) => dim,
            None if num_attention_heads > 0 && hidden_size.is_multiple_of(num_attention_heads) => {
                hidden_size / num_attention_heads
            }
            None => {
                return fields.refuse(format!(
                    "hidden_size = {hidden_size} is not a multiple of num_attention_heads = \
                     {num_attention_heads} and head_dim is not given"
                ));
            }
        };
        let mut eos_token_ids = Vec::new();
        let generation_fields = generation.map(|map| Fields {
            map,
            origin: "generation_config.json",
            section: "",
        });
        for source in [Some(&fields), generation_fields.as_ref()]
            .into_iter()
            .flatten()
        {
            for id in source.ids("eos_token_id")? {
                if !eos_token_ids.contains(&id) {
                    eos_token_ids.push(id);
                }
            }
        }
        let config = Self {
            arch,
            hidden_size,
            num_hidden_layers: fields.required_usize("num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            intermediate_size: fields.required_usize("intermediate_size")?,
            vocab_size: fields.required_usize("vocab_size")?,
            rms_norm_eps: fields.f64("rms_norm_eps")?.unwrap_or(1e-6),
            rope: read_rope(&fields)?,
            tie_word_embeddings: fields.bool("tie_word_embeddings")?.unwrap_or(false),
            attention_bias: arch == Arch::Qwen2,
            max_position_embeddings: fields.required_usize("max_position_embeddings")?,
            eos_token_ids,
            bos_token_id: fields.ids("bos_token_id")?.first().copied(),
            dtype: read_dtype(&fields)?,
        };
        config.check(origin)?;
        Ok(config)
    }

    /// A `config.json` that transformers (4.43 or newer) reads, for weights stored in `dtype`.
    ///
    /// # Errors
    /// Rope factors read from a GGUF file that are not Llama 3's rule have no spelling there.
    pub fn to_hf_json(&self, dtype: Dtype) -> Result<Value> {
        let rope_scaling = match &self.rope.scaling {
            RopeScaling::None => Value::Null,
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                "original_max_position_embeddings": original_max_position_embeddings,
            }),
            RopeScaling::Factors(_) => {
                return Err(Error::data(
                    "config.json cannot express this GGUF file's rope_freqs.weight: its factors \
                     do not follow llama3's rule",
                ));
            }
        };
        let eos = match self.eos_token_ids.as_slice() {
            [] => Value::Null,
            [one] => json!(one),
            many => json!(many),
        };
        let mut object = json!({
            "architectures": [self.arch.class_name()],
            "model_type": self.arch.name(),
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope.theta,
            "rope_scaling": rope_scaling,
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "use_cache": true,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos,
            "torch_dtype": dtype.torch_name(),
        });
        match self.arch {
            Arch::Qwen2 => object["use_sliding_window"] = json!(false),
            Arch::Llama => {
                object["attention_bias"] = json!(false);
                object["mlp_bias"] = json!(false);
            }
        }
        Ok(object)
    }
}

/// Reads a file that must hold one JSON object of bounded size.
pub(super) fn read_json_object(path: &Path) -> Result<Map<String, Value>> {
    let text = read_bounded(path, MAX_CONFIG_BYTES)?;
    match serde_json::from_slice(&text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(Error::file("parse", path, "not a JSON object")),
        Err(error) => Err(Error::file("parse", path, error)),
    }
}

/// Reads a regular file that is no larger than `limit` bytes.
pub(super) fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let metadata = std::fs::metadata(path).map_err(|e| Error::file("read", path, e))?;
    if !metadata.is_file() {
        return Err(Error::file("read", path, "not a regular file"));
    }
    if metadata.len() > limit {
        let cause = format!("{} bytes, at most {limit} are accepted", metadata.len());
        return Err(Error::file("read", path, cause));
    }
    std::fs::read(path).map_err(|e| Error::file("read", path, e))
}

fn read_arch(fields: &Fields) -> Result<Arch> {
    let known = [Arch::Qwen2, Arch::Llama];
    let model_type = fields.str("model_type")?;
    let class = match fields.get("architectures") {
        None => None,
        Some(Value::Array(names)) if names.len() == 1 && names[0].is_string() => names[0].as_str(),
        Some(other) => return fields.refuse(format!("architectures = {other} is not one name")),
    };
    let by_type = known.iter().find(|a| Some(a.name()) == model_type);
    let by_class = known.iter().find(|a| Some(a.class_name()) == class);
    match (by_type, by_class) {
        (Some(arch), Some(same)) if arch == same => Ok(*arch),
        (Some(arch), None) if class.is_none() => Ok(*arch),
        (None, Some(arch)) if model_type.is_none() => Ok(*arch),
        _ => fields.refuse(format!(
            "model_type {} with architecture {} is not supported; Qwen2ForCausalLM (qwen2) and \
             LlamaForCausalLM (llama) are",
            model_type.unwrap_or("(none)"),
            class.unwrap_or("(none)")
        )),
    }
}

/// Everything that would change the arithmetic in a way the decoder does not know.
fn refuse_unsupported(fields: &Fields, arch: Arch) -> Result<()> {
    let activation = fields.str("hidden_act")?.unwrap_or("silu");
    if activation != "silu" {
        return fields.refuse(format!(
            "hidden_act = {activation:?}; only \"silu\" is supported"
        ));
    }
    if fields.bool("mlp_bias")? == Some(true) {
        return fields.refuse("mlp_bias = true is not supported".to_string());
    }
    if fields.bool("rope_interleaved")? == Some(true) {
        return fields.refuse("rope_interleaved = true is not supported".to_string());
    }
    match (arch, fields.bool("attention_bias")?) {
        (Arch::Llama, Some(true)) => {
            return fields.refuse("attention_bias = true is not supported for llama".to_string());
        }
        (Arch::Qwen2, Some(false)) => {
            return fields.refuse("attention_bias = false is not qwen2".to_string());
        }
        _ => {}
    }
    let window = fields.usize("sliding_window")?;
    let uses_window = fields.bool("use_sliding_window")?;
    if uses_window == Some(true) || (arch == Arch::Llama && window.is_some()) {
        return fields.refuse("sliding-window attention is not supported".to_string());
    }
    if let Some(Value::Array(types)) = fields.get("layer_types")
        && let Some(other) = types.iter().find(|t| t.as_str() != Some("full_attention"))
    {
        return fields.refuse(format!(
            "layer_types contains {other}; only \"full_attention\" is supported"
        ));
    }
    if let Some(partial) = fields.f64("partial_rotary_factor")?
        && partial != 1.0
    {
        return fields.refuse(format!(
            "partial_rotary_factor = {partial} is not supported"
        ));
    }
    if let Some(quantization) = fields.get("quantization_config") {
        let method = quantization
            .get("quant_method")
            .and_then(Value::as_str)
            .unwrap_or("unknown");
        return fields.refuse(format!(
            "weights are quantised ({method}); use the unquantised checkpoint or a GGUF file"
        ));
    }
    Ok(())
}

/// `rope_theta` + `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5).
fn read_rope(fields: &Fields) -> Result<RopeConfig> {
    let top_theta = fields.f64("rope_theta")?;
    let mut found: Option<RopeConfig> = None;
    for key in ["rope_parameters", "rope_scaling"] {
        let map = match fields.get(key) {
            None => continue,
            Some(Value::Object(map)) => map,
            Some(other) => return fields.refuse(format!("{key} = {other} is not an object")),
        };
        let section = Fields {
            map,
            origin: fields.origin,
            section: key,
        };
        let theta = match (section.f64("rope_theta")?, top_theta) {
            (Some(inner), Some(outer)) if inner != outer => {
                return fields.refuse(format!("rope_theta is {outer} and, in {key}, {inner}"));
            }
            (inner, outer) => inner.or(outer).unwrap_or(10_000.0),
        };
        let rope = RopeConfig {
            theta,
            scaling: read_rope_scaling(&section)?,
        };
        match &found {
            Some(earlier) if *earlier != rope => {
                return fields
                    .refuse("rope_parameters and rope_scaling contradict each other".to_string());
            }
            _ => found = Some(rope),
        }
    }
    Ok(found.unwrap_or(RopeConfig {
        theta: top_theta.unwrap_or(10_000.0),
        scaling: RopeScaling::None,
    }))
}

fn read_rope_scaling(section: &Fields) -> Result<RopeScaling> {
    if let Some(partial) = section.f64("partial_rotary_factor")?
        && partial != 1.0
    {
        return section.refuse(format!(
            "partial_rotary_factor = {partial} is not supported"
        ));
    }
    let kind = match section.str("rope_type")? {
        Some(kind) => Some(kind),
        None => section.str("type")?,
    };
    match kind {
        None | Some("default") => Ok(RopeScaling::None),
        Some("llama3") => Ok(RopeScaling::Llama3 {
            factor: section.required_f64("factor")?,
            low_freq_factor: section.required_f64("low_freq_factor")?,
            high_freq_factor: section.required_f64("high_freq_factor")?,
            original_max_position_embeddings: section
                .required_usize("original_max_position_embeddings")?,
        }),
        Some(other) => section.refuse(format!(
            "rope type {other:?} is not supported; \"default\" and \"llama3\" are"
        )),
    }
}

/// An unknown spelling is not an error: each stored tensor carries its own dtype.
fn read_dtype(fields: &Fields) -> Result<Option<Dtype>> {
    let name = match fields.str("dtype")? {
        Some(name) => Some(name),
        None => fields.str("torch_dtype")?,
    };
    let known = [Dtype::F32, Dtype::F16, Dtype::Bf16];
    Ok(known.into_iter().find(|d| Some(d.torch_name()) == name))
}

/// Typed look-up in a JSON object; `null` counts as absent, a wrong type names file and key.
struct Fields<'a> {
    map: &'a Map<String, Value>,
    origin: &'a str,
    /// Key of the enclosing object, empty at the top.
    section: &'a str,
}

impl<'a> Fields<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn refuse<T>(&self, message: String) -> Result<T> {
        Err(Error::data(format!("{}: {message}", self.origin)))
    }

    fn path(&self, key: &str) -> String {
        match self.section {
            "" => key.to_string(),
            section => format!("{section}.{key}"),
        }
    }

    fn typed<T>(
        &self,
        key: &str,
        what: &str,
        convert: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match convert(value) {
            Some(converted) => Ok(Some(converted)),
            None => self.refuse(format!("{} = {value} is not {what}", self.path(key))),
        }
    }

    fn required<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        match value {
            Some(value) => Ok(value),
            None => self.refuse(format!("{} is missing", self.path(key))),
        }
    }

    fn usize(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a non-negative integer", |v| {
            v.as_u64().and_then(|n| usize::try_from(n).ok())
        })
    }

    fn f64(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a finite number", |v| {
            v.as_f64().filter(|n| n.is_finite())
        })
    }

    fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    fn str(&self, key: &str) -> Result<Option<&'a str>> {
        self.typed(key, "a string", Value::as_str)
    }

    /// One id or a list of ids.
    fn ids(&self, key: &str) -> Result<Vec<u32>> {
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let ids = self.typed(key, "a token id or a list of them", |v| match v {
            Value::Array(list) if list.len() <= 1024 => list.iter().map(id).collect(),
            one => id(one).map(|one| vec![one]),
        })?;
        Ok(ids.unwrap_or_default())
    }

    fn required_usize(&self, key: &str) -> Result<usize> {
        self.required(key, self.usize(key)?)
    }

    fn required_f64(&self, key: &str) -> Result<f64> {
        self.required(key, self.f64(key)?)
    }
}
