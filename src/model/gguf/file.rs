//! The container: metadata and tensor table of a GGUF file (versions 2 and 3, little-endian).
//!
//! Every length is compared with what is left of the file before memory is taken for it, so a
//! damaged or hostile file costs no more than a few times its own size.

use std::collections::BTreeMap;
use std::path::Path;

use super::super::config::Dtype;
use super::super::weights::{Encoding, MappedFile};
use super::BlockType;
use crate::error::{Error, Result};

const MAGIC: &[u8] = b"GGUF";
const MAX_DIMS: u32 = 4;
const DEFAULT_ALIGNMENT: u64 = 32;

/// A metadata value. Integers of every width are one variant, floats another.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Int(i128),
    F32(f32),
    F64(f64),
    Bool(bool),
    String(String),
    Strings(Vec<String>),
    Ints(Vec<i64>),
    /// An array of floats or booleans, which nothing here reads.
    OtherArray,
}

/// One row of the tensor table, its place checked against the file.
#[derive(Debug, Clone)]
pub(super) struct Tensor {
    /// Row-major shape, the slowest dimension first (GGUF stores it the other way round).
    pub shape: Vec<usize>,
    pub encoding: Encoding,
    /// From the start of the file.
    pub offset: usize,
    pub len: usize,
}

/// A parsed file; tensor data stay in the mapping.
pub(super) struct GgufFile {
    pub mapped: MappedFile,
    pub metadata: BTreeMap<String, Value>,
    pub tensors: BTreeMap<String, Tensor>,
}

impl GgufFile {
    pub fn open(path: &Path) -> Result<Self> {
        let mapped = MappedFile::open(path)?;
        let (metadata, tensors) =
            parse(&mapped.bytes).map_err(|cause| Error::file("read GGUF", path, cause))?;
        Ok(Self {
            mapped,
            metadata,
            tensors,
        })
    }

    /// An error that names the file.
    pub fn refuse<T>(&self, message: impl std::fmt::Display) -> Result<T> {
        Err(Error::data(format!(
            "{}: {message}",
            self.mapped.path.display()
        )))
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        what: &str,
        convert: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(value) => match convert(value) {
                Some(value) => Ok(Some(value)),
                None => self.refuse(format!("metadata key {key} is not {what}")),
            },
        }
    }

    pub fn usize(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a non-negative integer", |v| match v {
            Value::Int(n) => usize::try_from(*n).ok(),
            _ => None,
        })
    }

    pub fn u32(&self, key: &str) -> Result<Option<u32>> {
        self.typed(key, "a token id", |v| match v {
            Value::Int(n) => u32::try_from(*n).ok(),
            _ => None,
        })
    }

    /// A float; an f32 gives the decimal number it was written from (1e-5, not 9.99999975e-6).
    pub fn f64(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a finite number", |v| {
            let number = match v {
                Value::F32(x) => x.to_string().parse().ok(),
                Value::F64(x) => Some(*x),
                Value::Int(n) => Some(*n as f64),
                _ => None,
            };
            number.filter(|n: &f64| n.is_finite())
        })
    }

    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", |v| match v {
            Value::Bool(b) => Some(*b),
            _ => None,
        })
    }

    pub fn str(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", |v| match v {
            Value::String(s) => Some(s.as_str()),
            _ => None,
        })
    }

    pub fn strings(&self, key: &str) -> Result<Option<&[String]>> {
        self.typed(key, "a list of strings", |v| match v {
            Value::Strings(s) => Some(s.as_slice()),
            _ => None,
        })
    }

    pub fn ints(&self, key: &str) -> Result<Option<&[i64]>> {
        self.typed(key, "a list of integers", |v| match v {
            Value::Ints(n) => Some(n.as_slice()),
            _ => None,
        })
    }

    pub fn required<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        match value {
            Some(value) => Ok(value),
            None => self.refuse(format!("metadata key {key} is missing")),
        }
    }
}

