//! The project's own adapter file: the trained numbers, and how to make the adapter of them.

use std::path::Path;

use serde_json::json;

use super::stream::Writer;
use crate::adapter::{Adapter, StoredDtype};
use crate::model::Dtype;
use crate::{Error, Result};

/// Raised when an older program could not read what a newer one writes.
const VERSION: u32 = 1;

/// Writes the adapter as one safetensors file: `v` `[groups, u]` (or what else the kind trains) in
/// the stored dtype; in the metadata the specification as JSON, the format version, and the name
/// and hash of the model it belongs to.
pub fn write_tinylora(adapter: &Adapter, path: &Path) -> Result<()> {
    let spec = serde_json::to_string(adapter.spec())
        .map_err(|e| Error::Internal(format!("cannot write an adapter's specification: {e}")))?;
    let base = adapter.base();
    let metadata = json!({
        "format": "tinylora",
        "format_version": VERSION.to_string(),
        "spec": spec,
        "base_model": base.name,
        "base_model_hash": base.hash,
        "num_layers": base.num_layers.to_string(),
    });
    let dtype = match adapter.spec().dtype {
        StoredDtype::F32 => Dtype::F32,
        StoredDtype::Bf16 => Dtype::Bf16,
        StoredDtype::F16 => Dtype::F16,
    };
    let tensors = adapter.tensors()?;
    let sizes: Vec<usize> = tensors.iter().map(|(_, s)| s.iter().product()).collect();
    let mut writer = Writer::with_metadata(path, dtype, tensors, metadata)?;
    let parameters = adapter.rounded_parameters();
    let mut rest = &parameters[..];
    for size in sizes {
        let (tensor, after) = rest.split_at(size);
        writer.write(tensor)?;
        rest = after;
    }
    writer.finish()
}
