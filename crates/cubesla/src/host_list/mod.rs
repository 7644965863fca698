//! Block lists on the host: checked construction, conversion, upload.

mod formats;

pub use formats::{Bsr, FlexBlocks, IndexNumber};

use cubecl::client::Client;
use cubesla_kernels::{BlockList, InverseBlockList};

use crate::Error;

/// For each (batch, query head, query block) the key blocks it attends to, ascending.
///
/// This is where lists made by hand or by another library are checked and converted; kernels read
/// the [`BlockList`] that [`upload`](Self::upload) makes of it.
///
/// ```
/// use cubesla::HostBlockList;
///
/// // One head, two query blocks, three key blocks.
/// let list = HostBlockList::from_mask([1, 1, 2, 3], &[true, false, true, false, false, false])?;
/// assert_eq!(list.row(0), [0, 2]);
/// assert!(list.row(1).is_empty());
/// # Ok::<(), cubesla::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostBlockList {
    shape: [usize; 4],
    rows: Vec<Vec<u32>>,
}

impl HostBlockList {
    /// A list of `shape` `[B, Hq, M, N]` from its `B * Hq * M` rows of strictly ascending key blocks.
    ///
    /// # Errors
    /// [`Error::Length`] for a wrong number of rows, [`Error::ListIndex`] and [`Error::ListOrder`]
    /// for rows that are out of range or out of order.
    pub fn from_rows(shape: [usize; 4], rows: Vec<Vec<u32>>) -> Result<Self, Error> {
        let [batch, heads, query_blocks, key_blocks] = shape;
        expect_len("rows", rows.len(), batch * heads * query_blocks)?;
        for (row, indices) in rows.iter().enumerate() {
            for &index in indices {
                if index as usize >= key_blocks {
                    return Err(Error::ListIndex {
                        row,
                        index: index.into(),
                        key_blocks,
                    });
                }
            }
            if let Some(pair) = indices.windows(2).find(|pair| pair[0] >= pair[1]) {
                return Err(Error::ListOrder {
                    row,
                    previous: pair[0],
                    next: pair[1],
                });
            }
        }
        Ok(Self { shape, rows })
    }

    /// Every key block for every query block: dense attention.
    pub fn dense(shape: [usize; 4]) -> Self {
        let [batch, heads, query_blocks, key_blocks] = shape;
        let row: Vec<u32> = (0..key_blocks as u32).collect();
        Self {
            shape,
            rows: vec![row; batch * heads * query_blocks],
        }
    }

    /// From a boolean block mask `[B, Hq, M, N]`, true where a block is attended to.
    ///
    /// # Errors
    /// [`Error::Length`] if `mask` does not fill `shape`.
    pub fn from_mask(shape: [usize; 4], mask: &[bool]) -> Result<Self, Error> {
        expect_len("mask", mask.len(), shape.iter().product())?;
        Ok(Self::from_predicate(shape, |at| mask[at]))
    }

    /// From SLA's three-way block map `[B, Hq, M, N]`: the critical blocks, those above 0.
    ///
    /// # Errors
    /// [`Error::Length`] if `map` does not fill `shape`.
    pub fn from_map(shape: [usize; 4], map: &[i8]) -> Result<Self, Error> {
        expect_len("map", map.len(), shape.iter().product())?;
        Ok(Self::from_predicate(shape, |at| map[at] > 0))
    }

    fn from_predicate(shape: [usize; 4], selected: impl Fn(usize) -> bool) -> Self {
        let [batch, heads, query_blocks, key_blocks] = shape;
        let rows = (0..batch * heads * query_blocks)
            .map(|row| {
                (0..key_blocks)
                    .filter(|j| selected(row * key_blocks + j))
                    .map(|j| j as u32)
                    .collect()
            })
            .collect();
        Self { shape, rows }
    }

    /// `[B, Hq, M, N]`.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// The key blocks of row `row`, counting over (batch, head, query block).
    pub fn row(&self, row: usize) -> &[u32] {
        &self.rows[row]
    }

