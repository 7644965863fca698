//! Tensors that go together.

use burn_core::backend::Backend;
use burn_core::backend::tensor::{FloatTensor, IntTensor};

use crate::shim as burn;

/// The weights that combine the branches, f32.
#[derive(burn_core::backend::ExtensionType, Clone, Debug)]
#[extension_type(fusion)]
pub enum Combination<B: Backend> {
    /// SLA's `Wl [Dv, Dv]`, applied from the right as `Wl^T`, and `bl [Dv]`.
    Sla {
        /// `Wl`.
        wl: FloatTensor<B>,
        /// `bl`.
        bl: FloatTensor<B>,
    },
    /// SLA2's logits `[1, 1]`, `[Hq, 1]` or `[Hq, M]`.
    Sla2 {
        /// The logits.
        alpha_logit: FloatTensor<B>,
    },
}

/// Block lists: indices `[B, Hq, M, width]` and counts `[B, Hq, M]`, 32 bits.
#[derive(burn_core::backend::ExtensionType, Clone, Debug)]
#[extension_type(fusion)]
pub enum Lists<B: Backend> {
    /// No block is left out.
    Critical {
        /// Of the critical blocks.
        indices: IntTensor<B>,
        /// Of the critical blocks.
        counts: IntTensor<B>,
    },
    /// Some blocks are left out.
    Negligible {
        /// Of the critical blocks.
        indices: IntTensor<B>,
        /// Of the critical blocks.
        counts: IntTensor<B>,
        /// Of the negligible blocks.
        negligible_indices: IntTensor<B>,
        /// Of the negligible blocks.
        negligible_counts: IntTensor<B>,
    },
}
