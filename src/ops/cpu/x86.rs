//! AVX2 and AVX-512 vectors.
//!
//! The values [`Avx2`] and [`Avx512`] are made only inside functions compiled for these features
//! (see `dispatch!`), so that `self` proves that the machine has the features: which is what makes the
//! intrinsics below sound and lets them be inlined.

use super::simd::{LANES, Simd};
use std::arch::x86_64::*;

/// Operations on sixteen bytes, which are the same instructions with AVX2 and with AVX-512.
macro_rules! bytes {
    () => {
        #[inline(always)]
        unsafe fn load_bytes(self, p: *const u8) -> __m128i {
            // SAFETY: `self` proves the features; the pointer is the caller's promise.
            unsafe { _mm_loadu_si128(p.cast()) }
        }

        #[inline(always)]
        fn bytes_and(self, b: __m128i, mask: u8) -> __m128i {
            // SAFETY: `self` proves the features.
            unsafe { _mm_and_si128(b, _mm_set1_epi8(mask.cast_signed())) }
        }

        #[inline(always)]
        fn bytes_or(self, a: __m128i, b: __m128i) -> __m128i {
            // SAFETY: `self` proves the features.
            unsafe { _mm_or_si128(a, b) }
        }

        #[inline(always)]
        fn bytes_shr<const N: i32>(self, b: __m128i) -> __m128i {
            // SAFETY: `self` proves the features.
            unsafe { _mm_srli_epi16::<N>(b) }
        }

        #[inline(always)]
        fn bytes_shl<const N: i32>(self, b: __m128i) -> __m128i {
            // SAFETY: `self` proves the features.
            unsafe { _mm_slli_epi16::<N>(b) }
        }
    };
}

#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// # Safety
    /// The machine has AVX-512 F, BW, DQ and VL.
    #[inline(always)]
    pub(crate) unsafe fn new() -> Self {
        Self(())
    }
}

impl Simd for Avx512 {
    type V = __m512;
    type B = __m128i;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn load_ptr(self, p: *const f32) -> __m512 {
        // SAFETY: `self` proves the features; the pointer is the caller's promise.
        unsafe { _mm512_loadu_ps(p) }
    }

    #[inline(always)]
    unsafe fn store_ptr(self, p: *mut f32, v: __m512) {
        // SAFETY: `self` proves the features; the pointer is the caller's promise.
        unsafe { _mm512_storeu_ps(p, v) }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, p: *const half::bf16) -> __m512 {
        // SAFETY: `self` proves the features; the pointer is the caller's promise.
        unsafe {
            let narrow = _mm256_loadu_si256(p.cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(narrow)))
        }
    }

    #[inline(always)]
    unsafe fn load_f16(self, p: *const half::f16) -> __m512 {
        // SAFETY: `self` proves the features; the pointer is the caller's promise.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }

    bytes!();

    #[inline(always)]
    fn widen_u8(self, b: __m128i) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(b)) }
    }

    #[inline(always)]
    fn widen_i8(self, b: __m128i) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(b)) }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_div_ps(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    fn select_lt(self, a: __m512, b: __m512, yes: __m512, no: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), no, yes) }
    }

    #[inline(always)]
    fn scale_exponent(self, p: __m512, t: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe {
            let n = _mm512_slli_epi32::<23>(_mm512_castps_si512(t));
            _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), n))
        }
    }

    #[inline(always)]
    fn prefetch<T>(self, p: *const T) {
        // SAFETY: `self` proves the features; a prefetch of any address is harmless.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }

    #[inline(always)]
    fn transpose(self, rows: &mut [__m512; LANES]) {
        let quads = [
            quad(self, rows, 0),
            quad(self, rows, 4),
            quad(self, rows, 8),
            quad(self, rows, 12),
        ];
        for i in 0..4 {
            // Column 4·block + i of four rows each.
            let [q0, q1, q2, q3] = [quads[0][i], quads[1][i], quads[2][i], quads[3][i]];
            // SAFETY: `self` proves the features.
            unsafe {
                let low = _mm512_shuffle_f32x4::<0b10_00_10_00>(q0, q1);
                let high = _mm512_shuffle_f32x4::<0b11_01_11_01>(q0, q1);
                let low2 = _mm512_shuffle_f32x4::<0b10_00_10_00>(q2, q3);
                let high2 = _mm512_shuffle_f32x4::<0b11_01_11_01>(q2, q3);
                rows[i] = _mm512_shuffle_f32x4::<0b10_00_10_00>(low, low2);
                rows[8 + i] = _mm512_shuffle_f32x4::<0b11_01_11_01>(low, low2);
                rows[4 + i] = _mm512_shuffle_f32x4::<0b10_00_10_00>(high, high2);
                rows[12 + i] = _mm512_shuffle_f32x4::<0b11_01_11_01>(high, high2);
            }
        }
    }
}

