//! What an adapter takes from a backward pass, which it may share with others.

use std::ops::Range;

use candle_core::Tensor;

use crate::Result;
use crate::adapter::{Adapter, Gradients, LinearGrads, ModuleId, SideProducts};

/// Where the gradient of an adapter goes.
pub(super) struct Receiver<'a> {
    pub adapter: &'a Adapter,
    /// The rows of the pass that have it.
    pub rows: Range<usize>,
    /// Of each of them, as [`Adapter::accumulate`] takes it.
    pub row_sequences: &'a [u32],
    pub gradients: &'a mut Gradients,
}

impl Receiver<'_> {
    /// Takes its share of what one linear map contributes: x and g are those of all rows of the pass.
    pub fn accumulate(
        &mut self,
        id: ModuleId,
        x: &Tensor,
        g: &Tensor,
        xa: &SideProducts,
        gb: &SideProducts,
    ) -> Result<()> {
        let (rows, all) = (&self.rows, 0..x.dim(0)?);
        let own = |t: &Tensor| match *rows == all {
            true => Ok(t.clone()),
            false => t.narrow(0, rows.start, rows.len()),
        };
        let (xa, gb) = (xa.of(rows)?, gb.of(rows)?);
        let grads = LinearGrads {
            x: &own(x)?,
            g: &own(g)?,
            low_rank: xa.as_ref().zip(gb.as_ref()),
        };
        self.adapter
            .accumulate(id, &grads, self.row_sequences, self.gradients)
    }
}
