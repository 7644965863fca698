//! Block lists of other libraries, to and from [`HostBlockList`].
//!
//! | library | format | from | to |
//! |---|---|---|---|
//! | SLA | absolute indices in any order, the same number in each row | [`from_sla`](HostBlockList::from_sla) | [`to_sla`](HostBlockList::to_sla) |
//! | SpargeAttn, SageSLA | first index, then differences; a count per row | [`from_delta`](HostBlockList::from_delta) | [`to_delta`](HostBlockList::to_delta) |
//! | LightX2V, VSA `q2k` | absolute ascending indices; a count per row | [`from_index_number`](HostBlockList::from_index_number) | [`to_index_number`](HostBlockList::to_index_number) |
//! | VSA `k2q` | the same for each key block | [`from_key_index_number`](HostBlockList::from_key_index_number) | [`to_key_index_number`](HostBlockList::to_key_index_number) |
//! | FlexAttention `BlockMask` | partial and full lists, both ways | [`from_flex`](HostBlockList::from_flex) | [`to_flex`](HostBlockList::to_flex) |
//! | FlashInfer | block compressed rows (BSR) | [`from_bsr`](HostBlockList::from_bsr) | [`to_bsr`](HostBlockList::to_bsr) |
//!
//! Indices are i32, as those libraries keep them.

use super::{HostBlockList, expect_len};
use crate::Error;

/// Indices with a count per row: `index [rows, width]`, `number [rows]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexNumber {
    /// Entries past a row's number are ignored when read, and 0 when written.
    pub index: Vec<i32>,
    /// Entries of each row.
    pub number: Vec<i32>,
    /// Entries that a row has room for.
    pub width: usize,
}

/// The lists of a FlexAttention `BlockMask`.
///
/// Full blocks need no element mask; partial blocks are those that its `mask_mod` cuts into. Here
/// both are attended to in full, but for the causal mask that an operation is asked for: convert a
/// `BlockMask` whose `mask_mod` is causal, or none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlexBlocks {
    /// `kv_indices`, `kv_num_blocks`: partial key blocks of each query block.
    pub kv: IndexNumber,
    /// `full_kv_indices`, `full_kv_num_blocks`.
    pub full_kv: Option<IndexNumber>,
    /// `q_indices`, `q_num_blocks`: partial query blocks of each key block.
    pub q: IndexNumber,
    /// `full_q_indices`, `full_q_num_blocks`.
    pub full_q: Option<IndexNumber>,
}

/// Block compressed rows over all `B * Hq * M` rows.
///
/// For one head this is the pair that FlashInfer takes; for several, cut `indptr` at multiples of
/// `M` and subtract the first entry of each cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bsr {
    /// Where each row begins in `indices`, and the end: `rows + 1` entries from 0.
    pub indptr: Vec<i32>,
    /// Key blocks, row after row.
    pub indices: Vec<i32>,
}

impl HostBlockList {
    /// From SLA's `lut [B, Hq, M, top_k]`: absolute indices in any order.
    ///
    /// # Errors
    /// [`Error::Length`], and the list errors for indices out of range or repeated.
    pub fn from_sla(shape: [usize; 4], top_k: usize, lut: &[i32]) -> Result<Self, Error> {
        expect_len("lut", lut.len(), rows_of(shape) * top_k)?;
        let rows = (0..rows_of(shape))
            .map(|row| {
                let mut indices = checked(shape, row, &lut[row * top_k..][..top_k])?;
                indices.sort_unstable();
                Ok(indices)
            })
            .collect::<Result<_, Error>>()?;
        Self::from_rows(shape, rows)
    }

    /// SLA's `top_k` and `lut [B, Hq, M, top_k]`.
    ///
    /// # Errors
    /// [`Error::ListNotUniform`] if rows differ in length.
    pub fn to_sla(&self) -> Result<(usize, Vec<i32>), Error> {
        let top_k = self.rows.first().map_or(0, Vec::len);
        if let Some(row) = self.rows.iter().position(|row| row.len() != top_k) {
            return Err(Error::ListNotUniform {
                format: "SLA's table",
                first: top_k,
                row,
                found: self.rows[row].len(),
            });
        }
        let lut = self.rows.iter().flatten().map(|&j| j as i32).collect();
        Ok((top_k, lut))
    }

