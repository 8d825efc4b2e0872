//! What a PEFT LoRA's configuration says: ΔW = lora_alpha / r · B A, or lora_alpha / √r · B A with
//! rank-stabilised scaling, with ranks and alphas by pattern.

use regex::Regex;
use serde_json::{Map, Value};

use super::ModuleId;
use super::config::{self, Keys};
use super::targets::Targets;

#[derive(Debug)]
pub(super) struct LoraConfig {
    pub targets: Targets,
    r: usize,
    alpha: f64,
    rank_stabilised: bool,
    ranks: Vec<(Regex, usize)>,
    alphas: Vec<(Regex, f64)>,
}

/// Starts of A and B that leave the base weights alone; the others are relative to changed ones.
const HARMLESS_STARTS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

impl LoraConfig {
    pub fn parse(keys: &Keys) -> Result<Self, String> {
        keys.refuse(
            &["use_dora", "lora_bias", "use_qalora", "use_bdlora"],
            "it is more than a low-rank update",
        )?;
        keys.refuse(&["bias"], "the adapter would change biases, too")?;
        keys.refuse(
            &[
                "modules_to_save",
                "trainable_token_indices",
                "target_parameters",
            ],
            "the adapter would change more than the seven maps of the blocks",
        )?;
        keys.refuse(
            &[
                "layer_replication",
                "alora_invocation_tokens",
                "arrow_config",
                "kasa_config",
            ],
            "it changes how the model computes",
        )?;
        keys.refuse(
            &["monteclora_config", "megatron_config"],
            "only plain LoRA is read",
        )?;
        let start = keys.value("init_lora_weights");
        let harmless = start.is_null()
            || start.is_boolean()
            || start.as_str().is_some_and(|s| HARMLESS_STARTS.contains(&s));
        if !harmless {
            return Err(format!(
                "init_lora_weights = {start} is not supported: such an adapter belongs to changed \
                 base weights; convert it to a plain LoRA with PEFT"
            ));
        }
        let alpha = positive("lora_alpha", keys.number("lora_alpha", 8.0)?)?;
        Ok(Self {
            targets: keys.targets()?,
            r: keys.size("r", 8)?,
            alpha,
            rank_stabilised: keys.bool("use_rslora", false)?,
            ranks: patterns(keys.map("rank_pattern")?, |v| {
                config::size("rank_pattern", v)
            })?,
            alphas: patterns(keys.map("alpha_pattern")?, |v| {
                positive("alpha_pattern", config::number("alpha_pattern", v)?)
            })?,
        })
    }

    pub fn rank(&self, id: ModuleId) -> usize {
        matching(&self.ranks, id).unwrap_or(self.r)
    }

    pub fn factor(&self, id: ModuleId) -> f64 {
        let (alpha, r) = (matching(&self.alphas, id), self.rank(id) as f64);
        let divisor = if self.rank_stabilised { r.sqrt() } else { r };
        alpha.unwrap_or(self.alpha) / divisor
    }
}

fn positive(key: &str, x: f64) -> Result<f64, String> {
    match x > 0.0 {
        true => Ok(x),
        false => Err(format!("{key} = {x} is not positive")),
    }
}

/// PEFT's patterns are expressions for the end of a module's path, at whole names.
fn patterns<T>(
    map: Map<String, Value>,
    value: impl Fn(&Value) -> Result<T, String>,
) -> Result<Vec<(Regex, T)>, String> {
    map.iter()
        .map(|(pattern, number)| {
            let regex = Regex::new(&format!(r"^(.*\.)?({pattern})$"))
                .map_err(|e| format!("pattern {pattern:?}: {e}"))?;
            Ok((regex, value(number)?))
        })
        .collect()
}

/// The value of the first pattern that fits.
fn matching<T: Copy>(patterns: &[(Regex, T)], id: ModuleId) -> Option<T> {
    let path = id.to_string();
    let mut fitting = patterns.iter().filter(|(regex, _)| regex.is_match(&path));
    fitting.next().map(|(_, value)| *value)
}
