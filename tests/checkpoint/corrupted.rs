//! Thousands of damaged files of every format that is read: each is used or refused with a message
//! that names it, without a panic, quickly, and without more memory than the file is worth.

use std::alloc::{GlobalAlloc, Layout};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use safetensors::Dtype as StDtype;
use serde_json::json;
use tempfile::TempDir;
use tinylora::adapter::{Adapter, AdapterSource, AdapterSpec, SavedAdapter, SvdCache};
use tinylora::bounded::Allocator;
use tinylora::config::{Config, Source};
use tinylora::data::{self, dataset::ReadOptions};
use tinylora::eval::CompletionLog;
use tinylora::model::{Arch, ChatMessage, LoadOptions, Model};
use tinylora::run::checkpoint::{self, Checkpoint, Store};
use tinylora::sweep::file::SweepFile;
use tinylora::{Result, export, report};

use crate::gguf;
use crate::support::HfDir;

/// Damaged files of each format.
const CASES: u64 = 150;
/// Processor time of one case in an unoptimised build.
const TIME: Duration = Duration::from_secs(1);
const MEMORY: usize = 200 << 20;

/// Counts what this thread holds, and the most it has held.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static MOST: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    // A thread that ends may free after its thread locals are gone.
    let _ = HELD.try_with(|held| {
        held.set(held.get() + bytes);
        let _ = MOST.try_with(|most| most.set(most.get().max(held.get())));
    });
}

