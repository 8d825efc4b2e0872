//! The frozen weights of a checkpoint by Hugging Face name, wherever they are stored.
//!
//! Files are memory mapped and tensors read on demand, so that opening costs the header only and
//! a 16-bit checkpoint never exists twice. The files must not be changed while they are in use.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use half::{bf16, f16};
use memmap2::Mmap;
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::config::{Dtype, ModelConfig, expected_tensors};
use super::gguf::BlockType;
use super::random_init::RandomTensor;
use crate::error::{Error, Result};
use crate::ops::cpu::{MappedRows, PackedMatrix};

/// Named tensors in files, in blocks of a GGUF file, or made at random.
pub struct RawWeights {
    files: Vec<MappedFile>,
    entries: BTreeMap<String, Entry>,
    hash: OnceLock<String>,
    /// Stored bytes asked for so far: how far hashing and loading are.
    touched: Arc<AtomicUsize>,
}

/// What is known of a tensor without reading it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    pub shape: Vec<usize>,
    /// Element type that [`RawWeights::get`] gives (f32 for quantised blocks).
    pub dtype: Dtype,
    /// Bytes it takes where it is stored.
    pub stored_bytes: usize,
}

/// A tensor's elements, row-major, borrowed from the file where its layout allows.
#[derive(Debug, Clone, PartialEq)]
pub enum RawTensor<'a> {
    F32(Cow<'a, [f32]>),
    F16(Cow<'a, [f16]>),
    Bf16(Cow<'a, [bf16]>),
}

impl RawTensor<'_> {
    pub fn dtype(&self) -> Dtype {
        match self {
            Self::F32(_) => Dtype::F32,
            Self::F16(_) => Dtype::F16,
            Self::Bf16(_) => Dtype::Bf16,
        }
    }

    pub fn len(&self) -> usize {
        match self {
            Self::F32(v) => v.len(),
            Self::F16(v) => v.len(),
            Self::Bf16(v) => v.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements widened to f32, which is exact.
    pub fn into_f32(self) -> Vec<f32> {
        match self {
            Self::F32(v) => v.into_owned(),
            Self::F16(v) => v.par_iter().map(|x| x.to_f32()).collect(),
            Self::Bf16(v) => v.par_iter().map(|x| x.to_f32()).collect(),
        }
    }
}

/// A memory-mapped file with its name for messages.
pub(super) struct MappedFile {
    pub path: PathBuf,
    pub bytes: Arc<Mmap>,
}

impl MappedFile {
    pub fn open(path: &Path) -> Result<Self> {
        // Asked before opening, which would wait for ever on a pipe.
        let metadata = std::fs::metadata(path).map_err(|e| Error::file("open", path, e))?;
        if !metadata.is_file() {
            return Err(Error::file("open", path, "not a regular file"));
        }
        let file = File::open(path).map_err(|e| Error::file("open", path, e))?;
        // SAFETY: the mapping is read-only; that nobody truncates a checkpoint while it is in use
        // is a documented condition of this module.
        let bytes = unsafe { Mmap::map(&file) }.map_err(|e| Error::file("map", path, e))?;
        Ok(Self {
            path: path.to_path_buf(),
            bytes: Arc::new(bytes),
        })
    }
}

/// How the bytes of a tensor are to be read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Encoding {
    Plain(Dtype),
    /// GGUF blocks, dequantised to f32.
    Blocks(BlockType),
}

/// Where a tensor is.
#[derive(Debug, Clone)]
pub(super) enum Location {
    File {
        /// Index into the list of files.
        file: usize,
        offset: usize,
        len: usize,
        encoding: Encoding,
        /// Rows are interleaved per head as llama.cpp stores q and k of the Llama family: the
        /// number of heads to undo it with.
        interleaved_heads: Option<usize>,
    },
    Random(RandomTensor),
}

#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub shape: Vec<usize>,
    pub location: Location,
}

impl RawWeights {
    pub(super) fn new(files: Vec<MappedFile>, entries: BTreeMap<String, Entry>) -> Self {
        Self {
            files,
            entries,
            hash: OnceLock::new(),
            touched: Arc::default(),
        }
    }

    /// Names in lexical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    pub fn info(&self, name: &str) -> Option<TensorInfo> {
        let entry = self.entries.get(name)?;
        let (dtype, stored_bytes) = match &entry.location {
            Location::File { len, encoding, .. } => match encoding {
                Encoding::Plain(dtype) => (*dtype, *len),
                Encoding::Blocks(_) => (Dtype::F32, *len),
            },
            Location::Random(random) => (random.dtype(), 0),
        };
        Some(TensorInfo {
            shape: entry.shape.clone(),
            dtype,
            stored_bytes,
        })
    }

    /// Bytes of all tensors where they are stored.
    pub fn stored_bytes(&self) -> usize {
        self.names()
            .filter_map(|name| self.info(name))
            .map(|info| info.stored_bytes)
            .sum()
    }

    /// A counter of the stored bytes that are asked for.
    pub fn touched(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.touched)
    }

    /// The elements of a tensor in the element type it is stored in; quantised blocks give f32.
    pub fn get(&self, name: &str) -> Result<RawTensor<'_>> {
        let entry = self.entry(name)?;
        let (bytes, encoding, interleaved_heads) = match &entry.location {
            Location::Random(random) => return Ok(random.generate(&entry.shape)),
            Location::File {
                encoding,
                interleaved_heads,
                ..
            } => (self.stored(name, entry)?, *encoding, *interleaved_heads),
        };
        let tensor = match encoding {
            Encoding::Plain(Dtype::F32) => RawTensor::F32(cast(bytes, f32::from_le_bytes)),
            Encoding::Plain(Dtype::F16) => RawTensor::F16(cast(bytes, f16::from_le_bytes)),
            Encoding::Plain(Dtype::Bf16) => RawTensor::Bf16(cast(bytes, bf16::from_le_bytes)),
            Encoding::Blocks(block) => RawTensor::F32(block.dequantize(bytes)?.into()),
        };
        Ok(match interleaved_heads {
            None => tensor,
            Some(heads) => {
                let row = entry.shape.get(1).copied().unwrap_or(1);
                match tensor {
                    RawTensor::F32(v) => RawTensor::F32(split_halves(&v, heads, row).into()),
                    RawTensor::F16(v) => RawTensor::F16(split_halves(&v, heads, row).into()),
                    RawTensor::Bf16(v) => RawTensor::Bf16(split_halves(&v, heads, row).into()),
                }
            }
        })
    }

    /// A quantised matrix for products, its blocks interleaved in memory. `None` for other encodings and
    /// for formats without kernels.
    pub fn blocks(&self, name: &str) -> Result<Option<PackedMatrix>> {
        let entry = self.entry(name)?;
        let &[out, input] = &entry.shape[..] else {
            return Ok(None);
        };
        let Location::File {
            encoding: Encoding::Blocks(block),
            interleaved_heads,
            ..
        } = entry.location
        else {
            return Ok(None);
        };
        let Some(format) = block.kernels() else {
            return Ok(None);
        };
        let bytes = self.stored(name, entry)?;
        let rows = match interleaved_heads {
            Some(heads) => Cow::Owned(split_halves(bytes, heads, bytes.len() / out)),
            None => Cow::Borrowed(bytes),
        };
        Ok(Some(PackedMatrix::pack_blocks(format, &rows, out, input)))
    }

    /// Whether [`Self::blocks`] gives a matrix.
    pub fn has_blocks(&self, name: &str) -> bool {
        self.entries.get(name).is_some_and(|entry| {
            let encoding = match entry.location {
                Location::File { encoding, .. } => Some(encoding),
                Location::Random(_) => None,
            };
            matches!(encoding, Some(Encoding::Blocks(block)) if block.kernels().is_some())
                && entry.shape.len() == 2
        })
    }

    /// A matrix of two-byte floats for products, left in its file. `None` for other encodings and for
    /// layouts that products cannot read.
    pub fn mapped(&self, name: &str) -> Result<Option<PackedMatrix>> {
        let entry = self.entry(name)?;
        let &[out, input] = &entry.shape[..] else {
            return Ok(None);
        };
        let Location::File {
            file,
            offset,
            encoding: Encoding::Plain(dtype),
            interleaved_heads: None,
            ..
        } = entry.location
        else {
            return Ok(None);
        };
        let file = Arc::clone(&self.files[file].bytes);
        Ok(match dtype {
            Dtype::Bf16 => MappedRows::new(file, offset, out, input).map(PackedMatrix::mapped_bf16),
            Dtype::F16 => MappedRows::new(file, offset, out, input).map(PackedMatrix::mapped_f16),
            Dtype::F32 => None,
        })
    }

    /// As [`RawWeights::get`], widened to f32.
    pub fn get_f32(&self, name: &str) -> Result<Vec<f32>> {
        Ok(self.get(name)?.into_f32())
    }

    /// SHA-256 (hex) over names, shapes, encodings and stored bytes of the tensors the model
    /// uses: two checkpoints with the same hash have the same weights. Reads everything once;
    /// the result is kept.
    pub fn hash(&self) -> Result<&str> {
        if let Some(hash) = self.hash.get() {
            return Ok(hash);
        }
        let digests = self
            .entries
            .par_iter()
            .map(|(name, entry)| self.digest(name, entry))
            .collect::<Result<Vec<_>>>()?;
        let mut all = Sha256::new_with_prefix(b"tinylora weights 1\0");
        for digest in digests {
            all.update(digest);
        }
        let hex = all.finalize().iter().map(|b| format!("{b:02x}")).collect();
        Ok(self.hash.get_or_init(|| hex))
    }

    fn digest(&self, name: &str, entry: &Entry) -> Result<[u8; 32]> {
        let mut sha = Sha256::new();
        let mut header = format!("{name}\0{:?}\0", entry.shape);
        match &entry.location {
            Location::Random(random) => header.push_str(&format!("{random:?}")),
            Location::File {
                encoding,
                interleaved_heads,
                ..
            } => header.push_str(&format!("{encoding:?} {interleaved_heads:?}")),
        }
        sha.update((header.len() as u64).to_le_bytes());
        sha.update(header);
        if matches!(entry.location, Location::File { .. }) {
            sha.update(self.stored(name, entry)?);
            self.release(name);
        }
        Ok(sha.finalize().into())
    }

    /// Checks that every tensor the architecture needs is there in the right shape, and forgets
    /// the others: rotary tables and an output head that is tied anyway are harmless, anything
    /// else means that the checkpoint is not what its configuration says.
    pub(super) fn keep_expected(&mut self, config: &ModelConfig, origin: &str) -> Result<()> {
        let expected: HashMap<String, Vec<usize>> = expected_tensors(config).into_iter().collect();
        for (name, shape) in expected_tensors(config) {
            let Some(entry) = self.entries.get(&name) else {
                return Err(Error::data(format!("{origin}: tensor {name} is missing")));
            };
            if entry.shape != shape {
                return Err(Error::data(format!(
                    "{}: tensor {name} has shape {:?}, the configuration wants {shape:?}",
                    self.file_of(entry, origin),
                    entry.shape
                )));
            }
        }
        for (name, entry) in &self.entries {
            if !expected.contains_key(name) && !is_harmless_extra(name, config) {
                return Err(Error::data(format!(
                    "{}: tensor {name} has no place in a {} model with {} layers",
                    self.file_of(entry, origin),
                    config.arch.name(),
                    config.num_hidden_layers
                )));
            }
        }
        self.entries.retain(|name, _| expected.contains_key(name));
        Ok(())
    }

    fn file_of(&self, entry: &Entry, origin: &str) -> String {
        match &entry.location {
            Location::File { file, .. } => self.files[*file].path.display().to_string(),
            Location::Random(_) => origin.to_string(),
        }
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.entries
            .get(name)
            .ok_or_else(|| Error::data(format!("the checkpoint has no tensor {name}")))
    }

    /// Lets go of a tensor's pages, which would count as this process's memory as long as the file is
    /// mapped. They come back when they are read again.
    pub(super) fn release(&self, name: &str) {
        #[cfg(unix)]
        if let Some(Entry {
            location: Location::File {
                file, offset, len, ..
            },
            ..
        }) = self.entries.get(name)
        {
            // Whole pages only: the others may hold parts of other tensors.
            const PAGE: usize = 64 << 10;
            let start = offset.next_multiple_of(PAGE);
            let end = (offset + len) / PAGE * PAGE;
            if start < end {
                let advice = memmap2::UncheckedAdvice::DontNeed;
                // SAFETY: the mapping is of a file and read-only: nothing is lost but the copy in memory.
                let done = unsafe {
                    self.files[*file]
                        .bytes
                        .unchecked_advise_range(advice, start, end - start)
                };
                // Only a hint.
                let _ = done;
            }
        }
    }

    fn stored(&self, name: &str, entry: &Entry) -> Result<&[u8]> {
        let Location::File {
            file, offset, len, ..
        } = entry.location
        else {
            return Ok(&[]);
        };
        self.touched.fetch_add(len, Ordering::Relaxed);
        let file = &self.files[file];
        let range = offset..offset.saturating_add(len);
        file.bytes.get(range).ok_or_else(|| {
            let cause = format!("tensor {name} ends beyond the end of the file");
            Error::file("read", &file.path, cause)
        })
    }
}