type Parsed<T> = std::result::Result<T, String>;
type Contents = (BTreeMap<String, Value>, BTreeMap<String, Tensor>);

fn parse(bytes: &[u8]) -> Parsed<Contents> {
    let mut reader = Reader { bytes, position: 0 };
    if reader.take(4)? != MAGIC {
        return Err("not a GGUF file".into());
    }
    match reader.u32()? {
        2 | 3 => {}
        other if other.swap_bytes() <= 3 => return Err("big-endian files are not read".into()),
        other => return Err(format!("version {other} is not known (2 and 3 are)")),
    }
    // The smallest entries: a tensor has name length, dimension count, type and offset; a
    // metadata entry has key length, type and one byte of value.
    let tensor_count = reader.count(8 + 4 + 4 + 8)?;
    let metadata_count = reader.count(8 + 4 + 1)?;

    let mut metadata = BTreeMap::new();
    for _ in 0..metadata_count {
        let key = reader.string()?;
        let kind = reader.u32()?;
        let value = reader
            .value(kind)
            .map_err(|e| format!("metadata key {key:?}: {e}"))?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(format!("metadata key {key:?} appears twice"));
        }
    }
    let alignment = match metadata.get("general.alignment") {
        None => DEFAULT_ALIGNMENT,
        Some(Value::Int(n)) if (8..=1 << 16).contains(n) && n & (n - 1) == 0 => *n as u64,
        Some(other) => return Err(format!("general.alignment = {other:?} is not allowed")),
    };

    let mut table = Vec::with_capacity(tensor_count);
    for _ in 0..tensor_count {
        let name = reader.string()?;
        let row = reader
            .table_row()
            .map_err(|e| format!("tensor {name:?}: {e}"))?;
        table.push((name, row));
    }
    let data_start = (reader.position as u64).next_multiple_of(alignment);
    let mut tensors = BTreeMap::new();
    for (name, row) in table {
        let tensor = row
            .place(data_start, alignment, bytes.len() as u64)
            .map_err(|e| format!("tensor {name:?}: {e}"))?;
        if tensors.insert(name.clone(), tensor).is_some() {
            return Err(format!("tensor {name:?} appears twice"));
        }
    }
    Ok((metadata, tensors))
}

struct TableRow {
    /// Fastest dimension first, as stored.
    dims: Vec<u64>,
    code: u32,
    /// From the start of the data section.
    offset: u64,
}

