//! Pictures of what runs gave.

mod axis;
pub mod chart;
