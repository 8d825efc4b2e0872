//! Vectors of sixteen `f32`, the same arithmetic on every instruction set.
//!
//! A kernel is written once over [`Simd`]. Every operation is rounded once per lane as IEEE 754
//! says, and reductions go through one fixed tree, so all instruction sets give the same bits.

/// Lanes of a vector; also the width of a panel of weights or keys.
pub const LANES: usize = 16;

/// An instruction set at work. A value of the type is the proof that the machine has it.
pub trait Simd: Copy {
    type V: Copy;
    /// Sixteen bytes.
    type B: Copy;

    fn splat(self, x: f32) -> Self::V;
    /// # Safety
    /// Sixteen floats can be read at `p`.
    unsafe fn load_ptr(self, p: *const f32) -> Self::V;
    /// # Safety
    /// Sixteen floats can be written at `p`.
    unsafe fn store_ptr(self, p: *mut f32, v: Self::V);
    /// Widen sixteen bfloat16.
    ///
    /// # Safety
    /// Sixteen values can be read at `p`.
    unsafe fn load_bf16(self, p: *const half::bf16) -> Self::V;
    /// Widen sixteen IEEE half floats.
    ///
    /// # Safety
    /// Sixteen values can be read at `p`.
    unsafe fn load_f16(self, p: *const half::f16) -> Self::V;

