//! The decoder: embedding, blocks and final norm, forward and backward.
//!
//! The backward pass is written by hand, block by block, and makes no gradient of a frozen weight.
//! What the forward pass keeps for it is a choice ([`Keep`]): everything, or only the input of each
//! block, from which the block is computed again on the way back. There need not be a forward pass
//! at all where a rollout recorded these inputs.

use std::rc::Rc;

use candle_core::Tensor;

use super::config::ModelConfig;
use super::decoder_weights::{
    Block, NORM, Placement, Weights, input_norm_name, post_attention_norm_name,
};
use super::flops::Flops;
use super::kv_cache::{KvCache, heads};
use super::layer_inputs::{BatchInputs, Recorder};
use super::receiver::Receiver;
use super::way_back::WayBack;
use crate::adapter::{ModuleId, ModuleKind, RowAdapters, SideProducts};
use crate::ops::attention::{self, Heads, KvLayer};
use crate::ops::causal::CausalTable;
use crate::ops::device::reuse_sizes;
use crate::ops::lanes::Step;
use crate::ops::linear::{self, Matrix};
use crate::ops::rope::{RopeTable, Rotation};
use crate::ops::{Backend, Layout, Span, add, head, rms_norm, rope, swiglu};
use crate::run::signals;
use crate::{Error, Result};

/// A frozen model without its tokenizer.
#[derive(Debug)]
pub struct Decoder {
    pub config: ModelConfig,
    pub weights: Weights,
    pub placement: Placement,
    rope: RopeTable,
    causal: CausalTable,
}

/// What a training forward pass keeps of each block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// Everything that backward needs.
    Activations,
    /// The input alone; backward computes the block again.
    Inputs,
}

/// What [`Decoder::forward_train`] or a rollout leaves for [`Decoder::backward`].
#[derive(Debug)]
pub struct Tape {
    /// Output of the final norm, `[T, h]`.
    pub hidden: Tensor,
    layout: Layout,
    tokens: Vec<u32>,
    rotation: Rotation,
    blocks: Vec<Kept>,
    /// Input of the final norm, `[T, h]`.
    last: Tensor,
}

#[derive(Debug)]
enum Kept {
    Input(Tensor),
    Activations(Box<Activations>),
    /// The input, to be put together from what a rollout recorded.
    Recorded(Rc<BatchInputs>),
}

/// What a block is computed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Want {
    Output,
    OutputAndActivations,
    /// The way back: the last product of the block is left out.
    Activations,
}

/// The intermediate results of one block, `T` rows each.
#[derive(Debug)]
struct Activations {
    x: Tensor,
    normed: Tensor,
    attention: attention::Saved,
    middle: Tensor,
    middle_normed: Tensor,
    gate: Tensor,
    up: Tensor,
    activated: Tensor,
    /// x Aᵀ of each module's side paths, by [`ModuleKind`] index.
    side: Vec<SideProducts>,
}

impl Activations {
    /// The rows of the way back; what side paths keep is left to be computed again.
    fn copy(self, rows: &WayBack) -> Result<Self> {
        let copy = |x: Tensor| rows.copy(x);
        let attention::Saved { q, k, v, out, lse } = self.attention;
        Ok(Self {
            x: copy(self.x)?,
            normed: copy(self.normed)?,
            attention: attention::Saved {
                q: copy(q)?,
                k: copy(k)?,
                v: copy(v)?,
                out: copy(out)?,
                lse: lse.map(copy).transpose()?,
            },
            middle: copy(self.middle)?,
            middle_normed: copy(self.middle_normed)?,
            gate: copy(self.gate)?,
            up: copy(self.up)?,
            activated: copy(self.activated)?,
            side: Vec::new(),
        })
    }
}

/// One pass over a batch: what is the same in every block.
struct Pass<'a> {
    decoder: &'a Decoder,
    weights: &'a Weights,
    adapters: &'a RowAdapters<'a>,
    spans: &'a [Span],
    rotation: &'a Rotation,
    /// A mask that is large enough, on the portable path.
    causal: Option<Tensor>,
    /// Decoding on the portable path.
    step: Option<&'a Step>,
}

impl Decoder {
    pub fn new(config: ModelConfig, weights: Weights, placement: Placement) -> Self {
        let frequencies = config.rope.inverse_frequencies(config.head_dim);
        let rope = RopeTable::new(frequencies.into_iter().map(|f| f as f32).collect());
        Self {
            config,
            weights,
            placement,
            rope,
            causal: CausalTable::default(),
        }
    }

