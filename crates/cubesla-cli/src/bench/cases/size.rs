//! Sizes of cases.

use std::fmt;

use cubesla::DType;

/// Sizes of an attention problem of equal lengths.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// B.
    pub batch: usize,
    /// Query and key heads.
    pub heads: usize,
    /// Queries and keys.
    pub len: usize,
    /// D and Dv.
    pub dim: usize,
    /// Element type.
    pub dtype: DType,
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            batch,
            heads,
            len,
            dim,
            dtype,
        } = self;
        write!(f, "b{batch}h{heads}l{len}d{dim}/{dtype}")
    }
}

impl Size {
    /// `[B, H, L, D]`.
    pub fn new([batch, heads, len, dim]: [usize; 4], dtype: DType) -> Self {
        Self {
            batch,
            heads,
            len,
            dim,
            dtype,
        }
    }

    /// `[B, H, L, D]`.
    pub fn shape(&self) -> [usize; 4] {
        [self.batch, self.heads, self.len, self.dim]
    }

    /// Operations of dense attention.
    pub fn dense_flops(&self) -> f64 {
        self.pair_flops() * (self.len * self.len) as f64
    }

    /// Operations that attention spends on one pair of a query and a key, in all heads.
    pub fn pair_flops(&self) -> f64 {
        (4 * self.dim * self.batch * self.heads) as f64
    }

    /// Operations of the linear branch.
    pub fn linear_flops(&self) -> f64 {
        (4 * self.dim * self.dim * self.len * self.batch * self.heads) as f64
    }

    /// Bytes of one of Q, K, V and O.
    pub fn tensor_bytes(&self) -> usize {
        self.shape().iter().product::<usize>() * self.dtype.size()
    }
}

/// How large the default sizes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Those of video models, for a GPU of a data centre.
    Large,
    /// Those that software gets through in seconds.
    Small,
}

impl Scale {
    /// The sizes of attention, those of all variants first, and how many these are.
    pub fn sizes(self, dtype: Option<DType>) -> (Vec<Size>, usize) {
        let main = dtype.unwrap_or(self.dtype());
        match self {
            Scale::Large => {
                let mut sizes = [
                    [1, 12, 32760, 128],
                    [2, 16, 32760, 128],
                    [1, 12, 32760, 64],
                    [1, 40, 75600, 128],
                ]
                .map(|shape| Size::new(shape, main))
                .to_vec();
                if dtype.is_none() {
                    sizes.push(Size::new([1, 4, 8192, 128], DType::F32));
                }
                (sizes, 2)
            }
            Scale::Small => {
                let sizes = [[1, 2, 1024, 64], [1, 2, 512, 64]];
                (sizes.map(|shape| Size::new(shape, main)).to_vec(), 1)
            }
        }
    }

    fn dtype(self) -> DType {
        match self {
            Scale::Large => DType::BF16,
            Scale::Small => DType::F32,
        }
    }
}
