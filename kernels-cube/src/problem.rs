use core::fmt;

use cubecl::ir::DeviceProperties;

use crate::engine::{expect_simt, mma_supported};
use crate::{DType, DeviceTensor, F32Products, FactorType, ProblemError};

/// Which keys a query may see, element by element.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Causal {
    /// All keys.
    #[default]
    None,
    /// Keys `j <= i`: the first query is aligned with the first key.
    TopLeft,
    /// Keys `j <= i + Lk - Lq`: the last query is aligned with the last key, as in decoding with a
    /// cache.
    BottomRight,
}

impl fmt::Display for Causal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Causal::None => "none",
            Causal::TopLeft => "top-left",
            Causal::BottomRight => "bottom-right",
        })
    }
}

/// What a caller chooses about an attention operation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionOptions {
    /// Factor on the scores; `None` means `1/sqrt(D)`.
    pub scale: Option<f32>,
    /// Element-level causal masking.
    pub causal: Causal,
    /// Query rows per block, a multiple of 16 from 16 to 128.
    pub block_q: usize,
    /// Keys per block, a multiple of 16 from 16 to 128.
    pub block_k: usize,
    /// How attention, SLA and their gradients multiply f32 inputs. [`F32Products::Tf32`] is refused
    /// for other inputs, in low bits, and on devices without such tensor cores. Scores of the router
    /// are made in f32 all the same.
    pub products: F32Products,
}

impl Default for AttentionOptions {
    /// The papers' blocks of 128 queries by 64 keys, no causal mask, scale `1/sqrt(D)`,
    /// products of f32 in f32.
    fn default() -> Self {
        Self {
            scale: None,
            causal: Causal::None,
            block_q: 128,
            block_k: 64,
            products: F32Products::F32,
        }
    }
}

/// A validated attention problem: everything a plan may depend on.
///
/// Queries are `[B, Hq, Lq, D]`, keys `[B, Hkv, Lk, D]`, values `[B, Hkv, Lk, Dv]`. Query head `h`
/// reads key head `h / (Hq / Hkv)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionProblem {
    batch: usize,
    query_heads: usize,
    kv_heads: usize,
    query_len: usize,
    key_len: usize,
    head_dim: usize,
    value_dim: usize,
    dtype: DType,
    scale: f32,
    causal: Causal,
    block_q: usize,
    block_k: usize,
    products: F32Products,
    aligned: bool,
}

impl AttentionProblem {
    /// Checks `q`, `k`, `v` and `options` against each other.
    ///
    /// # Errors
    /// A [`ProblemError`] that names the argument and what would be right.
    pub fn new(
        q: &DeviceTensor<4>,
        k: &DeviceTensor<4>,
        v: &DeviceTensor<4>,
        options: &AttentionOptions,
    ) -> Result<Self, ProblemError> {
        for (name, tensor) in [("k", k), ("v", v)] {
            if tensor.dtype() != q.dtype() {
                return Err(ProblemError::DTypeMismatch {
                    argument: name,
                    found: tensor.dtype(),
                    expected: q.dtype(),
                });
            }
        }
        let problem = Self::from_shapes(q.shape(), k.shape(), v.shape(), q.dtype(), options)?;
        Ok(Self {
            aligned: [q, k, v].into_iter().all(DeviceTensor::is_aligned),
            ..problem
        })
    }