    /// Whether threads better work on different sequences than share products: a model that is small
    /// ([`Flops::is_small`]), on the CPU.
    pub fn is_small(&self) -> bool {
        self.placement.backend == Backend::Cpu && Flops::new(&self.config).is_small()
    }

    /// An empty cache for [`Self::forward`].
    pub fn new_cache(&self) -> KvCache {
        KvCache::new(&self.config, self.placement.backend)
    }

    /// Hidden states `[T, h]` (after the final norm) of new tokens of the sequences in `cache`:
    /// prefill, decoding and scoring are all this function, and give a row the same bits.
    ///
    /// Row `t` of `tokens` belongs to the span that covers it. `recorder` sees the input of every
    /// block and of the final norm.
    pub fn forward(
        &self,
        adapters: &RowAdapters<'_>,
        tokens: &[u32],
        spans: &[Span],
        cache: &mut KvCache,
        mut recorder: Option<&mut Recorder>,
    ) -> Result<Tensor> {
        for span in spans {
            if !cache.fits(span.slot, span.pos, span.len) {
                return Err(Error::Internal(format!(
                    "{} rows at position {} do not fit into slot {} of the cache",
                    span.len, span.pos, span.slot
                )));
            }
        }
        let positions = spans
            .iter()
            .flat_map(|s| (s.pos..s.pos + s.len).map(|p| p as u32))
            .collect();
        let rotation = self.rotation(positions)?;
        let step = cache.step(spans, rotation.index(), |len| self.triangle(len))?;
        let mut pass = self.pass(adapters, spans, &rotation)?;
        pass.step = step.as_ref();
        let mut x = pass.weights.embedding.rows(tokens)?;
        let _sizes = step.is_some().then(|| reuse_sizes(&self.placement.device));
        for (layer, kv) in cache.layers.iter_mut().enumerate() {
            signals::check()?;
            if let Some(recorder) = &mut recorder {
                recorder.add(&x)?;
            }
            x = output(pass.block(layer, x, kv, Want::Output)?.0)?;
        }
        if let Some(recorder) = recorder {
            recorder.add(&x)?;
        }
        self.final_norm(pass.weights, &x)
    }

    /// Hidden states of a whole packed batch, and what [`Self::backward`] needs.
    pub fn forward_train(
        &self,
        adapters: &RowAdapters<'_>,
        tokens: &[u32],
        layout: &Layout,
        keep: Keep,
    ) -> Result<Tape> {
        let rotation = self.rotation(layout.positions())?;
        let spans = layout.spans();
        let pass = self.pass(adapters, &spans, &rotation)?;
        let mut x = pass.weights.embedding.rows(tokens)?;
        let mut blocks = Vec::with_capacity(self.config.num_hidden_layers);
        for layer in 0..self.config.num_hidden_layers {
            signals::check()?;
            let mut kv = self.scratch_kv(layout);
            let want = match keep {
                Keep::Activations => Want::OutputAndActivations,
                Keep::Inputs => Want::Output,
            };
            let (y, kept) = pass.block(layer, x.clone(), &mut kv, want)?;
            blocks.push(match kept {
                Some(activations) => Kept::Activations(Box::new(activations)),
                None => Kept::Input(x),
            });
            x = output(y)?;
        }
        let hidden = self.final_norm(pass.weights, &x)?;
        Ok(Tape {
            hidden,
            layout: layout.clone(),
            tokens: tokens.to_vec(),
            rotation,
            blocks,
            last: x,
        })
    }

    /// [`Self::forward_train`] without a forward pass: the same from what rollouts recorded of the
    /// rows of the batch, at the same parameters.
    pub fn recorded(
        &self,
        adapters: &RowAdapters<'_>,
        tokens: &[u32],
        layout: &Layout,
        inputs: BatchInputs,
    ) -> Result<Tape> {
        if inputs.len() != layout.tokens() {
            return Err(Error::Internal(format!(
                "{} recorded rows for a batch of {}",
                inputs.len(),
                layout.tokens()
            )));
        }
        let layers = self.config.num_hidden_layers;
        let last = inputs.layer(layers)?;
        let inputs = Rc::new(inputs);
        Ok(Tape {
            hidden: self.final_norm(self.weights_for(adapters), &last)?,
            layout: layout.clone(),
            tokens: tokens.to_vec(),
            rotation: self.rotation(layout.positions())?,
            blocks: (0..layers)
                .map(|_| Kept::Recorded(Rc::clone(&inputs)))
                .collect(),
            last,
        })
    }

