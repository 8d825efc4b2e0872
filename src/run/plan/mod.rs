//! What a run would train, how much memory it takes, and the sizes that make it fit.
//!
//! A plan is an upper bound: every completion as long as it may be, the longest prompts together. It is
//! counted ([`formula`]), not measured, and compared with the peak of the process when a run ends.

mod formula;
mod workload;

use std::fmt;

pub use workload::{Evaluation, WeightBytes, Workload};

use self::formula::Formula;
use super::memory::{self, Limit};
use crate::adapter::{AdapterKind, ModuleKind, Tying};
use crate::config::{Config, Method, Sizes};
use crate::model::{Flops, ModelConfig, expected_tensors};
use crate::{Error, Result};

/// Something that takes memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    pub what: String,
    pub bytes: usize,
    /// Pages of a file, which count as resident but which the system takes back.
    pub reclaimable: bool,
}

impl Part {
    fn new(what: impl Into<String>, bytes: usize) -> Self {
        Self {
            what: what.into(),
            bytes,
            reclaimable: false,
        }
    }

    fn reclaimable(what: impl Into<String>, bytes: usize) -> Self {
        Self {
            reclaimable: true,
            ..Self::new(what, bytes)
        }
    }
}

/// A time of a run, and what it takes besides what is always there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Phase {
    pub name: &'static str,
    pub parts: Vec<Part>,
}

/// The memory of a run.
#[derive(Debug, Clone)]
pub struct Plan {
    pub sizes: Sizes,
    always: Vec<Part>,
    /// A server that the run starts, a process of its own on the same machine.
    server: Vec<Part>,
    phases: Vec<Phase>,
    limit: Option<Limit>,
}

/// Where a run takes place.
#[derive(Debug, Clone)]
pub struct Setting<'a> {
    pub model: &'a ModelConfig,
    pub weights: WeightBytes,
    pub on_cpu: bool,
    pub room: Room,
    /// Runs of this kind that are in lockstep, each with what it keeps and all with one batch.
    pub runs: usize,
}

impl Setting<'_> {
    /// How many times `rollout.max_batch_size` sequences all runs decode at once: a CPU is no faster with
    /// more than that, on a GPU each run has as many.
    pub fn batches(&self) -> usize {
        match self.on_cpu {
            true => 1,
            false => self.runs,
        }
    }
}

/// The memory that there is.
#[derive(Debug, Clone)]
pub struct Room {
    /// Bytes that the process has already, frozen weights apart.
    resident: usize,
    limit: Option<Limit>,
}

impl Room {
    /// As it is now, with `loaded` bytes of frozen weights in memory. On a GPU there is a limit only where
    /// `model.memory_gb` sets one.
    pub fn now(memory_gb: Option<f64>, on_cpu: bool, loaded: usize) -> Self {
        let resident = memory::resident().unwrap_or(0) as usize;
        Self {
            resident: resident.saturating_sub(loaded),
            limit: match on_cpu {
                true => Limit::find(memory_gb),
                false => memory_gb.and_then(|gb| Limit::find(Some(gb))),
            },
        }
    }
}

/// Numbers that training changes.
pub fn trained_parameters(config: &Config, model: &ModelConfig) -> usize {
    let spec = &config.adapter;
    let tying = Tying::new(spec, model.num_hidden_layers);
    match spec.kind {
        AdapterKind::TinyLora => tying.num_groups * spec.u,
        AdapterKind::LoraXs => tying.modules.len() * spec.r * spec.r,
        AdapterKind::Lora => {
            let sizes = tying.modules.iter().map(|id| {
                let (output, input) = shape(model, id.kind);
                spec.r * (output + input)
            });
            sizes.sum()
        }
        AdapterKind::Full => {
            let tensors = expected_tensors(model).into_iter();
            tensors
                .map(|(_, shape)| shape.iter().product::<usize>())
                .sum()
        }
    }
}

/// (out, in) features of a linear map.
fn shape(model: &ModelConfig, kind: ModuleKind) -> (usize, usize) {
    let hidden = model.hidden_size;
    let q = model.num_attention_heads * model.head_dim;
    let kv = model.num_key_value_heads * model.head_dim;
    match kind {
        ModuleKind::Q => (q, hidden),
        ModuleKind::K | ModuleKind::V => (kv, hidden),
        ModuleKind::O => (hidden, q),
        ModuleKind::Gate | ModuleKind::Up => (model.intermediate_size, hidden),
        ModuleKind::Down => (hidden, model.intermediate_size),
    }
}

