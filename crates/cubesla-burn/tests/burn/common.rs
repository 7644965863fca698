//! Devices, values and comparisons.

use burn_core::backend::DispatchDevice;
use burn_core::tensor::{Device, Gradients, Tensor, TensorData};

/// The device that `CUBESLA_DEVICE` names, or the best.
pub fn device() -> Device {
    let device = cubesla::device::from_env().expect("these tests need a device");
    Device::new(DispatchDevice::Cube(device))
}

/// What Burn's own products of f32 are good for: on CUDA its tensor cores round the factors to TF32,
/// with 11 bits, and formulas here are made of them.
pub fn limit(exact: f64) -> f64 {
    let device = cubesla::device::from_env().ok();
    let name = device.and_then(|device| cubesla::device::name(&device));
    if name.is_some_and(|name| name.starts_with("cuda")) {
        exact.max(2e-3)
    } else {
        exact
    }
}

/// Values in [-1, 1) that look random and depend on the seed alone.
pub fn values(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

pub fn noise<const D: usize>(shape: [usize; D], seed: u64, device: &Device) -> Tensor<D> {
    let values = values(shape.iter().product(), seed);
    Tensor::from_data(TensorData::new(values, shape), device)
}

/// `[B, H, L, D]` as a module makes it: a view of `[B, L, H, D]`.
pub fn heads(shape: [usize; 4], seed: u64, device: &Device) -> Tensor<4> {
    let [batch, heads, len, dim] = shape;
    noise([batch, len, heads, dim], seed, device).swap_dims(1, 2)
}

/// A leaf of the autodiff graph.
pub fn leaf<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    tensor.detach().require_grad()
}

/// The same values without a gradient; `detach` alone leaves a leaf one.
pub fn constant<const D: usize>(tensor: &Tensor<D>) -> Tensor<D> {
    tensor.clone().detach().set_require_grad(false)
}

pub fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    let data = tensor.into_data().convert::<f32>();
    data.try_to_vec().expect("the data was converted to f32")
}

/// The distance over the length of the expected vector.
pub fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let square = |x: f32| f64::from(x) * f64::from(x);
    let distance: f64 = found.iter().zip(expected).map(|(f, e)| square(f - e)).sum();
    let length: f64 = expected.iter().map(|&e| square(e)).sum();
    assert!(
        distance.is_finite() && length.is_finite(),
        "NaN or infinity"
    );
    (distance / length.max(1e-30)).sqrt()
}

#[track_caller]
pub fn assert_close<const D: usize>(what: &str, found: Tensor<D>, expected: Tensor<D>, most: f64) {
    assert_eq!(found.dims(), expected.dims(), "{what}");
    let error = relative_error(&floats(found), &floats(expected));
    assert!(error < limit(most), "{what}: {error:e}");
}

/// The gradients of a weighted sum of `out`.
pub fn backward(out: Tensor<4>, seed: u64) -> Gradients {
    let weights = noise(out.dims(), seed, &out.device());
    (out * weights).sum().backward()
}

#[track_caller]
pub fn gradient<const D: usize>(leaf: &Tensor<D>, grads: &Gradients) -> Tensor<D> {
    leaf.grad(grads).expect("a leaf has a gradient")
}
