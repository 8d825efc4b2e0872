//! Named vectors on disk, each in its own precision, bit for bit.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, View, serialize_to_file};

use super::fs;
use crate::{Error, Result};

/// A vector of numbers.
#[derive(Debug, Clone, PartialEq)]
pub enum Numbers {
    F32(Vec<f32>),
    F64(Vec<f64>),
}

struct Vector<'a> {
    numbers: &'a Numbers,
    shape: [usize; 1],
}

impl View for Vector<'_> {
    fn dtype(&self) -> Dtype {
        match self.numbers {
            Numbers::F32(_) => Dtype::F32,
            Numbers::F64(_) => Dtype::F64,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(match self.numbers {
            Numbers::F32(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Numbers::F64(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
        })
    }

    fn data_len(&self) -> usize {
        match self.numbers {
            Numbers::F32(_) => 4 * self.shape[0],
            Numbers::F64(_) => 8 * self.shape[0],
        }
    }
}

/// Writes the vectors as one safetensors file.
pub fn write_tensors(path: &Path, tensors: &BTreeMap<String, Numbers>) -> Result<()> {
    let views = tensors.iter().map(|(name, numbers)| {
        let length = match numbers {
            Numbers::F32(v) => v.len(),
            Numbers::F64(v) => v.len(),
        };
        let shape = [length];
        (name, Vector { numbers, shape })
    });
    serialize_to_file(views, None, path).map_err(|e| match e {
        safetensors::SafeTensorError::IoError(e) => fs::error("write", path, &e),
        e => Error::file("write", path, e),
    })
}

/// Reads what [`write_tensors`] wrote.
///
/// # Errors
/// [`Error::Data`] when it is no safetensors file, or holds anything but f32 and f64.
pub fn read_tensors(path: &Path) -> Result<BTreeMap<String, Numbers>> {
    let bytes = fs::read(path)?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| Error::file("read", path, e))?;
    let mut tensors = BTreeMap::new();
    for (name, view) in file.iter() {
        let data = view.data();
        let numbers = match view.dtype() {
            Dtype::F32 => Numbers::F32(chunks(data).map(f32::from_le_bytes).collect()),
            Dtype::F64 => Numbers::F64(chunks(data).map(f64::from_le_bytes).collect()),
            other => {
                let cause = format!("{name} is {other:?}, expected F32 or F64");
                return Err(Error::file("read", path, cause));
            }
        };
        tensors.insert(name.to_owned(), numbers);
    }
    Ok(tensors)
}

fn chunks<const N: usize>(data: &[u8]) -> impl Iterator<Item = [u8; N]> + '_ {
    data.as_chunks::<N>().0.iter().copied()
}
