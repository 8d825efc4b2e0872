//! One file a subcommand.

pub mod grade;