    /// Adds the gradient of every adapter to its receiver's, given dL/dhidden `[T', h]` on the rows of
    /// the way back. `adapters` are those of the rows there and back. One of type `full` is the only one.
    pub(super) fn backward(
        &self,
        adapters: (&RowAdapters<'_>, &RowAdapters<'_>),
        tape: Tape,
        way_back: &WayBack,
        dhidden: &Tensor,
        receivers: &mut [Receiver<'_>],
    ) -> Result<()> {
        let spans = tape.layout.spans();
        let pass = self.pass(adapters.0, &spans, &tape.rotation)?;
        let layout = &way_back.layout;
        let rotation = match way_back.is_copied() {
            true => self.rotation(layout.positions())?,
            false => tape.rotation.clone(),
        };
        let spans = layout.spans();
        let back = self.pass(adapters.1, &spans, &rotation)?;
        let full = adapters.0.full_weights().is_some();
        let pieces = layout.pieces();
        for Receiver {
            rows, gradients, ..
        } in receivers.iter_mut()
        {
            let own = pieces.iter().filter(|piece| rows.contains(&piece.start));
            let own = own.map(|piece| piece.start - rows.start..piece.end - rows.start);
            gradients.begin_pass(own.collect());
        }
        let (mut g, dnorm) = rms_norm::backward(
            self.placement.backend,
            &way_back.copy(tape.last)?,
            &pass.weights.norm,
            self.config.rms_norm_eps,
            dhidden,
            full,
        )?;
        if let (Some(dnorm), [Receiver { gradients, .. }]) = (dnorm, &mut *receivers) {
            gradients.add_weight(NORM, &dnorm)?;
        }
        let lowest = receivers.iter().map(|r| r.adapter.lowest_layer()).min();
        let lowest = lowest.unwrap_or(0);
        for (layer, kept) in tape.blocks.into_iter().enumerate().rev() {
            if layer < lowest {
                break;
            }
            signals::check()?;
            let kept = match kept {
                Kept::Activations(kept) => *kept,
                Kept::Input(x) => self.activations(&pass, layer, x, &tape.layout)?,
                Kept::Recorded(inputs) => {
                    self.activations(&pass, layer, inputs.layer(layer)?, &tape.layout)?
                }
            };
            let kept = match way_back.is_copied() {
                true => back.with_sides(layer, kept.copy(way_back)?)?,
                false => kept,
            };
            g = back.block_backward(layer, kept, g, layout, receivers)?;
        }
        if let (true, [Receiver { gradients, .. }]) = (full, &mut *receivers) {
            gradients.add_embedding(&tape.tokens, &g)?;
        }
        for Receiver {
            adapter,
            row_sequences,
            gradients,
            ..
        } in receivers
        {
            adapter.end_pass(row_sequences, gradients)?;
        }
        Ok(())
    }

    /// The activations of a block from its input.
    fn activations(
        &self,
        pass: &Pass<'_>,
        layer: usize,
        x: Tensor,
        layout: &Layout,
    ) -> Result<Activations> {
        let mut kv = self.scratch_kv(layout);
        let (_, kept) = pass.block(layer, x, &mut kv, Want::Activations)?;
        kept.ok_or_else(|| Error::Internal("a block kept nothing".into()))
    }

    /// The output head that goes with the adapters of a pass.
    pub fn head<'a>(&'a self, adapters: &RowAdapters<'a>) -> &'a Matrix {
        self.weights_for(adapters).head()
    }

    /// Logits `[N, vocab]` of hidden `[N, h]`, f32 (f64 for f64 models).
    pub fn logits(&self, adapters: &RowAdapters<'_>, hidden: &Tensor) -> Result<Tensor> {
        head::logits(hidden, self.weights_for(adapters).head())
    }

    fn weights_for<'a>(&'a self, adapters: &RowAdapters<'a>) -> &'a Weights {
        adapters.full_weights().unwrap_or(&self.weights)
    }

    fn pass<'a>(
        &'a self,
        adapters: &'a RowAdapters<'a>,
        spans: &'a [Span],
        rotation: &'a Rotation,
    ) -> Result<Pass<'a>> {
        let causal = match self.placement.backend {
            Backend::Cpu => None,
            Backend::Portable => {
                let end = spans.iter().map(|span| span.pos + span.len).max();
                Some(self.triangle(end.unwrap_or(0))?)
            }
        };
        Ok(Pass {
            decoder: self,
            weights: self.weights_for(adapters),
            adapters,
            spans,
            rotation,
            causal,
            step: None,
        })
    }

    fn triangle(&self, len: usize) -> Result<Tensor> {
        let Placement { device, dtype, .. } = &self.placement;
        self.causal.triangle(len, *dtype, device)
    }

    fn rotation(&self, positions: Vec<u32>) -> Result<Rotation> {
        let Placement {
            backend,
            device,
            dtype,
            ..
        } = &self.placement;
        self.rope.rotation(*backend, positions, *dtype, device)
    }

    fn final_norm(&self, weights: &Weights, x: &Tensor) -> Result<Tensor> {
        rms_norm::forward(
            self.placement.backend,
            x,
            &weights.norm,
            self.config.rms_norm_eps,
        )
    }

    /// Keys and values of one layer of a packed batch: slot = segment.
    fn scratch_kv(&self, layout: &Layout) -> KvLayer {
        let mut kv = KvLayer::new(self.placement.backend, self.heads());
        for (slot, segment) in layout.segments.iter().enumerate() {
            let parent = segment.parent.map(|p| (p, layout.segments[p].len));
            kv.alloc(slot, parent, segment.len);
        }
        kv
    }

    fn heads(&self) -> Heads {
        heads(&self.config)
    }
}

