//! What the program that started the ranks (mpirun, mpiexec, srun) says in the environment.

use std::env;

/// Names of a number under the launchers: Open MPI, MPICH and its relatives, Slurm.
type Names = &'static [&'static str];

const SIZE: Names = &["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"];
const LOCAL_RANK: Names = &[
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "SLURM_LOCALID",
];
const LOCAL_SIZE: Names = &["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"];

/// How this process was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launched {
    /// Processes that were started together; 1 without a launcher.
    pub size: usize,
}

impl Launched {
    /// From the environment.
    pub fn find() -> Self {
        Self::of(&|name| env::var(name).ok())
    }

    fn of(value: &dyn Fn(&str) -> Option<String>) -> Self {
        Self {
            size: number(SIZE, value).unwrap_or(1),
        }
    }
}

/// The CUDA device of this process: the first for the first process on the machine, and so on, around
/// those that can be seen.
pub fn local_gpu() -> usize {
    gpu(&|name| env::var(name).ok())
}

fn gpu(value: &dyn Fn(&str) -> Option<String>) -> usize {
    let rank = number(LOCAL_RANK, value).unwrap_or(0);
    match value("CUDA_VISIBLE_DEVICES").map(|list| list.split(',').count()) {
        // A launcher that gives each process a device of its own shows it that one alone.
        Some(visible) => rank % visible,
        None => rank,
    }
}

/// Processes of the run on this machine.
pub fn local_size() -> usize {
    size_here(&|name| env::var(name).ok())
}

fn size_here(value: &dyn Fn(&str) -> Option<String>) -> usize {
    let of_slurm = || {
        // Such as "8(x2),4": the first is right for even distributions.
        let text = value("SLURM_STEP_TASKS_PER_NODE")?;
        text.split(['(', ',']).next()?.parse().ok()
    };
    number(LOCAL_SIZE, value)
        .or_else(of_slurm)
        .unwrap_or(1)
        .max(1)
}

fn number(names: Names, value: &dyn Fn(&str) -> Option<String>) -> Option<usize> {
    names
        .iter()
        .find_map(|name| value(name)?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(variables: &[(&str, &str)], name: &str) -> Option<String> {
        let found = variables.iter().find(|(n, _)| *n == name);
        found.map(|(_, value)| (*value).to_owned())
    }

    fn size_under(variables: &[(&str, &str)]) -> (usize, usize) {
        let value = |name: &str| value(variables, name);
        (Launched::of(&value).size, size_here(&value))
    }

    #[test]
    fn every_process_of_a_machine_has_its_own_gpu() {
        let of = |variables: &[(&str, &str)]| gpu(&|name| value(variables, name));
        assert_eq!(of(&[]), 0);
        assert_eq!(of(&[("OMPI_COMM_WORLD_LOCAL_RANK", "3")]), 3);
        let shown = |list| [("SLURM_LOCALID", "3"), ("CUDA_VISIBLE_DEVICES", list)];
        assert_eq!(of(&shown("6")), 0);
        assert_eq!(of(&shown("4,5,6,7")), 3);
        assert_eq!(of(&shown("4,5")), 1);
    }

    #[test]
    fn launchers_are_told_apart() {
        assert_eq!(size_under(&[]), (1, 1));
        let open_mpi = [
            ("OMPI_COMM_WORLD_SIZE", "4"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
        ];
        assert_eq!(size_under(&open_mpi), (4, 2));
        assert_eq!(
            size_under(&[("PMI_SIZE", "3"), ("MPI_LOCALNRANKS", "3")]),
            (3, 3)
        );
        let slurm = [
            ("SLURM_STEP_NUM_TASKS", "16"),
            ("SLURM_STEP_TASKS_PER_NODE", "8(x2)"),
        ];
        assert_eq!(size_under(&slurm), (16, 8));
        // A batch script is not a step: its variables do not make one process several.
        assert_eq!(size_under(&[("SLURM_NTASKS", "16")]), (1, 1));
    }
}
