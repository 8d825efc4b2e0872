//! CPU kernels on plain slices: fused, threaded with rayon, AVX-512 or AVX2 chosen at run time.
//!
//! A result's bits depend on its own inputs only: not on how many rows are computed at once, nor
//! on tiles, threads or the instruction set. Sums run in a fixed order (see `gemm.rs`), reductions
//! over a row go through sixteen lanes by absolute index and one fixed tree, and `exp` is one
//! polynomial everywhere.

#![expect(
    clippy::needless_range_loop,
    reason = "tiles of constant size are read best as loops over their rows and columns"
)]
#![warn(clippy::undocumented_unsafe_blocks)]

mod add;
mod attention;
mod attention_backward;
mod block_formats;
mod blocks;
mod buffer;
mod eigen;
mod gemm;
mod grouped;
mod isa;
mod kv;
mod low_rank;
mod mapped;
mod pack;
mod panels;
mod par;
mod rms_norm;
mod rope;
mod scores;
mod simd;
mod swiglu;
mod team;
#[cfg(test)]
mod testing;
mod tile;
mod vectors;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use add::add_assign;
pub use attention::attention_forward;
pub use attention_backward::attention_backward;
pub use blocks::BlockFormat;
pub use eigen::symmetric_eigen;
pub use gemm::weight_gradient;
pub use isa::Isa;
pub use kv::KvStore;
pub use low_rank::{low_rank_down, low_rank_up};
pub use mapped::{MappedRows, Stored};
pub use pack::{PackedMatrix, Weight};
pub use par::{alone, is_alone, map, map_rows, piece};
pub use rms_norm::{rms_norm, rms_norm_backward};
pub use rope::{rope, rope_backward};
pub use scores::{TokenScores, draw_token, logits_gradient, token_scores};
pub use swiglu::{swiglu, swiglu_backward};
pub use team::team;
pub use vectors::{dot, subtract};
