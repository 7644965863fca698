//! Exact selection of the largest elements of a row, without sorting it.
//!
//! Floats are compared through integers that order the same way, so that the answer is the same on
//! every device: NaN below everything, both zeros equal. The smallest selected key is found bit by
//! bit, each bit by counting; among elements equal to it, those of lower index are taken.

use cubecl::prelude::*;

use super::group::RowGroup;
use super::shape::{RowShape, elements};

/// Key of an element that does not exist, below that of NaN.
const ABSENT: u32 = 0;
const NAN: u32 = 1;
const ZERO: u32 = 0x8000_0000;

/// The elements of a row that a unit holds: numbers `unit`, `unit + width`, ...
#[derive(CubeType)]
pub(crate) struct RowKeys {
    keys: Array<u32>,
    /// How many of them may exist.
    pub elements: usize,
    #[cube(comptime)]
    shape: RowShape,
}

/// Where a selection ends: keys above `key`, and the first `ties` of those equal to it.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Cut {
    pub key: u32,
    pub ties: u32,
}

/// The integer that orders as the float of these bits does.
#[cube]
pub(crate) fn order_key(bits: u32) -> u32 {
    let magnitude = bits & 0x7FFF_FFFF;
    let key = select(bits == magnitude, bits | ZERO, !bits);
    let key = select(magnitude == 0, ZERO, key);
    select(magnitude > 0x7F80_0000, NAN, key)
}

/// The float whose key this is.
#[cube]
pub(crate) fn float_of_key(key: u32) -> f32 {
    f32::reinterpret(select(key >= ZERO, key ^ ZERO, !key))
}

#[cube]
impl RowKeys {
    /// Reads a row of `len` floats, given as bits, from `start`.
    pub fn read(
        bits: &[u32],
        start: usize,
        len: u32,
        group: &RowGroup,
        #[comptime] shape: RowShape,
    ) -> RowKeys {
        let mut keys = Array::<u32>::new(shape.count);
        let elements = elements(len, shape);
        #[unroll(shape.planes)]
        for c in 0..elements {
            let at = group.index(c);
            let mut key = ABSENT.runtime();
            if at < len {
                key = order_key(bits[start + at as usize]);
            }
            keys[c] = key;
        }
        RowKeys {
            keys,
            elements,
            shape,
        }
    }

    /// The unit's `c`-th key.
    pub fn key(&self, c: usize) -> u32 {
        self.keys[c]
    }

    /// Number of keys of the row that are at least `bound`.
    pub fn count_from(&self, group: &mut RowGroup, bound: u32) -> u32 {
        let mut found = 0u32;
        #[unroll(self.shape.planes)]
        for c in 0..self.elements {
            found += u32::cast_from(self.keys[c] >= bound);
        }
        group.sum(found)
    }

    /// The cut that selects exactly `k` elements, from 1 to the length of the row.
    pub fn cut(&self, group: &mut RowGroup, k: u32) -> Cut {
        let mut key = 0u32;
        let mut exact = false;
        let mut bit = 0x8000_0000u32;
        // The largest key that at least `k` keys reach; done early if exactly `k` do.
        while bit > 0 && !exact {
            let bound = key | bit;
            let reached = self.count_from(group, bound);
            if reached >= k {
                key = bound;
            }
            exact = reached == k;
            bit >>= 1;
        }
        let mut ties = u32::MAX.runtime();
        if !exact {
            ties = k - self.count_from(group, key + 1);
        }
        Cut { key, ties }
    }
}

/// Which elements of a chunk of a row lie before a cut; chunks are asked for in order.
#[derive(CubeType)]
pub(crate) struct Selector {
    cut: Cut,
    ties_seen: u32,
}

#[cube]
impl Selector {
    /// Before the first chunk.
    pub fn new(cut: Cut) -> Selector {
        Selector { cut, ties_seen: 0 }
    }

    /// Whether the unit's element of the next chunk, of key `key`, is selected.
    pub fn next(&mut self, group: &mut RowGroup, key: u32) -> bool {
        let tie = key == self.cut.key;
        let mut selected = key > self.cut.key;
        if self.cut.ties == u32::MAX {
            selected = selected || tie;
        } else {
            let (before, all) = group.count_before(tie);
            selected = selected || (tie && self.ties_seen + before < self.cut.ties);
            self.ties_seen += all;
        }
        selected
    }
}

/// Appends the indices of flagged elements, chunk after chunk, so that they ascend.
#[derive(CubeType)]
pub(crate) struct Appender {
    /// Where the row's entries begin in its output.
    pub start: usize,
    /// Entries written.
    pub len: u32,
}

#[cube]
impl Appender {
    /// The place of the unit's entry if it is flagged.
    pub fn place(&mut self, group: &mut RowGroup, flag: bool) -> usize {
        let (before, all) = group.count_before(flag);
        let place = self.start + (self.len + before) as usize;
        self.len += all;
        place
    }
}