    /// [`new`](Self::new) from shapes alone, for contiguous tensors.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn from_shapes(
        q: [usize; 4],
        k: [usize; 4],
        v: [usize; 4],
        dtype: DType,
        options: &AttentionOptions,
    ) -> Result<Self, ProblemError> {
        for (argument, shape) in [("q", q), ("k", k), ("v", v)] {
            if shape.contains(&0) {
                return Err(ProblemError::ZeroSize {
                    argument,
                    shape: shape.to_vec(),
                });
            }
        }
        let [batch, query_heads, query_len, head_dim] = q;
        let [_, kv_heads, key_len, _] = k;
        let value_dim = v[3];
        expect_shape("k", k, [batch, kv_heads, key_len, head_dim])?;
        expect_shape("v", v, [batch, kv_heads, key_len, value_dim])?;
        if !query_heads.is_multiple_of(kv_heads) {
            return Err(ProblemError::HeadGroups {
                query_heads,
                kv_heads,
            });
        }
        for (argument, dim) in [("q", head_dim), ("v", value_dim)] {
            if !(32..=256).contains(&dim) || !dim.is_multiple_of(8) {
                return Err(ProblemError::HeadDim { argument, dim });
            }
        }
        for (argument, size) in [("block_q", options.block_q), ("block_k", options.block_k)] {
            if !(16..=128).contains(&size) || !size.is_multiple_of(16) {
                return Err(ProblemError::BlockSize { argument, size });
            }
        }
        // Row and block numbers are 32-bit in kernels, with room for a tile past the end.
        for (argument, len) in [("q", query_len), ("k", key_len)] {
            if len > i32::MAX as usize - 1024 {
                return Err(ProblemError::TooLong { argument, len });
            }
        }
        if options.products == F32Products::Tf32 && dtype != DType::F32 {
            return Err(ProblemError::NotSupported {
                what: format!("F32Products::Tf32 with {dtype} inputs"),
                why: "it rounds f32 factors; tensor cores multiply those of 16 bits as they are, so leave \
                      `products` at its default",
            });
        }
        let scale = options.scale.unwrap_or(1.0 / (head_dim as f32).sqrt());
        if !scale.is_finite() {
            return Err(ProblemError::Scale { scale });
        }
        Ok(Self {
            batch,
            query_heads,
            kv_heads,
            query_len,
            key_len,
            head_dim,
            value_dim,
            dtype,
            scale,
            causal: options.causal,
            block_q: options.block_q,
            block_k: options.block_k,
            products: options.products,
            aligned: true,
        })
    }

    /// B.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Hq.
    pub fn query_heads(&self) -> usize {
        self.query_heads
    }

    /// Hkv.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// Lq.
    pub fn query_len(&self) -> usize {
        self.query_len
    }

    /// Lk.
    pub fn key_len(&self) -> usize {
        self.key_len
    }

    /// D, the width of queries and keys.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Dv, the width of values and of the output.
    pub fn value_dim(&self) -> usize {
        self.value_dim
    }

    /// Element type of inputs and output.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Factor on the scores.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// Causal masking.
    pub fn causal(&self) -> Causal {
        self.causal
    }

    /// Query rows per block.
    pub fn block_q(&self) -> usize {
        self.block_q
    }

    /// Keys per block.
    pub fn block_k(&self) -> usize {
        self.block_k
    }

    /// How products of f32 inputs are made.
    pub fn products(&self) -> F32Products {
        self.products
    }

    /// What the factors of products of inputs are.
    pub fn factors(&self) -> FactorType {
        match self.products {
            F32Products::F32 => self.dtype.into(),
            F32Products::Tf32 => FactorType::Tf32,
        }
    }

    /// Whether the rows of all inputs are contiguous and begin at multiples of 16 bytes.
    pub fn is_aligned(&self) -> bool {
        self.aligned
    }

    /// M, the number of query blocks.
    pub fn query_blocks(&self) -> usize {
        self.query_len.div_ceil(self.block_q)
    }

    /// N, the number of key blocks.
    pub fn key_blocks(&self) -> usize {
        self.key_len.div_ceil(self.block_k)
    }

    /// Shape of the output, `[B, Hq, Lq, Dv]`.
    pub fn out_shape(&self) -> [usize; 4] {
        [self.batch, self.query_heads, self.query_len, self.value_dim]
    }

    /// Shape of the log-sum-exp, `[B, Hq, Lq]`.
    pub fn lse_shape(&self) -> [usize; 3] {
        [self.batch, self.query_heads, self.query_len]
    }

    /// With causal masking query `i` sees keys up to `i + causal_shift`.
    pub fn causal_shift(&self) -> i32 {
        match self.causal {
            Causal::None | Causal::TopLeft => 0,
            Causal::BottomRight => self.key_len as i32 - self.query_len as i32,
        }
    }

    /// An error unless these are tensors that the problem was, or could have been, made from.
    pub(crate) fn expect_inputs(
        &self,
        q: &DeviceTensor<4>,
        k: &DeviceTensor<4>,
        v: &DeviceTensor<4>,
    ) -> Result<(), ProblemError> {
        let keys = |dim| [self.batch, self.kv_heads, self.key_len, dim];
        let queries = [self.batch, self.query_heads, self.query_len, self.head_dim];
        for (argument, tensor, shape) in [
            ("q", q, queries),
            ("k", k, keys(self.head_dim)),
            ("v", v, keys(self.value_dim)),
        ] {
            expect_shape(argument, tensor.shape(), shape)?;
            expect_same_dtype(argument, tensor.dtype(), self.dtype)?;
            if self.aligned && !tensor.is_aligned() {
                return Err(ProblemError::NotContiguous { argument });
            }
        }
        Ok(())
    }

    /// An error unless the device makes the products that were asked for.
    ///
    /// # Errors
    /// [`ProblemError::NoPlan`] for products of tf32 on a device without them.
    pub fn expect_products(&self, device: &DeviceProperties) -> Result<(), ProblemError> {
        match (self.products, mma_supported(self.factors(), device)) {
            (F32Products::Tf32, Err(reason)) => expect_simt(self.factors(), reason, device),
            _ => Ok(()),
        }
    }

    /// An error if products of tf32 are asked of an operation that has none.
    pub(crate) fn refuse_tf32(&self, what: &'static str) -> Result<(), ProblemError> {
        match self.products {
            F32Products::F32 => Ok(()),
            F32Products::Tf32 => Err(ProblemError::NotSupported {
                what: format!("F32Products::Tf32 in {what}"),
                why: "its products are of other formats; attention and SLA in full precision have those \
                      of tf32",
            }),
        }
    }

    /// An error if a causal mask is asked of an operation that has none.
    pub(crate) fn refuse_causal(&self) -> Result<(), ProblemError> {
        match self.causal {
            Causal::None => Ok(()),
            causal => Err(ProblemError::NotSupported {
                what: format!("a {causal} causal mask in the router and the SLA operations"),
                why: "they pool and sum whole blocks; block_sparse_attention has causal masks, and \
                      linear_attention a causal form",
            }),
        }
    }
}

