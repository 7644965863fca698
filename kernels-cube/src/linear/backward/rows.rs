//! What the linear branch's gradient does row by row.

use cubecl::prelude::*;

use crate::limits::{expect_loop_budget, grid, line_grid};
use crate::linear::FeatureMap;
use crate::{DType, DeviceTensor, ProblemError};

/// Units that share a row.
const LANES: usize = 8;

/// Rows of a cube.
const ROWS: usize = 32;

/// Elements of a vector, which divide every width.
const WIDE: usize = 4;

type Wide<F> = Vector<F, Const<4>>;

/// `phi(Q) / n` in the type of `phi_q`, and `1 / n [B, H, L]`, both 0 where `n = phi(Q) . z` is;
/// `z [B, H, ceil(L / block), D]` is f32.
pub(crate) fn normalised(
    client: &Client,
    phi_q: &DeviceTensor<4>,
    z: &DeviceTensor<4>,
    block: usize,
) -> Result<(DeviceTensor<4>, DeviceTensor<3>), ProblemError> {
    let [batch, heads, len, dim] = phi_q.shape();
    expect_loop_budget(client.properties(), "rows of the linear branch", dim)?;
    let qn = DeviceTensor::empty(client, phi_q.shape(), phi_q.dtype());
    let inverse = DeviceTensor::empty(client, [batch, heads, len], DType::F32);
    // SAFETY: rows past the length do nothing.
    unsafe {
        normalise_kernel::launch_unchecked(
            client,
            row_grid(client, [batch, heads, len])?,
            CubeDim::new_1d((ROWS * LANES) as u32),
            AddressType::from_len(phi_q.len()),
            phi_q.buffer_arg(),
            z.buffer_arg(),
            qn.buffer_arg(),
            inverse.buffer_arg(),
            len,
            block,
            dim,
            phi_q.dtype().elem_type(),
        );
    }
    Ok((qn, inverse))
}

fn row_grid(client: &Client, [batch, heads, len]: [usize; 3]) -> Result<CubeCount, ProblemError> {
    let axes = [
        ("rows / 32", len.div_ceil(ROWS)),
        ("H", heads),
        ("B", batch),
    ];
    grid(client.properties(), axes)
}

/// A unit's row of its head, and the number of that head.
#[cube]
fn row_position() -> (usize, usize) {
    let row = CUBE_POS_X as usize * ROWS + UNIT_POS as usize / LANES;
    (row, (CUBE_POS_Z * CUBE_COUNT_Y + CUBE_POS_Y) as usize)
}

