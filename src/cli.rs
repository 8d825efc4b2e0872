//! Command line arguments and their dispatch to [`crate::commands`].

use std::process::ExitCode;

/// Parses the command line, runs the command, prints the error, gives the exit code.
pub fn main() -> ExitCode {
    ExitCode::SUCCESS
}