    /// All rows.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = &[u32]> {
        self.rows.iter().map(Vec::as_slice)
    }

    /// Entries of the longest row.
    pub fn width(&self) -> usize {
        self.rows.iter().map(Vec::len).max().unwrap_or(0)
    }

    /// Selected blocks over all blocks.
    pub fn density(&self) -> f64 {
        let selected: usize = self.rows.iter().map(Vec::len).sum();
        selected as f64 / self.shape.iter().product::<usize>() as f64
    }

    /// The block mask `[B, Hq, M, N]`.
    pub fn to_mask(&self) -> Vec<bool> {
        let key_blocks = self.shape[3];
        let mut mask = vec![false; self.rows.len() * key_blocks];
        for (row, indices) in self.rows.iter().enumerate() {
            for &j in indices {
                mask[row * key_blocks + j as usize] = true;
            }
        }
        mask
    }

    /// For each (batch, head, key block) the query blocks that selected it, ascending.
    pub fn by_key(&self) -> Vec<Vec<u32>> {
        let [_, _, query_blocks, key_blocks] = self.shape;
        let heads = self.shape[0] * self.shape[1];
        let mut keys = vec![Vec::new(); heads * key_blocks];
        for (row, indices) in self.rows.iter().enumerate() {
            let (head, query_block) = (row / query_blocks, row % query_blocks);
            for &j in indices {
                keys[head * key_blocks + j as usize].push(query_block as u32);
            }
        }
        keys
    }

    /// The inverse of [`by_key`](Self::by_key).
    ///
    /// # Errors
    /// As for [`from_rows`](Self::from_rows), read with queries and keys exchanged.
    pub fn from_by_key(shape: [usize; 4], keys: Vec<Vec<u32>>) -> Result<Self, Error> {
        let [batch, heads, query_blocks, key_blocks] = shape;
        let exchanged = Self::from_rows([batch, heads, key_blocks, query_blocks], keys)?;
        Ok(Self {
            shape,
            rows: exchanged.by_key(),
        })
    }

    /// Copies the list to the device.
    pub fn upload(&self, client: &Client) -> BlockList {
        // Width 0 would make an empty buffer, which no device allocates.
        let width = self.width().max(1);
        let mut indices = vec![0u32; self.rows.len() * width];
        for (slots, row) in indices.chunks_exact_mut(width).zip(&self.rows) {
            slots[..row.len()].copy_from_slice(row);
        }
        let counts: Vec<u32> = self.rows.iter().map(|row| row.len() as u32).collect();
        // SAFETY: every constructor keeps rows ascending and in range.
        unsafe {
            BlockList::from_handles(
                client.create_from_slice(bytemuck::cast_slice(&indices)),
                client.create_from_slice(bytemuck::cast_slice(&counts)),
                self.shape,
                width,
            )
        }
    }

    /// Reads a list back from the device, checking it on the way.
    ///
    /// # Errors
    /// [`Error::Device`] if the work that writes it failed, and the list errors if it is not one.
    pub fn download(client: &Client, list: &BlockList) -> Result<Self, Error> {
        let buffers = client
            .read(vec![list.indices().clone(), list.counts().clone()])
            .map_err(|source| Error::Device {
                operation: "reading a block list",
                source,
            })?;
        let [indices, counts] =
            [0, 1].map(|i| bytemuck::pod_collect_to_vec::<u8, u32>(&buffers[i]));
        let rows = indices
            .chunks_exact(list.width())
            .zip(&counts)
            .enumerate()
            .map(|(row, (slots, &count))| {
                slots
                    .get(..count as usize)
                    .map(<[u32]>::to_vec)
                    .ok_or(Error::ListCount {
                        row,
                        count: count.into(),
                        width: list.width(),
                    })
            })
            .take(list.rows())
            .collect::<Result<_, _>>()?;
        Self::from_rows(list.shape(), rows)
    }

    /// Reads an inverse list back from the device: the list that it is the inverse of.
    ///
    /// # Errors
    /// As for [`download`](Self::download).
    pub fn download_inverse(client: &Client, inverse: &InverseBlockList) -> Result<Self, Error> {
        let buffers = client
            .read(vec![inverse.offsets().clone(), inverse.rows().clone()])
            .map_err(|source| Error::Device {
                operation: "reading an inverse block list",
                source,
            })?;
        let [offsets, rows] = [0, 1].map(|i| bytemuck::pod_collect_to_vec::<u8, u32>(&buffers[i]));
        let [batch, heads, _, key_blocks] = inverse.shape();
        let mut keys = Vec::with_capacity(batch * heads * key_blocks);
        for head in 0..batch * heads {
            let offsets = &offsets[head * (key_blocks + 1)..][..=key_blocks];
            let entries = &rows[head * inverse.capacity()..][..inverse.capacity()];
            for pair in offsets.windows(2) {
                keys.push(entries[pair[0] as usize..pair[1] as usize].to_vec());
            }
        }
        Self::from_by_key(inverse.shape(), keys)
    }
}

fn expect_len(argument: &'static str, found: usize, expected: usize) -> Result<(), Error> {
    if found == expected {
        return Ok(());
    }
    Err(Error::Length {
        argument,
        found,
        expected,
    })
}
