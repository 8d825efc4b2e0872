//! Which instruction set the kernels use: found once, and the same bits whichever it is.

use std::cell::Cell;
use std::sync::OnceLock;

/// Instruction sets with kernels of their own, from the slowest to the fastest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust with `f32::mul_add`; what the compiler makes of it.
    Portable,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ, VL.
    Avx512,
}

impl Isa {
    /// The best instruction set of this machine.
    ///
    /// `TINYLORA_ISA=portable|avx2|avx512` asks for a lower one, to measure or to find a fault.
    pub fn detected() -> Self {
        static DETECTED: OnceLock<Isa> = OnceLock::new();
        *DETECTED.get_or_init(|| {
            let best = Self::of_machine();
            match std::env::var("TINYLORA_ISA").as_deref() {
                Ok("portable") => Self::Portable,
                Ok("avx2") => best.min(Self::Avx2),
                _ => best,
            }
        })
    }

    #[cfg(target_arch = "x86_64")]
    fn of_machine() -> Self {
        let avx2 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        match (avx2, avx512) {
            (true, true) => Self::Avx512,
            (true, false) => Self::Avx2,
            _ => Self::Portable,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn of_machine() -> Self {
        Self::Portable
    }

    /// What kernels called from this thread use. They hand it on to the threads that help them.
    pub fn current() -> Self {
        FORCED.get().unwrap_or_else(Self::detected)
    }

    /// Run `f` with kernels of at most this instruction set on the calling thread.
    pub fn with<T>(self, f: impl FnOnce() -> T) -> T {
        let before = FORCED.replace(Some(self.min(Self::detected())));
        let result = f();
        FORCED.set(before);
        result
    }

    /// Instruction sets this machine can run: what tests compare.
    pub fn available() -> Vec<Self> {
        [Self::Portable, Self::Avx2, Self::Avx512]
            .into_iter()
            .filter(|&isa| isa <= Self::detected())
            .collect()
    }
}

thread_local! {
    static FORCED: Cell<Option<Isa>> = const { Cell::new(None) };
}

/// Define a function which runs `$generic` with the vectors of the `isa` it is given.
///
/// `$generic` must be `#[inline(always)]`, so that it is compiled once for each instruction set.
macro_rules! dispatch {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $generic:path) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name(isa: $crate::ops::cpu::isa::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                use $crate::ops::cpu::{isa::Isa, x86::{Avx2, Avx512}};

                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
                #[allow(clippy::too_many_arguments)]
                fn avx512($($arg: $ty),*) $(-> $ret)? {
                    // SAFETY: the features are enabled in this function.
                    $generic(unsafe { Avx512::new() }, $($arg),*)
                }

                #[target_feature(enable = "avx2,fma,f16c")]
                #[allow(clippy::too_many_arguments)]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    // SAFETY: the features are enabled in this function.
                    $generic(unsafe { Avx2::new() }, $($arg),*)
                }

                debug_assert!(isa <= Isa::detected());
                match isa {
                    // SAFETY: kernels get their `Isa` from `Isa::current`: at most what was detected.
                    Isa::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    Isa::Portable => {}
                }
            }
            let _ = isa;
            $generic($crate::ops::cpu::simd::Portable, $($arg),*)
        }
    };
}
pub(crate) use dispatch;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forcing_is_local_and_undone() {
        let before = Isa::current();
        Isa::Portable.with(|| assert_eq!(Isa::current(), Isa::Portable));
        assert_eq!(Isa::current(), before);
        assert!(Isa::available().contains(&before));
    }
}
