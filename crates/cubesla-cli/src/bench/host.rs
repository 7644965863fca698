//! Random inputs, kept on the host as the device has them, so that results can be checked.

use std::f32::consts::TAU;

use cubesla::{Client, DType, DeviceTensor};
use cubesla_reference::Tensor;
use half::{bf16, f16};

use crate::error::Error;

/// A contiguous tensor in the bytes of its type.
pub struct HostTensor {
    shape: [usize; 4],
    dtype: DType,
    bytes: Vec<u8>,
}

impl HostTensor {
    /// Standard normals, rounded to `dtype`.
    pub fn normal(shape: [usize; 4], dtype: DType, seed: u64) -> Self {
        let len = shape.iter().product();
        let bytes = match dtype {
            DType::F32 => normals(len, seed, f32::to_le_bytes),
            DType::F16 => normals(len, seed, |x| f16::from_f32(x).to_le_bytes()),
            DType::BF16 => normals(len, seed, |x| bf16::from_f32(x).to_le_bytes()),
        };
        Self {
            shape,
            dtype,
            bytes,
        }
    }

    /// A result of the device.
    pub fn download(client: &Client, tensor: &DeviceTensor<4>) -> Result<Self, Error> {
        let bytes = read(client, tensor.handle())?;
        Ok(Self {
            shape: tensor.shape(),
            dtype: tensor.dtype(),
            bytes,
        })
    }

    /// Copies the tensor to the device.
    pub fn upload(&self, client: &Client) -> Result<DeviceTensor<4>, Error> {
        let [_, heads, len, dim] = self.shape;
        let strides = [heads * len * dim, len * dim, dim, 1];
        let handle = client.create_from_slice(&self.bytes);
        DeviceTensor::new(handle, self.shape, strides, self.dtype)
            .map_err(|source| cubesla::Error::from(source).into())
    }

    /// Bytes of the elements.
    pub fn size(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size()
    }

    /// Row `i` of head `h` of batch `b`, `[1, 1, 1, D]`.
    pub fn row(&self, [b, h, i]: [usize; 3]) -> Tensor {
        self.rows([b, h], i..i + 1)
    }

    /// A whole head, `[1, 1, L, D]`.
    pub fn head(&self, at: [usize; 2]) -> Tensor {
        self.rows(at, 0..self.shape[2])
    }

    fn rows(&self, [b, h]: [usize; 2], rows: std::ops::Range<usize>) -> Tensor {
        let [_, heads, len, dim] = self.shape;
        let row = dim * self.dtype.size();
        let first = (b * heads + h) * len;
        let bytes = &self.bytes[(first + rows.start) * row..(first + rows.end) * row];
        Tensor::new([1, 1, rows.len(), dim], decoded(bytes, self.dtype))
    }
}

/// The bytes of a buffer, after the work that writes it.
pub fn read(client: &Client, handle: &cubecl::server::Handle) -> Result<Vec<u8>, Error> {
    let bytes = client
        .read_one(handle.clone())
        .map_err(|source| cubesla::Error::Device {
            operation: "reading a result",
            source,
        })?;
    Ok(bytes.to_vec())
}

fn decoded(bytes: &[u8], dtype: DType) -> Vec<f64> {
    match dtype {
        DType::F32 => widened(bytes, |x| f32::from_le_bytes(x).into()),
        DType::F16 => widened(bytes, |x| f16::from_le_bytes(x).into()),
        DType::BF16 => widened(bytes, |x| bf16::from_le_bytes(x).into()),
    }
}

fn widened<const S: usize>(bytes: &[u8], widen: impl Fn([u8; S]) -> f64) -> Vec<f64> {
    let (elements, _) = bytes.as_chunks::<S>();
    elements.iter().map(|&x| widen(x)).collect()
}

/// `len` draws from a table of `2^16` normals: a tenth of a second for 50 million.
fn normals<const S: usize>(len: usize, seed: u64, bytes: impl Fn(f32) -> [u8; S]) -> Vec<u8> {
    let mut random = Random::new(seed);
    let table: Vec<[u8; S]> = (0..1 << 16).map(|_| bytes(random.normal())).collect();
    let mut out = vec![[0; S]; len];
    for four in out.chunks_mut(4) {
        let bits = random.next();
        for (n, x) in four.iter_mut().enumerate() {
            *x = table[(bits >> (16 * n)) as usize & 0xffff];
        }
    }
    out.into_flattened()
}

/// SplitMix64 (Steele, Lea and Flood 2014).
pub struct Random(u64);

impl Random {
    /// The sequence of that seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// 64 random bits.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A whole number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        ((u128::from(self.next()) * end as u128) >> 64) as usize
    }

    /// A standard normal, by Box and Muller.
    pub fn normal(&mut self) -> f32 {
        let mut uniform = || ((self.next() >> 40) as f32 + 0.5) / (1 << 24) as f32;
        let (radius, angle) = ((-2.0 * uniform().ln()).sqrt(), TAU * uniform());
        radius * angle.cos()
    }

    /// `count` distinct numbers below `end`, ascending: Knuth's algorithm S.
    pub fn subset(&mut self, count: usize, end: usize) -> Vec<u32> {
        let mut chosen = Vec::with_capacity(count);
        for at in 0..end {
            if self.below(end - at) < count - chosen.len() {
                chosen.push(at as u32);
            }
        }
        chosen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normals_have_mean_zero_and_variance_one() {
        let x = HostTensor::normal([1, 1, 1000, 101], DType::BF16, 3).head([0, 0]);
        let n = x.data().len() as f64;
        let mean = x.data().iter().sum::<f64>() / n;
        let variance = x.data().iter().map(|x| x * x).sum::<f64>() / n;
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.03);
    }

    #[test]
    fn subsets_are_distinct_ascending_and_of_the_right_size() {
        let mut random = Random::new(1);
        for (count, end) in [(0, 5), (1, 1), (3, 7), (7, 7), (25, 512)] {
            let chosen = random.subset(count, end);
            assert_eq!(chosen.len(), count);
            assert!(chosen.windows(2).all(|pair| pair[0] < pair[1]));
            assert!(chosen.iter().all(|&x| (x as usize) < end));
        }
    }

    #[test]
    fn rows_are_those_of_their_head() {
        let x = HostTensor::normal([2, 3, 4, 8], DType::F32, 5);
        let (head, row) = (x.head([1, 2]), x.row([1, 2, 3]));
        assert_eq!(head.row(0, 0, 3), row.data());
    }
}