/// Rows `i..i + 4` of a block, transposed within each of their 128-bit blocks; `_s` proves that the
/// machine has AVX-512. Arrays are made as literals and never copied, so that they stay in registers.
#[inline(always)]
fn quad(_s: Avx512, rows: &[__m512; LANES], i: usize) -> [__m512; 4] {
    let [r0, r1, r2, r3] = [rows[i], rows[i + 1], rows[i + 2], rows[i + 3]];
    // SAFETY: see the parameter.
    unsafe {
        let low = _mm512_castps_pd(_mm512_unpacklo_ps(r0, r1));
        let high = _mm512_castps_pd(_mm512_unpackhi_ps(r0, r1));
        let low2 = _mm512_castps_pd(_mm512_unpacklo_ps(r2, r3));
        let high2 = _mm512_castps_pd(_mm512_unpackhi_ps(r2, r3));
        [
            _mm512_castpd_ps(_mm512_unpacklo_pd(low, low2)),
            _mm512_castpd_ps(_mm512_unpackhi_pd(low, low2)),
            _mm512_castpd_ps(_mm512_unpacklo_pd(high, high2)),
            _mm512_castpd_ps(_mm512_unpackhi_pd(high, high2)),
        ]
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// # Safety
    /// The machine has AVX2, FMA and F16C.
    #[inline(always)]
    pub(crate) unsafe fn new() -> Self {
        Self(())
    }
}

/// Two registers are one vector of sixteen.
#[derive(Clone, Copy)]
pub(crate) struct Pair(__m256, __m256);

impl Simd for Avx2 {
    type V = Pair;
    type B = __m128i;

    #[inline(always)]
    fn splat(self, x: f32) -> Pair {
        // SAFETY: `self` proves the features.
        let v = unsafe { _mm256_set1_ps(x) };
        Pair(v, v)
    }

    #[inline(always)]
    unsafe fn load_ptr(self, p: *const f32) -> Pair {
        // SAFETY: `self` proves the features; the pointer is the caller's promise.
        unsafe { Pair(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
    }

    #[inline(always)]
    unsafe fn store_ptr(self, p: *mut f32, v: Pair) {
        // SAFETY: `self` proves the features; the pointer is the caller's promise.
        unsafe {
            _mm256_storeu_ps(p, v.0);
            _mm256_storeu_ps(p.add(8), v.1);
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, p: *const half::bf16) -> Pair {
        // SAFETY: `self` proves the features; the pointer is the caller's promise.
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(8).cast()));
            Pair(
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            )
        }
    }

    #[inline(always)]
    unsafe fn load_f16(self, p: *const half::f16) -> Pair {
        // SAFETY: `self` proves the features; the pointer is the caller's promise.
        unsafe {
            Pair(
                _mm256_cvtph_ps(_mm_loadu_si128(p.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast())),
            )
        }
    }

    bytes!();

    #[inline(always)]
    fn widen_u8(self, b: __m128i) -> Pair {
        // SAFETY: `self` proves the features.
        unsafe {
            Pair(
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(b)),
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128::<8>(b))),
            )
        }
    }

    #[inline(always)]
    fn widen_i8(self, b: __m128i) -> Pair {
        // SAFETY: `self` proves the features.
        unsafe {
            Pair(
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128::<8>(b))),
            )
        }
    }

    #[inline(always)]
    fn add(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: `self` proves the features.
        unsafe { Pair(_mm256_add_ps(a.0, b.0), _mm256_add_ps(a.1, b.1)) }
    }

    #[inline(always)]
    fn sub(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: `self` proves the features.
        unsafe { Pair(_mm256_sub_ps(a.0, b.0), _mm256_sub_ps(a.1, b.1)) }
    }

    #[inline(always)]
    fn mul(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: `self` proves the features.
        unsafe { Pair(_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1)) }
    }

    #[inline(always)]
    fn div(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: `self` proves the features.
        unsafe { Pair(_mm256_div_ps(a.0, b.0), _mm256_div_ps(a.1, b.1)) }
    }

    #[inline(always)]
    fn fma(self, a: Pair, b: Pair, c: Pair) -> Pair {
        // SAFETY: `self` proves the features.
        unsafe {
            Pair(
                _mm256_fmadd_ps(a.0, b.0, c.0),
                _mm256_fmadd_ps(a.1, b.1, c.1),
            )
        }
    }

    #[inline(always)]
    fn max(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: `self` proves the features.
        unsafe { Pair(_mm256_max_ps(a.0, b.0), _mm256_max_ps(a.1, b.1)) }
    }

    #[inline(always)]
    fn select_lt(self, a: Pair, b: Pair, yes: Pair, no: Pair) -> Pair {
        // SAFETY: `self` proves the features.
        unsafe {
            Pair(
                _mm256_blendv_ps(no.0, yes.0, _mm256_cmp_ps::<_CMP_LT_OQ>(a.0, b.0)),
                _mm256_blendv_ps(no.1, yes.1, _mm256_cmp_ps::<_CMP_LT_OQ>(a.1, b.1)),
            )
        }
    }

    #[inline(always)]
    fn scale_exponent(self, p: Pair, t: Pair) -> Pair {
        // SAFETY: `self` proves the features.
        unsafe {
            let low = _mm256_slli_epi32::<23>(_mm256_castps_si256(t.0));
            let high = _mm256_slli_epi32::<23>(_mm256_castps_si256(t.1));
            Pair(
                _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p.0), low)),
                _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p.1), high)),
            )
        }
    }

    #[inline(always)]
    fn prefetch<T>(self, p: *const T) {
        // SAFETY: `self` proves the features; a prefetch of any address is harmless.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }

    #[inline(always)]
    fn transpose(self, rows: &mut [Pair; LANES]) {
        // SAFETY: `self` proves the features.
        let mut blocks = [[unsafe { _mm256_setzero_ps() }; 8]; 4];
        for i in 0..8 {
            blocks[0][i] = rows[i].0;
            blocks[1][i] = rows[i].1;
            blocks[2][i] = rows[8 + i].0;
            blocks[3][i] = rows[8 + i].1;
        }
        for block in &mut blocks {
            transpose8(self, block);
        }
        for i in 0..8 {
            rows[i] = Pair(blocks[0][i], blocks[2][i]);
            rows[8 + i] = Pair(blocks[1][i], blocks[3][i]);
        }
    }
}

