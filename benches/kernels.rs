//! Every CPU kernel at the sizes of SmolLM2-135M, against what this machine can do.
//!
//!     cargo bench --bench kernels                         # a few minutes
//!     cargo bench --bench kernels -- --quick forward/f32  # a part of it, roughly
//!
//! Criterion measures and compares with the last time. The table at the end puts the median of every
//! kernel beside the machine's peak on all threads: the best product seen, and reading memory as
//! measured at the start. More than all of memory's rate means data from a cache.

use std::hint::black_box;
use std::time::{Duration, Instant};

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput};
use half::{bf16, f16};
use rayon::prelude::*;
use tinylora::ops::cpu::{self, BlockFormat, Isa, KvStore, PackedMatrix};
use tinylora::ops::{Layout, Segment, Span};

// SmolLM2-135M.
const HIDDEN: usize = 576;
const INTERMEDIATE: usize = 1536;
const VOCAB: usize = 49_152;
const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const HEAD_DIM: usize = 64;
/// out × in of its products: queries and outputs, gate and up, down, head.
const SHAPES: [(usize, usize); 4] = [
    (HIDDEN, HIDDEN),
    (INTERMEDIATE, HIDDEN),
    (HIDDEN, INTERMEDIATE),
    (VOCAB, HIDDEN),
];
const ROWS: [usize; 5] = [1, 8, 32, 128, 1024];
/// Rows of a training batch.
const BATCH: usize = 2048;
const SCALE: f32 = 0.125;

/// Bytes of weights to go through before the same ones come again: more than any cache holds, as a
/// decoder's layers are.
const COLD: usize = 256 << 20;

fn main() {
    // On a thread of the pool and in a team, as a rollout.
    rayon::scope(|_| measure());
}

fn measure() {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(50))
        .measurement_time(Duration::from_millis(300))
        .nresamples(2000)
        .configure_from_args();
    let mut bench = Bench {
        criterion: &mut criterion,
        rows: Vec::new(),
    };
    let mut machine = Machine::measure();
    println!("{machine}\n");
    cpu::team(|| {
        products(&mut bench, "f32", |w, n, k| {
            Some(PackedMatrix::pack(w, n, k))
        });
        products(&mut bench, "bf16", packed(bf16::from_f32));
        products(&mut bench, "f16", packed(f16::from_f32));
        for (name, format, dtype) in BLOCKS {
            products(&mut bench, name, blocks(format, dtype));
        }
        weight_gradients(&mut bench);
        low_rank(&mut bench);
        attention(&mut bench);
        row_wise(&mut bench);
        softmax(&mut bench);
    });
    let rows = bench.rows;
    criterion.final_summary();
    let rates = rows
        .iter()
        .filter_map(|row| Some(row.work.flops? / row.seconds / 1e9));
    machine.gflops = rates.fold(machine.gflops, f64::max);
    print_table(&machine, &rows);
}

/// What a call computes, and reads and writes at least. Products and attention are measured by
/// operations (a multiply-add counts as two), all else by bytes.
#[derive(Debug, Clone, Copy)]
struct Work {
    flops: Option<f64>,
    bytes: f64,
}

impl Work {
    fn flops(flops: usize, bytes: usize) -> Self {
        Self {
            flops: Some(flops as f64),
            bytes: bytes as f64,
        }
    }

    /// Floats read and written once.
    fn floats(count: usize) -> Self {
        Self {
            flops: None,
            bytes: (4 * count) as f64,
        }
    }

    fn throughput(self) -> Throughput {
        match self.flops {
            Some(flops) => Throughput::Elements(flops as u64),
            None => Throughput::Bytes(self.bytes as u64),
        }
    }
}

struct Row {
    name: String,
    work: Work,
    seconds: f64,
}

struct Bench<'a> {
    criterion: &'a mut Criterion,
    rows: Vec<Row>,
}