impl Pass<'_> {
    /// One block: its output `[T, h]` and its intermediate results, those that are wanted.
    fn block(
        &self,
        layer: usize,
        x: Tensor,
        kv: &mut KvLayer,
        want: Want,
    ) -> Result<(Option<Tensor>, Option<Activations>)> {
        let keep = want != Want::Output;
        let block = &self.weights.blocks[layer];
        let backend = self.decoder.placement.backend;
        let eps = self.decoder.config.rms_norm_eps;
        let heads = self.decoder.heads();
        let rows = x.dim(0)?;
        let paths = |kind: ModuleKind| self.adapters.side(ModuleId::new(layer, kind), rows);
        let mut side = vec![SideProducts::default(); ModuleKind::ALL.len()];
        let mut apply = |kind: ModuleKind, x: &Tensor| -> Result<Tensor> {
            let linear::Output { y, xa } = linear::forward(x, block.linear(kind), &paths(kind))?;
            side[kind.index()] = xa;
            Ok(y)
        };

        let normed = rms_norm::forward(backend, &x, &block.input_norm, eps)?;
        let q = apply(ModuleKind::Q, &normed)?;
        let q = rope::forward(backend, q, self.rotation, heads.query)?;
        let k = apply(ModuleKind::K, &normed)?;
        let k = rope::forward(backend, k, self.rotation, heads.key_value)?;
        let v = apply(ModuleKind::V, &normed)?;
        let (out, lse) = match self.step {
            Some(step) => (kv.decode(step, &q, &k, &v, heads)?, None),
            None => {
                kv.append(self.spans, &k, &v, heads)?;
                attention::forward(&q, self.spans, kv, heads, keep, self.causal.as_ref())?
            }
        };
        let middle = add::forward(backend, apply(ModuleKind::O, &out)?, &x)?;

        let middle_normed = rms_norm::forward(backend, &middle, &block.post_attention_norm, eps)?;
        let gate = apply(ModuleKind::Gate, &middle_normed)?;
        let up = apply(ModuleKind::Up, &middle_normed)?;
        let activated = swiglu::forward(backend, &gate, &up)?;
        let y = match want {
            Want::Activations => None,
            Want::Output | Want::OutputAndActivations => {
                let down = apply(ModuleKind::Down, &activated)?;
                Some(add::forward(backend, down, &middle)?)
            }
        };
        if want == Want::Activations {
            let down = block.linear(ModuleKind::Down);
            side[ModuleKind::Down.index()] =
                linear::side_input(&activated, down, &paths(ModuleKind::Down))?;
        }

        let kept = keep.then(|| Activations {
            x,
            normed,
            attention: attention::Saved { q, k, v, out, lse },
            middle,
            middle_normed,
            gate,
            up,
            activated,
            side,
        });
        Ok((y, kept))
    }

    /// What a block kept, with what its side paths keep: x Aᵀ of every map.
    fn with_sides(&self, layer: usize, mut kept: Activations) -> Result<Activations> {
        let (block, rows) = (&self.weights.blocks[layer], kept.x.dim(0)?);
        let of = |kind: ModuleKind| -> Result<SideProducts> {
            let x = match kind {
                ModuleKind::Q | ModuleKind::K | ModuleKind::V => &kept.normed,
                ModuleKind::O => &kept.attention.out,
                ModuleKind::Gate | ModuleKind::Up => &kept.middle_normed,
                ModuleKind::Down => &kept.activated,
            };
            let paths = self.adapters.side(ModuleId::new(layer, kind), rows);
            linear::side_input(x, block.linear(kind), &paths)
        };
        let side = ModuleKind::ALL.into_iter().map(of);
        kept.side = side.collect::<Result<_>>()?;
        Ok(kept)
    }

    /// dL/dx of a block, given what it kept and g = dL/dy; the adapters' shares go to `receivers`.
    fn block_backward(
        &self,
        layer: usize,
        kept: Activations,
        g: Tensor,
        layout: &Layout,
        receivers: &mut [Receiver<'_>],
    ) -> Result<Tensor> {
        let block = &self.weights.blocks[layer];
        let backend = self.decoder.placement.backend;
        let heads = self.decoder.heads();
        let Activations {
            x,
            normed,
            attention,
            middle,
            middle_normed,
            gate,
            up,
            activated,
            side,
        } = kept;
        let rows = x.dim(0)?;
        let mut back = |kind: ModuleKind, x: &Tensor, g: &Tensor| -> Result<Tensor> {
            let id = ModuleId::new(layer, kind);
            let paths = self.adapters.side(id, rows);
            let (dx, gb) = linear::backward(g, block.linear(kind), &paths)?;
            for receiver in receivers.iter_mut() {
                receiver.accumulate(id, x, g, &side[kind.index()], &gb)?;
            }
            Ok(dx)
        };

        // What is no longer needed is dropped at once: these tensors are the peak of an update.
        let dactivated = back(ModuleKind::Down, &activated, &g)?;
        drop(activated);
        let (dgate, dup) = swiglu::backward(backend, &gate, &up, &dactivated)?;
        drop((gate, up, dactivated));
        let dnormed = {
            let through_gate = back(ModuleKind::Gate, &middle_normed, &dgate)?;
            drop(dgate);
            let through_up = back(ModuleKind::Up, &middle_normed, &dup)?;
            add::forward(backend, through_gate, &through_up)?
        };
        drop((dup, middle_normed));
        let (dmiddle, dpost) = self.norm_backward(block, Norm::Post, &middle, &dnormed)?;
        drop((middle, dnormed));
        let g = add::forward(backend, dmiddle, &g)?;

        let dout = back(ModuleKind::O, &attention.out, &g)?;
        let (dq, dk, dv) = attention::backward(
            backend,
            &attention,
            &dout,
            layout,
            heads,
            self.causal.as_ref(),
        )?;
        drop((attention, dout));
        let dq = rope::backward(backend, dq, self.rotation, heads.query)?;
        let dk = rope::backward(backend, dk, self.rotation, heads.key_value)?;
        let dnormed = {
            let through_q = back(ModuleKind::Q, &normed, &dq)?;
            let through_k = back(ModuleKind::K, &normed, &dk)?;
            let through_v = back(ModuleKind::V, &normed, &dv)?;
            let sum = add::forward(backend, through_q, &through_k)?;
            add::forward(backend, sum, &through_v)?
        };
        drop((dq, dk, dv, normed));
        let (dx, dinput) = self.norm_backward(block, Norm::Input, &x, &dnormed)?;

        if let (Some(dpost), Some(dinput), [Receiver { gradients, .. }]) =
            (dpost, dinput, receivers)
        {
            gradients.add_weight(&post_attention_norm_name(layer), &dpost)?;
            gradients.add_weight(&input_norm_name(layer), &dinput)?;
        }
        add::forward(backend, dx, &g)
    }

    fn norm_backward(
        &self,
        block: &Block,
        norm: Norm,
        x: &Tensor,
        g: &Tensor,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let weight = match norm {
            Norm::Input => &block.input_norm,
            Norm::Post => &block.post_attention_norm,
        };
        let full = self.adapters.full_weights().is_some();
        let Decoder {
            config, placement, ..
        } = self.decoder;
        rms_norm::backward(placement.backend, x, weight, config.rms_norm_eps, g, full)
    }
}

fn output(y: Option<Tensor>) -> Result<Tensor> {
    y.ok_or_else(|| Error::Internal("a block computed no output".into()))
}

/// The two norms of a block.
#[derive(Clone, Copy)]
enum Norm {
    Input,
    Post,
}