    /// # Safety
    /// Sixteen bytes can be read at `p`.
    unsafe fn load_bytes(self, p: *const u8) -> Self::B;
    /// `mask` on every byte.
    fn bytes_and(self, b: Self::B, mask: u8) -> Self::B;
    fn bytes_or(self, a: Self::B, b: Self::B) -> Self::B;
    /// Shifts whole words: what comes in from a neighbouring byte is the caller's to mask.
    fn bytes_shr<const N: i32>(self, b: Self::B) -> Self::B;
    /// As [`Simd::bytes_shr`], to the left.
    fn bytes_shl<const N: i32>(self, b: Self::B) -> Self::B;
    fn widen_u8(self, b: Self::B) -> Self::V;
    fn widen_i8(self, b: Self::B) -> Self::V;

    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a · b + c`, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger; `b` where either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// `yes` where `a < b`, else `no` (also where either is NaN).
    fn select_lt(self, a: Self::V, b: Self::V, yes: Self::V, no: Self::V) -> Self::V;
    /// Multiply `p` by two to the `n`, where `t` holds `n + 1.5·2²³`; `p` near one.
    fn scale_exponent(self, p: Self::V, t: Self::V) -> Self::V;
    /// Bring a cache line closer, if the address is one of ours.
    #[inline(always)]
    fn prefetch<T>(self, _p: *const T) {}
    /// Rows become columns.
    fn transpose(self, rows: &mut [Self::V; LANES]);

    #[inline(always)]
    fn zero(self) -> Self::V {
        self.splat(0.0)
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::V {
        // SAFETY: an array of sixteen floats is behind the reference.
        unsafe { self.load_ptr(x.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, x: &mut [f32; LANES], v: Self::V) {
        // SAFETY: an array of sixteen floats is behind the reference.
        unsafe { self.store_ptr(x.as_mut_ptr(), v) }
    }

    /// Fewer than sixteen values, the rest `fill`.
    #[inline(always)]
    fn load_part(self, x: &[f32], fill: f32) -> Self::V {
        let mut buffer = [fill; LANES];
        buffer[..x.len()].copy_from_slice(x);
        self.load(&buffer)
    }

    /// The first `x.len()` lanes, fewer than sixteen.
    #[inline(always)]
    fn store_part(self, x: &mut [f32], v: Self::V) {
        let lanes = self.to_array(v);
        x.copy_from_slice(&lanes[..x.len()]);
    }

    #[inline(always)]
    fn to_array(self, v: Self::V) -> [f32; LANES] {
        let mut lanes = [0.0; LANES];
        self.store(&mut lanes, v);
        lanes
    }

    /// Sum of the lanes through the one fixed tree.
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        let a = self.to_array(v);
        let b: [f32; 8] = [
            a[0] + a[8],
            a[1] + a[9],
            a[2] + a[10],
            a[3] + a[11],
            a[4] + a[12],
            a[5] + a[13],
            a[6] + a[14],
            a[7] + a[15],
        ];
        let c = [b[0] + b[4], b[1] + b[5], b[2] + b[6], b[3] + b[7]];
        (c[0] + c[2]) + (c[1] + c[3])
    }

    /// Largest lane.
    #[inline(always)]
    fn max_lane(self, v: Self::V) -> f32 {
        let lanes = self.to_array(v);
        let mut largest = lanes[0];
        for &lane in &lanes[1..] {
            largest = if largest > lane { largest } else { lane };
        }
        largest
    }

    /// `eˣ` to about one unit in the last place; subnormal results are 0, NaN stays NaN.
    ///
    /// `x = n·ln 2 + r`, then a polynomial of degree 6 in `r`, |r| ≤ ½ ln 2, whose relative error
    /// is 3·10⁻⁹ (Remez exchange with the first two coefficients fixed to 1).
    #[inline(always)]
    fn exp(self, x: Self::V) -> Self::V {
        const MAGIC: f32 = 12_582_912.0; // 1.5·2²³: adding it rounds to an integer
        const LN2_HIGH: f32 = std::f32::consts::LN_2;
        const LN2_LOW: f32 = -1.904_654_3e-9;
        let t = self.fma(x, self.splat(std::f32::consts::LOG2_E), self.splat(MAGIC));
        let n = self.sub(t, self.splat(MAGIC));
        let r = self.fma(n, self.splat(-LN2_HIGH), x);
        let r = self.fma(n, self.splat(-LN2_LOW), r);
        let mut q = self.splat(0.001_381_454);
        for c in [0.008_368_745, 0.041_668_39, 0.166_665_21, 0.499_999_94] {
            q = self.fma(q, r, self.splat(c));
        }
        let p = self.fma(self.mul(q, r), r, self.add(r, self.splat(1.0)));
        let y = self.scale_exponent(p, t);
        // The larger bound lets infinities and NaN through as `x + ∞`.
        let high = self.splat(88.722_84);
        let infinite = self.add(x, self.splat(f32::INFINITY));
        let y = self.select_lt(high, x, infinite, y);
        let y = self.select_lt(x, self.splat(-87.336_54), self.zero(), y);
        self.select_lt(x, self.splat(f32::INFINITY), y, infinite)
    }
}

/// `half::f16::to_f32`, to the bit, but without branches or a question for the machine's features at every
/// number, so that a compiler makes vectors of it.
#[inline(always)]
fn widen_half(bits: u16) -> f32 {
    let bits = u32::from(bits);
    // With its exponent read as that of an f32, a number is 2¹¹² times too small; also a subnormal one.
    let scale = f32::from_bits((127 + 112) << 23);
    let finite = (f32::from_bits((bits & 0x7fff) << 13) * scale).to_bits();
    let infinite = if bits & 0x7c00 == 0x7c00 {
        0x7f80_0000
    } else {
        0
    };
    let quiet = if bits & 0x7fff > 0x7c00 {
        0x0040_0000
    } else {
        0
    };
    f32::from_bits((bits & 0x8000) << 16 | finite | infinite | quiet)
}

/// Plain Rust: right everywhere, the reference of the other instruction sets.
///
/// Compilers make it vectors where they may: for aarch64, which has NEON with fused multiply-adds
/// throughout, the loops of the micro-kernel have four `fmla` on four lanes for a vector of sixteen, and
/// no call and no spill (see `max_panels` in `tile.rs`).
#[derive(Clone, Copy)]
pub(crate) struct Portable;

impl Portable {
    /// As `map` of the array, which compilers leave a function of its own.
    #[inline(always)]
    fn widen<T: Copy>(narrow: [T; LANES], f: impl Fn(T) -> f32) -> [f32; LANES] {
        let mut out = [0.0; LANES];
        for (out, x) in out.iter_mut().zip(narrow) {
            *out = f(x);
        }
        out
    }

    #[inline(always)]
    fn map2(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
        let mut out = a;
        for (out, b) in out.iter_mut().zip(b) {
            *out = f(*out, b);
        }
        out
    }
}

impl Simd for Portable {
    type V = [f32; LANES];
    type B = u128;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; LANES]
    }

    #[inline(always)]
    unsafe fn load_ptr(self, p: *const f32) -> Self::V {
        // SAFETY: the caller promises sixteen readable floats; alignment is not assumed.
        unsafe { p.cast::<[f32; LANES]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store_ptr(self, p: *mut f32, v: Self::V) {
        // SAFETY: the caller promises sixteen writable floats; alignment is not assumed.
        unsafe { p.cast::<[f32; LANES]>().write_unaligned(v) }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, p: *const half::bf16) -> Self::V {
        // SAFETY: the caller promises sixteen readable values.
        let narrow = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        Self::widen(narrow, |bits| f32::from_bits(u32::from(bits) << 16))
    }

    #[inline(always)]
    unsafe fn load_f16(self, p: *const half::f16) -> Self::V {
        // SAFETY: the caller promises sixteen readable values.
        let narrow = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        Self::widen(narrow, widen_half)
    }

    #[inline(always)]
    unsafe fn load_bytes(self, p: *const u8) -> u128 {
        // SAFETY: the caller promises sixteen readable bytes.
        u128::from_le_bytes(unsafe { p.cast::<[u8; LANES]>().read_unaligned() })
    }

    #[inline(always)]
    fn bytes_and(self, b: u128, mask: u8) -> u128 {
        b & u128::from_ne_bytes([mask; LANES])
    }

    #[inline(always)]
    fn bytes_or(self, a: u128, b: u128) -> u128 {
        a | b
    }

    #[inline(always)]
    fn bytes_shr<const N: i32>(self, b: u128) -> u128 {
        b >> N
    }

    #[inline(always)]
    fn bytes_shl<const N: i32>(self, b: u128) -> u128 {
        b << N
    }

    #[inline(always)]
    fn widen_u8(self, b: u128) -> Self::V {
        Self::widen(b.to_le_bytes(), f32::from)
    }

    #[inline(always)]
    fn widen_i8(self, b: u128) -> Self::V {
        Self::widen(b.to_le_bytes(), |x| f32::from(x.cast_signed()))
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        Self::map2(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        Self::map2(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        Self::map2(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        Self::map2(a, b, |a, b| a / b)
    }

    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        let mut out = c;
        for i in 0..LANES {
            out[i] = a[i].mul_add(b[i], c[i]);
        }
        out
    }

    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        Self::map2(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn select_lt(self, a: Self::V, b: Self::V, yes: Self::V, no: Self::V) -> Self::V {
        let mut out = no;
        for i in 0..LANES {
            if a[i] < b[i] {
                out[i] = yes[i];
            }
        }
        out
    }

    #[inline(always)]
    fn scale_exponent(self, p: Self::V, t: Self::V) -> Self::V {
        Self::map2(p, t, |p, t| {
            f32::from_bits(p.to_bits().wrapping_add(t.to_bits() << 23))
        })
    }

    #[inline(always)]
    fn transpose(self, rows: &mut [Self::V; LANES]) {
        for i in 0..LANES {
            for j in 0..i {
                let upper = rows[j][i];
                rows[j][i] = rows[i][j];
                rows[i][j] = upper;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::isa::{Isa, dispatch};
    use super::super::testing::size;
    use super::*;

    #[inline(always)]
    fn exp_all<S: Simd>(s: S, x: &[f32; LANES], y: &mut [f32; LANES]) {
        s.store(y, s.exp(s.load(x)));
    }

    #[inline(always)]
    fn transpose_all<S: Simd>(s: S, x: &mut [[f32; LANES]; LANES]) {
        let mut rows = [s.zero(); LANES];
        for (row, x) in rows.iter_mut().zip(x.iter()) {
            *row = s.load(x);
        }
        s.transpose(&mut rows);
        for (row, x) in rows.iter().zip(x.iter_mut()) {
            s.store(x, *row);
        }
    }

    #[inline(always)]
    fn widen_all<S: Simd>(
        s: S,
        b: &[half::bf16; LANES],
        h: &[half::f16; LANES],
        y: &mut [[f32; LANES]; 2],
    ) {
        // SAFETY: the arrays hold sixteen values.
        unsafe {
            s.store(&mut y[0], s.load_bf16(b.as_ptr()));
            s.store(&mut y[1], s.load_f16(h.as_ptr()));
        }
    }

    dispatch! { fn exp16(x: &[f32; LANES], y: &mut [f32; LANES]) = exp_all }
    dispatch! { fn transpose16(x: &mut [[f32; LANES]; LANES]) = transpose_all }
    dispatch! { fn widen16(b: &[half::bf16; LANES], h: &[half::f16; LANES], y: &mut [[f32; LANES]; 2]) = widen_all }

    fn exp(isa: Isa, x: f32) -> f32 {
        let mut y = [0.0; LANES];
        exp16(isa, &[x; LANES], &mut y);
        y[3]
    }

    #[test]
    fn exp_is_within_two_ulp() {
        let mut worst = 0.0f64;
        let mut x = -87.3f32;
        while x < 88.7 {
            let got = exp(Isa::current(), x);
            let want = f64::from(x).exp();
            let ulp = f64::from((want as f32).next_up()) - f64::from(want as f32);
            worst = worst.max((f64::from(got) - want).abs() / ulp);
            x += size(0.003_7, 0.37);
        }
        assert!(worst < 1.5, "worst error {worst} ulp");
    }

    #[test]
    fn exp_at_the_edges() {
        for isa in Isa::available() {
            assert_eq!(exp(isa, 0.0), 1.0);
            assert_eq!(exp(isa, -0.0), 1.0);
            assert_eq!(exp(isa, f32::NEG_INFINITY), 0.0);
            assert_eq!(exp(isa, -1e30), 0.0);
            assert_eq!(exp(isa, -88.0), 0.0);
            assert_eq!(exp(isa, f32::INFINITY), f32::INFINITY);
            assert_eq!(exp(isa, 89.0), f32::INFINITY);
            assert!(exp(isa, 88.72).is_finite());
            assert!(exp(isa, f32::NAN).is_nan());
            assert!(exp(isa, f32::from_bits(0x7fc0_0123)).is_nan());
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        for isa in Isa::available() {
            let mut x = -90.0f32;
            while x < 90.0 {
                assert_eq!(exp(isa, x).to_bits(), exp(Isa::Portable, x).to_bits());
                x += size(0.37, 3.7);
            }
            let mut square = [[0.0; LANES]; LANES];
            for (i, row) in square.iter_mut().enumerate() {
                for (j, x) in row.iter_mut().enumerate() {
                    *x = (100 * i + j) as f32;
                }
            }
            transpose16(isa, &mut square);
            assert_eq!(square[3][14], 1403.0);
            assert_eq!(square[15][0], 15.0);
            for (i, row) in square.iter().enumerate() {
                for (j, &x) in row.iter().enumerate() {
                    assert_eq!(x, (100 * j + i) as f32);
                }
            }
            for first in (0..=u16::MAX).step_by(size(LANES, 61 * LANES)) {
                let bits: [u16; LANES] = std::array::from_fn(|i| first + i as u16);
                let (narrow, halves) = (
                    bits.map(half::bf16::from_bits),
                    bits.map(half::f16::from_bits),
                );
                let mut wide = [[0.0; LANES]; 2];
                widen16(isa, &narrow, &halves, &mut wide);
                let wide = wide.map(|row| row.map(f32::to_bits));
                assert_eq!(wide[0], bits.map(|x| u32::from(x) << 16));
                assert_eq!(wide[1], halves.map(|x| x.to_f32().to_bits()));
            }
        }
    }
}