impl Bench<'_> {
    /// Measures `call`, with criterion and for the table.
    fn kernel(&mut self, group: &str, size: &str, work: Work, mut call: impl FnMut()) {
        let mut samples = Vec::new();
        let mut criterion = self.criterion.benchmark_group(group);
        criterion
            .sampling_mode(SamplingMode::Flat)
            .throughput(work.throughput())
            .bench_function(BenchmarkId::from_parameter(size), |bencher| {
                bencher.iter_custom(|iterations| {
                    let started = Instant::now();
                    for _ in 0..iterations {
                        call();
                    }
                    let elapsed = started.elapsed();
                    samples.push(elapsed.as_secs_f64() / iterations as f64);
                    elapsed
                });
            });
        criterion.finish();
        // None when the filter of the command line leaves the kernel out.
        if !samples.is_empty() {
            self.rows.push(Row {
                name: format!("{group}/{size}"),
                work,
                seconds: median(&mut samples),
            });
        }
    }
}

fn median(samples: &mut [f64]) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}

/// The best this machine was seen to do, on all threads.
struct Machine {
    gflops: f64,
    gbytes: f64,
}

impl Machine {
    fn measure() -> Self {
        Self {
            gflops: product_rate() / 1e9,
            gbytes: read_rate() / 1e9,
        }
    }
}

impl std::fmt::Display for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} threads, {:?}: f32 products {:.0} GFLOP/s, reading memory {:.1} GB/s",
            rayon::current_num_threads(),
            Isa::current(),
            self.gflops,
            self.gbytes
        )
    }
}

/// The shortest of `count` calls.
fn best_of(count: usize, mut call: impl FnMut()) -> f64 {
    let seconds = (0..count).map(|_| {
        let started = Instant::now();
        call();
        started.elapsed().as_secs_f64()
    });
    seconds.fold(f64::INFINITY, f64::min)
}

/// Operations a second of f32 products of large, cached factors.
fn product_rate() -> f64 {
    let shapes = [(1024, 1024, 1024), (512, 2048, 1024), (1024, 1536, 576)];
    let rates = shapes.map(|(m, n, k)| {
        let w = PackedMatrix::pack(&noise(n * k), n, k);
        let (x, mut y) = (noise(m * k), vec![0.0; m * n]);
        let seconds = best_of(16, || w.forward(&x, m, None, &mut y));
        2.0 * (m * n * k) as f64 / seconds
    });
    rates.into_iter().fold(0.0, f64::max)
}

/// Bytes a second of reading an array that no cache holds.
fn read_rate() -> f64 {
    let array = vec![1u64; (1 << 30) / 8];
    let part = array.len().div_ceil(rayon::current_num_threads());
    let seconds = best_of(8, || {
        let sum = |part: &[u64]| part.iter().fold(0u64, |sum, x| sum.wrapping_add(*x));
        black_box(array.par_chunks(part).map(sum).sum::<u64>());
    });
    size_of_val(&array[..]) as f64 / seconds
}

/// Values of both signs between −1 and 1, the same on every run.
fn noise(len: usize) -> Vec<f32> {
    let mut state = 1u32;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 8_388_608.0 - 1.0
    };
    (0..len).map(next).collect()
}

/// Formats of GGUF files with kernels of their own.
const BLOCKS: [(&str, BlockFormat, GgmlDType); 8] = [
    ("Q4_0", BlockFormat::Q4_0, GgmlDType::Q4_0),
    ("Q4_1", BlockFormat::Q4_1, GgmlDType::Q4_1),
    ("Q5_0", BlockFormat::Q5_0, GgmlDType::Q5_0),
    ("Q5_1", BlockFormat::Q5_1, GgmlDType::Q5_1),
    ("Q8_0", BlockFormat::Q8_0, GgmlDType::Q8_0),
    ("Q4_K", BlockFormat::Q4K, GgmlDType::Q4K),
    ("Q5_K", BlockFormat::Q5K, GgmlDType::Q5K),
    ("Q6_K", BlockFormat::Q6K, GgmlDType::Q6K),
];

