//! Command line arguments and their dispatch to [`crate::commands`].

use std::io::{BufWriter, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::config::{DeviceSpec, WeightDtype};
use crate::reward::Grader;
use crate::{Error, Result, commands, ranks};

/// Teach a language model to reason with a handful of numbers: TinyLoRA + GRPO.
#[derive(Debug, Parser)]
#[command(
    version,
    about,
    propagate_version = true,
    arg_required_else_help = true
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    global: GlobalArgs,
}

/// Flags every command takes.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Common options")]
pub struct GlobalArgs {
    /// Where to compute: auto, cpu, cuda, cuda:N or metal
    #[arg(long, global = true, value_name = "DEVICE")]
    pub device: Option<DeviceSpec>,
    /// Number format of the frozen weights in memory: auto, f32, bf16 or f16
    #[arg(long, global = true, value_name = "DTYPE")]
    pub dtype: Option<WeightDtype>,
    /// Leave bf16 and f16 weights in their file instead of copying them: slower, but no memory of one's own
    #[arg(long, global = true)]
    pub mmap: bool,
    /// Key of every random draw
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u64).range(..=i64::MAX as u64))]
    pub seed: Option<u64>,
    /// Print results and errors only
    #[arg(long, short, global = true)]
    pub quiet: bool,
    /// Say more (-v: what is done, -vv: every detail)
    #[arg(long, short, global = true, action = clap::ArgAction::Count, conflicts_with = "quiet")]
    pub verbose: u8,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train an adapter; without --config, the embedded quick start
    Train(commands::train::TrainArgs),
    /// Train over a grid of sizes, learning rates, seeds and methods; a table and figures
    Sweep(commands::sweep::SweepArgs),
    /// Score a model on benchmarks or on your own problems
    Eval(Box<commands::eval::EvalArgs>),
    /// Write an adapter, or the model with it, for other programs
    Export(commands::export::ExportArgs),
    /// Go on from a prompt
    Generate(commands::generate::GenerateArgs),
    /// Log-probabilities of given completions
    Score(commands::score::ScoreArgs),
    /// Grade answers: rows with `gold` and `completion` or `pred` get `extracted` and `correct`
    Grade {
        /// gsm8k, gsm8k-flexible, lm-eval-strict, lm-eval-flexible, math, equiv or equiv-wide
        #[arg(long, value_name = "NAME")]
        reward: Grader,
        /// JSON Lines file
        file: PathBuf,
    },
    /// Measure sampling and training on this machine, against its own peak
    Bench(commands::bench::BenchArgs),
    /// Make one HTML page on one or several runs, and print a summary
    Report(commands::report::ReportArgs),
    /// Show what this machine and this build can do, and what is missing
    Doctor,
}

/// Parses the command line, runs the command, prints the error, gives the exit code.
pub fn main() -> ExitCode {
    let Cli { command, global } = Cli::parse();
    init_logging(&global);
    keep_freed_memory();
    let mut out = BufWriter::new(Stdout(std::io::stdout()));
    // On a thread of the pool: kernels hand out thousands of small tasks a second, and a thread
    // outside of it would go to sleep and be woken for every one.
    let work = || {
        rayon::scope(|_| {
            run(command, &global, &mut out)?;
            out.flush()
                .map_err(|e| Error::data(format!("cannot write to stdout: {e}")))
        })
    };
    // A panic is a bug; it has its exit code like any other failure, and its own message before.
    let result = start_threads().map(|()| catch_unwind(AssertUnwindSafe(work)));
    let result = match result {
        Ok(result) => result,
        Err(error) => Ok(Err(error)),
    };
    match result {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            // What was done before the error is as good as if there had been none.
            let _ = out.flush();
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
        Err(_) => {
            eprintln!("error: internal error, see the message above");
            ExitCode::from(1)
        }
    }
}

/// The pool that computes, with stacks as large as a main thread's.
fn start_threads() -> Result<()> {
    rayon::ThreadPoolBuilder::new()
        .stack_size(8 << 20)
        .build_global()
        .map_err(|e| Error::Internal(format!("cannot start threads: {e}")))
}

/// Activations are freed and allocated again all the time. The C library would give their pages
/// back to the system and fault them in again, zeroed, which costs a tenth of a forward pass.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn keep_freed_memory() {
    // SAFETY: plain settings, before there are threads. Where one is refused, things are slower.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn keep_freed_memory() {}

fn run(command: Command, global: &GlobalArgs, out: &mut dyn Write) -> Result<()> {
    match command {
        Command::Train(args) => ranks::run(|ranks| commands::train::run(&args, global, ranks, out)),
        Command::Sweep(args) => commands::sweep::run(&args, global, out),
        Command::Eval(args) => ranks::run(|ranks| commands::eval::run(&args, global, ranks, out)),
        Command::Export(args) => commands::export::run(&args, global, out),
        Command::Generate(args) => commands::generate::run(&args, global, out),
        Command::Score(args) => commands::score::run(&args, global, out),
        Command::Grade { reward, file } => commands::grade::run(reward, &file, out),
        Command::Bench(args) => commands::bench::run(&args, global, out),
        Command::Report(args) => commands::report::run(&args, global, out),
        Command::Doctor => commands::doctor::run(out),
    }
}

/// Stdout; when its reader has gone (`tinylora … | head`) the program ends without a word.
struct Stdout(std::io::Stdout);

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.write(bytes).inspect_err(leave_if_unread)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush().inspect_err(leave_if_unread)
    }
}

fn leave_if_unread(error: &std::io::Error) {
    if error.kind() == std::io::ErrorKind::BrokenPipe {
        std::process::exit(0);
    }
}

/// Log lines go to stderr; `RUST_LOG` overrides the flags.
fn init_logging(global: &GlobalArgs) {
    let level = match (global.quiet, global.verbose) {
        (true, _) => "error",
        (false, 0) => "tinylora=warn",
        (false, 1) => "tinylora=info",
        (false, 2) => "tinylora=debug",
        (false, _) => "trace",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .without_time()
        .init();
}