impl Plan {
    /// The plan with the sizes that are set, and for the others the largest that fit, which on the CPU
    /// changes no bit of a result. On a GPU it does, so that nothing is chosen there.
    ///
    /// # Errors
    /// [`Error::Config`] with the arithmetic when the smallest sizes do not fit.
    pub fn make(config: &Config, workload: &Workload, setting: &Setting<'_>) -> Result<Self> {
        let Setting {
            model,
            weights,
            on_cpu,
            runs,
            ..
        } = *setting;
        let (resident, limit) = (setting.room.resident, &setting.room.limit);
        let formula = Formula {
            config,
            model,
            weights,
            workload,
            trained: trained_parameters(config, model),
            is_small: on_cpu && Flops::new(model).is_small(),
            threads: rayon::current_num_threads(),
            runs,
            batches: setting.batches(),
        };
        let at = |sizes: Sizes| Self::at(&formula, sizes, resident, limit.clone());
        let usual = at(Sizes::of(config));
        if usual.fits() || !on_cpu {
            return usual.checked();
        }
        // What is kept only saves time and goes first; then passes and batches become smaller.
        let mut sizes = usual.sizes;
        let keeps = config.grpo.activation_memory_gb.is_none();
        if keeps {
            sizes.activation_memory = 0;
        }
        let smallest = formula.largest_piece();
        let packs = config.packing_is_free()
            && match config.method {
                Method::Grpo => config.grpo.micro_batch_tokens.is_none(),
                Method::Sft => config.sft.micro_batch_tokens.is_none(),
            };
        let over = |sizes: Sizes, phase: &str| {
            let plan = at(sizes);
            let limit = plan.limit_bytes();
            let phases = plan.phases.iter().filter(|p| p.name == phase);
            phases.map(|p| plan.needed(p)).max() > Some(limit)
        };
        while packs && sizes.pass_tokens > smallest && over(sizes, "updating") {
            sizes.pass_tokens = (sizes.pass_tokens / 2).max(smallest);
        }
        let batches = config.rollout.max_batch_size.is_none();
        let decodes_too_many = |sizes| over(sizes, "sampling") || over(sizes, "evaluating");
        while batches && sizes.max_batch_size > 1 && decodes_too_many(sizes) {
            sizes.max_batch_size /= 2;
        }
        let smallest = at(sizes).checked()?;
        if keeps {
            // What is left is for the inputs of blocks, of whole generation batches at best.
            sizes.activation_memory = ((smallest.limit_bytes() - smallest.peak_needed()) / runs)
                .min(usual.sizes.activation_memory);
            let plan = at(sizes);
            if plan.fits() {
                return Ok(plan);
            }
        }
        Ok(smallest)
    }

    fn at(formula: &Formula<'_>, sizes: Sizes, resident: usize, limit: Option<Limit>) -> Self {
        let mut phases = vec![formula.loading(), formula.decomposing()];
        if formula.config.method == Method::Grpo {
            phases.push(formula.sampling(&sizes));
        }
        phases.push(formula.updating(&sizes));
        phases.extend(formula.evaluating(&sizes));
        Self {
            sizes,
            always: formula.always(resident),
            server: formula.server(),
            phases,
            limit,
        }
    }

    fn limit_bytes(&self) -> usize {
        self.limit.as_ref().map_or(usize::MAX, |l| l.bytes as usize)
    }

    /// Bytes that have to be there during a phase, for this process and the server.
    fn needed(&self, phase: &Phase) -> usize {
        let parts = self.always.iter().chain(&self.server).chain(&phase.parts);
        parts.filter(|p| !p.reclaimable).map(|p| p.bytes).sum()
    }

    /// Bytes of this process that are resident during a phase where memory is plenty.
    fn resident(&self, phase: &Phase) -> usize {
        let parts = self.always.iter().chain(&phase.parts);
        parts.map(|p| p.bytes).sum()
    }

