//! Opening of a GPU, and what makes candle's kernels start faster on one.

use candle_core::Device;

use crate::{Error, Result};

/// Opens a CUDA device for work from this process's threads.
///
/// All of them use one stream, in which work runs in the order it was given: nothing has to be tracked
/// between streams, and the memory of freed tensors stays with the process for the next ones.
///
/// # Errors
/// [`Error::Config`] without a driver or a device of that number.
pub fn open_cuda(ordinal: usize) -> Result<Device> {
    cuda_driver().map_err(|why| Error::config(format!("device cuda:{ordinal}: {why}")))?;
    let fail = |e| Error::config(format!("cannot open cuda:{ordinal}: {e}"));
    let device = Device::new_cuda_with_stream(ordinal).map_err(fail)?;
    #[cfg(feature = "cuda")]
    tune(&device).map_err(fail)?;
    Ok(device)
}

/// Whether the driver and the libraries that come with CUDA are there for this build.
///
/// # Errors
/// What is missing, for people.
pub fn cuda_driver() -> std::result::Result<(), String> {
    #[cfg(all(feature = "cuda", target_os = "linux"))]
    super::cuda_driver::load()?;
    Ok(())
}

#[cfg(feature = "cuda")]
fn tune(device: &Device) -> candle_core::Result<()> {
    use candle_core::cuda_backend::WrapErr;
    use candle_core::cuda_backend::cudarc::driver::{result, sys};
    let cuda = device.as_cuda_device()?;
    let stream = cuda.cuda_stream();
    // SAFETY: tensors of this device are used on its one stream alone.
    unsafe { cuda.disable_event_tracking() };
    if stream.context().has_async_alloc() {
        let mut threshold = u64::MAX;
        // SAFETY: the device is open, and the attribute is read as the 64-bit number that it is.
        unsafe {
            let pool = result::device::get_mem_pool(stream.context().cu_device()).w()?;
            let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            result::mem_pool::set_attribute(pool, attribute, (&raw mut threshold).cast()).w()?;
        }
    }
    Ok(())
}

/// While the result lives, this thread's kernels take the shapes and strides they were given before
/// from the device, where candle would upload them with every kernel that needs them. For passes whose
/// sizes come again: they are kept as long as the process lives. Nothing on other devices.
pub fn reuse_sizes(device: &Device) -> impl Sized {
    #[cfg(feature = "cuda")]
    return device
        .as_cuda_device()
        .ok()
        .map(|cuda| cuda.enable_cuda_graph_htod_cache());
    #[cfg(not(feature = "cuda"))]
    let _ = device;
}
