//! SoftTop-k: a differentiable selection whose rows sum to `k`.
//!
//! ```text
//! m_j = sigmoid(x_j / tau + lambda),  lambda such that sum_j m_j = k N
//! dx_j = (s_j / tau) (g_j - sum_l s_l g_l / sum_l s_l),  s_j = m_j (1 - m_j)
//! ```
//!
//! Source: SoftTop-k (arXiv 2403.19969), as SLA2 (arXiv 2602.12675) trains its router.

use cubecl::prelude::*;

use super::group::RowGroup;
use super::shape::{RowShape, elements, row_of_group};
use crate::limits::line_grid;
use crate::problem::expect_f32;
use crate::{DeviceTensor, ProblemError};

/// Bisections of `lambda`: the bracket, at most some hundreds wide, shrinks below the distance of
/// neighbouring f32.
const BISECTIONS: u32 = 34;

/// Within `TAIL` of the bracket's ends a sigmoid is 0 or 1 to f32's precision.
const TAIL: f32 = 18.0;

/// The soft selection of each row of `scores`, contiguous f32 `[B, Hq, M, N]`; each row of the
/// result sums to `ratio N`, within 1e-4 of it or of 1, the larger.
///
/// # Errors
/// [`ProblemError`] for scores that are not contiguous f32, a `tau` that is not positive and finite, a `ratio` outside (0, 1), or rows
/// longer than 8192.
pub fn soft_top_k(
    client: &Client,
    scores: &DeviceTensor<4>,
    tau: f32,
    ratio: f32,
) -> Result<DeviceTensor<4>, ProblemError> {
    let shape = scores.shape();
    expect_f32("scores", scores, shape)?;
    expect_temperature(tau)?;
    if !(ratio > 0.0 && ratio < 1.0) {
        return Err(ProblemError::Ratio { ratio });
    }
    let rows: usize = shape[..3].iter().product();
    let row_shape = RowShape::new(client.properties(), shape[3])?;
    let soft = DeviceTensor::empty(client, shape, scores.dtype());
    // SAFETY: groups past the last row do nothing, elements past a row's end are neither read nor
    // written.
    unsafe {
        soft_top_k_rows::launch_unchecked(
            client,
            line_grid(client.properties(), "rows", rows.div_ceil(row_shape.rows))?,
            row_shape.cube_dim(),
            scores.buffer_arg(),
            soft.buffer_arg(),
            rows as u32,
            shape[3] as u32,
            1.0 / tau,
            ratio * shape[3] as f32,
            row_shape,
        );
    }
    Ok(soft)
}

/// The gradient of [`soft_top_k`]'s scores, for the gradient `grad` of its result `soft`; each row
/// sums to 0. All are contiguous f32 `[B, Hq, M, N]`.
///
/// # Errors
/// As for [`soft_top_k`].
pub fn soft_top_k_backward(
    client: &Client,
    soft: &DeviceTensor<4>,
    grad: &DeviceTensor<4>,
    tau: f32,
) -> Result<DeviceTensor<4>, ProblemError> {
    let shape = soft.shape();
    expect_f32("soft", soft, shape)?;
    expect_f32("grad", grad, shape)?;
    expect_temperature(tau)?;
    let rows: usize = shape[..3].iter().product();
    let row_shape = RowShape::new(client.properties(), shape[3])?;
    let dscores = DeviceTensor::empty(client, shape, soft.dtype());
    // SAFETY: as for `soft_top_k`.
    unsafe {
        soft_top_k_backward_rows::launch_unchecked(
            client,
            line_grid(client.properties(), "rows", rows.div_ceil(row_shape.rows))?,
            row_shape.cube_dim(),
            soft.buffer_arg(),
            grad.buffer_arg(),
            dscores.buffer_arg(),
            rows as u32,
            shape[3] as u32,
            1.0 / tau,
            row_shape,
        );
    }
    Ok(dscores)
}

fn expect_temperature(tau: f32) -> Result<(), ProblemError> {
    if tau > 0.0 && tau.is_finite() {
        return Ok(());
    }
    Err(ProblemError::Temperature { tau })
}

