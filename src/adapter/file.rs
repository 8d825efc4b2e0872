//! The `tinylora` adapter file: one safetensors file with the trained numbers, in the spec's
//! dtype, and under the metadata key `tinylora` a JSON object with the format's version, the
//! specification and the base model's hash. Everything else about the adapter follows from these
//! and the base weights: 13 numbers in bf16 are 26 bytes of data.
//!
//! Tensors are those of [`Adapter::tensors`]. A file is not trusted: every size, name and number is
//! checked before it is used.

use std::path::Path;

use half::{bf16, f16};
use safetensors::tensor::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::spec::{AdapterKind, AdapterSpec, StoredDtype};
use super::svd::{SVD_VERSION, SvdCache};
use super::tying::Tying;
use super::{Adapter, BaseModel};
use crate::model::{Decoder, Model};
use crate::run::fs;
use crate::{Error, Result};

/// Version of the file format written here; others are refused.
const FORMAT_VERSION: u32 = 1;
/// Key of the file's metadata.
const KEY: &str = "tinylora";
/// Bytes of the base model's name that are kept: it only serves messages.
const NAME_BYTES: usize = 200;
/// More blocks than any model has: keeps what is computed from a hostile file small.
pub(super) const MAX_LAYERS: usize = 4096;

/// The metadata of a file.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Description {
    format_version: u32,
    spec: AdapterSpec,
    base_model: Base,
    svd_version: u32,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Base {
    name: String,
    hash: String,
    num_layers: usize,
}

/// An adapter as its file has it, not yet on a model.
#[derive(Debug, Clone)]
pub struct SavedAdapter {
    pub spec: AdapterSpec,
    pub base: BaseModel,
    /// Where it was read, for messages.
    origin: String,
    /// The base's hash is known by its first digits only.
    short_hash: bool,
    /// Name, shape and numbers, in the order of the file.
    tensors: Vec<(String, Vec<usize>, Vec<f32>)>,
}

impl Adapter {
    /// Writes the adapter's file, replacing an old one in one step.
    ///
    /// # Errors
    /// `Error::Data` when the path cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        fs::write_atomic(path, &self.to_bytes()?)
    }

    /// Reads an adapter's file and puts it on the model it was trained on.
    ///
    /// # Errors
    /// As [`SavedAdapter::load`] and [`SavedAdapter::onto`].
    pub fn load(path: &Path, model: &Model, cache: &SvdCache) -> Result<Self> {
        SavedAdapter::load(path)?.onto(model.base(), &model.decoder, cache, &|_, _| ())
    }

    /// The content of the adapter's file: the same bytes for the same adapter.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let spec = self.spec();
        let BaseModel {
            name,
            hash,
            num_layers,
        } = self.base().clone();
        let description = Description {
            format_version: FORMAT_VERSION,
            spec: spec.clone(),
            base_model: Base {
                name: shorten(name),
                hash,
                num_layers,
            },
            svd_version: SVD_VERSION,
        };
        let internal = |e: serde_json::Error| Error::Internal(format!("adapter metadata: {e}"));
        let description = serde_json::to_string(&description).map_err(internal)?;
        let mut header = Map::new();
        header.insert("__metadata__".into(), json!({ KEY: description }));
        let mut end = 0;
        for (name, shape) in self.tensors()? {
            let start = end;
            end += shape.iter().product::<usize>() * spec.dtype.size();
            let dtype = format!("{:?}", safetensors_dtype(spec.dtype));
            let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]});
            header.insert(name, entry);
        }
        // The format asks for data that starts at a multiple of eight bytes.
        let mut header = Value::Object(header).to_string();
        header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        let numbers = self.parameters().iter();
        match spec.dtype {
            StoredDtype::F32 => bytes.extend(numbers.flat_map(|x| x.to_le_bytes())),
            StoredDtype::Bf16 => {
                bytes.extend(numbers.flat_map(|&x| bf16::from_f32(x).to_le_bytes()));
            }
            StoredDtype::F16 => bytes.extend(numbers.flat_map(|&x| f16::from_f32(x).to_le_bytes())),
        }
        Ok(bytes)
    }
}