    /// From SpargeAttn's `lut` (in each row the first index, then differences) and
    /// `valid_block_num`.
    ///
    /// # Errors
    /// [`Error::Length`], and the list errors for rows that are not ascending or out of range.
    pub fn from_delta(shape: [usize; 4], delta: &IndexNumber) -> Result<Self, Error> {
        let rows = delta.rows(rows_of(shape))?;
        let rows = rows
            .enumerate()
            .map(|(row, differences)| {
                let absolute: Vec<i32> = differences?
                    .iter()
                    .scan(0i32, |at, &difference| {
                        *at = at.saturating_add(difference);
                        Some(*at)
                    })
                    .collect();
                checked(shape, row, &absolute)
            })
            .collect::<Result<_, Error>>()?;
        Self::from_rows(shape, rows)
    }

    /// SpargeAttn's `lut [B, Hq, M, N]` and `valid_block_num [B, Hq, M]`.
    pub fn to_delta(&self) -> IndexNumber {
        let rows = self.rows.iter().map(|row| {
            let mut previous = 0;
            row.iter()
                .map(|&j| j - std::mem::replace(&mut previous, j))
                .collect()
        });
        IndexNumber::new(rows, self.shape[3])
    }

    /// From absolute ascending indices with a count per row.
    ///
    /// # Errors
    /// [`Error::Length`], and the list errors.
    pub fn from_index_number(shape: [usize; 4], list: &IndexNumber) -> Result<Self, Error> {
        Self::from_rows(shape, list.checked_rows(rows_of(shape), shape)?)
    }

    /// Absolute ascending indices with a count per row, `width = N`.
    pub fn to_index_number(&self) -> IndexNumber {
        IndexNumber::new(self.rows.iter().cloned(), self.shape[3])
    }

    /// From absolute ascending indices of query blocks with a count per key block.
    ///
    /// # Errors
    /// [`Error::Length`], and the list errors.
    pub fn from_key_index_number(shape: [usize; 4], list: &IndexNumber) -> Result<Self, Error> {
        let [batch, heads, query_blocks, key_blocks] = shape;
        let exchanged = [batch, heads, key_blocks, query_blocks];
        let keys = list.checked_rows(rows_of(exchanged), exchanged)?;
        Self::from_by_key(shape, keys)
    }

    /// Absolute ascending indices of query blocks with a count per key block, `width = M`.
    pub fn to_key_index_number(&self) -> IndexNumber {
        IndexNumber::new(self.by_key().into_iter(), self.shape[2])
    }

    /// From the partial and full lists of a FlexAttention `BlockMask`, by query block.
    ///
    /// # Errors
    /// [`Error::Length`], and the list errors; a block that is both partial and full is repeated.
    pub fn from_flex(shape: [usize; 4], flex: &FlexBlocks) -> Result<Self, Error> {
        let mut rows = flex.kv.checked_rows(rows_of(shape), shape)?;
        if let Some(full) = &flex.full_kv {
            let full = full.checked_rows(rows_of(shape), shape)?;
            for (row, full) in rows.iter_mut().zip(full) {
                row.extend(full);
            }
        }
        for row in &mut rows {
            row.sort_unstable();
        }
        Self::from_rows(shape, rows)
    }

    /// The lists of a FlexAttention `BlockMask` with no full blocks, both ways.
    pub fn to_flex(&self) -> FlexBlocks {
        FlexBlocks {
            kv: self.to_index_number(),
            full_kv: None,
            q: self.to_key_index_number(),
            full_q: None,
        }
    }

