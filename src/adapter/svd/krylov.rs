//! The r largest singular triplets of a matrix that is only multiplied with.
//!
//! Randomised block Krylov iteration (Musco & Musco, NeurIPS 2015) on WᵀW, or on WWᵀ when that is
//! smaller: it is subspace iteration which keeps what it has seen, and so needs far fewer products
//! than the plain kind where singular values lie close together. The basis is kept orthonormal
//! against all of itself; when it grows too long it is replaced by its best Ritz vectors and
//! iteration goes on (thick restart, Wu & Simon 2000).
//!
//! Large products are those of [`PackedMatrix`] in f32; inner products accumulate in f64; the
//! projected eigenproblem is solved in f64.

use crate::ops::cpu::{self, PackedMatrix, symmetric_eigen};
use crate::ops::random::Stream;

/// Residual ‖Wᵀu − σv‖ that is accepted, relative to the gap that decides how far the subspace
/// can be off (sin θ ≤ residual / gap) …
const GAP_TOLERANCE: f64 = 2.5e-4;
/// … or relative to σ₁, where f32 products cannot resolve the gap.
const FLOOR: f64 = 3e-6;
/// Blocks after which the answer is taken as it is. Only spectra without a gap get here.
const MAX_BLOCKS: usize = 64;
/// Matrices with a side this short are projected on the whole space at once.
const DIRECT: usize = 64;

/// Elements of a matrix up to which its transpose is made: 64 MB.
const TRANSPOSED: usize = 16 << 20;

/// Keeps the random start apart from other users of the generator.
const DOMAIN: u32 = 3;

/// Left and right singular vectors by rows, `[r, out]` and `[r, in]`, and values, descending.
pub(super) struct Triplets {
    pub left: Vec<f32>,
    pub values: Vec<f64>,
    pub right: Vec<f32>,
}

/// The `rank` ≤ min(out, in) largest singular triplets of `w`, with arbitrary signs.
pub(super) fn largest_triplets(w: &PackedMatrix, rank: usize) -> Triplets {
    let side = Side::shorter(w);
    let mut basis = Basis::start(side.short(), rank);
    let mut next_check = basis.first_check;
    let mut blocks = 0;
    loop {
        basis.expand(&side);
        blocks += 1;
        let exhausted = basis.is_complete();
        if !exhausted && basis.projected < next_check {
            continue;
        }
        let ritz = basis.ritz(rank);
        let candidate = Candidate::new(&side, &ritz, rank);
        let gap = match ritz.values.get(rank) {
            Some(&next) => candidate.values[rank - 1] - next.max(0.0).sqrt(),
            None => f64::INFINITY,
        };
        let accepted = (GAP_TOLERANCE * gap).max(FLOOR * candidate.values[0]);
        // NaN among the weights ends the iteration: `accepted` is not above or below anything.
        let converged = candidate.residual <= accepted || accepted.is_nan();
        if exhausted || converged || blocks >= MAX_BLOCKS {
            return candidate.into_triplets(&side);
        }
        next_check = basis.projected + basis.first_check / 2;
        if next_check > basis.longest {
            basis.restart(&ritz);
            next_check = basis
                .first_check
                .max(basis.projected + basis.first_check / 2);
        }
    }
}

/// W seen from its shorter side: `towards` maps short vectors to long ones, `back` is its
/// transpose.
struct Side<'a> {
    w: &'a PackedMatrix,
    /// Wᵀ of a small matrix, made once instead of for every product with it; the same bits.
    transposed: Option<PackedMatrix>,
    short_is_in: bool,
}

impl<'a> Side<'a> {
    fn shorter(w: &'a PackedMatrix) -> Self {
        let elements = w.in_features() * w.out_features();
        Self {
            w,
            transposed: (elements <= TRANSPOSED).then(|| w.transposed()),
            short_is_in: w.in_features() <= w.out_features(),
        }
    }

    fn short(&self) -> usize {
        self.w.in_features().min(self.w.out_features())
    }

    fn long(&self) -> usize {
        self.w.in_features().max(self.w.out_features())
    }

    fn towards(&self, rows: &[f32]) -> Vec<f32> {
        let m = rows.len() / self.short();
        let mut image = vec![0.0; m * self.long()];
        match self.short_is_in {
            true => self.w.forward(rows, m, None, &mut image),
            false => self.by_transpose(rows, m, &mut image),
        }
        image
    }

    fn by_transpose(&self, rows: &[f32], m: usize, image: &mut [f32]) {
        match &self.transposed {
            Some(w) => w.forward(rows, m, None, image),
            None => self.w.backward(rows, m, image, false),
        }
    }

