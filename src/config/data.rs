//! The `[data]` section: which problems to train on and how they are shown to the model.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::check;
use crate::Result;
use crate::model::Date;

/// The training problems and the prompt they are put into.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// A benchmark's name (`gsm8k`, `math`, `svamp`, …) or a `.jsonl`, `.json` or `.parquet` file.
    pub train: String,
    /// Split of a benchmark; a file has none.
    pub split: String,
    /// Which column holds what. Unset entries take the usual names.
    pub fields: FieldMapping,
    /// Only the first so many problems.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
    /// Only problems of these difficulty levels (MATH has 1 to 5); empty takes all.
    pub levels: Vec<u8>,
    /// Prompt template: `auto` (the benchmark's own), `gsm8k`, `qwen-boxed`, `plain`, or a text
    /// with `{problem}` in it.
    pub prompt: String,
    /// The day that a chat template names as today's (`2026-01-31`), where it names one; unset takes the
    /// day on which the run begins.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub today: Option<Date>,
    /// Problems whose prompt has more tokens than this are left out.
    pub max_prompt_length: usize,
    /// What to do with a row that cannot be used.
    pub on_bad_row: OnBadRow,
    /// Folder with `<name>/<split>.jsonl` files, looked into before the hub.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_dir: Option<PathBuf>,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            train: "gsm8k".to_string(),
            split: "train".to_string(),
            fields: FieldMapping::default(),
            limit: None,
            levels: Vec::new(),
            prompt: "auto".to_string(),
            today: None,
            max_prompt_length: 1024,
            on_bad_row: OnBadRow::Error,
            data_dir: None,
        }
    }
}

impl DataConfig {
    /// Checks values that the types do not rule out. Whether `train` exists is seen on loading.
    pub fn validate(&self) -> Result<()> {
        check(
            !self.train.trim().is_empty(),
            "data.train",
            &self.train,
            || "name a benchmark or a .jsonl, .json or .parquet file".to_string(),
        )?;
        check(
            !self.split.trim().is_empty() && !self.split.contains(['/', '\\']),
            "data.split",
            &self.split,
            || "name a split such as \"train\" or \"test\"".to_string(),
        )?;
        check(self.limit != Some(0), "data.limit", 0, || {
            "take at least 1 problem, or leave it out".to_string()
        })?;
        check(
            self.max_prompt_length > 0,
            "data.max_prompt_length",
            self.max_prompt_length,
            || "allow at least 1 token".to_string(),
        )
    }
}

/// Names of the columns in the user's file; a dot reaches into nested values
/// (`reward_model.ground_truth`, `prompt.0.content`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FieldMapping {
    /// The question.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// The reference answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub answer: Option<String>,
    /// The worked solution, which SFT learns from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub solution: Option<String>,
    /// What identifies a problem in logs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Difficulty, for `levels`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub level: Option<String>,
}

/// What to do with a row that is not valid: bad JSON, bad UTF-8, a missing field, too long.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnBadRow {
    /// Stop at the first one, naming file and line.
    #[default]
    Error,
    /// Leave it out and report it.
    Skip,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_section_reads_and_refuses() {
        let config: DataConfig = toml::from_str(
            "train = \"mine.jsonl\"\non_bad_row = \"skip\"\nlevels = [3, 4]\n[fields]\nproblem = \"q\"",
        )
        .unwrap();
        assert_eq!(config.fields.problem.as_deref(), Some("q"));
        assert_eq!(config.on_bad_row, OnBadRow::Skip);
        config.validate().unwrap();
        let again: DataConfig = toml::from_str(&toml::to_string(&config).unwrap()).unwrap();
        assert_eq!(again, config);
        assert!(toml::from_str::<DataConfig>("trian = \"x\"").is_err());
        assert!(toml::from_str::<DataConfig>("[fields]\nquestion = \"x\"").is_err());
        for bad in [
            "train = \" \"",
            "split = \"../x\"",
            "limit = 0",
            "max_prompt_length = 0",
        ] {
            let config: DataConfig = toml::from_str(bad).unwrap();
            let error = config.validate().unwrap_err();
            assert_eq!(error.exit_code(), 2, "{bad}");
        }
    }
}
