//! Grids of training runs: [`file`] says which, [`grid`] turns that into configurations,
//! [`jobs`] reads their problems, [`training`] trains them,
//! [`results`] keeps what came out, [`summary`] compares it, [`table`] and [`figure`]
//! (drawn by [`chart`]) show it.

mod axis;
pub mod chart;
pub mod figure;
pub mod file;
pub mod grid;
pub mod jobs;
pub mod results;
pub mod summary;
pub mod table;
#[cfg(test)]
mod tests;
pub mod training;
