//! `environment.json`: what a run was computed with. Nothing in it names a person or a machine.

use std::path::Path;

use candle_core::utils::{cuda_is_available, metal_is_available};
use candle_core::{Device, DeviceLocation};
use serde::Serialize;

use super::directory::RunDirectory;
use super::fs;
use crate::model::Model;
use crate::ops::cpu::Isa;
use crate::{Error, Result};

/// The file's name in a run directory.
pub const FILE: &str = "environment.json";

/// What a run was computed with.
#[derive(Debug, Clone, Serialize)]
pub struct Environment {
    /// Version of this program.
    pub tinylora: &'static str,
    /// `debug` or `release`.
    pub build: &'static str,
    pub os: &'static str,
    pub arch: &'static str,
    /// What the processor calls itself, where the system tells.
    pub cpu: Option<String>,
    pub threads: usize,
    /// Instruction set of the CPU kernels.
    pub kernels: String,
    /// GPU support in this build.
    pub gpu_support: &'static str,
    pub device: String,
    pub model: ModelIdentity,
}

/// Which weights were trained on.
#[derive(Debug, Clone, Serialize)]
pub struct ModelIdentity {
    pub name: String,
    /// SHA-256 over the checkpoint's weights.
    pub hash: String,
}

impl Environment {
    /// This process with a model on a device.
    pub fn of(model: &Model, device: &Device) -> Self {
        let device = match device.location() {
            DeviceLocation::Cpu => "cpu".to_owned(),
            DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
            DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
        };
        Self {
            tinylora: env!("CARGO_PKG_VERSION"),
            build: profile(),
            os: std::env::consts::OS,
            arch: std::env::consts::ARCH,
            cpu: processor(),
            threads: rayon::current_num_threads(),
            kernels: kernels(Isa::detected()),
            gpu_support: gpu_support(),
            device,
            model: ModelIdentity {
                name: public_name(&model.name),
                hash: model.hash.clone(),
            },
        }
    }

    /// Writes the file at the start of a run; a resumed run keeps that of its start.
    pub fn record(&self, directory: &RunDirectory) -> Result<()> {
        let path = directory.path().join(FILE);
        if path.exists() {
            return Ok(());
        }
        let text = serde_json::to_string_pretty(self)
            .map_err(|e| Error::Internal(format!("cannot write the environment: {e}")))?;
        fs::write_atomic(&path, format!("{text}\n").as_bytes())
    }
}

/// How this program was built: `debug` or `release`.
pub fn profile() -> &'static str {
    match cfg!(debug_assertions) {
        true => "debug",
        false => "release",
    }
}

/// Lower-case name of an instruction set.
pub fn kernels(isa: Isa) -> String {
    format!("{isa:?}").to_lowercase()
}

/// GPU support in this build.
pub fn gpu_support() -> &'static str {
    match (cuda_is_available(), metal_is_available()) {
        (true, _) => "cuda",
        (_, true) => "metal",
        _ => "none (CPU only)",
    }
}

/// What the processor calls itself.
pub fn processor() -> Option<String> {
    file_field("/proc/cpuinfo", "model name")
}

/// Value of the first `name : value` line of a file of the /proc kind.
pub fn file_field(path: impl AsRef<Path>, name: &str) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim().to_string())
    })
}

/// A model's name without the folders it lies in, whose names may be a person's. A hub id
/// (`owner/name`) is not a path and stays whole.
pub fn public_name(name: &str) -> String {
    let path = Path::new(name);
    let is_path = path.is_absolute() || path.components().count() > 2 || path.exists();
    match path.file_name() {
        Some(last) if is_path => last.to_string_lossy().into_owned(),
        _ => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_proc_files_are_found() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("meminfo");
        std::fs::write(&path, "MemTotal:  12 kB\nMemFree: 3 kB\n").expect("written");
        assert_eq!(file_field(&path, "MemFree").as_deref(), Some("3 kB"));
        assert_eq!(file_field(&path, "Mem"), None);
    }

    #[test]
    fn names_of_models_lose_their_folders_and_hub_ids_stay() {
        assert_eq!(public_name("/home/someone/models/small"), "small");
        assert_eq!(public_name("models/of/mine.gguf"), "mine.gguf");
        assert_eq!(
            public_name("Qwen/Qwen2.5-7B-Instruct"),
            "Qwen/Qwen2.5-7B-Instruct"
        );
        assert_eq!(public_name("mini"), "mini");
    }
}
