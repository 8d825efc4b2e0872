//! The functions of the CUDA driver and of the libraries beside it, looked up when they are first
//! needed.
//!
//! candle links these libraries, and a program that links one does not start where it is missing: not
//! even to say so. Here every function of theirs that the program uses is defined as a jump through a
//! table, and [`load`] fills the table. The linker then finds no use for the libraries themselves and
//! leaves them out (`scripts/build_cuda.sh` checks that it did). A function that is not in the list
//! below brings its library back into the program; it works, but no longer starts without a driver.

use std::ffi::{CStr, c_int, c_void};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

/// Fills the table.
///
/// # Errors
/// The library that cannot be loaded, with the system's reason.
pub fn load() -> Result<(), String> {
    static LOADED: OnceLock<Result<(), String>> = OnceLock::new();
    LOADED
        .get_or_init(|| LIBRARIES.iter().try_for_each(Library::load))
        .clone()
}

/// A shared library and the functions that are used of it.
struct Library {
    /// Names to try, the versioned one first.
    files: &'static [&'static CStr],
    /// What it is and where it comes from.
    advice: &'static str,
    functions: &'static [&'static CStr],
    table: &'static [AtomicPtr<c_void>],
}

impl Library {
    fn load(&self) -> Result<(), String> {
        let mut handle = std::ptr::null_mut();
        for file in self.files {
            // SAFETY: a name that ends with a zero byte. What runs when the library is loaded is
            // NVIDIA's code, as if it had been linked.
            handle = unsafe { libc::dlopen(file.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
            if !handle.is_null() {
                break;
            }
        }
        if handle.is_null() {
            return Err(format!("{} ({})", self.advice, last_error()));
        }
        for (function, place) in self.functions.iter().zip(self.table) {
            // SAFETY: an open library and a name that ends with a zero byte.
            let address = unsafe { libc::dlsym(handle, function.as_ptr()) };
            if address.is_null() {
                return Err(format!(
                    "{} is too old: it has no {}",
                    self.files[0].to_string_lossy(),
                    function.to_string_lossy()
                ));
            }
            place.store(address, Ordering::Relaxed);
        }
        Ok(())
    }
}

fn last_error() -> String {
    // SAFETY: the message is of this thread, and valid until its next call of this kind.
    unsafe {
        let message = libc::dlerror();
        match message.is_null() {
            true => "no reason given".to_owned(),
            false => CStr::from_ptr(message).to_string_lossy().into_owned(),
        }
    }
}

/// Defines functions as jumps through a table of their addresses, in order.
macro_rules! functions {
    ($table:ident, $names:ident, $missing:ident = $status:literal, $($name:ident)*) => {
        const $names: &[&CStr] = &[$(
            match CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                Ok(name) => name,
                Err(_) => panic!("a name with a zero byte"),
            }
        ),*];
        /// What stands in the table before the library is loaded.
        extern "C" fn $missing() -> c_int {
            $status
        }
        static $table: [AtomicPtr<c_void>; $names.len()] =
            [const { AtomicPtr::new($missing as *mut c_void) }; $names.len()];
        functions!(@each $table, 0usize, $($name)*);
    };
    (@each $table:ident, $at:expr,) => {};
    (@each $table:ident, $at:expr, $name:ident $($rest:ident)*) => {
        #[cfg(target_arch = "x86_64")]
        std::arch::global_asm!(
            concat!(".globl ", stringify!($name)),
            concat!(".type ", stringify!($name), ",@function"),
            concat!(stringify!($name), ":"),
            "jmp qword ptr [rip + {table} + 8 * {at}]",
            table = sym $table,
            at = const $at,
        );
        #[cfg(target_arch = "aarch64")]
        std::arch::global_asm!(
            concat!(".globl ", stringify!($name)),
            concat!(".type ", stringify!($name), ",%function"),
            concat!(stringify!($name), ":"),
            "adrp x16, {table} + 8 * {at}",
            "ldr x16, [x16, :lo12:{table} + 8 * {at}]",
            "br x16",
            table = sym $table,
            at = const $at,
        );
        functions!(@each $table, $at + 1usize, $($rest)*);
    };
}

const LIBRARIES: &[Library] = &[
    Library {
        files: &[c"libcuda.so.1", c"libcuda.so"],
        advice: "the NVIDIA driver is not there: install it, or take a build without CUDA",
        functions: DRIVER_NAMES,
        table: &DRIVER,
    },
    Library {
        files: &[c"libcublas.so.13", c"libcublas.so"],
        advice: "cuBLAS of CUDA 13 is not there: install the CUDA toolkit or the package nvidia-cublas, and put its folder on LD_LIBRARY_PATH",
        functions: BLAS_NAMES,
        table: &BLAS,
    },
    Library {
        files: &[c"libcurand.so.10", c"libcurand.so"],
        advice: "cuRAND of CUDA 13 is not there: install the CUDA toolkit or the package nvidia-curand, and put its folder on LD_LIBRARY_PATH",
        functions: RAND_NAMES,
        table: &RAND,
    },
];

functions!(
    DRIVER, DRIVER_NAMES, missing_driver = 34,
    cuCtxDestroy_v2
    cuCtxGetCurrent
    cuCtxSetCurrent
    cuCtxSynchronize
    cuDeviceGet
    cuDeviceGetAttribute
    cuDeviceGetMemPool
    cuDevicePrimaryCtxRelease_v2
    cuDevicePrimaryCtxRetain
    cuEventCreate
    cuEventDestroy_v2
    cuEventRecord
    cuGetErrorString
    cuInit
    cuLaunchKernel
    cuMemAllocAsync
    cuMemAlloc_v2
    cuMemFreeAsync
    cuMemFree_v2
    cuMemPoolSetAttribute
    cuMemcpyDtoDAsync_v2
    cuMemcpyDtoHAsync_v2
    cuMemcpyHtoDAsync_v2
    cuMemcpyPeerAsync
    cuMemsetD8Async
    cuModuleGetFunction
    cuModuleLoad
    cuModuleLoadData
    cuModuleUnload
    cuStreamCreate
    cuStreamDestroy_v2
    cuStreamIsCapturing
    cuStreamSynchronize
    cuStreamWaitEvent
);

functions!(
    BLAS, BLAS_NAMES, missing_blas = 1,
    cublasCreate_v2
    cublasDestroy_v2
    cublasDgemmStridedBatched
    cublasGemmStridedBatchedEx
    cublasSetStream_v2
    cublasSgemmStridedBatched
);

functions!(
    RAND, RAND_NAMES, missing_rand = 203,
    curandCreateGenerator
    curandDestroyGenerator
    curandSetPseudoRandomGeneratorSeed
    curandSetStream
);