/// Makes matrices `[n, k]` in two bytes.
fn packed<T: cpu::Weight>(
    narrow: impl Fn(f32) -> T,
) -> impl Fn(&[f32], usize, usize) -> Option<PackedMatrix> {
    move |w, n, k| {
        let narrow: Vec<T> = w.iter().copied().map(&narrow).collect();
        Some(PackedMatrix::pack(&narrow, n, k))
    }
}

/// Makes matrices of blocks, where rows are whole blocks.
fn blocks(
    format: BlockFormat,
    dtype: GgmlDType,
) -> impl Fn(&[f32], usize, usize) -> Option<PackedMatrix> {
    move |w, n, k| {
        if !k.is_multiple_of(format.block_size()) {
            return None;
        }
        let w = Tensor::from_slice(w, (n, k), &Device::Cpu).expect("a matrix");
        let w = QTensor::quantize(&w, dtype).expect("quantised");
        let bytes = w.data().expect("its bytes");
        Some(PackedMatrix::pack_blocks(format, &bytes, n, k))
    }
}

/// Linear layers, forward and backward. The weights come from memory, as they do in a decoder.
fn products(
    bench: &mut Bench<'_>,
    dtype: &str,
    make: impl Fn(&[f32], usize, usize) -> Option<PackedMatrix>,
) {
    for (n, k) in SHAPES {
        let Some(matrix) = make(&noise(n * k), n, k) else {
            continue;
        };
        let copies = COLD.div_ceil(matrix.bytes());
        let packed = vec![matrix; copies];
        let mut next = packed.iter().cycle();
        let mut cold = || next.next().expect("a cycle has no end");
        for m in ROWS {
            let work = Work::flops(2 * m * n * k, packed[0].bytes() + 4 * m * (n + k));
            let size = format!("{n}x{k}/{m}");
            let (x, mut y) = (noise(m * k), vec![0.0; m * n]);
            bench.kernel(&format!("forward/{dtype}"), &size, work, || {
                cold().forward(&x, m, None, &mut y);
            });
            let (g, mut dx) = (noise(m * n), vec![0.0; m * k]);
            bench.kernel(&format!("backward/{dtype}"), &size, work, || {
                cold().backward(&g, m, &mut dx, false);
            });
        }
    }
}

fn weight_gradients(bench: &mut Bench<'_>) {
    for &(n, k) in &SHAPES[..3] {
        let (g, x, mut dw) = (noise(BATCH * n), noise(BATCH * k), vec![0.0; n * k]);
        let work = Work::flops(2 * BATCH * n * k, 4 * (g.len() + x.len() + dw.len()));
        bench.kernel("weight_gradient", &format!("{n}x{k}/{BATCH}"), work, || {
            cpu::weight_gradient(&g, &x, n, k, &mut dw, false)
        });
    }
}

/// The adapter's side path.
fn low_rank(bench: &mut Bench<'_>) {
    let r = 2;
    for width in [HIDDEN, INTERMEDIATE] {
        for rows in [32, BATCH] {
            let size = format!("{width}/{rows}");
            let (wide, factor) = (noise(rows * width), noise(r * width));
            let mut narrow = vec![0.0; rows * r];
            let down = Work::floats(wide.len() + narrow.len());
            bench.kernel("low_rank_down", &size, down, || {
                cpu::low_rank_down(&wide, &factor, r, &mut narrow);
            });
            let mut y = wide.clone();
            let up = Work::floats(2 * y.len() + narrow.len());
            bench.kernel("low_rank_up", &size, up, || {
                cpu::low_rank_up(&narrow, &factor, r, &mut y);
            });
        }
    }
}

const Q_WIDTH: usize = HEADS * HEAD_DIM;
const KV_WIDTH: usize = KV_HEADS * HEAD_DIM;

