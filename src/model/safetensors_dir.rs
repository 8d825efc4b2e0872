//! Weights of a Hugging Face directory: one `model.safetensors`, or several with an index.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use safetensors::SafeTensors;
use serde_json::{Map, Value};

use super::config::Dtype;
use super::config_json::read_json_object;
use super::weights::{Encoding, Entry, Location, MappedFile, RawWeights};
use crate::error::{Error, Result};

pub(super) const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// Opens the weights in `dir`; tensors are not yet compared with a configuration.
pub(super) fn open(dir: &Path) -> Result<RawWeights> {
    let single = dir.join(SINGLE);
    let index = dir.join(INDEX);
    if single.exists() {
        return read_files(vec![single], None);
    }
    if index.exists() {
        let map = weight_map(&index)?;
        let names: BTreeSet<&String> = map.values().collect();
        let paths = names.into_iter().map(|name| dir.join(name)).collect();
        return read_files(paths, Some(&map));
    }
    Err(Error::data(no_weights_message(dir)))
}

fn no_weights_message(dir: &Path) -> String {
    let pickled = ["pytorch_model.bin", "pytorch_model.bin.index.json"];
    let advice = if pickled.iter().any(|name| dir.join(name).exists()) {
        "pickled PyTorch weights are not read: convert them to safetensors"
    } else {
        "is it a checkpoint directory?"
    };
    format!("{}: no {SINGLE} and no {INDEX}; {advice}", dir.display())
}

/// tensor name → file name, each a plain `*.safetensors` name inside the directory.
pub(super) fn weight_map(index: &Path) -> Result<BTreeMap<String, String>> {
    let object = read_json_object(index)?;
    let Some(Value::Object(map)) = object.get("weight_map") else {
        return Err(Error::file("parse", index, "weight_map is missing"));
    };
    if map.is_empty() {
        return Err(Error::file("parse", index, "weight_map is empty"));
    }
    checked_file_names(map).map_err(|cause| Error::file("parse", index, cause))
}

fn checked_file_names(
    map: &Map<String, Value>,
) -> std::result::Result<BTreeMap<String, String>, String> {
    let mut checked = BTreeMap::new();
    for (tensor, file) in map {
        let plain = file.as_str().filter(|name| {
            let mut parts = Path::new(name).components();
            let one = matches!(parts.next(), Some(Component::Normal(_))) && parts.next().is_none();
            one && name.ends_with(".safetensors") && !name.contains(['/', '\\', '\0'])
        });
        let Some(file) = plain else {
            return Err(format!(
                "tensor {tensor} is in {file}, which is not the name of a .safetensors file in \
                 the same directory"
            ));
        };
        checked.insert(tensor.clone(), file.to_string());
    }
    Ok(checked)
}

/// Reads the headers of `paths`. With `map`, exactly the tensors it names are taken, each from
/// the file it names.
fn read_files(paths: Vec<PathBuf>, map: Option<&BTreeMap<String, String>>) -> Result<RawWeights> {
    let mut files = Vec::with_capacity(paths.len());
    let mut entries = BTreeMap::new();
    for (file, path) in paths.iter().enumerate() {
        let mapped = MappedFile::open(path)?;
        let (header_len, metadata) = SafeTensors::read_metadata(&mapped.bytes).map_err(|e| {
            Error::file("read", path, format!("{e} (truncated or not safetensors)"))
        })?;
        // Eight bytes give the length of the JSON header, the data follows it.
        let data_start = 8 + header_len;
        for (name, info) in metadata.tensors() {
            if let Some(map) = map
                && map.get(&name).map(|file| path.ends_with(file)) != Some(true)
            {
                continue;
            }
            let dtype = match info.dtype {
                safetensors::Dtype::F32 => Dtype::F32,
                safetensors::Dtype::F16 => Dtype::F16,
                safetensors::Dtype::BF16 => Dtype::Bf16,
                other => {
                    let cause = format!("tensor {name} is {other:?}; F32, F16 and BF16 are read");
                    return Err(Error::file("read", path, cause));
                }
            };
            let (start, end) = info.data_offsets;
            let entry = Entry {
                shape: info.shape.clone(),
                location: Location::File {
                    file,
                    offset: data_start + start,
                    len: end - start,
                    encoding: Encoding::Plain(dtype),
                    interleaved_heads: None,
                },
            };
            entries.insert(name, entry);
        }
        files.push(mapped);
    }
    let absent = map.and_then(|map| map.iter().find(|(name, _)| !entries.contains_key(*name)));
    if let Some((name, file)) = absent {
        return Err(Error::data(format!(
            "{INDEX} places tensor {name} in {file}, which does not contain it"
        )));
    }
    Ok(RawWeights::new(files, entries))
}