    fn back(&self, rows: &[f32]) -> Vec<f32> {
        let m = rows.len() / self.long();
        let mut image = vec![0.0; m * self.short()];
        match self.short_is_in {
            true => self.by_transpose(rows, m, &mut image),
            false => self.w.forward(rows, m, None, &mut image),
        }
        image
    }
}

/// Orthonormal vectors of length `n`, one after the other.
struct Rows {
    n: usize,
    data: Vec<f32>,
}

impl Rows {
    fn len(&self) -> usize {
        self.data.len() / self.n
    }

    fn iter(&self) -> impl Iterator<Item = &[f32]> {
        self.data.chunks_exact(self.n)
    }

    /// Appends the part of `z` outside the span, unless nothing but rounding is left of it.
    fn append(&mut self, mut z: Vec<f32>) {
        if self.len() >= self.n {
            return;
        }
        let original = norm(&z);
        let mut before = original;
        // Cancellation spoils a single pass; a repetition mends it, and three are never needed.
        for _ in 0..3 {
            for q in self.data.chunks_exact(self.n) {
                let along = cpu::dot(&z, q) as f32;
                cpu::subtract(&mut z, along, q);
            }
            let after = norm(&z);
            // Written so that NaN is dropped too.
            let substantial = after > 1e-6 * original;
            if !substantial {
                return;
            }
            if after > 0.5 * before {
                self.data
                    .extend(z.iter().map(|&x| (f64::from(x) / after) as f32));
                return;
            }
            before = after;
        }
    }

    /// Appends `count` random directions; `draw` keeps repeated calls apart.
    fn append_random(&mut self, count: usize, draw: u32) {
        let stream = Stream {
            seed: 0,
            domain: DOMAIN,
            index: draw,
        };
        for row in stream.normals(count * self.n).chunks_exact(self.n) {
            self.append(row.iter().map(|&x| x as f32).collect());
        }
    }
}

/// An orthonormal basis of a Krylov space, and the operator WᵀW projected on it.
struct Basis {
    /// Those from `projected` on are the block that comes next.
    rows: Rows,
    /// `operator[i][j]` = qᵢᵀ WᵀW qⱼ for i, j < `projected`.
    operator: Vec<Vec<f64>>,
    projected: usize,
    /// Rows of a block.
    block: usize,
    /// Enough rows to look at the result for the first time.
    first_check: usize,
    /// Rows above which the basis is restarted.
    longest: usize,
    /// Random blocks drawn so far.
    draws: u32,
}

/// Ritz values of the projected operator, descending, and the first `kept` vectors, by rows.
struct Ritz {
    values: Vec<f64>,
    vectors: Vec<f32>,
    kept: usize,
}

impl Basis {
    fn start(n: usize, rank: usize) -> Self {
        let block = (rank / 2).next_multiple_of(8).clamp(8, 64);
        let mut basis = Self {
            rows: Rows {
                n,
                data: Vec::new(),
            },
            operator: Vec::new(),
            projected: 0,
            block,
            first_check: rank + 6 * block,
            longest: 2 * rank + 12 * block,
            draws: 0,
        };
        if n <= DIRECT.max(rank + 2 * block) {
            basis.rows.data = vec![0.0; n * n];
            (0..n).for_each(|i| basis.rows.data[i * n + i] = 1.0);
        } else {
            basis.append_random();
        }
        basis
    }

    /// Nothing is left to expand with: the projection is exact.
    fn is_complete(&self) -> bool {
        self.projected == self.rows.len()
    }

    /// Applies the operator to the waiting block, and makes what is new in the image the next.
    fn expand(&mut self, side: &Side<'_>) {
        let (n, first) = (self.rows.n, self.projected);
        let image = side.back(&side.towards(&self.rows.data[first * n..]));
        for z in image.chunks_exact(n) {
            let row: Vec<f64> = self.rows.iter().map(|q| cpu::dot(z, q)).collect();
            self.operator[..first]
                .iter_mut()
                .zip(&row)
                .for_each(|(old, &x)| old.push(x));
            self.operator.push(row);
        }
        self.projected = self.rows.len();
        for z in image.chunks_exact(n) {
            self.rows.append(z.to_vec());
        }
        // An invariant space smaller than what is wanted: repeated or vanishing singular values.
        if self.is_complete() && self.rows.len() < self.first_check.min(n) {
            self.append_random();
        }
    }

    fn append_random(&mut self) {
        self.rows.append_random(self.block, self.draws);
        self.draws += 1;
    }

