//! What the fuzz targets share: input as a file, and the promises that every reader keeps.

pub mod seeds;

use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tinylora::Result;
use tinylora::bounded::Allocator;
use tinylora::model::ModelConfig;

/// As in the program.
#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

/// A bound on processor time that only something like exponential work exceeds.
pub const LIMIT: Duration = Duration::from_secs(2);

static PLACE: LazyLock<TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a folder"));

/// Path of a file in this process's own folder.
pub fn path(name: &str) -> PathBuf {
    PLACE.path().join(name)
}

/// Writes the input to a file and reads it: no panic, no hang, and a refusal that says what is wrong
/// with which file (`named`), as the user's or the file's fault.
pub fn read_file<T>(name: &str, data: &[u8], named: &str, read: impl FnOnce(&Path) -> Result<T>) {
    let path = path(name);
    std::fs::write(&path, data).expect("written");
    promises(named, || read(&path));
}

/// As [`read_file`] for what is not in a file.
pub fn promises<T>(named: &str, read: impl FnOnce() -> Result<T>) {
    let start = CpuTime::now();
    if let Err(error) = read() {
        assert!(matches!(error.exit_code(), 2 | 3), "{error}");
        assert!(error.to_string().contains(named), "{error}");
    }
    assert!(start.elapsed() < LIMIT, "{:?}", start.elapsed());
}

/// Processor time of this thread, which goes on only while it runs: a machine that is busy, or a
/// process that is paused, is no finding.
pub struct CpuTime {
    thread: Option<Duration>,
    wall: Instant,
}

impl CpuTime {
    pub fn now() -> Self {
        let thread = std::fs::read_to_string("/proc/thread-self/schedstat").ok();
        let nanoseconds = thread.and_then(|text| text.split(' ').next()?.parse().ok());
        Self {
            thread: nanoseconds.map(Duration::from_nanos),
            wall: Instant::now(),
        }
    }

    /// Time since then, by the clock where the system does not tell.
    pub fn elapsed(&self) -> Duration {
        match (self.thread, Self::now().thread) {
            (Some(then), Some(now)) => now.saturating_sub(then),
            _ => self.wall.elapsed(),
        }
    }
}

/// The embedded checkpoint with one file of it replaced; gives its folder.
pub fn mini_with(name: &str, data: &[u8]) -> PathBuf {
    let folder = path("model");
    if !folder.exists() {
        let mini = tinylora::data::mini::directory().expect("the embedded model");
        std::fs::create_dir(&folder).expect("a folder");
        for entry in std::fs::read_dir(mini).expect("the embedded model") {
            let from = entry.expect("a file").path();
            let to = folder.join(from.file_name().expect("a name"));
            std::fs::copy(from, to).expect("copied");
        }
    }
    std::fs::write(folder.join(name), data).expect("written");
    folder
}

/// `config.json` of a model whose files are small enough to be fuzzed whole; its tokenizer is that of
/// the embedded model.
pub const SMALL_CONFIG: &str = r#"{
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 32,
    "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "vocab_size": 585,
    "tie_word_embeddings": true, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "eos_token_id": 3, "pad_token_id": 0}"#;

/// [`SMALL_CONFIG`], read.
pub fn small_config() -> ModelConfig {
    let json: serde_json::Value = serde_json::from_str(SMALL_CONFIG).expect("JSON");
    let json = json.as_object().expect("an object");
    ModelConfig::from_hf_json(json, None, "config.json").expect("a valid configuration")
}
