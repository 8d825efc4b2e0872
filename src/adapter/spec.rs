//! What an adapter is: the `[adapter]` section of a configuration and the metadata of a saved one.

use half::{bf16, f16};
use serde::{Deserialize, Serialize};

use super::modules::ModuleKind;
use crate::{Error, Result};

/// Family of the adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AdapterKind {
    /// ΔW = U Σ (Σ_i v_i P_i) Vᵀ with v shared between modules.
    #[serde(rename = "tinylora")]
    TinyLora,
    /// ΔW = U Σ R Vᵀ with a free r×r matrix R in every module.
    LoraXs,
    /// ΔW = lora_alpha / r · B A with A and B trained.
    Lora,
    /// Every weight of the model is trained.
    Full,
}

impl AdapterKind {
    /// Name as written in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::TinyLora => "tinylora",
            Self::LoraXs => "lora-xs",
            Self::Lora => "lora",
            Self::Full => "full",
        }
    }
}

/// How modules share their v.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tie {
    /// Consecutive runs of `n_tie` modules in model order, the last one shorter.
    Tiled,
    /// The same runs, but within each kind of module.
    Structured,
    /// One group for the whole model.
    All,
    /// PEFT's rule: as many groups as `weight_tying` leaves, the last one longer.
    Peft,
}

/// Where the fixed random matrices P come from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Projection {
    /// Counter-based normal numbers of standard deviation `projection_std`.
    #[default]
    Philox,
    /// PEFT's: torch's generator seeded with `projection_seed` + the module's number, N(0, 1/r).
    Peft,
}

/// On which side of R the singular values stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sigma {
    /// A = Vᵀ, B = U Σ: the paper's formula.
    Output,
    /// A = Σ Vᵀ, B = U: LoRA-XS code.
    Input,
    /// A = √Σ Vᵀ, B = U √Σ: PEFT.
    Split,
}

/// Number format in which the trained parameters are stored and used by the policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StoredDtype {
    F32,
    Bf16,
    F16,
}

impl StoredDtype {
    /// The nearest number this format can hold (ties to even; beyond its range: infinite).
    pub fn round(self, x: f32) -> f32 {
        match self {
            Self::F32 => x,
            Self::Bf16 => bf16::from_f32(x).to_f32(),
            Self::F16 => f16::from_f32(x).to_f32(),
        }
    }

    /// Bytes of one number.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }
}

/// Everything that decides an adapter apart from the base model and the trained numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdapterSpec {
    /// Family of the adapter.
    #[serde(rename = "type")]
    pub kind: AdapterKind,
    /// Rank of ΔW. The paper uses 2 in all main runs.
    pub r: usize,
    /// Trained numbers in each group (`tinylora`).
    pub u: usize,
    /// Modules that share one group (`tinylora`, `tie` = tiled or structured).
    pub n_tie: usize,
    /// How modules share their numbers.
    pub tie: Tie,
    /// Share of the numbers that tying saves, 0 (every module its own) to 1 (one group), as in PEFT
    /// (`tie` = peft).
    #[serde(skip_serializing_if = "is_zero")]
    pub weight_tying: f64,
    /// On which side of R the singular values stand (PEFT: `split`).
    pub sigma: Sigma,
    /// Where P comes from: `philox`, or `peft` as PEFT draws it (entries N(0, 1/r)).
    #[serde(skip_serializing_if = "is_philox")]
    pub projection: Projection,
    /// Key of everything random in the adapter: P of `tinylora`, the start of `lora` and `lora-xs`.
    pub projection_seed: u64,
    /// Standard deviation of P's entries. The paper states none: 1 is the author's public code,
    /// 1/√r is PEFT.
    pub projection_std: f64,
    /// Multiplies ΔW (`tinylora`, `lora-xs`).
    pub scaling: f64,
    /// Format of the stored parameters. Training keeps an f32 master copy.
    pub dtype: StoredDtype,
    /// `lora` multiplies B A by `lora_alpha / r`. Not given: `r`, which makes that factor 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora_alpha: Option<f64>,
    /// Standard deviation of R at the start (`lora-xs`): 0, or 1e-5 as in the LoRA-XS paper.
    pub init_std: f64,
    /// Adapted maps of every block, by PEFT's names.
    pub target_modules: Vec<ModuleKind>,
}