    /// From block compressed rows over all `B * Hq * M` rows.
    ///
    /// # Errors
    /// [`Error::Length`] if `indptr` is not ascending from 0 to `indices.len()`, and the list errors.
    pub fn from_bsr(shape: [usize; 4], bsr: &Bsr) -> Result<Self, Error> {
        expect_len("indptr", bsr.indptr.len(), rows_of(shape) + 1)?;
        expect_len("indptr[0]", bsr.indptr[0] as usize, 0)?;
        let end = bsr.indptr[rows_of(shape)] as usize;
        expect_len("indices", bsr.indices.len(), end)?;
        let rows = bsr
            .indptr
            .windows(2)
            .enumerate()
            .map(|(row, pair)| {
                let range = pair[0] as usize..pair[1] as usize;
                let indices = bsr.indices.get(range).ok_or(Error::ListCount {
                    row,
                    count: i64::from(pair[1]) - i64::from(pair[0]),
                    width: bsr.indices.len(),
                })?;
                checked(shape, row, indices)
            })
            .collect::<Result<_, Error>>()?;
        Self::from_rows(shape, rows)
    }

    /// Block compressed rows over all `B * Hq * M` rows.
    pub fn to_bsr(&self) -> Bsr {
        let mut indptr = vec![0];
        let mut indices = Vec::new();
        for row in &self.rows {
            indices.extend(row.iter().map(|&j| j as i32));
            indptr.push(indices.len() as i32);
        }
        Bsr { indptr, indices }
    }
}

impl IndexNumber {
    fn new(rows: impl ExactSizeIterator<Item = Vec<u32>>, width: usize) -> Self {
        let mut index = vec![0; rows.len() * width];
        let mut number = Vec::with_capacity(rows.len());
        for (slots, row) in index.chunks_exact_mut(width.max(1)).zip(rows) {
            number.push(row.len() as i32);
            for (slot, j) in slots.iter_mut().zip(row) {
                *slot = j as i32;
            }
        }
        Self {
            index,
            number,
            width,
        }
    }

    /// The counted entries of each of `count` rows.
    fn rows(
        &self,
        count: usize,
    ) -> Result<impl Iterator<Item = Result<&[i32], Error>> + '_, Error> {
        expect_len("number", self.number.len(), count)?;
        expect_len("index", self.index.len(), count * self.width)?;
        Ok(self.number.iter().enumerate().map(|(row, &number)| {
            let slots = &self.index[row * self.width..][..self.width];
            usize::try_from(number)
                .ok()
                .and_then(|number| slots.get(..number))
                .ok_or(Error::ListCount {
                    row,
                    count: number.into(),
                    width: self.width,
                })
        }))
    }

    fn checked_rows(&self, count: usize, shape: [usize; 4]) -> Result<Vec<Vec<u32>>, Error> {
        self.rows(count)?
            .enumerate()
            .map(|(row, indices)| checked(shape, row, indices?))
            .collect()
    }
}

/// `B * Hq * M`.
fn rows_of([batch, heads, query_blocks, _]: [usize; 4]) -> usize {
    batch * heads * query_blocks
}

