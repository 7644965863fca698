//! What gradients are made with.

use burn_core::backend::TensorMetadata;
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;
use cubesla::{AttentionOptions, LowBitFormats, SlaBackwardOptions, SlaInputs, SlaSaved};

use super::super::layout::{block_list, contiguous, view, wrap};
use super::super::{Combination, SlaGradientOps};
use super::{ListTensors, Weights, launched, library_lists, sla};

impl SlaGradientOps for CubeBackend {
    fn cubesla_attention_backward(
        q: CubeTensor,
        k: CubeTensor,
        v: CubeTensor,
        out: CubeTensor,
        lse: CubeTensor,
        grad: CubeTensor,
        indices: CubeTensor,
        counts: CubeTensor,
        options: AttentionOptions,
        formats: Option<LowBitFormats>,
    ) -> (CubeTensor, CubeTensor, CubeTensor) {
        let like = q.clone();
        let list = block_list(indices, counts, k.shape()[2].div_ceil(options.block_k));
        let run = || {
            let (q, k, v, out, grad) = (view(q)?, view(k)?, view(v)?, view(out)?, view(grad)?);
            let lse = contiguous(lse)?;
            let (client, q, k, v) = (&like.client, &q, &k, &v);
            let (out, lse, grad, list, options) = (&out, &lse, &grad, &list, &options);
            match formats {
                None => cubesla::block_sparse_attention_backward(
                    client, q, k, v, out, lse, grad, list, options,
                ),
                Some(low) => cubesla::low_bit_attention_backward(
                    client, q, k, v, out, lse, grad, list, options, low,
                ),
            }
        };
        let operation = match formats {
            None => "block_sparse_attention's backward",
            Some(_) => "low_bit_attention's backward",
        };
        let grads = launched(operation, run());
        (
            wrap(&like, &grads.dq),
            wrap(&like, &grads.dk),
            wrap(&like, &grads.dv),
        )
    }

    fn cubesla_sla_saving(
        q: CubeTensor,
        k: CubeTensor,
        v: CubeTensor,
        weights: Weights,
        lists: ListTensors,
        options: SlaBackwardOptions,
    ) -> (CubeTensor, CubeTensor, CubeTensor, CubeTensor) {
        let like = q.clone();
        let result = sla(q, k, v, weights, lists, options, true);
        let result = launched("sla", result);
        let saved = result.saved.expect("the branches were asked for");
        (
            wrap(&like, &result.out),
            wrap(&like, &saved.sparse),
            wrap(&like, &saved.linear),
            wrap(&like, &saved.lse),
        )
    }

    fn cubesla_sla_backward(
        q: CubeTensor,
        k: CubeTensor,
        v: CubeTensor,
        weights: Weights,
        lists: ListTensors,
        sparse: CubeTensor,
        linear: CubeTensor,
        lse: CubeTensor,
        grad: CubeTensor,
        options: SlaBackwardOptions,
    ) -> (CubeTensor, CubeTensor, CubeTensor, Weights) {
        let like = q.clone();
        let blocks = k.shape()[2].div_ceil(options.attention.block_k);
        let (critical, negligible) = library_lists(lists, blocks);
        let run = || {
            let (q, k, v, grad) = (view(q)?, view(k)?, view(v)?, view(grad)?);
            let inputs = SlaInputs {
                q: &q,
                k: &k,
                v: &v,
                critical: &critical,
                negligible: negligible.as_ref(),
            };
            let saved = SlaSaved {
                sparse: contiguous(sparse)?,
                linear: contiguous(linear)?,
                lse: contiguous(lse)?,
            };
            let client = &like.client;
            Ok(match weights {
                Combination::Sla { wl, bl } => {
                    let (wl, bl) = (contiguous(wl)?, contiguous(bl)?);
                    let grads =
                        cubesla::sla_backward(client, inputs, &saved, &wl, &bl, &grad, &options)?;
                    let weights = Combination::Sla {
                        wl: wrap(&like, &grads.dwl),
                        bl: wrap(&like, &grads.dbl),
                    };
                    ([grads.dq, grads.dk, grads.dv], weights)
                }
                Combination::Sla2 { alpha_logit } => {
                    let alpha_logit = contiguous(alpha_logit)?;
                    let grads = cubesla::sla2_backward(
                        client,
                        inputs,
                        &saved,
                        &alpha_logit,
                        &grad,
                        &options,
                    )?;
                    let weights = Combination::Sla2 {
                        alpha_logit: wrap(&like, &grads.dalpha_logit),
                    };
                    ([grads.dq, grads.dk, grads.dv], weights)
                }
            })
        };
        let (inputs, weights) = launched("sla's backward", run());
        let [dq, dk, dv] = inputs.map(|grad| wrap(&like, &grad));
        (dq, dk, dv, weights)
    }

    fn cubesla_soft_top_k_backward(soft: CubeTensor, grad: CubeTensor, tau: f32) -> CubeTensor {
        let like = soft.clone();
        let run = || {
            let (soft, grad) = (contiguous(soft)?, contiguous(grad)?);
            Ok(cubesla::soft_top_k_backward(
                &like.client,
                &soft,
                &grad,
                tau,
            )?)
        };
        wrap(&like, &launched("soft_top_k's backward", run()))
    }
}