/// An error unless `argument`'s shape is `expected`.
pub(crate) fn expect_shape<const R: usize>(
    argument: &'static str,
    found: [usize; R],
    expected: [usize; R],
) -> Result<(), ProblemError> {
    if found == expected {
        return Ok(());
    }
    Err(ProblemError::ShapeMismatch {
        argument,
        found: found.to_vec(),
        expected: expected.to_vec(),
    })
}

/// An error unless `tensor` is contiguous f32 of `shape`, with no empty axis.
pub(crate) fn expect_f32<const R: usize>(
    argument: &'static str,
    tensor: &DeviceTensor<R>,
    shape: [usize; R],
) -> Result<(), ProblemError> {
    expect_contiguous(argument, tensor, shape, DType::F32)?;
    if shape.contains(&0) {
        return Err(ProblemError::ZeroSize {
            argument,
            shape: shape.to_vec(),
        });
    }
    Ok(())
}

/// An error unless `tensor` is contiguous, of `shape` and of type `dtype`.
pub(crate) fn expect_contiguous<const R: usize>(
    argument: &'static str,
    tensor: &DeviceTensor<R>,
    shape: [usize; R],
    dtype: DType,
) -> Result<(), ProblemError> {
    expect_shape(argument, tensor.shape(), shape)?;
    expect_same_dtype(argument, tensor.dtype(), dtype)?;
    if !tensor.is_contiguous() {
        return Err(ProblemError::NotContiguous { argument });
    }
    Ok(())
}

fn expect_same_dtype(
    argument: &'static str,
    found: DType,
    expected: DType,
) -> Result<(), ProblemError> {
    if found == expected {
        return Ok(());
    }
    Err(ProblemError::DTypeMismatch {
        argument,
        found,
        expected,
    })
}
