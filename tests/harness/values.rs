//! Random values, and values as a type holds them.

use cubesla::DType;
use cubesla_kernels::FactorType;
use half::{bf16, f16};

/// A small random generator (xorshift64*), the same on every platform.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// A generator for `seed`.
    pub fn new(seed: u64) -> Self {
        let mut rng = Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        for _ in 0..4 {
            rng.next();
        }
        rng
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// Uniform in [0, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.uniform() * n as f64) as usize
    }

    /// Standard normal (Box-Muller).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// `n` standard normal values as `dtype` holds them.
    pub fn normals(&mut self, n: usize, dtype: DType) -> Vec<f32> {
        (0..n)
            .map(|_| rounded(self.normal() as f32, dtype))
            .collect()
    }
}

/// `x` as `dtype` holds it.
pub fn rounded(x: f32, dtype: impl Into<FactorType>) -> f32 {
    match dtype.into() {
        FactorType::F32 => x,
        FactorType::Tf32 => tf32(x),
        FactorType::F16 => f16::from_f32(x).to_f32(),
        FactorType::BF16 => bf16::from_f32(x).to_f32(),
    }
}

/// The nearest number with 10 bits of mantissa, ties away from zero.
fn tf32(x: f32) -> f32 {
    if !x.is_finite() {
        return x;
    }
    // Half of the last bit that stays, then the 13 that go.
    f32::from_bits((x.to_bits() + (1 << 12)) & !((1 << 13) - 1))
}