    fn peak_needed(&self) -> usize {
        let needed = self.phases.iter().map(|phase| self.needed(phase));
        needed.max().unwrap_or(0)
    }

    /// Largest resident memory, to be compared with what the system counted.
    pub fn peak(&self) -> usize {
        let resident = self.phases.iter().map(|phase| self.resident(phase));
        resident.max().unwrap_or(0)
    }

    fn fits(&self) -> bool {
        self.peak_needed() <= self.limit_bytes()
    }

    fn checked(self) -> Result<Self> {
        match (&self.limit, self.fits()) {
            (Some(limit), false) => Err(Error::config(self.refusal(limit))),
            _ => Ok(self),
        }
    }

    /// Why a run cannot be, with the arithmetic of its largest phase.
    fn refusal(&self, limit: &Limit) -> String {
        let phase = self.phases.iter().max_by_key(|phase| self.needed(phase));
        let parts = self
            .always
            .iter()
            .chain(&self.server)
            .chain(phase.iter().flat_map(|phase| &phase.parts))
            .filter(|part| !part.reclaimable && part.bytes > 0);
        let sum: Vec<String> = parts
            .map(|part| format!("{} {}", bytes(part.bytes), part.what))
            .collect();
        format!(
            "model.memory_gb: {} takes {} and may take {} ({}): {}; lower \
             grpo.max_completion_length, grpo.num_generations, grpo.micro_batch_tokens or \
             rollout.max_batch_size, take model.dtype = \"bf16\" or a quantised model, or raise \
             model.memory_gb",
            phase.map_or("the run", |phase| phase.name),
            bytes(self.peak_needed()),
            bytes(limit.bytes as usize),
            limit.origin,
            sum.join(" + ")
        )
    }

    /// The plan next to what the process took at most: `memory: 1.2 GB at most, 1.3 GB planned`.
    pub fn compared(&self) -> Option<String> {
        let peak = memory::peak()?;
        Some(format!(
            "memory: {} at most, {} planned",
            bytes(peak as usize),
            bytes(self.peak())
        ))
    }
}

/// Every part with what it takes, for people: one line each.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = |f: &mut fmt::Formatter<'_>, size: usize, what: &str| {
            writeln!(f, "  {:>9}  {what}", bytes(size))
        };
        writeln!(f, "memory, at most:")?;
        let back = |part: &Part| match part.reclaimable {
            true => " (given back when memory is short)",
            false => "",
        };
        for part in &self.always {
            line(f, part.bytes, &format!("{}{}", part.what, back(part)))?;
        }
        if !self.server.is_empty() {
            let size: usize = self.server.iter().map(|part| part.bytes).sum();
            writeln!(f, " llama-server, {} in all:", bytes(size))?;
        }
        for part in &self.server {
            line(f, part.bytes, &part.what)?;
        }
        for phase in &self.phases {
            let size = self.resident(phase);
            writeln!(f, " {}, {} in all:", phase.name, bytes(size))?;
            for part in phase.parts.iter().filter(|part| part.bytes > 0) {
                line(f, part.bytes, &format!("{}{}", part.what, back(part)))?;
            }
        }
        let Sizes {
            pass_tokens,
            max_batch_size,
            activation_memory,
        } = self.sizes;
        writeln!(
            f,
            "sizes: passes of {pass_tokens} tokens, {max_batch_size} sequences at once, {} kept for \
             updates",
            bytes(activation_memory)
        )?;
        match &self.limit {
            Some(limit) => writeln!(
                f,
                "needed: {} of {} ({})",
                bytes(self.peak_needed()),
                bytes(limit.bytes as usize),
                limit.origin
            ),
            None => writeln!(f, "needed: {}", bytes(self.peak_needed())),
        }
    }
}

/// `1.5 GB`, `26 bytes`.
pub fn bytes(count: usize) -> String {
    let scaled = |unit: f64, name: &str| format!("{:.1} {name}", count as f64 / unit);
    match count {
        0..1_000 => format!("{count} bytes"),
        1_000..1_000_000 => scaled(1e3, "kB"),
        1_000_000..1_000_000_000 => scaled(1e6, "MB"),
        _ => scaled(1e9, "GB"),
    }
}

#[cfg(test)]
mod tests;
