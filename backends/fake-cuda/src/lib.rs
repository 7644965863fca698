//! A CUDA driver that runs nothing.
//!
//! Put in place of `libcuda.so`, it lets `cubecl-cuda` start on a machine without a GPU: device
//! memory is host memory, streams and events do nothing, launches return at once. What is real is
//! everything before the driver, so a program that launches a kernel has it expanded by CubeCL and
//! compiled by NVRTC for the architecture asked for, and the PTX is left behind for `ptxas` to judge.
//!
//! | variable | meaning |
//! |---|---|
//! | `FAKE_CUDA_SM` | compute capability times ten: 80, 89, 90 (default), 120 |
//! | `FAKE_CUDA_PTX` | folder that receives `<kernel>.ptx` for each kernel loaded |
//!
//! `cargo xtask cuda` builds it and uses it. The functions are those that cubecl-cuda 0.11.3 calls,
//! under the names of the CUDA driver API.

#![allow(non_snake_case, missing_docs, clippy::missing_safety_doc)] // the driver API's own names

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr;
use std::sync::Mutex;

type Status = c_int;
type Address = u64;

const SUCCESS: Status = 0;
const OUT_OF_MEMORY: Status = 2;
const NOT_FOUND: Status = 500;

/// Alignment and header size of device allocations.
const ALIGNMENT: usize = 512;

/// Any non-null pointer: handles are never followed.
const TOKEN: *mut c_void = ptr::without_provenance_mut(1);

fn capability() -> c_int {
    std::env::var("FAKE_CUDA_SM")
        .ok()
        .and_then(|sm| sm.parse().ok())
        .unwrap_or(90)
}

