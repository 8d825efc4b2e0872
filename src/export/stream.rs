//! A safetensors file written tensor by tensor, so that memory holds one of them at a time.

use std::io::BufWriter;
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
        let mut file = BufWriter::new(fs::temporary_for(path)?);
        fs::write_all(&mut file, path, &(header.len() as u64).to_le_bytes())?;
        fs::write_all(&mut file, path, header.as_bytes())?;
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
        fs::write_all(&mut self.file, &self.path, &bytes)
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
        let file = self.file;
        let temporary = fs::change("write", &path, || {
            file.into_inner().map_err(|e| e.into_error())
        })?;
        fs::put_in_place(temporary, &path)
    }
}

fn name_of(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "F32",
        Dtype::F16 => "F16",
        Dtype::Bf16 => "BF16",
    }
}
