//! The tensors of one safetensors file, read on demand.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, Metadata};

use crate::adapter::file::widen;
use crate::adapter::spec::StoredDtype;
use crate::run::fs;
use crate::{Error, Result};

/// A file whose header is known to fit its content.
#[derive(Debug)]
pub(super) struct TensorFile {
    path: PathBuf,
    bytes: Vec<u8>,
    data_start: usize,
    metadata: Metadata,
}

impl TensorFile {
    pub fn open(path: &Path) -> Result<Self> {
        let bytes = fs::read(path)?;
        let (header, metadata) = SafeTensors::read_metadata(&bytes).map_err(|e| {
            Error::file("read", path, format!("{e} (truncated or not safetensors)"))
        })?;
        Ok(Self {
            path: path.to_owned(),
            data_start: 8 + header,
            bytes,
            metadata,
        })
    }

    pub fn names(&self) -> BTreeSet<String> {
        self.metadata.tensors().into_keys().collect()
    }

    /// Compares a tensor's shape and number format with what is needed.
    pub fn check(&self, name: &str, shape: &[usize]) -> Result<()> {
        let Some(info) = self.metadata.info(name) else {
            return self.refuse(name, "is missing");
        };
        if info.shape != shape {
            let found = &info.shape;
            return self.refuse(
                name,
                format!("has shape {found:?}, the model needs {shape:?}"),
            );
        }
        match info.dtype {
            Dtype::F32 | Dtype::F16 | Dtype::BF16 => Ok(()),
            other => self.refuse(name, format!("is {other:?}; F32, F16 and BF16 are read")),
        }
    }

    /// The numbers of a tensor of this shape, row-major.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.check(name, shape)?;
        let Some(info) = self.metadata.info(name) else {
            return self.refuse(name, "is missing");
        };
        let (start, end) = info.data_offsets;
        let dtype = match info.dtype {
            Dtype::F16 => StoredDtype::F16,
            Dtype::BF16 => StoredDtype::Bf16,
            _ => StoredDtype::F32,
        };
        let data = &self.bytes[self.data_start + start..self.data_start + end];
        let values = widen(data, dtype);
        match values.iter().find(|x| !x.is_finite()) {
            Some(x) => self.refuse(name, format!("holds {x}")),
            None => Ok(values),
        }
    }

    /// Refuses tensors that nothing here has asked for: they would change the model unseen.
    pub fn check_nothing_else(&self, known: &[String]) -> Result<()> {
        let known: BTreeSet<&String> = known.iter().collect();
        match self.names().iter().find(|name| !known.contains(name)) {
            Some(name) => self.refuse(name, "does not belong to an adapted map of the model"),
            None => Ok(()),
        }
    }

    pub fn refuse<T>(&self, name: &str, cause: impl std::fmt::Display) -> Result<T> {
        Err(Error::data(format!(
            "{}: tensor {name} {cause}",
            self.path.display()
        )))
    }
}
