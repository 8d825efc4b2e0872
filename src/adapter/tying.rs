//! Which modules share their trained numbers.

use super::modules::{ModuleId, ModuleKind};
use super::spec::{AdapterSpec, Tie};

/// The adapted modules of a model and the group of each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tying {
    /// Adapted modules in model order.
    pub modules: Vec<ModuleId>,
    /// Group of `modules[i]`.
    pub groups: Vec<usize>,
    pub num_groups: usize,
}

impl Tying {
    /// Groups of the spec's target modules in a model of `num_layers` blocks.
    ///
    /// With N adapted modules: `tiled` has ceil(N / n_tie) groups, `structured`
    /// kinds · ceil(num_layers / n_tie), `all` one, `peft` max(1, round(N · (1 − weight_tying))).
    pub fn new(spec: &AdapterSpec, num_layers: usize) -> Self {
        let targets = spec.targets();
        let modules: Vec<ModuleId> = ModuleId::all(num_layers)
            .filter(|id| targets.contains(&id.kind))
            .collect();
        let runs = num_layers.div_ceil(spec.n_tie);
        let position =
            |kind: ModuleKind| targets.iter().position(|&t| t == kind).unwrap_or_default();
        let by_weight_tying = peft_groups(modules.len(), spec.weight_tying);
        let group = |i: usize, id: ModuleId| match spec.tie {
            Tie::Tiled => i / spec.n_tie,
            Tie::Structured => position(id.kind) * runs + id.layer / spec.n_tie,
            Tie::All => 0,
            Tie::Peft => by_weight_tying[i],
        };
        let groups: Vec<usize> = modules
            .iter()
            .enumerate()
            .map(|(i, &id)| group(i, id))
            .collect();
        let num_groups = groups.iter().max().map_or(0, |&last| last + 1);
        Self {
            modules,
            groups,
            num_groups,
        }
    }
}

/// PEFT's group of each of `n` modules: equal runs, of which the last takes what is left over.
pub(super) fn peft_groups(n: usize, weight_tying: f64) -> Vec<usize> {
    // Python rounds halves to even.
    let groups = (n as f64 * (1.0 - weight_tying)).round_ties_even() as usize;
    let groups = groups.clamp(1, n.max(1));
    let size = (n / groups).max(1);
    (0..n).map(|i| (i / size).min(groups - 1)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(tie: Tie, n_tie: usize, layers: usize) -> usize {
        Tying::new(
            &AdapterSpec {
                tie,
                n_tie,
                ..Default::default()
            },
            layers,
        )
        .num_groups
    }

    #[test]
    fn the_papers_counts() {
        let ladder = [256, 128, 64, 32, 16, 8, 4, 2, 1].map(|n_tie| count(Tie::Tiled, n_tie, 28));
        assert_eq!(ladder, [1, 2, 4, 7, 13, 25, 49, 98, 196]);
        assert_eq!(count(Tie::Tiled, 16, 36), 16);
        assert_eq!(count(Tie::Tiled, 4, 7), 13);
        assert_eq!(count(Tie::Structured, 16, 28), 14);
        assert_eq!(count(Tie::Structured, 1, 28), 196);
        assert_eq!(count(Tie::All, 16, 28), 1);
    }

    #[test]
    fn members_of_groups() {
        let tiled = Tying::new(
            &AdapterSpec {
                n_tie: 4,
                ..Default::default()
            },
            3,
        );
        let expected: Vec<usize> = (0..21).map(|i| i / 4).collect();
        assert_eq!(tiled.groups, expected);
        assert_eq!(tiled.num_groups, 6, "the last group is shorter");

        let spec = AdapterSpec {
            n_tie: 2,
            tie: Tie::Structured,
            ..Default::default()
        };
        let structured = Tying::new(&spec, 3);
        for (id, &group) in structured.modules.iter().zip(&structured.groups) {
            assert_eq!(group, id.kind.index() * 2 + id.layer / 2);
        }
        assert_eq!(structured.num_groups, 14);
    }

    #[test]
    fn pefts_groups() {
        assert_eq!(peft_groups(4, 0.0), [0, 1, 2, 3]);
        assert_eq!(peft_groups(4, 1.0), [0; 4]);
        assert_eq!(
            peft_groups(7, 0.6),
            [0, 0, 1, 1, 2, 2, 2],
            "round(2.8) groups"
        );
        assert_eq!(peft_groups(5, 0.5), [0, 0, 1, 1, 1], "2.5 rounds to even");
        assert!(peft_groups(0, 0.5).is_empty());
        let spec = AdapterSpec {
            tie: Tie::Peft,
            weight_tying: 0.9,
            ..Default::default()
        };
        let tying = Tying::new(&spec, 3);
        assert_eq!(tying.num_groups, 2);
        assert_eq!(tying.groups[9..], [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]);
    }

    #[test]
    fn a_subset_of_modules_is_chunked_among_itself() {
        let target_modules = vec![ModuleKind::V, ModuleKind::Q];
        let spec = AdapterSpec {
            n_tie: 3,
            target_modules,
            ..Default::default()
        };
        let tying = Tying::new(&spec, 4);
        assert_eq!(tying.modules.len(), 8);
        assert_eq!(tying.groups, [0, 0, 0, 1, 1, 1, 2, 2]);
        assert_eq!(tying.modules[1], ModuleId::new(0, ModuleKind::V));
    }
}
