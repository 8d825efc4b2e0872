//! The `tinylora` format: an adapter as one safetensors file.
//!
//! Its tensors are the trained numbers in the spec's dtype (13 bf16 numbers are 26 bytes). Its
//! metadata has one entry, `tinylora`: JSON with the format's version, the base model's name and
//! hash, and the specification, from which everything else is made again.

use std::collections::HashMap;
use std::path::Path;

use half::{bf16, f16};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use super::{Adapter, AdapterSpec, BaseModel, StoredDtype, SvdCache};
use crate::model::Model;
use crate::run::fs;
use crate::{Error, Result};

/// The metadata entry, and the name of the format.
const KEY: &str = "tinylora";
const VERSION: u32 = 1;

/// What the metadata entry says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    version: u32,
    base_model: String,
    base_model_sha256: String,
    spec: AdapterSpec,
}

impl Adapter {
    /// Writes the adapter in the `tinylora` format, in one step.
    pub fn save(&self, path: &Path) -> Result<()> {
        let header = Header {
            version: VERSION,
            base_model: self.base.name.clone(),
            base_model_sha256: self.base.hash.clone(),
            spec: self.spec.clone(),
        };
        let internal = |e: &dyn std::fmt::Display| Error::Internal(format!("adapter file: {e}"));
        let header = serde_json::to_string(&header).map_err(|e| internal(&e))?;
        let dtype = self.spec.dtype;
        let mut rest = self.parameters();
        let mut tensors = Vec::new();
        for (name, shape) in self.tensors()? {
            let (own, others) = rest.split_at(shape.iter().product());
            rest = others;
            tensors.push((name, shape, encode(own, dtype)));
        }
        let views = tensors
            .iter()
            .map(|(name, shape, bytes)| {
                let view = TensorView::new(stored(dtype), shape.clone(), bytes);
                Ok((name.as_str(), view.map_err(|e| internal(&e))?))
            })
            .collect::<Result<Vec<_>>>()?;
        let metadata = HashMap::from([(KEY.to_owned(), header)]);
        let bytes = safetensors::serialize(views, Some(metadata)).map_err(|e| internal(&e))?;
        fs::write_atomic(path, &bytes)
    }

    /// Reads an adapter in the `tinylora` format and puts it on the model it was trained on.
    ///
    /// # Errors
    /// `Error::Data` when the file is damaged, of another format or version, or was trained on a
    /// model with other weights.
    pub fn load(path: &Path, model: &Model, cache: &SvdCache) -> Result<Self> {
        let bytes = fs::read(path)?;
        let bad = |what: String| Error::file("use adapter", path, what);
        let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(|e| bad(e.to_string()))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| bad(e.to_string()))?;
        let header = metadata
            .metadata()
            .as_ref()
            .and_then(|entries| entries.get(KEY))
            .ok_or_else(|| bad("its metadata has no entry \"tinylora\"".into()))?;
        let header = parse(header).map_err(bad)?;
        if header.base_model_sha256 != model.hash {
            return Err(bad(format!(
                "it was trained on {} with weights {}, but {} has weights {}: give that model",
                header.base_model,
                short(&header.base_model_sha256),
                model.name,
                short(&model.hash)
            )));
        }
        header.spec.validate().map_err(|e| bad(e.to_string()))?;
        let base = BaseModel {
            name: header.base_model,
            ..model.base()
        };
        let mut adapter = Self::new(&header.spec, base, &model.decoder, cache, &|_, _| {})?;
        let parameters = adapter.read_tensors(&file).map_err(bad)?;
        adapter
            .set_parameters(&parameters)
            .map_err(|e| bad(e.to_string()))?;
        Ok(adapter)
    }

    /// The flat parameters, when the file holds exactly this adapter's tensors.
    fn read_tensors(&self, file: &SafeTensors<'_>) -> Result<Vec<f32>, String> {
        let expected = self.tensors().map_err(|e| e.to_string())?;
        if file.len() != expected.len() {
            return Err(format!(
                "it has {} tensors, its specification asks for {}",
                file.len(),
                expected.len()
            ));
        }
        let mut parameters = Vec::with_capacity(self.num_parameters());
        for (name, shape) in expected {
            let view = file
                .tensor(&name)
                .map_err(|_| format!("tensor {name} is missing"))?;
            if view.shape() != shape || view.dtype() != stored(self.spec.dtype) {
                return Err(format!(
                    "tensor {name} is {:?} {:?}, its specification asks for {:?} {shape:?}",
                    view.dtype(),
                    view.shape(),
                    stored(self.spec.dtype)
                ));
            }
            parameters.extend(decode(view.data(), self.spec.dtype));
        }
        Ok(parameters)
    }
}

fn parse(header: &str) -> Result<Header, String> {
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let wrong = |e: serde_json::Error| format!("its metadata cannot be read: {e}");
    let Version { version } = serde_json::from_str(header).map_err(wrong)?;
    if version != VERSION {
        return Err(format!(
            "its format has version {version}, this program reads version {VERSION}"
        ));
    }
    serde_json::from_str(header).map_err(wrong)
}

/// Enough of a hash to tell two models apart by eye.
fn short(hash: &str) -> String {
    hash.chars().take(12).collect()
}

fn stored(dtype: StoredDtype) -> Dtype {
    match dtype {
        StoredDtype::F32 => Dtype::F32,
        StoredDtype::Bf16 => Dtype::BF16,
        StoredDtype::F16 => Dtype::F16,
    }
}

fn encode(values: &[f32], dtype: StoredDtype) -> Vec<u8> {
    let values = values.iter().copied();
    match dtype {
        StoredDtype::F32 => values.flat_map(f32::to_le_bytes).collect(),
        StoredDtype::Bf16 => values
            .flat_map(|x| bf16::from_f32(x).to_le_bytes())
            .collect(),
        StoredDtype::F16 => values
            .flat_map(|x| f16::from_f32(x).to_le_bytes())
            .collect(),
    }
}

fn decode(bytes: &[u8], dtype: StoredDtype) -> Vec<f32> {
    let halves = || bytes.as_chunks::<2>().0.iter();
    match dtype {
        StoredDtype::F32 => {
            let words = bytes.as_chunks::<4>().0.iter();
            words.map(|b| f32::from_le_bytes(*b)).collect()
        }
        StoredDtype::Bf16 => halves().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
        StoredDtype::F16 => halves().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
    }
}
