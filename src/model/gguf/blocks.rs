//! Quantised blocks of GGUF files, widened to f32 with candle's own formulas.

use std::borrow::Cow;

use candle_core::CpuStorage;
use candle_core::quantized::GgmlDType;
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::ops::cpu::BlockFormat;

/// Blocks dequantised by one task.
const BLOCKS_PER_TASK: usize = 1 << 10;

/// A block format: `block_size` elements in `type_size` bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::model) struct BlockType(GgmlDType);

impl BlockType {
    /// The format of this number in a GGUF tensor table; `None` for formats that are not
    /// quantised or that candle cannot read.
    pub fn from_gguf(code: u32) -> Option<Self> {
        let dtype = match code {
            2 => GgmlDType::Q4_0,
            3 => GgmlDType::Q4_1,
            6 => GgmlDType::Q5_0,
            7 => GgmlDType::Q5_1,
            8 => GgmlDType::Q8_0,
            10 => GgmlDType::Q2K,
            11 => GgmlDType::Q3K,
            12 => GgmlDType::Q4K,
            13 => GgmlDType::Q5K,
            14 => GgmlDType::Q6K,
            _ => return None,
        };
        Some(Self(dtype))
    }

    /// Elements in a block.
    pub fn block_size(self) -> usize {
        self.0.block_size()
    }

    /// Bytes of a block.
    pub fn type_size(self) -> usize {
        self.0.type_size()
    }

    /// The format whose blocks products read as they are.
    pub fn kernels(self) -> Option<BlockFormat> {
        match self.0 {
            GgmlDType::Q4_0 => Some(BlockFormat::Q4_0),
            GgmlDType::Q4_1 => Some(BlockFormat::Q4_1),
            GgmlDType::Q5_0 => Some(BlockFormat::Q5_0),
            GgmlDType::Q5_1 => Some(BlockFormat::Q5_1),
            GgmlDType::Q8_0 => Some(BlockFormat::Q8_0),
            GgmlDType::Q4K => Some(BlockFormat::Q4K),
            GgmlDType::Q5K => Some(BlockFormat::Q5K),
            GgmlDType::Q6K => Some(BlockFormat::Q6K),
            _ => None,
        }
    }

    /// Widens whole blocks. `bytes` must be aligned to 4 bytes, as GGUF guarantees.
    pub fn dequantize(self, bytes: &[u8]) -> Result<Vec<f32>> {
        let elements = bytes.len() / self.type_size() * self.block_size();
        let mut out = vec![0f32; elements];
        out.par_chunks_mut(BLOCKS_PER_TASK * self.block_size())
            .zip(bytes.par_chunks(BLOCKS_PER_TASK * self.type_size()))
            .try_for_each(|(out, bytes)| {
                out.copy_from_slice(&self.dequantize_task(bytes)?);
                Ok::<_, Error>(())
            })?;
        Ok(out)
    }

    fn dequantize_task(self, bytes: &[u8]) -> Result<Vec<f32>> {
        let elements = bytes.len() / self.type_size() * self.block_size();
        let blocks = self.0.from_data(Cow::Borrowed(bytes));
        match blocks.dequantize(elements)? {
            CpuStorage::F32(values) => Ok(values),
            _ => Err(Error::Internal("dequantised blocks are not f32".into())),
        }
    }
}
