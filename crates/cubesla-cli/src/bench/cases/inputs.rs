//! Random inputs of attention.

use cubesla::{Client, DeviceTensor};

use super::Size;
use crate::bench::host::{HostTensor, Random};
use crate::error::Error;

/// Calls take turns over so many copies of their inputs that none is left in a cache by the last.
const CACHE: usize = 128 << 20;
const MAX_COPIES: usize = 16;

/// How many copies of inputs of `bytes` outgrow a GPU's cache; one where the device is the host.
pub fn copies(client: &Client, bytes: usize) -> usize {
    if crate::bench::is_software(client) {
        1
    } else {
        CACHE.div_ceil(bytes).clamp(1, MAX_COPIES)
    }
}

/// Queries, keys and values, on the host and in copies on the device.
pub struct Qkv {
    /// Their size.
    pub size: Size,
    /// On the host.
    pub host: [HostTensor; 3],
    /// On the device.
    device: Vec<[DeviceTensor<4>; 3]>,
}

impl Qkv {
    /// Random normals.
    pub fn new(client: &Client, size: Size) -> Result<Self, Error> {
        let host = [1, 2, 3].map(|seed| HostTensor::normal(size.shape(), size.dtype, seed));
        let bytes = host.iter().map(HostTensor::size).sum();
        let device = (0..copies(client, bytes))
            .map(|_| {
                let [q, k, v] = host.each_ref().map(|x| x.upload(client));
                Ok([q?, k?, v?])
            })
            .collect::<Result<_, Error>>()?;
        Ok(Self { size, host, device })
    }

    /// Those of the call of that number.
    pub fn copy(&self, number: usize) -> &[DeviceTensor<4>; 3] {
        &self.device[number % self.device.len()]
    }

    /// Rows `(b, h, i)` to check: the first and the last of all, and some between.
    pub fn sample(&self) -> Vec<[usize; 3]> {
        let Size {
            batch, heads, len, ..
        } = self.size;
        let mut random = Random::new(17);
        let mut rows = vec![[0, 0, 0], [batch - 1, heads - 1, len - 1]];
        rows.extend((0..6).map(|_| [batch, heads, len].map(|end| random.below(end))));
        rows
    }
}
