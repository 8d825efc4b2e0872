//! The trained numbers of a run, as its page shows them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::Result;
use crate::adapter::{AdapterKind, AdapterSpec, SavedAdapter, Tying};
use crate::run::{checkpoint, directory};

/// Bytes of an adapter file beyond which its numbers are not looked at.
const MAX_FILE: u64 = 64 << 20;
/// Numbers drawn one by one.
const MAX_BARS: usize = 256;
/// Bars of the histogram of more numbers than that.
const BINS: usize = 61;

/// An adapter as far as the page is concerned.
#[derive(Debug, Clone)]
pub struct TrainedNumbers {
    /// The file it is from, within the run directory.
    pub origin: String,
    pub spec: AdapterSpec,
    pub model: String,
    pub count: usize,
    /// Bytes of the numbers.
    pub bytes: usize,
    pub drawing: Drawing,
    /// Euclidean norm.
    pub norm: f64,
}

/// How the numbers are drawn.
#[derive(Debug, Clone)]
pub enum Drawing {
    /// Each with a label.
    Bars(Vec<(String, f32)>),
    /// Counts of equal intervals between the smallest and the largest.
    Histogram {
        low: f32,
        high: f32,
        counts: Vec<usize>,
    },
}

/// What became of looking for the adapter.
pub enum Found {
    Numbers(Box<TrainedNumbers>),
    /// Why there is nothing to show.
    Nothing(String),
}

/// The adapter of a finished run, else that of its last checkpoint.
pub fn find(run: &Path) -> Found {
    let finished = run.join("adapter.safetensors");
    let last = || checkpoint::last_adapter(&directory::checkpoints(run));
    let path = if finished.is_file() {
        Some(finished)
    } else {
        last()
    };
    let Some(path) = path else {
        return Found::Nothing(
            "adapter.safetensors is missing, and there is no checkpoint with one".to_owned(),
        );
    };
    let size = std::fs::metadata(&path).map_or(0, |m| m.len());
    let origin = within(run, &path);
    if size > MAX_FILE {
        return Found::Nothing(format!(
            "{origin} has {} MB: too many numbers to draw",
            size >> 20
        ));
    }
    match read(&path, origin.clone()) {
        Ok(numbers) => Found::Numbers(Box::new(numbers)),
        Err(error) => {
            // The message names the whole path, which is nobody's business on a page.
            let full = path.display().to_string();
            Found::Nothing(error.to_string().replace(&full, &origin))
        }
    }
}

fn within(run: &Path, path: &Path) -> String {
    let parts: PathBuf = path.strip_prefix(run).unwrap_or(path).to_owned();
    parts.display().to_string()
}

fn read(path: &Path, origin: String) -> Result<TrainedNumbers> {
    let saved = SavedAdapter::load(path)?;
    let count = saved.num_parameters();
    let norm = saved
        .numbers()
        .map(|x| f64::from(x).powi(2))
        .sum::<f64>()
        .sqrt();
    let drawing = match count {
        0..=MAX_BARS => {
            let labels = labels(&saved.spec, saved.base.num_layers, count);
            Drawing::Bars(labels.into_iter().zip(saved.numbers()).collect())
        }
        _ => histogram(&saved),
    };
    Ok(TrainedNumbers {
        origin,
        count,
        bytes: count * saved.spec.dtype.size(),
        drawing,
        norm,
        model: crate::run::environment::public_name(&saved.base.name),
        spec: saved.spec,
    })
}

/// What each number acts on.
fn labels(spec: &AdapterSpec, num_layers: usize, count: usize) -> Vec<String> {
    if spec.kind != AdapterKind::TinyLora {
        return (0..count).map(|i| format!("number {i}")).collect();
    }
    let tying = Tying::new(spec, num_layers);
    let mut members: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (module, group) in tying.groups.iter().enumerate() {
        members.entry(*group).or_default().push(module);
    }
    let label = |i: usize| {
        let (group, part) = (i / spec.u.max(1), i % spec.u.max(1));
        let modules = members.get(&group).map_or(&[][..], Vec::as_slice);
        let name = |module: &usize| {
            let id = &tying.modules[*module];
            format!("{}.{}", id.layer, id.kind.name())
        };
        let span = match modules {
            [] => String::new(),
            [one] => name(one),
            [first, .., last] => format!("{} … {}", name(first), name(last)),
        };
        match spec.u {
            1 => format!("group {group}: {span}"),
            _ => format!("group {group}, number {part}: {span}"),
        }
    };
    (0..count).map(label).collect()
}

fn histogram(saved: &SavedAdapter) -> Drawing {
    let (mut low, mut high) = saved
        .numbers()
        .fold((f32::MAX, f32::MIN), |(l, h), x| (l.min(x), h.max(x)));
    if low >= high {
        (low, high) = (low - 0.5, low + 0.5);
    }
    let mut counts = vec![0; BINS];
    let scale = BINS as f64 / (f64::from(high) - f64::from(low));
    for x in saved.numbers() {
        let bin = ((f64::from(x) - f64::from(low)) * scale) as usize;
        counts[bin.min(BINS - 1)] += 1;
    }
    Drawing::Histogram { low, high, counts }
}