// SAFETY: every call goes to the program's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promise is that of `Allocator`.
        unsafe { Allocator.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promise is that of `Allocator`.
        unsafe { Allocator.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promise is that of `Allocator`.
        unsafe { Allocator.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Processor time of this thread, which does not depend on what else the machine does.
fn cpu_time(began: Instant) -> Duration {
    let schedule = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanoseconds = schedule.split(' ').next().and_then(|n| n.parse().ok());
    nanoseconds.map_or_else(|| began.elapsed(), Duration::from_nanos)
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    /// A place in a file; its first part, where headers are, half of the time.
    fn place(&mut self, bytes: &[u8]) -> usize {
        let end = match self.below(2) {
            0 => bytes.len().min(256),
            _ => bytes.len(),
        };
        self.below(end)
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}

const NUMBERS: &[&str] = &[
    "-1",
    "0",
    "1e999",
    "-0.0",
    "NaN",
    "null",
    "4294967295",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "340282366920938463463374607431768211456",
    "\"\"",
    "[]",
    "{}",
    "[[[[1]]]]",
    "true",
];

/// One damaged copy.
fn damage(good: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = good.to_vec();
    match random.below(10) {
        0 => {
            for _ in 0..=random.below(8) {
                let at = random.place(&bytes);
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << random.below(8);
                }
            }
        }
        1 => bytes.truncate(random.place(good)),
        2 => {
            // Lengths and counts that nothing could hold, or that are only a little wrong.
            let huge = [
                u64::MAX,
                u64::MAX / 2,
                1 << 40,
                1 << 31,
                u64::from(u32::MAX),
                good.len() as u64 + 1,
                0,
            ];
            let value = random.pick(&huge).to_le_bytes();
            let width = *random.pick(&[4usize, 8]);
            let at = random.place(&bytes);
            let end = bytes.len().min(at + width);
            bytes[at..end].copy_from_slice(&value[..end - at]);
        }
        3 => {
            let len = random.below(300);
            bytes = (0..len).map(|_| random.next() as u8).collect();
        }
        4 => {
            // A random header before the good data.
            let len = random.below(64).min(bytes.len());
            bytes[..len].fill_with(|| random.next() as u8);
        }
        5 => {
            let depth = 10usize.pow(1 + random.below(5) as u32);
            let opening = *random.pick(&["[", "{\"a\":", "(", "{{", "{% if 1 %}", "a = [", "[a."]);
            let at = random.place(&bytes);
            bytes.splice(at..at, opening.repeat(depth).into_bytes());
        }
        6 => {
            // A number, or any other value, of the text becomes another.
            let starts: Vec<usize> = (1..bytes.len())
                .filter(|&i| bytes[i].is_ascii_digit() && !bytes[i - 1].is_ascii_alphanumeric())
                .collect();
            if !starts.is_empty() {
                let start = *random.pick(&starts);
                let rest = &bytes[start..];
                let len = rest.iter().take_while(|b| b.is_ascii_digit()).count();
                let value = random.pick(NUMBERS).bytes();
                bytes.splice(start..start + len, value);
            }
        }
        7 => {
            let (from, len) = (random.place(&bytes), random.below(200));
            let piece = bytes[from..bytes.len().min(from + len)].to_vec();
            let at = random.place(&bytes);
            bytes.splice(at..at, piece);
        }
        8 => {
            let (from, len) = (random.place(&bytes), random.below(40));
            let end = bytes.len().min(from + len);
            bytes.drain(from..end);
        }
        _ => {
            let at = random.place(&bytes);
            let end = bytes.len().min(at + random.below(64));
            let value = *random.pick(&[0x00, 0xff, b'"', b'{', b' ', 0x80]);
            bytes[at..end].fill(value);
        }
    }
    bytes
}

/// A file that is damaged again and again, and what reads it.
struct Format<'a> {
    /// A message must contain one of these: the file, or what in it is wrong where it follows from
    /// several files.
    names: &'a [&'a str],
    path: PathBuf,
    read: &'a dyn Fn() -> Result<()>,
}

#[derive(Default)]
struct Figures {
    cases: usize,
    used: usize,
    slowest: Duration,
    most: usize,
    wrong: Vec<String>,
}

impl Figures {
    fn try_all(&mut self, format: &Format<'_>, seed: u64) {
        let Format { names, path, read } = format;
        let name = path.display();
        let good = std::fs::read(path).unwrap();
        (read)().unwrap_or_else(|e| panic!("{name} as it was made: {e}"));
        let mut random = Random(seed);
        for case in 0..CASES {
            let bytes = damage(&good, &mut random);
            std::fs::write(path, &bytes).unwrap();
            self.one(names, &format!("{name} case {case}"), &bytes, read);
        }
        std::fs::write(path, &good).unwrap();
    }

    fn one(&mut self, names: &[&str], what: &str, bytes: &[u8], read: &dyn Fn() -> Result<()>) {
        let began = Instant::now();
        let (time, held) = (cpu_time(began), HELD.get());
        MOST.set(held);
        let result = catch_unwind(AssertUnwindSafe(read));
        let memory = (MOST.get() - held).max(0) as usize;
        let time = cpu_time(began).saturating_sub(time);
        self.cases += 1;
        self.slowest = self.slowest.max(time);
        self.most = self.most.max(memory);
        let mut wrong = |cause: String| self.wrong.push(format!("{what}: {cause}"));
        match result {
            Ok(Ok(())) => self.used += 1,
            Ok(Err(error)) if !matches!(error.exit_code(), 2 | 3) => {
                wrong(format!("exit code {}: {error}", error.exit_code()));
            }
            Ok(Err(error)) if !names.iter().any(|name| error.to_string().contains(name)) => {
                wrong(format!("not named: {error}"));
            }
            Ok(Err(_)) => {}
            Err(_) => wrong("panicked".to_owned()),
        }
        if time > TIME {
            wrong(format!("{time:?}"));
        }
        if memory > MEMORY.max(2 * bytes.len()) {
            wrong(format!("{memory} bytes of memory"));
        }
    }
}

fn tiny_model(dir: &Path) -> Model {
    Model::load(&dir.display().to_string(), &LoadOptions::default()).unwrap()
}

fn use_model(path: &Path) -> Result<()> {
    let model = Model::load(&path.display().to_string(), &LoadOptions::default())?;
    model.tokenizer.encode("12 there <x>", true)?;
    if model.tokenizer.has_chat_template() {
        let message = ChatMessage::new("user", "12");
        model.tokenizer.apply_chat_template(&[message], true)?;
    }
    Ok(())
}

fn adapter(model: &Model) -> Adapter {
    let spec = AdapterSpec {
        n_tie: 3,
        ..AdapterSpec::default()
    };
    let cache = SvdCache::disabled();
    Adapter::new(&spec, model.base(), &model.decoder, &cache, &|_, _| ()).unwrap()
}

fn put_on(name: &Path, model: &Model) -> Result<()> {
    let cache = SvdCache::disabled();
    let source = AdapterSource::open(&name.display().to_string())?;
    source
        .onto(model.base(), &model.decoder, &cache, &|_, _| ())
        .map(|_| ())
}

/// Writes a seed file.
fn seed(dir: &TempDir, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = dir.path().join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, content).unwrap();
    path
}

const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}\
    {{ m.content | trim }} {{ m | tojson(indent=2) }}{% set n = loop.index * 12 %}{{ n }}\
    {% endif %}{% endfor %}{% macro f(a) %}{{ a.upper() }}{% endmacro %}{{ f('x') }}";