/// The sum over the units of a row. All units of the cube must call it, once.
#[cube]
fn row_sum(x: f32) -> f32 {
    let mut partial = Shared::<[f32]>::new_slice(comptime!(ROWS * LANES));
    partial[UNIT_POS as usize] = x;
    sync_cube();
    let mut sum = 0.0f32;
    #[unroll]
    for i in 0..LANES {
        sum += partial[UNIT_POS as usize / LANES * LANES + i];
    }
    sum
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn normalise_kernel<F: Float>(
    phi_q: &[Wide<F>],
    z: &[Wide<f32>],
    qn: &mut [Wide<F>],
    inverse: &mut [f32],
    len: usize,
    block: usize,
    #[comptime] dim: usize,
    #[define(F)] _dtype: ElemType,
) {
    let (row, head) = row_position();
    let lane = UNIT_POS as usize % LANES;
    let vectors = comptime!(dim / WIDE);
    let start = (head * len + row) * vectors;
    let state = (head * len.div_ceil(block) + row / block) * vectors;
    let mut sum = 0.0f32;
    if row < len {
        #[unroll]
        for step in 0..comptime!(vectors.div_ceil(LANES)) {
            let at = comptime!(step * LANES) + lane;
            if at < vectors {
                let products = Wide::<f32>::cast_from(phi_q[start + at]) * z[state + at];
                sum += element_sum(products);
            }
        }
    }
    let n = row_sum(sum);
    let factor = select(n == 0.0, 0.0, 1.0 / n);
    if row < len {
        #[unroll]
        for step in 0..comptime!(vectors.div_ceil(LANES)) {
            let at = comptime!(step * LANES) + lane;
            if at < vectors {
                let y = Wide::<f32>::cast_from(phi_q[start + at]);
                qn[start + at] = Wide::<F>::cast_from(y * Vector::new(factor));
            }
        }
        if lane == 0 {
            inverse[head * len + row] = factor;
        }
    }
}

#[cube]
fn element_sum(x: Wide<f32>) -> f32 {
    (x.extract(0usize) + x.extract(1usize)) + (x.extract(2usize) + x.extract(3usize))
}

/// Gradients of rows of features, before they pass through phi.
#[derive(Clone, Copy)]
pub(crate) struct FeatureGradient<'a> {
    /// The products, f32 `[B, H, L, D]`.
    pub products: &'a DeviceTensor<4>,
    /// A vector for each block of rows, f32 `[B, H, ceil(L / block), D]`.
    pub vectors: &'a DeviceTensor<4>,
    /// Rows of a block.
    pub block: usize,
    /// `delta` and `1 / n`, each `[B, H, L]`: the gradient is `(products - delta vector) / n`.
    /// Without them it is `products + vector`.
    pub rows: Option<[&'a DeviceTensor<3>; 2]>,
}

/// `others + dX` in the type of `phi_x`, where `dX` is the gradient of `X` for that of `phi(X)`:
/// `phi_x` and `others`, f32 or of its type, are contiguous `[B, H, L, D]`.
pub(crate) fn through_phi(
    client: &Client,
    phi_x: &DeviceTensor<4>,
    gradient: FeatureGradient<'_>,
    phi: FeatureMap,
    others: &DeviceTensor<4>,
) -> Result<DeviceTensor<4>, ProblemError> {
    let [batch, heads, len, dim] = phi_x.shape();
    expect_loop_budget(client.properties(), "the gradient of a feature map", dim)?;
    let out = DeviceTensor::empty(client, phi_x.shape(), phi_x.dtype());
    let FeatureGradient {
        products,
        vectors,
        block,
        rows,
    } = gradient;
    // An argument that the variant does not read.
    let [delta, inverse] = rows.map_or([products.buffer_arg(), products.buffer_arg()], |rows| {
        rows.map(DeviceTensor::buffer_arg)
    });
    // SAFETY: rows past the length do nothing.
    unsafe {
        through_phi_kernel::launch_unchecked(
            client,
            row_grid(client, [batch, heads, len])?,
            CubeDim::new_1d((ROWS * LANES) as u32),
            AddressType::from_len(products.len()),
            phi_x.buffer_arg(),
            products.buffer_arg(),
            vectors.buffer_arg(),
            delta,
            inverse,
            others.buffer_arg(),
            out.buffer_arg(),
            len,
            block,
            PhiConfig {
                dim,
                phi,
                normalised: rows.is_some(),
            },
            phi_x.dtype().elem_type(),
            others.dtype().elem_type(),
        );
    }
    Ok(out)
}

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct PhiConfig {
    dim: usize,
    phi: FeatureMap,
    normalised: bool,
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn through_phi_kernel<F: Float, G: Float>(
    phi_x: &[Wide<F>],
    products: &[Wide<f32>],
    vectors: &[Wide<f32>],
    delta: &[f32],
    inverse: &[f32],
    others: &[Wide<G>],
    out: &mut [Wide<F>],
    len: usize,
    block: usize,
    #[comptime] config: PhiConfig,
    #[define(F)] _dtype: ElemType,
    #[define(G)] _others_dtype: ElemType,
) {
    let width = comptime!(config.dim / WIDE);
    let steps = comptime!(width.div_ceil(LANES));
    let (row, head) = row_position();
    let lane = UNIT_POS as usize % LANES;
    let start = (head * len + row) * width;
    let vector = (head * len.div_ceil(block) + row / block) * width;
    let mut weight = 1.0f32.runtime();
    let mut factor = 1.0f32.runtime();
    if row < len && config.normalised {
        weight = -delta[head * len + row];
        factor = inverse[head * len + row];
    }
    let mut grads = Array::<Wide<f32>>::new(steps);
    let mut sum = 0.0f32;
    #[unroll]
    for step in 0..steps {
        let at = comptime!(step * LANES) + lane;
        let mut grad = Wide::<f32>::new(0.0f32);
        if row < len && at < width {
            let shared = vectors[vector + at] * Vector::new(weight);
            grad = (products[start + at] + shared) * Vector::new(factor);
            if comptime!(config.phi == FeatureMap::Softmax) {
                sum += element_sum(grad * Wide::<f32>::cast_from(phi_x[start + at]));
            }
        }
        grads[step] = grad;
    }
    let mut mean = 0.0f32.runtime();
    if comptime!(config.phi == FeatureMap::Softmax) {
        mean = row_sum(sum);
    }
    #[unroll]
    for step in 0..steps {
        let at = comptime!(step * LANES) + lane;
        if row < len && at < width {
            let y = Wide::<f32>::cast_from(phi_x[start + at]);
            let mut dx = Wide::<f32>::cast_from(others[start + at]);
            #[unroll]
            for e in 0..WIDE {
                let grad = (grads[step].extract(e) - mean) * slope(y.extract(e), config.phi);
                dx.insert(e, dx.extract(e) + grad);
            }
            out[start + at] = Wide::<F>::cast_from(dx);
        }
    }
}

/// The slope of phi where its value is `y`.
#[cube]
pub(super) fn slope(y: f32, #[comptime] phi: FeatureMap) -> f32 {
    match comptime!(phi) {
        FeatureMap::Softmax => y,
        // Above 1 it is x + 1, below it is the exponential, which is its own slope.
        FeatureMap::EluPlusOne => min(y, 1.0),
        FeatureMap::Relu => select(y > 0.0, 1.0f32, 0.0f32),
        FeatureMap::Identity => 1.0f32.runtime(),
    }
}

/// `x`, f32 and contiguous, in `dtype`.
pub(crate) fn rounded(
    client: &Client,
    x: &DeviceTensor<4>,
    dtype: DType,
) -> Result<DeviceTensor<4>, ProblemError> {
    if dtype == DType::F32 {
        return Ok(x.clone());
    }
    rounded_terms(client, x, None, dtype)
}

/// `x + y` in `dtype`: `x` is f32, `y` f32 or of `dtype`, both contiguous.
pub(crate) fn rounded_sum(
    client: &Client,
    x: &DeviceTensor<4>,
    y: &DeviceTensor<4>,
    dtype: DType,
) -> Result<DeviceTensor<4>, ProblemError> {
    rounded_terms(client, x, Some(y), dtype)
}

fn rounded_terms(
    client: &Client,
    x: &DeviceTensor<4>,
    y: Option<&DeviceTensor<4>>,
    dtype: DType,
) -> Result<DeviceTensor<4>, ProblemError> {
    let out = DeviceTensor::empty(client, x.shape(), dtype);
    let units = 256;
    let cubes = (x.len() / WIDE).div_ceil(units);
    // SAFETY: one unit to a vector.
    unsafe {
        round_kernel::launch_unchecked(
            client,
            line_grid(client.properties(), "elements", cubes)?,
            CubeDim::new_1d(units as u32),
            AddressType::from_len(x.len()),
            x.buffer_arg(),
            y.unwrap_or(x).buffer_arg(),
            out.buffer_arg(),
            y.is_some(),
            dtype.elem_type(),
            y.unwrap_or(x).dtype().elem_type(),
        );
    }
    Ok(out)
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn round_kernel<F: Float, G: Float>(
    x: &[Wide<f32>],
    y: &[Wide<G>],
    out: &mut [Wide<F>],
    #[comptime] adds: bool,
    #[define(F)] _dtype: ElemType,
    #[define(G)] _other_dtype: ElemType,
) {
    let cube = CUBE_POS_Y as usize * CUBE_COUNT_X as usize + CUBE_POS_X as usize;
    let at = cube * CUBE_DIM as usize + UNIT_POS as usize;
    if at < x.len() {
        let mut sum = x[at];
        if adds {
            sum += Wide::<f32>::cast_from(y[at]);
        }
        out[at] = Wide::<F>::cast_from(sum);
    }
}