/// The indices of a row, none of them negative.
fn checked(shape: [usize; 4], row: usize, indices: &[i32]) -> Result<Vec<u32>, Error> {
    indices
        .iter()
        .map(|&index| {
            u32::try_from(index).map_err(|_| Error::ListIndex {
                row,
                index: index.into(),
                key_blocks: shape[3],
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lists() -> impl Strategy<Value = HostBlockList> {
        ([1..3usize, 1..3usize, 1..5usize, 1..9usize], any::<u64>()).prop_flat_map(|(shape, _)| {
            let len = shape.iter().product::<usize>();
            proptest::collection::vec(any::<bool>(), len)
                .prop_map(move |mask| HostBlockList::from_mask(shape, &mask).unwrap())
        })
    }

    proptest! {
        #[test]
        fn every_format_round_trips(list in lists()) {
            let shape = list.shape();
            prop_assert_eq!(&HostBlockList::from_mask(shape, &list.to_mask())?, &list);
            prop_assert_eq!(&HostBlockList::from_delta(shape, &list.to_delta())?, &list);
            prop_assert_eq!(&HostBlockList::from_index_number(shape, &list.to_index_number())?, &list);
            let by_key = list.to_key_index_number();
            prop_assert_eq!(&HostBlockList::from_key_index_number(shape, &by_key)?, &list);
            prop_assert_eq!(&HostBlockList::from_flex(shape, &list.to_flex())?, &list);
            prop_assert_eq!(&HostBlockList::from_bsr(shape, &list.to_bsr())?, &list);
            prop_assert_eq!(&HostBlockList::from_by_key(shape, list.by_key())?, &list);
        }

        #[test]
        fn the_two_directions_of_flex_agree(list in lists()) {
            let flex = list.to_flex();
            let shape = list.shape();
            prop_assert_eq!(
                HostBlockList::from_key_index_number(shape, &flex.q)?,
                HostBlockList::from_index_number(shape, &flex.kv)?
            );
        }
    }

    #[test]
    fn sla_tables_are_sorted_and_must_be_uniform() {
        let shape = [1, 1, 2, 5];
        let list = HostBlockList::from_sla(shape, 2, &[3, 1, 0, 4]).unwrap();
        assert_eq!(list.row(0), [1, 3]);
        assert_eq!(list.to_sla().unwrap(), (2, vec![1, 3, 0, 4]));
        let ragged = HostBlockList::from_rows(shape, vec![vec![0], vec![]]).unwrap();
        assert!(matches!(
            ragged.to_sla(),
            Err(Error::ListNotUniform { row: 1, .. })
        ));
    }

    #[test]
    fn full_and_partial_blocks_of_flex_are_merged() {
        let list = |rows: [Vec<u32>; 2]| IndexNumber::new(rows.into_iter(), 3);
        let flex = FlexBlocks {
            kv: list([vec![2], vec![]]),
            full_kv: Some(list([vec![0], vec![1]])),
            q: list([vec![], vec![]]),
            full_q: None,
        };
        let merged = HostBlockList::from_flex([1, 1, 2, 3], &flex).unwrap();
        assert_eq!(merged.row(0), [0, 2]);
        assert_eq!(merged.row(1), [1]);
    }

    #[test]
    fn delta_codes_are_the_first_index_and_differences() {
        let list = HostBlockList::from_rows([1, 1, 1, 8], vec![vec![2, 3, 7]]).unwrap();
        let delta = list.to_delta();
        assert_eq!(
            (&delta.index[..3], &delta.number[..]),
            (&[2, 1, 4][..], &[3][..])
        );
    }

    #[test]
    fn bad_lists_are_refused() {
        let shape = [1, 1, 1, 4];
        let one = |indices: &[i32], number: i32| IndexNumber {
            index: indices.to_vec(),
            number: vec![number],
            width: indices.len(),
        };
        let read = |list: IndexNumber| HostBlockList::from_index_number(shape, &list).unwrap_err();
        assert!(matches!(
            read(one(&[4], 1)),
            Error::ListIndex { index: 4, .. }
        ));
        assert!(matches!(
            read(one(&[-1], 1)),
            Error::ListIndex { index: -1, .. }
        ));
        assert!(matches!(read(one(&[1, 1], 2)), Error::ListOrder { .. }));
        assert!(matches!(
            read(one(&[2, 1], 2)),
            Error::ListOrder {
                previous: 2,
                next: 1,
                ..
            }
        ));
        assert!(matches!(
            read(one(&[0, 1], 3)),
            Error::ListCount {
                count: 3,
                width: 2,
                ..
            }
        ));
        assert!(matches!(
            read(one(&[0], -1)),
            Error::ListCount { count: -1, .. }
        ));
        let bsr = Bsr {
            indptr: vec![0, 2],
            indices: vec![0],
        };
        assert!(HostBlockList::from_bsr(shape, &bsr).is_err());
        assert!(HostBlockList::from_mask(shape, &[true]).is_err());
        assert!(HostBlockList::from_sla(shape, 2, &[1, 1]).is_err());
    }
}