impl Default for AdapterSpec {
    fn default() -> Self {
        Self {
            kind: AdapterKind::TinyLora,
            r: 2,
            u: 1,
            n_tie: 16,
            tie: Tie::Tiled,
            weight_tying: 0.0,
            sigma: Sigma::Output,
            projection: Projection::Philox,
            projection_seed: 42,
            projection_std: 1.0,
            scaling: 1.0,
            dtype: StoredDtype::F32,
            lora_alpha: None,
            init_std: 0.0,
            target_modules: ModuleKind::ALL.to_vec(),
        }
    }
}

/// Files of adapters that do not use a setting stay readable by programs that do not know it.
fn is_zero(x: &f64) -> bool {
    *x == 0.0
}

fn is_philox(projection: &Projection) -> bool {
    *projection == Projection::Philox
}

/// Larger ranks and groups than any model can use: keeps sizes computed from hostile files small.
const MAX_SIZE: usize = 1 << 16;
/// Most numbers of P in one module.
const MAX_PROJECTION: usize = 1 << 24;

impl AdapterSpec {
    /// Checks every value that can be judged without a model.
    ///
    /// # Errors
    /// `Error::Config` that names the key, its value and what is allowed.
    pub fn validate(&self) -> Result<()> {
        let size = |key: &str, value: usize| {
            if (1..=MAX_SIZE).contains(&value) {
                return Ok(());
            }
            Err(Error::config(format!(
                "adapter.{key} must lie between 1 and {MAX_SIZE} (got {value})"
            )))
        };
        size("r", self.r)?;
        size("u", self.u)?;
        size("n_tie", self.n_tie)?;
        if self.kind == AdapterKind::TinyLora && self.u * self.r * self.r > MAX_PROJECTION {
            return Err(Error::config(format!(
                "adapter.u = {} with adapter.r = {} needs more than {MAX_PROJECTION} numbers of P \
                 in every module: make one of them smaller",
                self.u, self.r
            )));
        }
        let number = |key: &str, value: f64, ok: bool, want: &str| {
            if ok && value.is_finite() {
                return Ok(());
            }
            Err(Error::config(format!(
                "adapter.{key} must be {want} (got {value})"
            )))
        };
        let std = self.projection_std;
        number("projection_std", std, std > 0.0, "a positive number")?;
        number(
            "scaling",
            self.scaling,
            self.scaling != 0.0,
            "a number other than 0",
        )?;
        number(
            "weight_tying",
            self.weight_tying,
            (0.0..=1.0).contains(&self.weight_tying),
            "between 0 and 1",
        )?;
        number(
            "init_std",
            self.init_std,
            self.init_std >= 0.0,
            "0 or a positive number",
        )?;
        if let Some(alpha) = self.lora_alpha {
            number("lora_alpha", alpha, alpha > 0.0, "a positive number")?;
        }
        if self.target_modules.is_empty() {
            return Err(Error::config(
                "adapter.target_modules is empty: name at least one of q_proj, k_proj, v_proj, \
                 o_proj, gate_proj, up_proj, down_proj",
            ));
        }
        for (i, kind) in self.target_modules.iter().enumerate() {
            if self.target_modules[..i].contains(kind) {
                return Err(Error::config(format!(
                    "adapter.target_modules names {kind} twice"
                )));
            }
        }
        self.validate_for_kind()
    }

    /// Refuses settings that the chosen kind would silently ignore.
    fn validate_for_kind(&self) -> Result<()> {
        let ignored = |key: &str, hint: &str| {
            Err(Error::config(format!(
                "adapter.{key} has no effect with adapter.type = \"{}\": {hint}",
                self.kind.name()
            )))
        };
        let kind = self.kind;
        if self.scaling != 1.0 && matches!(kind, AdapterKind::Lora | AdapterKind::Full) {
            return ignored("scaling", "leave it out (lora is scaled by lora_alpha / r)");
        }
        if self.lora_alpha.is_some() && kind != AdapterKind::Lora {
            return ignored(
                "lora_alpha",
                "use scaling, which multiplies the whole update",
            );
        }
        if self.weight_tying != 0.0 && (kind, self.tie) != (AdapterKind::TinyLora, Tie::Peft) {
            return ignored("weight_tying", "it belongs to tinylora with tie = \"peft\"");
        }
        if self.projection == Projection::Peft {
            if kind != AdapterKind::TinyLora {
                return ignored("projection", "it belongs to tinylora");
            }
            if self.projection_std != 1.0 {
                return ignored(
                    "projection_std",
                    "with projection = \"peft\" it is 1/√r, leave it out",
                );
            }
        }
        if self.init_std != 0.0 && kind != AdapterKind::LoraXs {
            return ignored("init_std", "it belongs to lora-xs");
        }
        if kind == AdapterKind::Full && self.target_modules.len() != ModuleKind::ALL.len() {
            return ignored("target_modules", "full training moves every weight");
        }
        Ok(())
    }

