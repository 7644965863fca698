//! Inputs of the benchmarks in this package.

use cubesla::{Client, DType, DeviceTensor, Error, upload};

/// B, H, L, D of the attention benchmarks.
pub const SHAPE: [usize; 4] = [1, 2, 512, 64];

/// Q, K and V of [`SHAPE`] in f32, pseudo-random in [-1, 1).
///
/// # Errors
/// None for a shape that is not empty.
pub fn qkv(client: &Client) -> Result<[DeviceTensor<4>; 3], Error> {
    let values = noise(3 * SHAPE.iter().product::<usize>());
    let third = values.len() / 3;
    let tensor = |n: usize| upload(client, &values[n * third..][..third], SHAPE, DType::F32);
    Ok([tensor(0)?, tensor(1)?, tensor(2)?])
}

/// `len` pseudo-random numbers in [-1, 1), the same each time: Marsaglia's xorshift.
pub fn noise(len: usize) -> Vec<f32> {
    let mut state: u32 = 0x9e37_79b9;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_is_spread_over_its_range() {
        let values = noise(10_000);
        assert!(values.iter().all(|x| (-1.0..1.0).contains(x)));
        let mean = values.iter().sum::<f32>() / 10_000.0;
        assert!(mean.abs() < 0.03, "{mean}");
    }
}