/// Keys seen by all rows of a batch together.
fn keys_seen(layout: &Layout) -> usize {
    let positions = layout.positions();
    positions
        .iter()
        .map(|&position| position as usize + 1)
        .sum()
}

fn attention(bench: &mut Bench<'_>) {
    decode_attention(bench);
    let prefill = Layout::from_lengths(&[512]).expect("a layout");
    train_attention(bench, "prefill 512", &prefill);
    train_attention(bench, "group 100+8x128", &group(100, 8, 128));
}

/// A prompt and its completions.
fn group(prompt: usize, completions: usize, len: usize) -> Layout {
    let parent = Segment {
        start: 0,
        len: prompt,
        parent: None,
    };
    let child = |index: usize| Segment {
        start: prompt + index * len,
        len,
        parent: Some(0),
    };
    let segments = std::iter::once(parent).chain((0..completions).map(child));
    Layout::new(segments.collect()).expect("a layout")
}

/// One token of 32 sequences, each at position 256 behind a prompt that all share.
fn decode_attention(bench: &mut Bench<'_>) {
    let (sequences, prompt, own) = (32, 128, 128);
    let layout = group(prompt, sequences, own);
    let kv = filled(&layout);
    let last = |index| Span {
        row: index,
        len: 1,
        slot: index + 1,
        pos: prompt + own - 1,
    };
    let spans: Vec<Span> = (0..sequences).map(last).collect();
    let (q, mut out) = (noise(sequences * Q_WIDTH), vec![0.0; sequences * Q_WIDTH]);
    let keys = sequences * (prompt + own);
    let work = Work::flops(
        4 * keys * Q_WIDTH,
        4 * (2 * layout.tokens() * KV_WIDTH + 2 * q.len()),
    );
    bench.kernel("attention", "decode 32 at 256", work, || {
        cpu::attention_forward(&q, &spans, &kv, HEADS, SCALE, &mut out, None);
    });
}

/// A store with the keys and values of a batch.
fn filled(layout: &Layout) -> KvStore {
    let mut kv = KvStore::new(KV_HEADS, HEAD_DIM);
    for (slot, segment) in layout.segments.iter().enumerate() {
        let parent = segment.parent.map(|parent| (parent, layout.offset(slot)));
        kv.alloc(slot, parent, segment.len);
    }
    let (k, v) = (
        noise(layout.tokens() * KV_WIDTH),
        noise(layout.tokens() * KV_WIDTH),
    );
    kv.append(&layout.spans(), &k, &v);
    kv
}

fn train_attention(bench: &mut Bench<'_>, name: &str, layout: &Layout) {
    let rows = layout.tokens();
    let (kv, spans) = (filled(layout), layout.spans());
    let (q, k, v) = (
        noise(rows * Q_WIDTH),
        noise(rows * KV_WIDTH),
        noise(rows * KV_WIDTH),
    );
    let (mut out, mut lse) = (vec![0.0; rows * Q_WIDTH], vec![0.0; rows * HEADS]);
    let flops = 4 * keys_seen(layout) * Q_WIDTH;
    let floats = 2 * rows * (Q_WIDTH + KV_WIDTH);
    bench.kernel("attention", name, Work::flops(flops, 4 * floats), || {
        cpu::attention_forward(&q, &spans, &kv, HEADS, SCALE, &mut out, Some(&mut lse));
    });
    cpu::attention_forward(&q, &spans, &kv, HEADS, SCALE, &mut out, Some(&mut lse));

    let dout = noise(rows * Q_WIDTH);
    let mut dq = vec![0.0; rows * Q_WIDTH];
    let (mut dk, mut dv) = (vec![0.0; rows * KV_WIDTH], vec![0.0; rows * KV_WIDTH]);
    // Five products for the two of the way there.
    let work = Work::flops(5 * flops / 2, 8 * floats);
    bench.kernel("attention_backward", name, work, || {
        cpu::attention_backward(
            &q, &k, &v, &out, &lse, &dout, layout, HEADS, KV_HEADS, HEAD_DIM, SCALE, &mut dq,
            &mut dk, &mut dv,
        );
    });
}

