//! `[model]`: which checkpoint, in which number format, on which device.

use std::fmt;
use std::str::FromStr;

use clap::ValueEnum;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::check;
use crate::model::Dtype;
use crate::{Error, Result};

/// Number format of the frozen weights in memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum WeightDtype {
    /// As they are on disk.
    #[default]
    Auto,
    F32,
    Bf16,
    F16,
}

impl WeightDtype {
    /// `None` keeps the file's.
    pub fn to_dtype(self) -> Option<Dtype> {
        match self {
            Self::Auto => None,
            Self::F32 => Some(Dtype::F32),
            Self::Bf16 => Some(Dtype::Bf16),
            Self::F16 => Some(Dtype::F16),
        }
    }

    /// Name as written in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }
}

/// The `[model]` section.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelSection {
    /// Hugging Face directory, `.gguf` file or hub id (`Qwen/Qwen2.5-7B-Instruct`).
    pub path: String,
    /// Number format of the frozen weights in memory; `auto` keeps that of the file, also of the quantised blocks
    /// Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K of a GGUF file, whose numbers are those of `f32`.
    pub dtype: WeightDtype,
    /// Leave bf16 and f16 weights in their file instead of copying them into memory: a model starts at once and
    /// shares its pages with other processes, but decodes up to half as fast. On the CPU; the same bits.
    pub mmap: bool,
    /// `cpu`, `cuda`, `cuda:1`, `metal`; `auto` takes the GPU that this build supports if its driver is
    /// there, else the CPU. `cuda` and `auto` take a GPU for each process on a machine (under mpirun).
    pub device: DeviceSpec,
    /// Start from random weights when `path` is a directory that has none.
    pub random_init: bool,
    /// Memory that a training may take, in GB. Sizes that are not set are chosen to fit, and what
    /// cannot fit is refused. Unset: four fifths of what is free when it starts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_gb: Option<f64>,
}

impl ModelSection {
    /// Checks every value; the message names the key.
    pub fn validate(&self) -> Result<()> {
        check(!self.path.trim().is_empty(), "model.path", "\"\"", || {
            "name a Hugging Face directory, a .gguf file or a hub id".into()
        })?;
        let memory = self.memory_gb.unwrap_or(1.0);
        check(
            memory > 0.0 && memory.is_finite(),
            "model.memory_gb",
            memory,
            || "must be above 0".into(),
        )
    }
}

/// Where tensors live.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DeviceSpec {
    /// The GPU this build supports if its driver is there, else the CPU.
    #[default]
    Auto,
    Cpu,
    /// CUDA device by number; without one, that of this process among those on its machine.
    Cuda(Option<usize>),
    Metal,
}

impl DeviceSpec {
    /// Opens the device.
    ///
    /// # Errors
    /// [`Error::Config`] when this build or this machine does not have it.
    pub fn open(self) -> Result<candle_core::Device> {
        use crate::{ops::device, ranks};
        use candle_core::{Device, utils};
        let metal =
            || Device::new_metal(0).map_err(|e| Error::config(format!("cannot open metal: {e}")));
        match self {
            Self::Auto if utils::cuda_is_available() => match device::cuda_driver() {
                Ok(()) => device::open_cuda(ranks::local_gpu()),
                Err(why) => {
                    tracing::warn!("{why}: going on with the CPU");
                    Ok(Device::Cpu)
                }
            },
            Self::Auto if utils::metal_is_available() => metal(),
            Self::Auto | Self::Cpu => Ok(Device::Cpu),
            Self::Cuda(n) if utils::cuda_is_available() => {
                device::open_cuda(n.unwrap_or_else(ranks::local_gpu))
            }
            Self::Metal if utils::metal_is_available() => metal(),
            Self::Cuda(_) => Err(Error::config(format!(
                "device {self}: this binary was built without CUDA; use --device cpu or another build"
            ))),
            Self::Metal => Err(Error::config(
                "device metal: this binary was built without Metal; use --device cpu or another build",
            )),
        }
    }
}

impl FromStr for DeviceSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(None)),
            "metal" => Ok(Self::Metal),
            _ => text
                .strip_prefix("cuda:")
                .and_then(|n| n.parse().ok())
                .map(|n| Self::Cuda(Some(n)))
                .ok_or_else(|| format!("expected auto, cpu, cuda, cuda:N or metal, got {text:?}")),
        }
    }
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(None) => f.write_str("cuda"),
            Self::Cuda(Some(n)) => write!(f, "cuda:{n}"),
            Self::Metal => f.write_str("metal"),
        }
    }
}

impl Serialize for DeviceSpec {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for DeviceSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}