    /// Rayleigh–Ritz on the projected rows: a few more vectors than `rank`, for a restart.
    fn ritz(&self, rank: usize) -> Ritz {
        let p = self.projected;
        let mut matrix = vec![0.0; p * p];
        for i in 0..p {
            for j in 0..p {
                matrix[i * p + j] = (self.operator[i][j] + self.operator[j][i]) / 2.0;
            }
        }
        let (values, coefficients) = symmetric_eigen(matrix, p);
        let kept = (rank + self.block).min(p);
        let mut vectors = Vec::with_capacity(kept * self.rows.n);
        let mut sum = vec![0.0f64; self.rows.n];
        for row in coefficients.chunks_exact(p).take(kept) {
            sum.fill(0.0);
            for (q, &c) in self.rows.iter().zip(row) {
                sum.iter_mut()
                    .zip(q)
                    .for_each(|(s, &q)| *s += c * f64::from(q));
            }
            let norm = sum.iter().map(|x| x * x).sum::<f64>().sqrt();
            vectors.extend(sum.iter().map(|&x| (x / norm) as f32));
        }
        Ritz {
            values,
            vectors,
            kept,
        }
    }

    /// Keeps the best Ritz vectors and the block that comes next.
    fn restart(&mut self, ritz: &Ritz) {
        let waiting = self.rows.data.split_off(self.projected * self.rows.n);
        self.rows.data.clone_from(&ritz.vectors);
        self.projected = ritz.kept;
        self.operator = (0..ritz.kept)
            .map(|i| {
                (0..ritz.kept)
                    .map(|j| if i == j { ritz.values[i] } else { 0.0 })
                    .collect()
            })
            .collect();
        for z in waiting.chunks_exact(self.rows.n) {
            self.rows.append(z.to_vec());
        }
    }
}

/// The Ritz vectors as singular triplets, and how well they fit.
struct Candidate {
    short: Vec<f32>,
    values: Vec<f64>,
    long: Vec<f32>,
    /// Largest ‖Wᵀu − σv‖.
    residual: f64,
}

impl Candidate {
    fn new(side: &Side<'_>, ritz: &Ritz, rank: usize) -> Self {
        let (n, m) = (side.short(), side.long());
        let short = ritz.vectors[..rank * n].to_vec();
        let mut long = side.towards(&short);
        let values: Vec<f64> = long.chunks_exact(m).map(norm).collect();
        for (y, &sigma) in long.chunks_exact_mut(m).zip(&values) {
            let scale = if sigma > 0.0 { 1.0 / sigma } else { 0.0 };
            y.iter_mut()
                .for_each(|y| *y = (f64::from(*y) * scale) as f32);
        }
        let residual = side
            .back(&long)
            .chunks_exact(n)
            .zip(short.chunks_exact(n))
            .zip(&values)
            .map(|((back, v), &sigma)| {
                let square = |(&b, &v): (&f32, &f32)| (f64::from(b) - sigma * f64::from(v)).powi(2);
                back.iter().zip(v).map(square).sum::<f64>().sqrt()
            })
            .fold(0.0, f64::max);
        Self {
            short,
            values,
            long,
            residual,
        }
    }

    /// Sorts by value and completes the long vectors of vanishing values to an orthonormal set.
    fn into_triplets(self, side: &Side<'_>) -> Triplets {
        let (n, m) = (side.short(), side.long());
        let mut order: Vec<usize> = (0..self.values.len()).collect();
        order.sort_by(|&i, &j| self.values[j].total_cmp(&self.values[i]));
        let values: Vec<f64> = order.iter().map(|&i| self.values[i]).collect();
        let short = order
            .iter()
            .flat_map(|&i| self.short[i * n..][..n].iter().copied())
            .collect();

        let mut long = Rows {
            n: m,
            data: Vec::new(),
        };
        for &i in &order {
            if self.values[i] > 1e-6 * values[0] || !self.values[i].is_finite() {
                // Kept as it is: orthogonal to the others up to the residual.
                long.data.extend_from_slice(&self.long[i * m..][..m]);
                continue;
            }
            let (before, mut draw) = (long.len(), 0);
            while long.len() == before {
                long.append_random(1, draw);
                draw += 1;
            }
        }
        let (left, right) = match side.short_is_in {
            true => (long.data, short),
            false => (short, long.data),
        };
        Triplets {
            left,
            values,
            right,
        }
    }
}

fn norm(a: &[f32]) -> f64 {
    cpu::dot(a, a).sqrt()
}
