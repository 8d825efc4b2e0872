//! The order in which training goes through its data: shuffled anew for every pass, a function of
//! the seed and the position alone, so that a resumed run needs to know no more than the position.

use crate::ops::random::Stream;

/// "order" in ASCII: keeps these draws apart from other users of the run's seed.
const ORDER: u64 = 0x6f_7264_6572;

/// An endless sequence of indices below `len`: each pass holds every index once.
#[derive(Debug, Clone)]
pub struct DataOrder {
    seed: u64,
    len: usize,
    epoch: Option<u64>,
    shuffled: Vec<usize>,
}

impl DataOrder {
    /// # Panics
    /// When `len` is 0.
    pub fn new(seed: u64, len: usize) -> Self {
        assert!(len > 0, "there is no order of no data");
        Self {
            seed,
            len,
            epoch: None,
            shuffled: Vec::new(),
        }
    }

    /// Index at `position` (from 0, over all passes).
    pub fn at(&mut self, position: u64) -> usize {
        let epoch = position / self.len as u64;
        if self.epoch != Some(epoch) {
            self.shuffle(epoch);
        }
        self.shuffled[(position % self.len as u64) as usize]
    }

    /// Passes done at `position`, as a fraction (metric `epoch`).
    pub fn epochs(&self, position: u64) -> f64 {
        position as f64 / self.len as f64
    }

    /// Steps of `per_step` items in `epochs` passes, at least 1.
    pub fn steps(&self, epochs: f64, per_step: usize) -> u64 {
        ((self.len as f64 * epochs / per_step as f64).floor() as u64).max(1)
    }

    /// Fisher–Yates with draws of the pass's own stream.
    fn shuffle(&mut self, epoch: u64) {
        let stream = Stream {
            seed: self.seed ^ ORDER,
            domain: (epoch >> 32) as u32,
            index: epoch as u32,
        };
        self.shuffled = (0..self.len).collect();
        for (i, draw) in (1..self.len).rev().zip(stream.uniforms(self.len - 1)) {
            self.shuffled.swap(i, (draw * (i + 1) as f64) as usize);
        }
        self.epoch = Some(epoch);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pass(order: &mut DataOrder, epoch: u64) -> Vec<usize> {
        (epoch * 50..(epoch + 1) * 50)
            .map(|p| order.at(p))
            .collect()
    }

    #[test]
    fn every_pass_is_another_permutation() {
        let mut order = DataOrder::new(1, 50);
        let (first, second) = (pass(&mut order, 0), pass(&mut order, 1));
        assert_ne!(first, second);
        for mut indices in [first, second] {
            indices.sort_unstable();
            assert_eq!(indices, (0..50).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_position_gives_the_same_index_from_anywhere() {
        let mut order = DataOrder::new(1, 50);
        let whole: Vec<_> = (0..150).map(|p| order.at(p)).collect();
        assert_eq!(DataOrder::new(1, 50).at(120), whole[120]);
        assert_eq!(order.at(3), whole[3]);
        assert_ne!(pass(&mut DataOrder::new(2, 50), 0), whole[..50]);
    }

    #[test]
    fn a_single_item_and_the_number_of_steps() {
        assert_eq!(DataOrder::new(1, 1).at(7), 0);
        let order = DataOrder::new(1, 7473);
        assert_eq!(order.steps(3.0, 64), 350);
        assert_eq!(order.steps(0.001, 64), 1);
        assert_eq!(order.epochs(7473 * 2), 2.0);
    }
}
