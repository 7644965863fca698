//! From scores to block lists, on the device.

use cubecl::prelude::*;

use super::group::RowGroup;
use super::rank::{Appender, Cut, RowKeys, Selector, float_of_key};
use super::shape::{RowShape, row_of_group};
use crate::block_list::BlockList;
use crate::limits::{expect_buffer, line_grid};
use crate::problem::expect_f32;
use crate::{DeviceTensor, ProblemError};

/// How many blocks of a row are critical.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Critical {
    /// Always so many.
    Count(usize),
    /// The fewest that hold a softmax mass of at least `mass`, between `min` and `max`.
    ///
    /// With `min` the count of a top-k this is the union of both selections.
    Mass {
        /// Above 0, at most 1.
        mass: f32,
        /// At least 1.
        min: usize,
        /// At most the length of a row.
        max: usize,
    },
}

impl Critical {
    /// The most blocks that a row can have.
    pub fn max(&self) -> usize {
        match *self {
            Critical::Count(count) => count,
            Critical::Mass { max, .. } => max,
        }
    }
}

/// The lists of a selection.
#[derive(Clone, Debug)]
pub struct BlockSelection {
    /// The critical blocks.
    pub critical: BlockList,
    /// The negligible blocks, if any were asked for.
    pub negligible: Option<BlockList>,
}

/// Ranks each row of `scores`, contiguous f32 `[B, Hq, M, N]`, and lists its largest elements as
/// critical and its `negligible` smallest as negligible; the rest is marginal.
///
/// Equal scores are taken by rising index, NaN ranks below everything; lists ascend. Counts give the
/// same lists on every device; where a mass falls on the edge of a block, the order of f32 sums
/// decides, which devices differ in. Nothing is read back.
///
/// # Errors
/// [`ProblemError`] for scores that are not contiguous f32, more than 8192 blocks in a row, counts
/// below 1 or above it, or a mass outside (0, 1].
pub fn select_blocks(
    client: &Client,
    scores: &DeviceTensor<4>,
    critical: Critical,
    negligible: usize,
) -> Result<BlockSelection, ProblemError> {
    let shape @ [batch, heads, query_blocks, key_blocks] = scores.shape();
    expect_f32("scores", scores, shape)?;
    let (min, max, mass) = match critical {
        Critical::Count(count) => (count, count, None),
        Critical::Mass { mass, min, max } => (min, max, Some(mass)),
    };
    for (argument, found, limit) in [
        ("critical", max, key_blocks),
        ("critical minimum", min, max),
        (
            "critical minimum + negligible",
            min + negligible,
            key_blocks,
        ),
    ] {
        if !(1..=limit).contains(&found) {
            return Err(ProblemError::Count {
                argument,
                found,
                limit,
            });
        }
    }
    if mass.is_some_and(|mass| !(mass > 0.0 && mass <= 1.0)) {
        return Err(ProblemError::Mass {
            mass: mass.unwrap_or_default(),
        });
    }

    let device = client.properties();
    let rows = batch * heads * query_blocks;
    let row_shape = RowShape::new(device, key_blocks)?;
    // A buffer must not be empty.
    let negligible_width = negligible.max(1);
    expect_buffer(device, "block list", rows * max.max(negligible_width) * 4)?;
    let list = |width: usize| {
        let indices = client.empty(rows * width * 4);
        let counts = client.empty(rows * 4);
        // SAFETY: the kernel below fills both with ascending indices below the row's length.
        unsafe { BlockList::from_handles(indices, counts, shape, width) }
    };
    let critical_list = list(max);
    let negligible_list = list(negligible_width);
    // SAFETY: a row's entries are at most its list's width, as counted from the same numbers.
    unsafe {
        let buffer =
            |handle: &cubecl::server::Handle, len| BufferArg::from_raw_parts(handle.clone(), len);
        select_block_rows::launch_unchecked(
            client,
            line_grid(
                device,
                "rows of the block list",
                rows.div_ceil(row_shape.rows),
            )?,
            row_shape.cube_dim(),
            scores.buffer_arg(),
            buffer(critical_list.indices(), rows * max),
            buffer(critical_list.counts(), rows),
            buffer(negligible_list.indices(), rows * negligible_width),
            buffer(negligible_list.counts(), rows),
            SelectScalarsLaunch::new(
                rows as u32,
                key_blocks as u32,
                min as u32,
                max as u32,
                mass.unwrap_or_default(),
                negligible as u32,
                negligible_width as u32,
            ),
            row_shape,
            mass.is_some(),
            negligible > 0,
        );
    }
    Ok(BlockSelection {
        critical: critical_list,
        negligible: (negligible > 0).then_some(negligible_list),
    })
}

