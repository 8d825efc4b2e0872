//! What a memory plan is made from: the model's shape, its weights' bytes, and the longest work.

use crate::Result;
use crate::config::ModelSection;
use crate::model::{Dtype, Model, ModelConfig, RawWeights, Weight, expected_tensors};

/// Outputs that a matrix in panels is filled up to a multiple of.
const PANEL: usize = 16;

/// Bytes of the frozen weights, in memory and on the way there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WeightBytes {
    /// Held in memory while the program runs.
    pub held: usize,
    /// How they are held, for people: `f32`.
    pub format: &'static str,
    /// In files that stay mapped, which the system reads again when it has taken pages back.
    pub in_files: usize,
    /// All of the checkpoint as it is stored.
    pub stored: usize,
    /// Of the tensors that are read at one time, as they are in their files.
    pub mapped: usize,
    /// Largest copies that exist while one tensor, or one on each thread, is brought into form.
    pub in_flight: usize,
}

impl WeightBytes {
    /// Of a checkpoint that is not loaded yet, on the CPU.
    ///
    /// # Errors
    /// A file that ends before its tensors do.
    pub fn of_checkpoint(
        raw: &RawWeights,
        config: &ModelConfig,
        section: &ModelSection,
    ) -> Result<Self> {
        let wanted = section.dtype.to_dtype();
        let dtype = wanted.or(config.dtype).unwrap_or(Dtype::F32);
        let size = bytes_of(dtype);
        let mut bytes = Self {
            format: name_of(dtype),
            stored: raw.stored_bytes(),
            ..Self::default()
        };
        let threads = rayon::current_num_threads();
        let stored = expected_tensors(config).into_iter();
        let stored = stored.filter_map(|(name, _)| Some(raw.info(&name)?.stored_bytes));
        // Pages are given back tensor by tensor.
        bytes.mapped = threads * stored.max().unwrap_or(0);
        for (name, shape) in expected_tensors(config) {
            let [out, input] = shape[..] else {
                bytes.held += shape.iter().product::<usize>() * size_of::<f32>();
                continue;
            };
            let stored = raw.info(&name);
            let in_file = stored.as_ref().map_or(0, |info| info.stored_bytes);
            if wanted.is_none() && raw.has_blocks(&name) {
                bytes.format = "blocks of the file";
                bytes.held += in_file / out * out.next_multiple_of(PANEL);
                continue;
            }
            let fits = stored.as_ref().is_some_and(|info| info.dtype == dtype);
            if section.mmap && fits && raw.mapped(&name)?.is_some() {
                bytes.in_files += in_file;
                continue;
            }
            bytes.held += out.next_multiple_of(PANEL) * input * size;
            // What is stored otherwise than it is held exists in f32, and once more in 16 bits.
            if !fits || in_file != out * input * size {
                let copies = size_of::<f32>() + if size < 4 { size } else { 0 };
                // Matrices of blocks are loaded side by side, the embedding and the head alone.
                let side_by_side = if name.contains(".layers.") {
                    threads
                } else {
                    1
                };
                bytes.in_flight = bytes.in_flight.max(out * input * copies * side_by_side);
            }
        }
        Ok(bytes)
    }

    /// Of a model in memory.
    pub fn of_model(model: &Model) -> Result<Self> {
        let mut held = 0;
        for (_, weight) in model.decoder.weights.named() {
            held += match weight {
                Weight::Matrix(matrix) => matrix.bytes()?,
                Weight::Vector(vector) => vector.elem_count() * vector.dtype().size_in_bytes(),
            };
        }
        Ok(Self {
            held,
            format: model.decoder.placement.dtype.as_str(),
            ..Self::default()
        })
    }
}

fn bytes_of(dtype: Dtype) -> usize {
    match dtype {
        Dtype::F32 => 4,
        Dtype::F16 | Dtype::Bf16 => 2,
    }
}

fn name_of(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "f32",
        Dtype::F16 => "f16",
        Dtype::Bf16 => "bf16",
    }
}

/// The longest work that a run may have, in tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Workload {
    /// Tokens of the prompts (GRPO) or whole examples (SFT), longest first.
    pub lengths: Vec<usize>,
    /// Tokens that all prompts begin with, which are computed once.
    pub shared: usize,
    /// The longest prompt of the evaluation and the most tokens of its completions, if there is one.
    pub evaluation: Option<Evaluation>,
}

/// An evaluation's longest prompt and completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Evaluation {
    pub prompt: usize,
    /// Tokens that all prompts begin with.
    pub shared: usize,
    pub completion: usize,
    pub completions: usize,
}

impl Evaluation {
    /// The larger of both in every respect.
    pub fn larger(self, other: Self) -> Self {
        Self {
            prompt: self.prompt.max(other.prompt),
            shared: self.shared.min(other.shared),
            completion: self.completion.max(other.completion),
            completions: self.completions.max(other.completions),
        }
    }
}

impl Workload {
    /// Tokens of the longest prompt or example.
    pub fn longest(&self) -> usize {
        self.lengths.first().copied().unwrap_or(0)
    }

    /// Tokens that all of several prompts begin with, short of the whole of any.
    pub fn common<'a>(prompts: impl IntoIterator<Item = &'a [u32]>) -> usize {
        let mut prompts = prompts.into_iter();
        let Some(first) = prompts.next() else {
            return 0;
        };
        let same = |other: &[u32]| first.iter().zip(other).take_while(|(a, b)| a == b).count();
        prompts
            .map(|other| same(other).min(other.len() - 1))
            .min()
            .unwrap_or(0)
            .min(first.len() - 1)
    }

    /// Tokens of the `count` longest.
    pub fn longest_sum(&self, count: usize) -> usize {
        self.lengths.iter().take(count).sum()
    }
}