impl SavedAdapter {
    /// Reads and checks an adapter file.
    ///
    /// # Errors
    /// `Error::Data` that names the file and what is wrong with it.
    pub fn load(path: &Path) -> Result<Self> {
        Self::from_bytes(&fs::read(path)?, &path.display().to_string())
    }

    /// As [`Self::load`]; `origin` names the bytes in messages.
    pub fn from_bytes(bytes: &[u8], origin: &str) -> Result<Self> {
        Self::parse(bytes, origin)
            .map_err(|cause| Error::data(format!("cannot read adapter {origin}: {cause}")))
    }

    fn parse(bytes: &[u8], origin: &str) -> Result<Self, String> {
        let file =
            SafeTensors::deserialize(bytes).map_err(|e| format!("not a safetensors file ({e})"))?;
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| e.to_string())?;
        let text = metadata
            .metadata()
            .as_ref()
            .and_then(|map| map.get(KEY))
            .ok_or_else(|| {
                format!(
                    "its metadata has no key \"{KEY}\", so this program did not write it (of a \
                     PEFT adapter, name the directory)"
                )
            })?;
        let Description {
            spec, base_model, ..
        } = description(text)?;

        let mut names: Vec<&str> = file.names();
        // The file's own order: that of the data.
        names.sort_by_key(|name| metadata.info(name).map(|info| info.data_offsets.0));
        let mut tensors = Vec::with_capacity(names.len());
        for name in names {
            let view = file.tensor(name).map_err(|e| e.to_string())?;
            let expected = safetensors_dtype(spec.dtype);
            if view.dtype() != expected {
                let found = view.dtype();
                return Err(format!(
                    "tensor {name} is {found:?}, its metadata says {expected:?}"
                ));
            }
            let numbers = widen(view.data(), spec.dtype);
            if let Some(i) = numbers.iter().position(|x| !x.is_finite()) {
                return Err(format!("number {i} of tensor {name} is {}", numbers[i]));
            }
            tensors.push((name.to_owned(), view.shape().to_vec(), numbers));
        }
        let saved = Self {
            base: BaseModel {
                name: base_model.name,
                hash: base_model.hash,
                num_layers: base_model.num_layers,
            },
            spec,
            origin: origin.to_owned(),
            short_hash: false,
            tensors,
        };
        saved.check_cores()?;
        Ok(saved)
    }

    /// The two kinds whose shapes follow from the specification alone.
    fn check_cores(&self) -> Result<(), String> {
        let (spec, tying) = (&self.spec, Tying::new(&self.spec, self.base.num_layers));
        let expected = match spec.kind {
            AdapterKind::TinyLora => ("v", vec![tying.num_groups, spec.u]),
            AdapterKind::LoraXs => ("R", vec![tying.modules.len(), spec.r, spec.r]),
            AdapterKind::Lora | AdapterKind::Full => return Ok(()),
        };
        match &self.tensors[..] {
            [(name, shape, _)] if (name.as_str(), shape) == (expected.0, &expected.1) => Ok(()),
            found => {
                let found: Vec<_> = found
                    .iter()
                    .take(3)
                    .map(|(name, shape, _)| (name, shape))
                    .collect();
                Err(format!(
                    "it should hold one tensor {expected:?}, it holds {found:?}"
                ))
            }
        }
    }

    /// What an adapter's text holds: one tensor, and a base known by the start of its hash.
    pub(super) fn of_text(
        spec: AdapterSpec,
        base: BaseModel,
        origin: String,
        tensor: (String, Vec<usize>, Vec<f32>),
    ) -> Self {
        Self {
            spec,
            base,
            origin,
            short_hash: true,
            tensors: vec![tensor],
        }
    }

    pub fn num_parameters(&self) -> usize {
        self.numbers().count()
    }

    /// The numbers of all tensors in the order of [`Adapter::parameters`].
    pub fn numbers(&self) -> impl Iterator<Item = f32> {
        let tensors = self.tensors.iter();
        tensors.flat_map(|(_, _, numbers)| numbers.iter().copied())
    }

    /// The adapter on its base model. `cache` and `progress` are as in [`Adapter::new`].
    ///
    /// # Errors
    /// `Error::Data` when it was trained on another model, or does not fit this one.
    pub fn onto(
        &self,
        base: BaseModel,
        decoder: &Decoder,
        cache: &SvdCache,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<Adapter> {
        let same = match self.short_hash {
            true => base.hash.starts_with(&self.base.hash),
            false => base.hash == self.base.hash,
        };
        if !same {
            return Err(Error::data(format!(
                "adapter {} was trained on {} (weights {}), not on {} (weights {}): its numbers \
                 mean nothing there",
                self.origin,
                self.base.name,
                brief(&self.base.hash),
                base.name,
                brief(&base.hash)
            )));
        }
        let mut adapter = Adapter::new(&self.spec, base, decoder, cache, progress)
            .map_err(|e| Error::data(format!("adapter {}: {e}", self.origin)))?;
        let expected = adapter.tensors()?;
        let found = self.tensors.iter().map(|(name, shape, _)| (name, shape));
        if !found.eq(expected.iter().map(|(name, shape)| (name, shape))) {
            return Err(Error::data(format!(
                "adapter {}: its {} tensors do not fit the {} of {}",
                self.origin,
                self.tensors.len(),
                expected.len(),
                adapter.base().name
            )));
        }
        let numbers: Vec<f32> = self.numbers().collect();
        adapter.set_parameters(&numbers)?;
        Ok(adapter)
    }
}