/// Scalar arguments.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct SelectScalars {
    rows: u32,
    len: u32,
    min: u32,
    max: u32,
    mass: f32,
    negligible: u32,
    negligible_width: u32,
}

#[cube(launch_unchecked)]
fn select_block_rows(
    bits: &[u32],
    critical: &mut [u32],
    critical_counts: &mut [u32],
    negligible: &mut [u32],
    negligible_counts: &mut [u32],
    scalars: SelectScalars,
    #[comptime] shape: RowShape,
    #[comptime] by_mass: bool,
    #[comptime] with_negligible: bool,
) {
    let row = row_of_group(shape);
    // Whole groups stop together, and with them a cube that is one group.
    if row < scalars.rows {
        let mut group = RowGroup::new(shape.width, shape.planes);
        let start = row as usize * scalars.len as usize;
        let keys = RowKeys::read(bits, start, scalars.len, &group, shape);

        let mut count = scalars.max;
        if by_mass {
            count = mass_count(&keys, &mut group, scalars.mass, shape);
            count = clamp(count, scalars.min, scalars.max);
        }
        let mut critical_rows = Selector::new(keys.cut(&mut group, count));
        // The negligible are what the `len - negligible` largest leave.
        let kept = scalars.len - min(scalars.negligible, scalars.len - count);
        let kept_cut = if with_negligible {
            keys.cut(&mut group, kept)
        } else {
            Cut {
                key: 0u32.runtime(),
                ties: u32::MAX.runtime(),
            }
        };
        let mut kept_rows = Selector::new(kept_cut);
        let mut critical_entries = Appender {
            start: row as usize * scalars.max as usize,
            len: 0,
        };
        let mut negligible_entries = Appender {
            start: row as usize * scalars.negligible_width as usize,
            len: 0,
        };
        #[unroll(shape.planes)]
        for c in 0..keys.elements {
            let key = keys.key(c);
            let index = group.index(c);
            let is_critical = critical_rows.next(&mut group, key);
            let place = critical_entries.place(&mut group, is_critical);
            if is_critical {
                critical[place] = index;
            }
            if with_negligible {
                let is_kept = kept_rows.next(&mut group, key);
                let listed = !is_kept && index < scalars.len;
                let place = negligible_entries.place(&mut group, listed);
                if listed {
                    negligible[place] = index;
                }
            }
        }
        if group.unit == 0 {
            critical_counts[row as usize] = critical_entries.len;
            negligible_counts[row as usize] = negligible_entries.len;
        }
    }
}

/// The fewest of the largest elements whose softmax mass is at least `mass`.
#[cube]
fn mass_count(keys: &RowKeys, group: &mut RowGroup, mass: f32, #[comptime] shape: RowShape) -> u32 {
    let mut own = 0u32;
    #[unroll(shape.planes)]
    for c in 0..keys.elements {
        own = max(own, keys.key(c));
    }
    let top = group.max(own);
    let mut weights = Array::<f32>::new(shape.count);
    let mut sum = 0.0f32;
    #[unroll(shape.planes)]
    for c in 0..keys.elements {
        weights[c] = weight(keys.key(c), top);
        sum += weights[c];
    }
    let target = mass * group.sum_f32(sum);

    // The largest key such that keys from it on hold the target.
    let mut key = 0u32;
    let mut bit = 0x8000_0000u32;
    while bit > 0 {
        let bound = key | bit;
        let reached = mass_from(keys, &weights, group, bound, shape);
        if reached >= target && reached > 0.0 {
            key = bound;
        }
        bit >>= 1;
    }
    let above = keys.count_from(group, key + 1);
    let missing = target - mass_from(keys, &weights, group, key + 1, shape);
    let ties = (missing / weight(key, top)).ceil();
    above + u32::cast_from(max(ties, 0.0))
}

/// Mass of the keys that are at least `bound`.
#[cube]
fn mass_from(
    keys: &RowKeys,
    weights: &Array<f32>,
    group: &mut RowGroup,
    bound: u32,
    #[comptime] shape: RowShape,
) -> f32 {
    let mut found = 0.0f32;
    #[unroll(shape.planes)]
    for c in 0..keys.elements {
        found += select(keys.key(c) >= bound, weights[c], 0.0);
    }
    group.sum_f32(found)
}

/// `exp(x - max)` of the element of this key, 0 for NaN and for none, 1 for the largest even if it
/// is infinite.
#[cube]
fn weight(key: u32, top: u32) -> f32 {
    let mut w = (float_of_key(key) - float_of_key(top)).exp();
    if key == top {
        w = 1.0f32.runtime();
    }
    select(key > 1, w, 0.0)
}