/// Writes `value` where the driver's caller asked for it.
unsafe fn put<T>(place: *mut T, value: T) -> Status {
    // SAFETY: the driver API requires a valid place for every result.
    unsafe { place.write(value) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuInit(_flags: c_uint) -> Status {
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> Status {
    unsafe { put(version, 13_000) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> Status {
    unsafe { put(count, 1) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> Status {
    unsafe { put(device, ordinal) }
}

unsafe fn put_text(place: *mut c_char, len: c_int, text: &str) -> Status {
    let bytes = text.as_bytes();
    let count = bytes.len().min(len as usize - 1);
    // SAFETY: the caller's buffer has `len` bytes.
    unsafe {
        ptr::copy_nonoverlapping(bytes.as_ptr().cast(), place, count);
        place.add(count).write(0);
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, len: c_int, _device: c_int) -> Status {
    unsafe {
        put_text(
            name,
            len,
            &format!("no GPU, compiling for sm_{}", capability()),
        )
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetPCIBusId(id: *mut c_char, len: c_int, _: c_int) -> Status {
    unsafe { put_text(id, len, "0000:01:00.0") }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, _device: c_int) -> Status {
    unsafe { put(bytes, 80 << 30) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetAttribute(
    value: *mut c_int,
    attribute: c_int,
    _device: c_int,
) -> Status {
    let sm = capability();
    // Numbers of CUdevice_attribute; values of A100, RTX 4090, H100 and RTX 5090.
    let answer = match attribute {
        1..=3 => 1024,   // threads per block, block x and y
        4 => 64,         // block z
        5 => i32::MAX,   // grid x
        6 | 7 => 65_535, // grid y and z
        10 => 32,        // warp size
        16 => match sm {
            80 => 108,
            89 => 128,
            90 => 132,
            _ => 170,
        }, // multiprocessors
        75 => sm / 10,
        76 => sm % 10,
        97 => {
            1024 * match sm {
                80 => 163,
                90 => 227,
                _ => 99,
            }
        } // shared memory per block, opted in
        _ => 1,
    };
    unsafe { put(value, answer) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut *mut c_void, _: c_int) -> Status {
    unsafe { put(context, TOKEN) }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRelease_v2(_device: c_int) -> Status {
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetCurrent(_context: *mut c_void) -> Status {
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetCurrent(context: *mut *mut c_void) -> Status {
    unsafe { put(context, TOKEN) }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSynchronize() -> Status {
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetStreamPriorityRange(low: *mut c_int, high: *mut c_int) -> Status {
    unsafe {
        put(low, 0);
        put(high, -5)
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreate(stream: *mut *mut c_void, _flags: c_uint) -> Status {
    unsafe { put(stream, TOKEN) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreateWithPriority(
    stream: *mut *mut c_void,
    _flags: c_uint,
    _priority: c_int,
) -> Status {
    unsafe { put(stream, TOKEN) }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamDestroy_v2(_stream: *mut c_void) -> Status {
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamSynchronize(_stream: *mut c_void) -> Status {
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamQuery(_stream: *mut c_void) -> Status {
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamWaitEvent(_: *mut c_void, _event: *mut c_void, _: c_uint) -> Status {
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamIsCapturing(_: *mut c_void, capturing: *mut c_int) -> Status {
    unsafe { put(capturing, 0) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventCreate(event: *mut *mut c_void, _flags: c_uint) -> Status {
    unsafe { put(event, TOKEN) }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventDestroy_v2(_event: *mut c_void) -> Status {
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventRecord(_event: *mut c_void, _stream: *mut c_void) -> Status {
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventSynchronize(_event: *mut c_void) -> Status {
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventQuery(_event: *mut c_void) -> Status {
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventElapsedTime_v2(
    milliseconds: *mut f32,
    _start: *mut c_void,
    _end: *mut c_void,
) -> Status {
    unsafe { put(milliseconds, 1.0) }
}

/// Sizes of live allocations, which deallocation needs.
static ALLOCATIONS: Mutex<Option<HashMap<Address, Layout>>> = Mutex::new(None);

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAlloc_v2(address: *mut Address, bytes: usize) -> Status {
    let Ok(layout) = Layout::from_size_align(bytes.max(1), ALIGNMENT) else {
        return OUT_OF_MEMORY;
    };
    // SAFETY: the layout's size is not zero.
    let memory = unsafe { alloc_zeroed(layout) };
    if memory.is_null() {
        return OUT_OF_MEMORY;
    }
    let mut allocations = ALLOCATIONS.lock().unwrap();
    allocations
        .get_or_insert_default()
        .insert(memory as Address, layout);
    unsafe { put(address, memory as Address) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAllocAsync(
    address: *mut Address,
    bytes: usize,
    _stream: *mut c_void,
) -> Status {
    unsafe { cuMemAlloc_v2(address, bytes) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFree_v2(address: Address) -> Status {
    let mut allocations = ALLOCATIONS.lock().unwrap();
    if let Some(layout) = allocations.get_or_insert_default().remove(&address) {
        // SAFETY: `address` came from `cuMemAlloc_v2` with this layout and was live until now.
        unsafe { dealloc(address as *mut u8, layout) };
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFreeAsync(address: Address, _stream: *mut c_void) -> Status {
    unsafe { cuMemFree_v2(address) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAllocHost_v2(memory: *mut *mut c_void, bytes: usize) -> Status {
    let mut address = 0;
    // SAFETY: `address` is a place for the result.
    let status = unsafe { cuMemAlloc_v2(&mut address, bytes) };
    unsafe { memory.write(address as *mut c_void) };
    status
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFreeHost(memory: *mut c_void) -> Status {
    unsafe { cuMemFree_v2(memory as Address) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> Status {
    unsafe {
        put(free, 80 << 30);
        put(total, 80 << 30)
    }
}

unsafe fn copy(to: Address, from: Address, bytes: usize) -> Status {
    // SAFETY: device addresses are host addresses here, and the caller vouches for the ranges.
    unsafe { ptr::copy(from as *const u8, to as *mut u8, bytes) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyHtoDAsync_v2(
    to: Address,
    from: *const c_void,
    bytes: usize,
    _stream: *mut c_void,
) -> Status {
    unsafe { copy(to, from as Address, bytes) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoHAsync_v2(
    to: *mut c_void,
    from: Address,
    bytes: usize,
    _stream: *mut c_void,
) -> Status {
    unsafe { copy(to as Address, from, bytes) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoDAsync_v2(
    to: Address,
    from: Address,
    bytes: usize,
    _stream: *mut c_void,
) -> Status {
    unsafe { copy(to, from, bytes) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemsetD8Async(
    to: Address,
    value: u8,
    bytes: usize,
    _stream: *mut c_void,
) -> Status {
    // SAFETY: as in `copy`.
    unsafe { ptr::write_bytes(to as *mut u8, value, bytes) };
    SUCCESS
}

/// A module is its PTX, kept for the life of the process as CubeCL keeps modules.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadData(
    module: *mut *mut c_void,
    image: *const c_void,
) -> Status {
    // SAFETY: CubeCL loads PTX text, which ends with a NUL.
    let ptx = unsafe { CStr::from_ptr(image.cast()) }.to_owned();
    unsafe { put(module, ptx.into_raw().cast()) }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleUnload(_module: *mut c_void) -> Status {
    SUCCESS
}

/// Finds an entry in a module and leaves the module's PTX in the folder `FAKE_CUDA_PTX`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetFunction(
    function: *mut *mut c_void,
    module: *mut c_void,
    name: *const c_char,
) -> Status {
    // SAFETY: `module` came from `cuModuleLoadData`; `name` is a C string by contract.
    let (ptx, name) = unsafe { (CStr::from_ptr(module.cast()), CStr::from_ptr(name)) };
    let (ptx, name) = (ptx.to_string_lossy(), name.to_string_lossy());
    if !ptx.contains(&*name) {
        return NOT_FOUND;
    }
    if let Some(folder) = std::env::var_os("FAKE_CUDA_PTX") {
        let file = std::path::Path::new(&folder).join(format!("{name}.ptx"));
        if let Err(error) = std::fs::write(&file, ptx.as_bytes()) {
            eprintln!(
                "cubesla-fake-cuda: cannot write {}: {error}",
                file.display()
            );
            return NOT_FOUND;
        }
    }
    unsafe { put(function, TOKEN) }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFuncSetAttribute(_: *mut c_void, _attribute: c_int, _value: c_int) -> Status {
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFuncGetAttribute(
    value: *mut c_int,
    _attribute: c_int,
    _function: *mut c_void,
) -> Status {
    unsafe { put(value, 0) }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuLaunchKernel() -> Status {
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuLaunchKernelEx() -> Status {
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuTensorMapEncodeTiled(map: *mut [u64; 16]) -> Status {
    unsafe { put(map, [0; 16]) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorName(_: Status, name: *mut *const c_char) -> Status {
    unsafe { put(name, c"FAKE_CUDA_ERROR".as_ptr()) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorString(_: Status, text: *mut *const c_char) -> Status {
    unsafe { put(text, c"an error of the fake CUDA driver".as_ptr()) }
}
