//! `tinylora report`: run directories → one self-contained HTML page, and a summary.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;

use crate::cli::GlobalArgs;
use crate::report;
use crate::run::progress::Progress;
use crate::{Error, Result};

/// Arguments of `tinylora report`.
#[derive(Debug, Args)]
pub struct ReportArgs {
    /// Run directories, or names of folders under runs/; several are laid over one another
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// Page to write; an old report there is replaced
    #[arg(long, value_name = "FILE.html")]
    out: PathBuf,
}

/// Runs the command; the summary is what it prints on `out`.
pub fn run(args: &ReportArgs, global: &GlobalArgs, out: &mut dyn Write) -> Result<()> {
    report::check_target(&args.out)?;
    let paths: Vec<PathBuf> = args
        .runs
        .iter()
        .map(|run| report::find(run))
        .collect::<Result<_>>()?;
    let runs = report::read(&paths)?;
    report::write(&runs, &args.out)?;
    for run in &runs {
        out.write_all(report::summary(run).as_bytes())
            .map_err(|e| Error::data(format!("cannot write to stdout: {e}")))?;
    }
    Progress::new(global.quiet).line(&format!("page written to {}", args.out.display()));
    Ok(())
}
