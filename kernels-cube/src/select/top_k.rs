//! Top-k of each row of a matrix, exact.

use cubecl::prelude::*;

use super::group::RowGroup;
use super::rank::{Appender, RowKeys, Selector, order_key};
use super::shape::{RowShape, row_of_group};
use crate::limits::{expect_buffer, expect_loop_budget, line_grid};
use crate::{DType, DeviceTensor, ProblemError};

/// In which order selected elements are returned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TopKOrder {
    /// By falling value; equal values by rising index.
    #[default]
    Value,
    /// By rising index.
    Index,
}

/// The largest elements of each row.
#[derive(Clone, Debug)]
pub struct TopK {
    /// f32 `[rows, k]`.
    pub values: DeviceTensor<2>,
    /// u32 `[rows, k]`, as the bits of a tensor of 4-byte elements.
    pub indices: cubecl::server::Handle,
}

/// The `k` largest elements of each row of `rows`, contiguous f32 `[rows, len]`.
///
/// Exact and the same on every device: equal values are taken by rising index, and NaN ranks below
/// everything.
///
/// # Errors
/// [`ProblemError`] if `rows` is not contiguous f32, is longer than 8192, or `k` is not between 1
/// and its length.
pub fn top_k(
    client: &Client,
    rows: &DeviceTensor<2>,
    k: usize,
    order: TopKOrder,
) -> Result<TopK, ProblemError> {
    let [count, len] = rows.shape();
    let device = client.properties();
    if rows.dtype() != DType::F32 {
        return Err(ProblemError::DTypeMismatch {
            argument: "rows",
            found: rows.dtype(),
            expected: DType::F32,
        });
    }
    if !rows.is_contiguous() {
        return Err(ProblemError::NotContiguous { argument: "rows" });
    }
    if count == 0 || !(1..=len).contains(&k) {
        return Err(ProblemError::Count {
            argument: "k",
            found: k,
            limit: len,
        });
    }
    let shape = RowShape::new(device, len)?;
    expect_buffer(device, "top-k", count * k * 4)?;
    let by_index = Selected::empty(client, count, k);
    // SAFETY: groups past the last row write nothing; a selection of k has k places.
    unsafe {
        top_k_rows::launch_unchecked(
            client,
            line_grid(device, "rows", count.div_ceil(shape.rows))?,
            shape.cube_dim(),
            rows.buffer_arg(),
            by_index.values.buffer_arg(),
            by_index.indices_arg(),
            count as u32,
            len as u32,
            k as u32,
            shape,
        );
    }
    if order == TopKOrder::Index || k == 1 {
        return Ok(by_index.into_top_k());
    }
    expect_loop_budget(device, "top-k by value", k)?;
    let by_value = Selected::empty(client, count, k);
    let units = 128;
    // SAFETY: one unit to an entry, and every entry of a row has a rank of its own below k.
    unsafe {
        sort_rows::launch_unchecked(
            client,
            line_grid(device, "rows", (count * k).div_ceil(units))?,
            CubeDim::new_1d(units as u32),
            by_index.values.buffer_arg(),
            by_index.indices_arg(),
            by_value.values.buffer_arg(),
            by_value.indices_arg(),
            (count * k) as u32,
            k as u32,
        );
    }
    Ok(by_value.into_top_k())
}

struct Selected {
    values: DeviceTensor<2>,
    indices: cubecl::server::Handle,
}

impl Selected {
    fn empty(client: &Client, rows: usize, k: usize) -> Self {
        Self {
            values: DeviceTensor::empty(client, [rows, k], DType::F32),
            indices: client.empty(rows * k * 4),
        }
    }

    fn indices_arg(&self) -> BufferArg {
        // SAFETY: allocated with one word for each value.
        unsafe { BufferArg::from_raw_parts(self.indices.clone(), self.values.len()) }
    }

    fn into_top_k(self) -> TopK {
        TopK {
            values: self.values,
            indices: self.indices,
        }
    }
}

/// Each row's selection, by rising index.
#[cube(launch_unchecked, address_type = "u32")]
fn top_k_rows(
    bits: &[u32],
    values: &mut [u32],
    indices: &mut [u32],
    rows: u32,
    len: u32,
    k: u32,
    #[comptime] shape: RowShape,
) {
    let row = row_of_group(shape);
    // Whole groups stop together, and with them a cube that is one group.
    if row < rows {
        let mut group = RowGroup::new(shape.width, shape.planes);
        let start = row as usize * len as usize;
        let keys = RowKeys::read(bits, start, len, &group, shape);
        let mut selector = Selector::new(keys.cut(&mut group, k));
        let mut entries = Appender {
            start: row as usize * k as usize,
            len: 0,
        };
        #[unroll(shape.planes)]
        for c in 0..keys.elements {
            let selected = selector.next(&mut group, keys.key(c));
            let place = entries.place(&mut group, selected);
            if selected {
                let index = group.index(c);
                values[place] = bits[start + index as usize];
                indices[place] = index;
            }
        }
    }
}

/// Reorders each row of `k` entries by falling value; the entries come by rising index, which is how
/// equal values stay.
#[cube(launch_unchecked)]
fn sort_rows(
    values: &[u32],
    indices: &[u32],
    sorted_values: &mut [u32],
    sorted_indices: &mut [u32],
    entries: u32,
    k: u32,
) {
    let entry = (CUBE_POS_Y * CUBE_COUNT_X + CUBE_POS_X) * CUBE_DIM + UNIT_POS;
    if entry < entries {
        let start = entry / k * k;
        let own = order_key(values[entry as usize]);
        let mut rank = 0u32;
        for i in 0..k {
            let other = order_key(values[(start + i) as usize]);
            let before = other > own || (other == own && start + i < entry);
            rank += u32::cast_from(before);
        }
        sorted_values[(start + rank) as usize] = values[entry as usize];
        sorted_indices[(start + rank) as usize] = indices[entry as usize];
    }
}
