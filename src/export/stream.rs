//! A safetensors file written tensor by tensor, so that memory holds one of them at a time.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use serde_json::{Map, Value, json};
use tempfile::NamedTempFile;

use crate::model::Dtype;
use crate::run::fs;
use crate::{Error, Result};

/// Writes tensors in the order in which they were announced; the file appears when it is whole.
pub(super) struct Writer {
    path: PathBuf,
    dtype: Dtype,
    /// Elements of the tensors still to come, the next one last.
    expected: Vec<usize>,
    file: BufWriter<NamedTempFile>,
}

impl Writer {
    /// `tensors` are names and shapes, all stored as `dtype`.
    pub fn create(path: &Path, dtype: Dtype, tensors: Vec<(String, Vec<usize>)>) -> Result<Self> {
        let mut header = Map::new();
        header.insert("__metadata__".into(), json!({"format": "pt"}));
        let (mut offset, mut expected) = (0, Vec::with_capacity(tensors.len()));
        for (name, shape) in tensors {
            let elements: usize = shape.iter().product();
            let end = offset + elements * dtype.size_in_bytes();
            let entry = json!({
                "dtype": name_of(dtype), "shape": shape, "data_offsets": [offset, end],
            });
            header.insert(name, entry);
            expected.push(elements);
            offset = end;
        }
        expected.reverse();
        // The data starts at a multiple of 8 bytes, as the format asks: the header is padded.
        let mut header = Value::Object(header).to_string();
        header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
        let fail = |e: std::io::Error| fs::error("write", path, &e);
        let temporary = tempfile::Builder::new()
            .prefix(".tmp-")
            .tempfile_in(fs::parent(path))
            .map_err(fail)?;
        let mut file = BufWriter::new(temporary);
        file.write_all(&(header.len() as u64).to_le_bytes())
            .map_err(fail)?;
        file.write_all(header.as_bytes()).map_err(fail)?;
        Ok(Self {
            path: path.to_owned(),
            dtype,
            expected,
            file,
        })
    }

    /// The next tensor, row-major, rounded once to the file's dtype.
    pub fn write(&mut self, values: &[f32]) -> Result<()> {
        if self.expected.pop() != Some(values.len()) {
            return Err(Error::Internal(format!(
                "a tensor of {} elements was not announced to {}",
                values.len(),
                self.path.display()
            )));
        }
        let bytes: Vec<u8> = match self.dtype {
            Dtype::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Dtype::Bf16 => values
                .iter()
                .flat_map(|&x| bf16::from_f32(x).to_le_bytes())
                .collect(),
            Dtype::F16 => values
                .iter()
                .flat_map(|&x| f16::from_f32(x).to_le_bytes())
                .collect(),
        };
        let written = self.file.write_all(&bytes);
        written.map_err(|e| fs::error("write", &self.path, &e))
    }

    /// Makes the file durable under its name.
    pub fn finish(self) -> Result<()> {
        if !self.expected.is_empty() {
            return Err(Error::Internal(format!(
                "{} tensors of {} were never written",
                self.expected.len(),
                self.path.display()
            )));
        }
        let path = self.path;
        let fail = |e: std::io::Error| fs::error("write", &path, &e);
        let temporary = self.file.into_inner().map_err(|e| fail(e.into_error()))?;
        readable(temporary.as_file()).map_err(fail)?;
        temporary.as_file().sync_all().map_err(fail)?;
        temporary.persist(&path).map_err(|e| fail(e.error))?;
        fs::sync_dir(fs::parent(&path))
    }
}

/// Temporary files are private; what they become should be as readable as any other file.
fn readable(file: &File) -> std::io::Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        file.set_permissions(std::fs::Permissions::from_mode(0o644))?;
    }
    #[cfg(not(unix))]
    let _ = file;
    Ok(())
}

fn name_of(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "F32",
        Dtype::F16 => "F16",
        Dtype::Bf16 => "BF16",
    }
}
