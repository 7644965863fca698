//! Rows with a scale each, in one kernel: a row comes from memory once, and from a cache when its
//! scale is known.

use cubecl::prelude::*;

use super::codes::{code, is_infinite, is_nan, magnitude, scale_of};
use super::{Format, Granularity};
use crate::limits::{expect_loop_budget, line_grid};
use crate::{DType, DeviceTensor, ProblemError};

/// Units of a cube, which has a row.
const UNITS: usize = 256;
/// Elements of a word, and of a vector.
const FOUR: usize = 4;

/// Whether [`launch`] can quantize `x`: 8 bits, a scale a row, no zero points, rows of whole vectors.
pub(super) fn fits(
    x: &DeviceTensor<2>,
    format: Format,
    granularity: Granularity,
    zero_point: bool,
) -> bool {
    granularity == Granularity::Row
        && !zero_point
        && format.per_word() == FOUR
        && x.is_aligned()
        && x.shape()[1].is_multiple_of(FOUR)
}

/// Writes the `words` of `x`, and gives the scales.
pub(super) fn launch(
    client: &Client,
    x: &DeviceTensor<2>,
    words: BufferArg,
    format: Format,
) -> Result<DeviceTensor<2>, ProblemError> {
    let device = client.properties();
    let [rows, columns] = x.shape();
    let pitch = format.words_per_row(columns);
    expect_loop_budget(device, "scales", 2 * pitch.div_ceil(UNITS) + 8)?;
    let grid = line_grid(device, "rows", rows)?;
    let scales = DeviceTensor::empty(client, [rows, 1], DType::F32);
    // SAFETY: a cube reads and writes its own row, if there is one.
    unsafe {
        encode_rows::launch_unchecked(
            client,
            grid,
            CubeDim::new_1d(UNITS as u32),
            AddressType::from_len(x.extent().max(rows * pitch)),
            FOUR,
            x.tensor_arg(),
            scales.buffer_arg(),
            words,
            rows as u32,
            (columns / FOUR) as u32,
            pitch as u32,
            format,
            x.dtype().elem_type(),
        );
    }
    Ok(scales)
}

/// A cube finds the scale of its row and then the row's codes; `filled` words hold elements.
#[cube(launch_unchecked, address_type = "dynamic")]
fn encode_rows<F: Float, N: Size>(
    x: &Tensor<Vector<F, N>>,
    scales: &mut [u32],
    words: &mut [u32],
    rows: u32,
    filled: u32,
    pitch: u32,
    #[comptime] format: Format,
    #[define(F)] _dtype: ElemType,
) {
    let row = CUBE_POS_Y * CUBE_COUNT_X + CUBE_POS_X;
    let inside = row < rows;
    let start = row as usize * x.stride(0) / FOUR;
    let mut peak = 0u32.runtime();
    for word in range_stepped(UNIT_POS, select(inside, filled, 0), UNITS as u32) {
        let four = Vector::<f32, N>::cast_from(x[start + word as usize]);
        #[unroll]
        for e in 0..FOUR {
            let size = magnitude(four.extract(e));
            let finite = !is_nan(size) && !is_infinite(size);
            // A NaN is larger than all else; FP8 has a code for it and leaves the scale alone.
            let counts = finite || (is_nan(size) && comptime!(format != Format::Fp8));
            peak = max(peak, select(counts, size, 0));
        }
    }
    let mut peaks = Shared::<[u32]>::new_slice(UNITS);
    let unit = UNIT_POS as usize;
    peaks[unit] = peak;
    #[unroll]
    for step in 0..comptime!(UNITS.ilog2() as usize) {
        let half = comptime!(UNITS >> (step + 1));
        sync_cube();
        if unit < half {
            peaks[unit] = max(peaks[unit], peaks[unit + half]);
        }
    }
    sync_cube();
    let peak = peaks[0];
    let scale = scale_of(peak, format);
    let bits = select(is_nan(peak), 0x7FC0_0000, u32::reinterpret(scale));
    let scale = f32::reinterpret(bits);
    if inside && unit == 0 {
        scales[row as usize] = bits;
    }
    for at in range_stepped(UNIT_POS, select(inside, pitch, 0), UNITS as u32) {
        let mut word = 0u32.runtime();
        if at < filled {
            let four = Vector::<f32, N>::cast_from(x[start + at as usize]);
            #[unroll]
            for e in 0..FOUR {
                let bits = code(four.extract(e), scale, 0.0, format, false);
                word |= bits << comptime!((8 * e) as u32);
            }
        }
        words[row as usize * pitch as usize + at as usize] = word;
    }
}