#[test]
fn damaged_models_are_used_or_refused() {
    let mut figures = Figures::default();
    let mut made = HfDir::new(Arch::Llama, StDtype::F32);
    made.config["dtype"] = "float32".into();
    let dir = made.finish().to_owned();
    made.write("chat_template.jinja", TEMPLATE);
    made.write(
        "tokenizer_config.json",
        json!({"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}).to_string(),
    );
    made.write(
        "generation_config.json",
        json!({"eos_token_id": [2, 3]}).to_string(),
    );
    let read = || use_model(&dir);
    let place = dir.display().to_string();
    let names = [place.as_str(), "generation_config.json"];
    for (number, name) in [
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ]
    .into_iter()
    .enumerate()
    {
        let format = Format {
            names: &names,
            path: dir.join(name),
            read: &read,
        };
        figures.try_all(&format, 100 + number as u64);
    }
    // The same weights behind an index.
    std::fs::rename(dir.join("model.safetensors"), dir.join("a.safetensors")).unwrap();
    let tensors = made
        .tensors
        .keys()
        .map(|name| (name.clone(), json!("a.safetensors")));
    let map: serde_json::Map<_, _> = tensors.collect();
    let index = "model.safetensors.index.json";
    made.write(
        index,
        json!({"metadata": {"total_size": 12}, "weight_map": map}).to_string(),
    );
    let format = Format {
        names: &[place.as_str(), index],
        path: dir.join(index),
        read: &read,
    };
    figures.try_all(&format, 110);
    let (place, path) = gguf::tiny();
    let format = Format {
        names: &["tiny.gguf"],
        path: path.clone(),
        read: &|| use_model(&path),
    };
    figures.try_all(&format, 120);
    figures.try_all(&format, 121);
    drop(place);
    report_on(figures, "models");
}

#[test]
fn damaged_adapters_and_checkpoints_are_used_or_refused() {
    let mut figures = Figures::default();
    let made = HfDir::new(Arch::Llama, StDtype::F32);
    let model = tiny_model(made.finish());
    let adapter = adapter(&model);
    let place = tempfile::tempdir().unwrap();

    let path = seed(&place, "adapter.safetensors", adapter.to_bytes().unwrap());
    let format = Format {
        names: &["adapter.safetensors"],
        path: path.clone(),
        read: &|| put_on(&path, &model),
    };
    figures.try_all(&format, 200);

    let text = seed(&place, "text", adapter.short_text().unwrap());
    let format = Format {
        names: &["adapter tinylora1:", "cannot read adapter"],
        path: text.clone(),
        read: &|| {
            let text = String::from_utf8_lossy(&std::fs::read(&text).unwrap()).into_owned();
            SavedAdapter::from_text(&text).map(|_| ())
        },
    };
    figures.try_all(&format, 210);

    for (number, kind) in ["peft", "lora"].into_iter().enumerate() {
        let dir = place.path().join(kind);
        match kind {
            "peft" => export::write_peft(&adapter, &dir).unwrap(),
            _ => export::write_lora(&adapter, &dir).unwrap(),
        }
        for (file, name) in ["adapter_config.json", "adapter_model.safetensors"]
            .into_iter()
            .enumerate()
        {
            let format = Format {
                names: &[kind],
                path: dir.join(name),
                read: &|| put_on(&dir, &model),
            };
            figures.try_all(&format, 220 + 2 * number as u64 + file as u64);
        }
    }

    let checkpoints = place.path().join("checkpoints");
    let mut store = Store::open(&checkpoints, 0).unwrap();
    let mut saved = Checkpoint::default();
    saved.state.step = 1;
    saved.state.parameters = vec![0.5; 13];
    saved.state.optimizer.first_moment = vec![0.25; 13];
    saved.state.optimizer.second_moment = vec![0.125; 13];
    store.save(&saved, |path| adapter.save(path)).unwrap();
    let folder = checkpoints.join("step-000001");
    for (number, name) in ["SHA256SUMS", "manifest.json", "state.safetensors"]
        .into_iter()
        .enumerate()
    {
        let format = Format {
            names: &["step-000001"],
            path: folder.join(name),
            read: &|| checkpoint::load(&folder).map(|_| ()),
        };
        figures.try_all(&format, 230 + number as u64);
        if name == "SHA256SUMS" {
            continue;
        }
        // Whoever damages a file on purpose also writes the sums.
        let with_sums = || {
            let sum = |name: &str| {
                use sha2::Digest;
                let bytes = std::fs::read(folder.join(name)).unwrap();
                format!("{:x}  {name}\n", sha2::Sha256::digest(bytes))
            };
            let names = ["adapter.safetensors", "state.safetensors", "manifest.json"];
            std::fs::write(folder.join("SHA256SUMS"), names.map(sum).concat()).unwrap();
            checkpoint::load(&folder).map(|_| ())
        };
        let format = Format {
            read: &with_sums,
            path: folder.join(name),
            names: &["step-000001"],
        };
        figures.try_all(&format, 240 + number as u64);
        with_sums().unwrap();
    }
    report_on(figures, "adapters and checkpoints");
}

#[test]
fn damaged_data_and_configurations_are_used_or_refused() {
    let mut figures = Figures::default();
    let place = tempfile::tempdir().unwrap();
    let config = include_str!("../../configs/qwen7b-13p.toml");
    let sweep = include_str!("../../configs/sweep-mini.toml");
    let row = |i: usize| {
        json!({"question": format!("What is {i} + 1?"), "answer": format!("{}", i + 1),
        "solution": format!("It is {}.\n#### {}", i + 1, i + 1), "level": 3, "extra": [{"a": [1, 2.5]}]})
    };
    let rows: Vec<String> = (0..6).map(|i| row(i).to_string()).collect();
    let parquet = include_bytes!("../fixtures/data/gsm8k/test.parquet").as_slice();
    let metrics: String = (1..9)
        .map(|step| {
            format!(
                "{}\n",
                json!({"step": step, "reward": 0.5, "loss": 0.1, "grad_norm": 1.5})
            )
        })
        .collect();

    let load = |path: &Path| data::load_file(path, &ReadOptions::default()).map(|_| ());
    let run = place.path().join("run");
    let log_configuration = json!({"model": "m"}).as_object().cloned().unwrap();
    let log = place.path().join("log.jsonl");
    drop(CompletionLog::open(&log, &log_configuration).unwrap());
    let run_config = seed(&place, "run/config.toml", config);
    let of_run = seed(&place, "run/metrics.jsonl", metrics);
    let completions = json!({"step": 1, "problem": "train/0", "prompt": "p", "completion": "c", "answer": "4",
        "extracted": null, "reward": 0.0, "advantage": -0.5, "num_tokens": 3, "finish": "eos"});
    let of_run_too = seed(
        &place,
        "run/completions.jsonl",
        format!("{completions}\n").repeat(4),
    );
    // A value out of its range is named by its key, which may also come from the command line.
    let sections = [
        "adapter", "data", "eval", "grpo", "model", "optim", "reward", "rollout", "train",
    ];
    let keys = sections.map(|section| format!("{section}."));
    let with_keys: Vec<&str> = keys
        .iter()
        .map(String::as_str)
        .chain(["run.toml"])
        .collect();
    type Read<'a> = &'a dyn Fn(&Path) -> Result<()>;
    let formats: [(&[&str], PathBuf, Read<'_>); 8] = [
        (&with_keys, seed(&place, "run.toml", config), &|path| {
            Config::load(&Source::read(path)?, &[]).map(|_| ())
        }),
        (
            &["sweep.toml"],
            seed(&place, "sweep.toml", sweep),
            &|path| SweepFile::parse(&Source::read(path)?).map(|_| ()),
        ),
        (
            &["rows.jsonl"],
            seed(&place, "rows.jsonl", rows.join("\n")),
            &load,
        ),
        (
            &["rows.json"],
            seed(&place, "rows.json", format!("[{}]", rows.join(",\n"))),
            &load,
        ),
        (
            &["rows.parquet"],
            seed(&place, "rows.parquet", parquet),
            &load,
        ),
        (&["log.jsonl"], log, &|path| {
            let opened = CompletionLog::open(path, &log_configuration);
            opened.map(|_| ())
        }),
        (&["run"], of_run, &|_| {
            report::read(std::slice::from_ref(&run)).map(|_| ())
        }),
        (&["run"], of_run_too, &|_| {
            report::read(std::slice::from_ref(&run)).map(|_| ())
        }),
    ];
    assert!(run_config.exists());
    for (number, (names, path, read)) in formats.into_iter().enumerate() {
        let format = Format {
            names,
            path: path.clone(),
            read: &|| read(&path),
        };
        figures.try_all(&format, 300 + number as u64);
    }
    report_on(figures, "data and configurations");
}

fn report_on(figures: Figures, what: &str) {
    let Figures {
        cases,
        used,
        slowest,
        most,
        wrong,
    } = figures;
    println!(
        "{what}: {cases} damaged files, {used} still usable, slowest {slowest:?}, most memory {} KB",
        most >> 10
    );
    assert!(
        wrong.is_empty(),
        "{} wrong:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    assert!(used < 3 * cases / 4, "{used} of {cases} made no difference");
}

#[test]
fn the_counter_counts() {
    let held = HELD.get();
    MOST.set(held);
    drop(vec![1u8; 1 << 20]);
    assert!(MOST.get() - held >= 1 << 20);
}