fn is_harmless_extra(name: &str, config: &ModelConfig) -> bool {
    name.ends_with(".rotary_emb.inv_freq")
        || (config.tie_word_embeddings && name == "lm_head.weight")
}

/// The bytes as numbers: in place when they are aligned (they nearly always are) and the machine
/// is little-endian, copied otherwise.
fn cast<const N: usize, T: Copy + Plain>(bytes: &[u8], convert: fn([u8; N]) -> T) -> Cow<'_, [T]> {
    if cfg!(target_endian = "little") {
        // SAFETY: every bit pattern is a valid f32, f16 or bf16 (the only `Plain` types).
        let (before, middle, after) = unsafe { bytes.align_to::<T>() };
        if before.is_empty() && after.is_empty() {
            return Cow::Borrowed(middle);
        }
    }
    let (elements, _) = bytes.as_chunks::<N>();
    Cow::Owned(elements.iter().map(|&element| convert(element)).collect())
}

/// Types of which every bit pattern is a value.
trait Plain {}
impl Plain for f32 {}
impl Plain for f16 {}
impl Plain for bf16 {}

/// Rows of each head from interleaved order (0, h/2, 1, h/2+1, …) to halves (0, 1, …): the
/// rotation then pairs row i with row i + h/2, as Hugging Face's models do.
fn split_halves<T: Copy>(rows: &[T], heads: usize, row: usize) -> Vec<T> {
    let head_dim = rows.len() / (heads * row);
    let mut out = Vec::with_capacity(rows.len());
    for head in rows.chunks_exact(head_dim * row) {
        for half in 0..2 {
            for pair in 0..head_dim / 2 {
                let from = (2 * pair + half) * row;
                out.extend_from_slice(&head[from..from + row]);
            }
        }
    }
    out
}
