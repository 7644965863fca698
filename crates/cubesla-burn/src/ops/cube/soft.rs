//! The first training stage: a call into the library each.

use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;
use cubesla::{
    AttentionOptions, DeviceTensor, Error, FeatureMap, RouterWeights, Sla2SoftOutput, SlaSaved,
    SoftInputs,
};

use super::super::layout::{contiguous, view, wrap};
use super::super::soft::{SoftGradientOps, SoftOps};
use super::launched;

/// The tensors of a call, as the library takes them.
struct Tensors {
    qkv: [DeviceTensor<4>; 3],
    weights: DeviceTensor<4>,
    alpha_logit: DeviceTensor<2>,
}

impl Tensors {
    fn new(
        qkv: [CubeTensor; 3],
        weights: CubeTensor,
        alpha_logit: CubeTensor,
    ) -> Result<Self, Error> {
        let [q, k, v] = qkv;
        Ok(Self {
            qkv: [view(q)?, view(k)?, view(v)?],
            weights: contiguous(weights)?,
            alpha_logit: contiguous(alpha_logit)?,
        })
    }

    fn inputs(&self) -> SoftInputs<'_> {
        let [q, k, v] = &self.qkv;
        SoftInputs {
            q,
            k,
            v,
            weights: &self.weights,
            alpha_logit: &self.alpha_logit,
        }
    }
}

fn forward(
    qkv: [CubeTensor; 3],
    weights: CubeTensor,
    alpha_logit: CubeTensor,
    options: AttentionOptions,
    phi: FeatureMap,
) -> Sla2SoftOutput {
    let client = qkv[0].client.clone();
    let run = || {
        let tensors = Tensors::new(qkv, weights, alpha_logit)?;
        cubesla::sla2_soft_forward(&client, tensors.inputs(), phi, &options)
    };
    launched("sla2_soft", run())
}

impl SoftOps for CubeBackend {
    fn cubesla_soft(
        q: CubeTensor,
        k: CubeTensor,
        v: CubeTensor,
        weights: CubeTensor,
        alpha_logit: CubeTensor,
        options: AttentionOptions,
        phi: FeatureMap,
    ) -> CubeTensor {
        let like = q.clone();
        let result = forward([q, k, v], weights, alpha_logit, options, phi);
        wrap(&like, &result.out)
    }
}

impl SoftGradientOps for CubeBackend {
    fn cubesla_soft_saving(
        q: CubeTensor,
        k: CubeTensor,
        v: CubeTensor,
        weights: CubeTensor,
        alpha_logit: CubeTensor,
        options: AttentionOptions,
        phi: FeatureMap,
    ) -> (CubeTensor, CubeTensor, CubeTensor, CubeTensor) {
        let like = q.clone();
        let result = forward([q, k, v], weights, alpha_logit, options, phi);
        (
            wrap(&like, &result.out),
            wrap(&like, &result.saved.sparse),
            wrap(&like, &result.saved.linear),
            wrap(&like, &result.saved.lse),
        )
    }

    fn cubesla_soft_backward(
        q: CubeTensor,
        k: CubeTensor,
        v: CubeTensor,
        weights: CubeTensor,
        alpha_logit: CubeTensor,
        sparse: CubeTensor,
        linear: CubeTensor,
        lse: CubeTensor,
        grad: CubeTensor,
        options: AttentionOptions,
        phi: FeatureMap,
    ) -> (CubeTensor, CubeTensor, CubeTensor, CubeTensor, CubeTensor) {
        let like = q.clone();
        let run = || {
            let tensors = Tensors::new([q, k, v], weights, alpha_logit)?;
            let saved = SlaSaved {
                sparse: contiguous(sparse)?,
                linear: contiguous(linear)?,
                lse: contiguous(lse)?,
            };
            let (inputs, grad) = (tensors.inputs(), view(grad)?);
            cubesla::sla2_soft_backward(&like.client, inputs, &saved, &grad, phi, &options)
        };
        let grads = launched("sla2_soft's backward", run());
        (
            wrap(&like, &grads.dq),
            wrap(&like, &grads.dk),
            wrap(&like, &grads.dv),
            wrap(&like, &grads.dweights),
            wrap(&like, &grads.dalpha_logit),
        )
    }

    fn cubesla_router_backward(
        q: CubeTensor,
        k: CubeTensor,
        wq: CubeTensor,
        wk: CubeTensor,
        grad: CubeTensor,
        options: AttentionOptions,
    ) -> (CubeTensor, CubeTensor) {
        let like = q.clone();
        let run = || {
            let (q, k, grad) = (view(q)?, view(k)?, contiguous(grad)?);
            let (wq, wk) = (contiguous(wq)?, contiguous(wk)?);
            let weights = RouterWeights { wq: &wq, wk: &wk };
            cubesla::router_backward(&like.client, &q, &k, weights, &grad, &options)
        };
        let grads = launched("router_scores' backward", run());
        (wrap(&like, &grads.wq), wrap(&like, &grads.wk))
    }
}