/// An 8×8 block; `_s` proves that the machine has AVX2. Like [`quad`], without copies of arrays.
#[inline(always)]
fn transpose8(_s: Avx2, r: &mut [__m256; 8]) {
    // SAFETY: see the parameter.
    unsafe {
        let [r0, r1, r2, r3, r4, r5, r6, r7] = *r;
        let half = [quad8(_s, [r0, r1, r2, r3]), quad8(_s, [r4, r5, r6, r7])];
        for i in 0..4 {
            r[i] = _mm256_permute2f128_ps::<0x20>(half[0][i], half[1][i]);
            r[4 + i] = _mm256_permute2f128_ps::<0x31>(half[0][i], half[1][i]);
        }
    }
}

/// Four rows, transposed within each of their 128-bit blocks.
#[inline(always)]
fn quad8(_s: Avx2, [r0, r1, r2, r3]: [__m256; 4]) -> [__m256; 4] {
    // SAFETY: see the parameter of `transpose8`.
    unsafe {
        let low = _mm256_unpacklo_ps(r0, r1);
        let high = _mm256_unpackhi_ps(r0, r1);
        let low2 = _mm256_unpacklo_ps(r2, r3);
        let high2 = _mm256_unpackhi_ps(r2, r3);
        [
            _mm256_shuffle_ps::<0b01_00_01_00>(low, low2),
            _mm256_shuffle_ps::<0b11_10_11_10>(low, low2),
            _mm256_shuffle_ps::<0b01_00_01_00>(high, high2),
            _mm256_shuffle_ps::<0b11_10_11_10>(high, high2),
        ]
    }
}