/// Parses and checks the metadata.
fn description(text: &str) -> Result<Description, String> {
    // The version first: a later one may have keys that are unknown here.
    #[derive(Deserialize)]
    struct Version {
        format_version: u32,
    }
    let bad = |e: serde_json::Error| format!("its metadata cannot be read ({e})");
    let Version { format_version } = serde_json::from_str(text).map_err(bad)?;
    if format_version != FORMAT_VERSION {
        return Err(format!(
            "its format version is {format_version}, this program reads {FORMAT_VERSION}"
        ));
    }
    let description: Description = serde_json::from_str(text).map_err(bad)?;
    description.spec.validate().map_err(|e| e.to_string())?;
    if description.svd_version != SVD_VERSION && description.spec.needs_svd() {
        return Err(format!(
            "it belongs to decomposition {} of the base weights, this program computes {SVD_VERSION}",
            description.svd_version
        ));
    }
    let layers = description.base_model.num_layers;
    if !(1..=MAX_LAYERS).contains(&layers) {
        return Err(format!("its base model has {layers} layers"));
    }
    Ok(description)
}

fn safetensors_dtype(dtype: StoredDtype) -> Dtype {
    match dtype {
        StoredDtype::F32 => Dtype::F32,
        StoredDtype::Bf16 => Dtype::BF16,
        StoredDtype::F16 => Dtype::F16,
    }
}

/// Little-endian numbers; `data` is a whole number of them, as safetensors has checked.
pub(super) fn widen(data: &[u8], dtype: StoredDtype) -> Vec<f32> {
    let pairs = || data.as_chunks::<2>().0.iter();
    match dtype {
        StoredDtype::F32 => data
            .as_chunks::<4>()
            .0
            .iter()
            .map(|&x| f32::from_le_bytes(x))
            .collect(),
        StoredDtype::Bf16 => pairs().map(|&x| bf16::from_le_bytes(x).to_f32()).collect(),
        StoredDtype::F16 => pairs().map(|&x| f16::from_le_bytes(x).to_f32()).collect(),
    }
}

/// The end of a long name, which is what tells paths apart.
fn shorten(name: String) -> String {
    if name.len() <= NAME_BYTES {
        return name;
    }
    let start = (name.len() - NAME_BYTES..name.len()).find(|&i| name.is_char_boundary(i));
    format!("…{}", &name[start.unwrap_or(name.len())..])
}

/// Enough of a hash to recognise it.
fn brief(hash: &str) -> String {
    hash.chars().take(12).collect()
}
