//! Moving tensors between host and device, and waiting for it.

use cubecl::client::Client;
use cubesla_kernels::select::TopK;
use cubesla_kernels::{DType, DeviceTensor};
use half::{bf16, f16};

use crate::Error;

/// Copies row-major `data` to the device, rounded to `dtype`.
///
/// # Errors
/// [`Error::Length`] if `data` does not fill `shape`.
pub fn upload<const R: usize>(
    client: &Client,
    data: &[f32],
    shape: [usize; R],
    dtype: DType,
) -> Result<DeviceTensor<R>, Error> {
    let expected = shape.iter().product();
    if data.len() != expected {
        return Err(Error::Length {
            argument: "data",
            found: data.len(),
            expected,
        });
    }
    let handle = match dtype {
        DType::F32 => client.create_from_slice(bytemuck::cast_slice(data)),
        DType::F16 => {
            let half: Vec<f16> = data.iter().map(|&x| f16::from_f32(x)).collect();
            client.create_from_slice(bytemuck::cast_slice(&half))
        }
        DType::BF16 => {
            let half: Vec<bf16> = data.iter().map(|&x| bf16::from_f32(x)).collect();
            client.create_from_slice(bytemuck::cast_slice(&half))
        }
    };
    let mut strides = [1; R];
    for axis in (1..R).rev() {
        strides[axis - 1] = strides[axis] * shape[axis];
    }
    Ok(DeviceTensor::new(handle, shape, strides, dtype)?)
}

/// Reads a tensor back in row-major order, whatever its strides. Waits for the work that writes it.
///
/// # Errors
/// [`Error::Device`] if that work failed.
pub fn download<const R: usize>(
    client: &Client,
    tensor: &DeviceTensor<R>,
) -> Result<Vec<f32>, Error> {
    let bytes = client
        .read_one(tensor.handle().clone())
        .map_err(|source| Error::Device {
            operation: "reading a tensor",
            source,
        })?;
    let buffer: Vec<f32> = match tensor.dtype() {
        DType::F32 => bytemuck::pod_collect_to_vec(&bytes),
        DType::F16 => bytemuck::pod_collect_to_vec::<u8, f16>(&bytes)
            .into_iter()
            .map(f16::to_f32)
            .collect(),
        DType::BF16 => bytemuck::pod_collect_to_vec::<u8, bf16>(&bytes)
            .into_iter()
            .map(bf16::to_f32)
            .collect(),
    };
    if tensor.is_contiguous() {
        return Ok(buffer[..tensor.len()].to_vec());
    }
    let (shape, strides) = (tensor.shape(), tensor.strides());
    Ok((0..tensor.len())
        .map(|mut at| {
            let mut offset = 0;
            for axis in (0..R).rev() {
                offset += at % shape[axis] * strides[axis];
                at /= shape[axis];
            }
            buffer[offset]
        })
        .collect())
}

/// Reads a selection back: its values and its indices, each `[rows, k]`.
///
/// # Errors
/// [`Error::Device`] if the work that makes them failed.
pub fn download_top_k(client: &Client, selected: &TopK) -> Result<(Vec<f32>, Vec<u32>), Error> {
    let values = download(client, &selected.values)?;
    let indices = client
        .read_one(selected.indices.clone())
        .map_err(|source| Error::Device {
            operation: "reading indices",
            source,
        })?;
    let indices: Vec<u32> = bytemuck::pod_collect_to_vec(&indices);
    Ok((values, indices))
}

/// Waits until the device has done everything that was enqueued.
///
/// # Errors
/// [`Error::Device`] if any of it failed.
pub fn sync(client: &Client) -> Result<(), Error> {
    cubecl::future::block_on(client.sync()).map_err(|source| Error::Device {
        operation: "work enqueued before",
        source,
    })
}
