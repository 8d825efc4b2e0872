use std::process::ExitCode;

use tinylora::bounded::Allocator;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

fn main() -> ExitCode {
    tinylora::cli::main()
}
