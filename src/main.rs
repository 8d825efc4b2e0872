use std::process::ExitCode;

fn main() -> ExitCode {
    tinylora::cli::main()
}