/// Kernels that pass over rows once, for a decoding step and for a training batch.
fn row_wise(bench: &mut Bench<'_>) {
    for rows in [32, BATCH] {
        let size = format!("{HIDDEN}/{rows}");
        let (x, g, w) = (noise(rows * HIDDEN), noise(rows * HIDDEN), noise(HIDDEN));
        let mut y = vec![0.0; rows * HIDDEN];
        let len = y.len();
        bench.kernel("rms_norm", &size, Work::floats(2 * len), || {
            cpu::rms_norm(&x, &w, 1e-5, &mut y);
        });
        bench.kernel("rms_norm_backward", &size, Work::floats(3 * len), || {
            cpu::rms_norm_backward(&x, &w, 1e-5, &g, &mut y, None);
        });

        bench.kernel("add_assign", &size, Work::floats(3 * len), || {
            cpu::add_assign(&mut y, &x);
        });

        let positions: Vec<u32> = (0..rows as u32).collect();
        // Rotations, so that values keep their size however often they are turned.
        let mut y = x.clone();
        let angles = noise(rows * HEAD_DIM / 2);
        let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
        let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
        bench.kernel("rope", &size, Work::floats(2 * len), || {
            cpu::rope(&mut y, HEADS, &positions, &cos, &sin);
        });
        bench.kernel("rope_backward", &size, Work::floats(2 * len), || {
            cpu::rope_backward(&mut y, HEADS, &positions, &cos, &sin);
        });

        let size = format!("{INTERMEDIATE}/{rows}");
        let len = rows * INTERMEDIATE;
        let (gate, up, g) = (noise(len), noise(len), noise(len));
        let (mut a, mut b) = (vec![0.0; len], vec![0.0; len]);
        bench.kernel("swiglu", &size, Work::floats(3 * len), || {
            cpu::swiglu(&gate, &up, &mut a);
        });
        bench.kernel("swiglu_backward", &size, Work::floats(5 * len), || {
            cpu::swiglu_backward(&gate, &up, &g, &mut a, &mut b);
        });
    }
}

/// One row of logits, which is one thread's work.
fn softmax(bench: &mut Bench<'_>) {
    let logits = noise(VOCAB);
    let size = format!("{VOCAB} (one thread)");
    bench.kernel("token_scores", &size, Work::floats(VOCAB), || {
        black_box(cpu::token_scores(black_box(&logits), 7, 1.0));
    });
    let scores = cpu::token_scores(&logits, 7, 1.0);
    bench.kernel("draw_token", &size, Work::floats(VOCAB), || {
        black_box(cpu::draw_token(black_box(&logits), 1.0, 0.7));
    });
    // In place, so that the values change; they stay in the range of logits.
    let mut gradient = logits.clone();
    bench.kernel("logits_gradient", &size, Work::floats(2 * VOCAB), || {
        cpu::logits_gradient(black_box(&mut gradient), 7, 1.0, scores.lse, 1e-3);
    });
}

fn print_table(machine: &Machine, rows: &[Row]) {
    if rows.is_empty() {
        return;
    }
    println!("\n{machine}\n");
    println!("| kernel | µs | GFLOP/s | of peak | GB/s | of memory |");
    println!("|---|---|---|---|---|---|");
    for Row {
        name,
        work,
        seconds,
    } in rows
    {
        let products = work.flops.map_or(" | ".to_owned(), |flops| {
            let rate = flops / seconds / 1e9;
            format!("{rate:.1} | {:.0} %", 100.0 * rate / machine.gflops)
        });
        let rate = work.bytes / seconds / 1e9;
        println!(
            "| {name} | {:.1} | {products} | {rate:.1} | {:.0} % |",
            1e6 * seconds,
            100.0 * rate / machine.gbytes
        );
    }
}