/// `1 / (1 + e^-x)`, which neither overflows nor cancels.
#[cube]
fn sigmoid(x: f32) -> f32 {
    let e = (-x.abs()).exp();
    select(x >= 0.0, 1.0 / (1.0 + e), e / (1.0 + e))
}

/// The unit's elements of a row from `start`: numbers `unit`, `unit + width`, ...
#[cube]
fn read_row(
    row: &[f32],
    start: usize,
    len: u32,
    group: &RowGroup,
    #[comptime] shape: RowShape,
) -> Array<f32> {
    let mut values = Array::<f32>::new(shape.count);
    #[unroll(shape.planes)]
    for c in 0..elements(len, shape) {
        let at = group.index(c);
        let mut value = 0.0f32.runtime();
        if at < len {
            value = row[start + at as usize];
        }
        values[c] = value;
    }
    values
}

#[cube(launch_unchecked)]
fn soft_top_k_rows(
    scores: &[f32],
    soft: &mut [f32],
    rows: u32,
    len: u32,
    inverse_tau: f32,
    total: f32,
    #[comptime] shape: RowShape,
) {
    let row = row_of_group(shape);
    // Whole groups stop together, and with them a cube that is one group.
    if row < rows {
        let mut group = RowGroup::new(shape.width, shape.planes);
        let start = row as usize * len as usize;
        let mut x = read_row(scores, start, len, &group, shape);
        let mut own_max = f32::min_value();
        let mut own_min = f32::max_value();
        #[unroll(shape.planes)]
        for c in 0..elements(len, shape) {
            if group.index(c) < len {
                x[c] *= inverse_tau;
                own_max = max(own_max, x[c]);
                own_min = min(own_min, x[c]);
            }
        }
        let largest = group.max_f32(own_max);
        let smallest = -group.max_f32(-own_min);

        // Twice: the second time from a bracket around the first answer, with the elements moved
        // there, where f32 is finer.
        let mut low = -largest - TAIL;
        let mut high = -smallest + TAIL;
        #[unroll]
        for pass in 0..2u32 {
            for _ in 0..BISECTIONS {
                let middle = low + (high - low) * 0.5;
                let mut own = 0.0f32;
                #[unroll(shape.planes)]
                for c in 0..elements(len, shape) {
                    if group.index(c) < len {
                        own += sigmoid(x[c] + middle);
                    }
                }
                if group.sum_f32(own) < total {
                    low = middle;
                } else {
                    high = middle;
                }
            }
            if comptime!(pass == 0) {
                #[unroll(shape.planes)]
                for c in 0..elements(len, shape) {
                    x[c] += low;
                }
                low = f32::new(-1.0e-3);
                high = f32::new(1.0e-3);
            }
        }
        #[unroll(shape.planes)]
        for c in 0..elements(len, shape) {
            let at = group.index(c);
            if at < len {
                soft[start + at as usize] = sigmoid(x[c] + high);
            }
        }
    }
}

#[cube(launch_unchecked)]
fn soft_top_k_backward_rows(
    soft: &[f32],
    grad: &[f32],
    dscores: &mut [f32],
    rows: u32,
    len: u32,
    inverse_tau: f32,
    #[comptime] shape: RowShape,
) {
    let row = row_of_group(shape);
    if row < rows {
        let mut group = RowGroup::new(shape.width, shape.planes);
        let start = row as usize * len as usize;
        // Elements that do not exist read as 0 and have no slope.
        let m = read_row(soft, start, len, &group, shape);
        let g = read_row(grad, start, len, &group, shape);
        let mut own_slope = 0.0f32;
        let mut own_product = 0.0f32;
        #[unroll(shape.planes)]
        for c in 0..elements(len, shape) {
            let slope = m[c] * (1.0 - m[c]);
            own_slope += slope;
            own_product += slope * g[c];
        }
        let slope_sum = group.sum_f32(own_slope);
        let product_sum = group.sum_f32(own_product);
        // A row of zeros and ones has no slope, and no gradient.
        let mean = select(slope_sum > 0.0, product_sum / slope_sum, 0.0);
        #[unroll(shape.planes)]
        for c in 0..elements(len, shape) {
            let at = group.index(c);
            if at < len {
                let slope = m[c] * (1.0 - m[c]);
                dscores[start + at as usize] = slope * inverse_tau * (g[c] - mean);
            }
        }
    }
}
