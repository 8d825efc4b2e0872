//! The seven linear maps of a decoder block, and their order in the model.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Which linear map of a block. The order of the variants is the order in the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ModuleKind {
    #[serde(rename = "q_proj")]
    Q,
    #[serde(rename = "k_proj")]
    K,
    #[serde(rename = "v_proj")]
    V,
    #[serde(rename = "o_proj")]
    O,
    #[serde(rename = "gate_proj")]
    Gate,
    #[serde(rename = "up_proj")]
    Up,
    #[serde(rename = "down_proj")]
    Down,
}

impl ModuleKind {
    /// All seven in model order.
    pub const ALL: [Self; 7] = [
        Self::Q,
        Self::K,
        Self::V,
        Self::O,
        Self::Gate,
        Self::Up,
        Self::Down,
    ];

    /// Position in [`ModuleKind::ALL`].
    pub fn index(self) -> usize {
        self as usize
    }

    /// Name as PEFT's `target_modules` has it, for example `q_proj`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q => "q_proj",
            Self::K => "k_proj",
            Self::V => "v_proj",
            Self::O => "o_proj",
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
        }
    }

    /// The part of the block it belongs to, as in Hugging Face names: `self_attn` or `mlp`.
    pub fn block(self) -> &'static str {
        match self {
            Self::Q | Self::K | Self::V | Self::O => "self_attn",
            Self::Gate | Self::Up | Self::Down => "mlp",
        }
    }
}

impl fmt::Display for ModuleKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for ModuleKind {
    type Err = crate::Error;

    fn from_str(name: &str) -> crate::Result<Self> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.name() == name)
            .ok_or_else(|| {
                let known: Vec<_> = Self::ALL.iter().map(|kind| kind.name()).collect();
                crate::Error::config(format!(
                    "unknown module \"{name}\" (expected one of {})",
                    known.join(", ")
                ))
            })
    }
}

/// One linear map of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ModuleId {
    pub layer: usize,
    pub kind: ModuleKind,
}

impl ModuleId {
    pub fn new(layer: usize, kind: ModuleKind) -> Self {
        Self { layer, kind }
    }

    /// Position in model order: layer 0 q, k, v, o, gate, up, down; layer 1 …
    pub fn index(self) -> usize {
        self.layer * ModuleKind::ALL.len() + self.kind.index()
    }

    /// Every linear map of a model with `num_layers` blocks, in model order.
    pub fn all(num_layers: usize) -> impl Iterator<Item = Self> {
        (0..num_layers).flat_map(|layer| {
            ModuleKind::ALL
                .into_iter()
                .map(move |kind| Self { layer, kind })
        })
    }
}

impl fmt::Display for ModuleId {
    /// Hugging Face path without `.weight`, for example `model.layers.3.self_attn.q_proj`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "model.layers.{}.{}.{}",
            self.layer,
            self.kind.block(),
            self.kind.name()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn model_order_and_names() {
        let all: Vec<_> = ModuleId::all(3).collect();
        assert_eq!(all.len(), 21);
        assert!(all.iter().enumerate().all(|(i, id)| id.index() == i));
        assert_eq!(all[0].to_string(), "model.layers.0.self_attn.q_proj");
        assert_eq!(all[20].to_string(), "model.layers.2.mlp.down_proj");
        for kind in ModuleKind::ALL {
            assert_eq!(kind.name().parse::<ModuleKind>().unwrap(), kind);
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.name());
        }
        assert!(
            "lm_head"
                .parse::<ModuleKind>()
                .unwrap_err()
                .to_string()
                .contains("q_proj")
        );
    }
}