impl TableRow {
    fn place(self, data_start: u64, alignment: u64, file_len: u64) -> Parsed<Tensor> {
        let (encoding, block, size) = match (self.code, BlockType::from_gguf(self.code)) {
            (0, _) => (Encoding::Plain(Dtype::F32), 1, 4),
            (1, _) => (Encoding::Plain(Dtype::F16), 1, 2),
            (30, _) => (Encoding::Plain(Dtype::Bf16), 1, 2),
            (_, Some(b)) => (Encoding::Blocks(b), b.block_size(), b.type_size()),
            (code, None) => return Err(format!("element type {code} is not supported")),
        };
        let row = self.dims.first().copied().unwrap_or(1);
        if !row.is_multiple_of(block as u64) {
            return Err(format!("rows of {row} are not whole blocks of {block}"));
        }
        let elements = self.dims.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
        let len = elements.and_then(|n| (n / block as u64).checked_mul(size as u64));
        let end = len
            .and_then(|len| data_start.checked_add(self.offset)?.checked_add(len))
            .filter(|&end| end <= file_len);
        let (Some(len), Some(_)) = (len, end) else {
            return Err(format!(
                "shape {:?} at offset {} goes beyond the end of the file (truncated?)",
                self.dims, self.offset
            ));
        };
        if !self.offset.is_multiple_of(alignment) {
            return Err(format!("offset {} is not aligned", self.offset));
        }
        // Everything fits the mapping from here on, hence usize.
        Ok(Tensor {
            shape: self.dims.iter().rev().map(|&d| d as usize).collect(),
            encoding,
            offset: (data_start + self.offset) as usize,
            len: len as usize,
        })
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Parsed<&'a [u8]> {
        let end = self.position.checked_add(n);
        let taken = end.and_then(|end| self.bytes.get(self.position..end));
        let Some(taken) = taken else {
            return Err("the file ends early (truncated?)".into());
        };
        self.position += n;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Parsed<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn u32(&mut self) -> Parsed<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Parsed<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A number of things that take at least `min_size` bytes each: refused when the rest of the
    /// file could not hold them.
    fn count(&mut self, min_size: u64) -> Parsed<usize> {
        let n = self.u64()?;
        let left = (self.bytes.len() - self.position) as u64;
        match n.checked_mul(min_size) {
            Some(needed) if needed <= left => Ok(n as usize),
            _ => Err(format!("a list of {n} entries does not fit in the file")),
        }
    }

    fn string(&mut self) -> Parsed<String> {
        let len = self.count(1)?;
        let bytes = self.take(len)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_string()),
            Err(_) => Err("a string is not UTF-8".into()),
        }
    }

    /// An integer of value type `kind`; `None` for the other types.
    fn int(&mut self, kind: u32) -> Parsed<Option<i128>> {
        Ok(Some(match kind {
            0 => u8::from_le_bytes(self.array()?).into(),
            1 => i8::from_le_bytes(self.array()?).into(),
            2 => u16::from_le_bytes(self.array()?).into(),
            3 => i16::from_le_bytes(self.array()?).into(),
            4 => u32::from_le_bytes(self.array()?).into(),
            5 => i32::from_le_bytes(self.array()?).into(),
            10 => u64::from_le_bytes(self.array()?).into(),
            11 => i64::from_le_bytes(self.array()?).into(),
            _ => return Ok(None),
        }))
    }

    fn value(&mut self, kind: u32) -> Parsed<Value> {
        if let Some(n) = self.int(kind)? {
            return Ok(Value::Int(n));
        }
        match kind {
            6 => Ok(Value::F32(f32::from_le_bytes(self.array()?))),
            7 => match self.array()? {
                [0] => Ok(Value::Bool(false)),
                [1] => Ok(Value::Bool(true)),
                [other] => Err(format!("{other} is neither true nor false")),
            },
            8 => Ok(Value::String(self.string()?)),
            9 => self.array_value(),
            12 => Ok(Value::F64(f64::from_le_bytes(self.array()?))),
            other => Err(format!("value type {other} is not known")),
        }
    }

    fn array_value(&mut self) -> Parsed<Value> {
        let kind = self.u32()?;
        let size = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => return Err("nested lists are not supported".into()),
            other => return Err(format!("value type {other} is not known")),
        };
        let len = self.count(size)?;
        match kind {
            8 => {
                let strings = (0..len).map(|_| self.string());
                Ok(Value::Strings(strings.collect::<Parsed<_>>()?))
            }
            6 | 7 | 12 => {
                self.take(len * size as usize)?;
                Ok(Value::OtherArray)
            }
            _ => {
                let mut ints = Vec::with_capacity(len);
                for _ in 0..len {
                    let n = self.int(kind)?.and_then(|n| i64::try_from(n).ok());
                    ints.push(n.ok_or("an integer is too large")?);
                }
                Ok(Value::Ints(ints))
            }
        }
    }

    fn table_row(&mut self) -> Parsed<TableRow> {
        let dims = match self.u32()? {
            n @ 1..=MAX_DIMS => (0..n).map(|_| self.u64()).collect::<Parsed<Vec<_>>>()?,
            n => return Err(format!("{n} dimensions (1 to {MAX_DIMS} are allowed)")),
        };
        Ok(TableRow {
            dims,
            code: self.u32()?,
            offset: self.u64()?,
        })
    }
}
