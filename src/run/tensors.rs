//! Named vectors on disk, bit for bit.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, View, serialize_to_file};

use super::fs;
use crate::{Error, Result};

struct Vector<'a> {
    numbers: &'a [f32],
    shape: [usize; 1],
}

impl View for Vector<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(self.numbers.iter().flat_map(|x| x.to_le_bytes()).collect())
    }

    fn data_len(&self) -> usize {
        size_of_val(self.numbers)
    }
}

/// Writes the vectors as one safetensors file.
pub fn write_tensors(path: &Path, tensors: &[(&str, &Vec<f32>)]) -> Result<()> {
    let views = tensors.iter().map(|(name, numbers)| {
        let shape = [numbers.len()];
        (name, Vector { numbers, shape })
    });
    fs::change("write", path, || {
        serialize_to_file(views, None, path).map_err(|e| match e {
            safetensors::SafeTensorError::IoError(e) => e,
            e => std::io::Error::other(e),
        })
    })
}

/// Reads what [`write_tensors`] wrote.
///
/// # Errors
/// [`Error::Data`] when it is no safetensors file, or holds anything but f32.
pub fn read_tensors(path: &Path) -> Result<BTreeMap<String, Vec<f32>>> {
    let bytes = fs::read(path)?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| Error::file("read", path, e))?;
    let mut tensors = BTreeMap::new();
    for (name, view) in file.iter() {
        if view.dtype() != Dtype::F32 {
            let cause = format!("{name} is {:?}, expected F32", view.dtype());
            return Err(Error::file("read", path, cause));
        }
        let words = view.data().as_chunks::<4>().0;
        let numbers = words.iter().map(|word| f32::from_le_bytes(*word));
        tensors.insert(name.to_owned(), numbers.collect());
    }
    Ok(tensors)
}