    /// The adapted kinds in model order, whatever order the configuration names them in.
    pub fn targets(&self) -> Vec<ModuleKind> {
        let mut targets = self.target_modules.clone();
        targets.sort_unstable();
        targets
    }

    /// The factor `lora_alpha / r` of kind `lora`.
    pub fn lora_factor(&self) -> f64 {
        self.lora_alpha.unwrap_or(self.r as f64) / self.r as f64
    }

    /// Whether the kind needs the singular value decomposition of the base weights.
    pub fn needs_svd(&self) -> bool {
        matches!(self.kind, AdapterKind::TinyLora | AdapterKind::LoraXs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_the_papers_and_survive_toml_and_json() {
        let spec: AdapterSpec = toml::from_str("").unwrap();
        assert_eq!(spec, AdapterSpec::default());
        spec.validate().unwrap();
        let text = "type = \"lora-xs\"\nr = 4\nsigma = \"split\"\ntie = \"structured\"\n\
                    dtype = \"bf16\"\ninit_std = 1e-5\ntarget_modules = [\"v_proj\", \"q_proj\"]";
        let spec: AdapterSpec = toml::from_str(text).unwrap();
        spec.validate().unwrap();
        assert_eq!(spec.targets(), [ModuleKind::Q, ModuleKind::V]);
        let json = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<AdapterSpec>(&json).unwrap(), spec);
    }

    #[test]
    fn bad_values_are_refused_by_name() {
        for (text, expected) in [
            ("r = 0", "adapter.r"),
            ("u = 0", "adapter.u"),
            ("u = 1000000", "adapter.u"),
            ("u = 60000\nr = 60000", "numbers of P"),
            ("n_tie = 0", "adapter.n_tie"),
            ("projection_std = 0.0", "projection_std"),
            ("projection_std = nan", "projection_std"),
            ("scaling = inf", "scaling"),
            ("scaling = 0.0", "scaling"),
            ("type = \"lora-xs\"\ninit_std = -1.0", "init_std"),
            ("type = \"lora\"\nlora_alpha = 0.0", "lora_alpha"),
            ("target_modules = []", "target_modules"),
            ("target_modules = [\"q_proj\", \"q_proj\"]", "q_proj twice"),
            ("tie = \"peft\"\nweight_tying = 1.5", "weight_tying"),
            ("weight_tying = 0.5", "no effect"),
            ("projection = \"peft\"\nprojection_std = 2.0", "1/√r"),
            ("type = \"lora\"\nprojection = \"peft\"", "no effect"),
            ("lora_alpha = 32.0", "no effect"),
            ("init_std = 1.0", "no effect"),
            ("type = \"lora\"\nscaling = 2.0", "no effect"),
            (
                "type = \"full\"\ntarget_modules = [\"q_proj\"]",
                "no effect",
            ),
        ] {
            let spec: AdapterSpec = toml::from_str(text).unwrap();
            let error = spec.validate().unwrap_err();
            assert!(error.to_string().contains(expected), "{text}: {error}");
            assert_eq!(error.exit_code(), 2);
        }
        for text in [
            "rank = 2",
            "type = \"dora\"",
            "target_modules = [\"lm_head\"]",
            "r = -1",
        ] {
            assert!(toml::from_str::<AdapterSpec>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn rounding_to_the_stored_format() {
        let x = 1.0 + 2f32.powi(-8);
        assert_eq!(StoredDtype::F32.round(x), x);
        assert_eq!(StoredDtype::Bf16.round(x), 1.0, "ties go to even");
        assert_eq!(StoredDtype::F16.round(x), x);
        assert_eq!(StoredDtype::F16.round(1e5), f32::INFINITY);
    }
}
