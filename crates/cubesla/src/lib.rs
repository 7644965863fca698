//! Sparse, linear and low-bit attention, on CUDA and on everything that wgpu reaches.

mod attention;
pub mod device;
mod error;
mod host_list;
mod linear;
mod matmul;
pub mod plan;
mod router;
mod sla;
mod soft;
mod transfer;

pub use attention::{
    AttentionGradients, AttentionOutput, block_sparse_attention, block_sparse_attention_backward,
    low_bit_attention, low_bit_attention_backward,
};
pub use cubecl::Device;
pub use cubecl::client::Client;
pub use cubesla_kernels::attention::{LowBitFormats, LowBitScores, LowBitValues, expect_low_bit};
pub use cubesla_kernels::linear::{FeatureMap, feature_rows};
pub use cubesla_kernels::matmul::{
    LowBitForm, MatmulProblem, activation_granularity, expect_dynamic, expect_weights,
    quantized_matmul_backward, weight_only_matmul,
};
pub use cubesla_kernels::quantize::{
    Format, Granularity, QuantizedTensor, dequantize, expect_format, fake_quantize, quantize,
};
pub use cubesla_kernels::router::{RouterGradients, RouterWeights, mean_pool, pooled_scores};
pub use cubesla_kernels::select::{
    BlockSelection, Critical, MAX_ROW, TopK, TopKOrder, select_blocks, soft_top_k,
    soft_top_k_backward, top_k,
};
pub use cubesla_kernels::sla::{LinearMode, Precision, SlaInputs, SlaSaved, SoftInputs};
pub use cubesla_kernels::{
    AttentionOptions, AttentionProblem, BlockList, Causal, DType, DeviceTensor, F32Products,
    InverseBlockList, ProblemError,
};
pub use error::Error;
pub use host_list::{Bsr, FlexBlocks, HostBlockList, IndexNumber};
pub use linear::linear_attention;
pub use matmul::{dynamic_matmul, quantized_matmul};
pub use router::{RouterOptions, Routing, route};
pub use sla::{
    Blocks, Sla2Gradients, SlaBackwardOptions, SlaGradients, SlaOptions, SlaResult, sla_backward,
    sla_forward, sla2_backward, sla2_forward,
};
pub use soft::{
    Sla2SoftGradients, Sla2SoftOutput, SoftAttentionGradients, router_backward, sla2_soft_backward,
    sla2_soft_forward, soft_attention, soft_attention_backward,
};
pub use transfer::{download, download_top_k, sync, upload};
