use burn_core::module::Module;
use burn_core::tensor::Tensor;
use burn_optim::{AdamConfig, GradientsParams};
use cubesla_burn::{
    SlaMhaInput, SlaMultiHeadAttentionConfig, SlaVariant, SparseLinearAttentionConfig,
};

use crate::common::{device, floats, noise};

/// Every parameter that requires a gradient gets one, and following them lowers the loss.
#[test]
fn a_few_steps_lower_the_loss() {
    for variant in [SlaVariant::Sla, SlaVariant::Sla2] {
        let device = device().autodiff();
        let attention = SparseLinearAttentionConfig::new(32)
            .with_variant(variant)
            .with_block_q(32)
            .with_block_k(16)
            .with_critical(0.3);
        let mut model = SlaMultiHeadAttentionConfig::new(64, 2)
            .with_attention(Some(attention))
            .init(&device);
        let mut optimizer = AdamConfig::new().init();
        let x = noise([1, 70, 64], 1, &device);
        let target = noise([1, 1, 64], 2, &device).expand([1, 70, 64]);
        let mut losses = Vec::new();
        for _ in 0..8 {
            let out = model.forward(SlaMhaInput::self_attn(x.clone())).context;
            let loss = (out - target.clone()).powi_scalar(2).mean();
            losses.push(floats::<1>(loss.clone())[0]);
            let grads = GradientsParams::from_grads(loss.backward(), &model);
            assert_eq!(grads.len(), parameters(&model), "{variant:?}");
            // Small enough not to overshoot, wherever the random parameters begin.
            model = optimizer.step(1e-2, model, grads);
        }
        assert!(losses[7] < 0.7 * losses[0], "{variant:?}: {losses:?}");
    }
}

fn parameters(module: &impl Module) -> usize {
    struct Count(usize);
    impl burn_core::module::ModuleVisitor for Count {
        fn visit_float<const D: usize>(&mut self, _: &burn_core::module::Param<Tensor<D>>) {
            self.0 += 1;
        }
    }
    let mut count = Count(0);
    module.visit(&mut count);
    count.0
}
