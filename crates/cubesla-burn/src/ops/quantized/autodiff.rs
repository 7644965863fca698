//! The operations under Burn's autodiff.

use burn_core::backend::Backend;
use burn_core::backend::autodiff::Autodiff;
use burn_core::backend::autodiff::checkpoint::base::Checkpointer;
use burn_core::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_core::backend::autodiff::grads::Gradients;
use burn_core::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn_core::backend::tensor::FloatTensor;
use burn_core::backend::{AutodiffBackend, TensorMetadata};
use burn_core::tensor::{DType, FloatDType};

use super::{Form, Packed, QuantizedGradientOps, QuantizedOps};
use crate::Activations;

/// `X`, with the straight-through gradient where it was quantized.
#[derive(Debug)]
struct Linear;

/// `X` and the bias.
#[derive(Debug)]
struct LinearBias;

/// The gradient passes through.
#[derive(Debug)]
struct FakeQuantize;

type Weights<B> = (Packed<B>, Form);

impl<B: Backend + QuantizedGradientOps> Backward<B, 1> for Linear {
    type State = Weights<B>;

    fn backward(
        self,
        ops: Ops<Weights<B>, 1>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let grad = grads.consume::<B>(&ops.node);
        let (w, form) = ops.state;
        if let [Some(x)] = ops.parents {
            let dx = B::cubesla_quantized_linear_backward(grad, w, form);
            grads.register::<B>(x.id, dx);
        }
    }
}

impl<B: Backend + QuantizedGradientOps> Backward<B, 2> for LinearBias {
    type State = Weights<B>;

    fn backward(
        self,
        ops: Ops<Weights<B>, 2>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let grad = grads.consume::<B>(&ops.node);
        let (w, form) = ops.state;
        let [x, bias] = ops.parents;
        if let Some(bias) = bias {
            let outputs = grad.shape()[1];
            let sum = B::float_sum_dim(B::float_cast(grad.clone(), FloatDType::F32), 0);
            grads.register::<B>(bias.id, B::float_reshape(sum, [outputs].into()));
        }
        if let Some(x) = x {
            let dx = B::cubesla_quantized_linear_backward(grad, w, form);
            grads.register::<B>(x.id, dx);
        }
    }
}

impl<B: Backend> Backward<B, 1> for FakeQuantize {
    type State = ();

    fn backward(self, ops: Ops<(), 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        if let [Some(w)] = ops.parents {
            grads.register::<B>(w.id, grad);
        }
    }
}

impl<B: Backend + QuantizedOps + QuantizedGradientOps, C: CheckpointStrategy> QuantizedOps
    for Autodiff<B, C>
{
    fn cubesla_quantize(w: FloatTensor<Self>, form: Form, zero_point: bool) -> Packed<Self> {
        match B::cubesla_quantize(w.into_primitive(), form, zero_point) {
            Packed::Symmetric { words, scales } => Packed::Symmetric {
                words,
                scales: Self::from_inner(scales),
            },
            Packed::ZeroPoint {
                words,
                scales,
                zeros,
            } => Packed::ZeroPoint {
                words,
                scales: Self::from_inner(scales),
                zeros: Self::from_inner(zeros),
            },
        }
    }

    fn cubesla_dequantize(w: Packed<Self>, form: Form, dtype: DType) -> FloatTensor<Self> {
        Self::from_inner(B::cubesla_dequantize(inner(w), form, dtype))
    }

    fn cubesla_fake_quantize(
        w: FloatTensor<Self>,
        form: Form,
        zero_point: bool,
    ) -> FloatTensor<Self> {
        let prepared = FakeQuantize.prepare::<C>([w.node()]).compute_bound();
        let rounded = B::cubesla_fake_quantize(w.into_primitive(), form, zero_point);
        prepared.stateless(rounded)
    }

    fn cubesla_quantized_linear(
        x: FloatTensor<Self>,
        w: Packed<Self>,
        form: Form,
        activations: Activations,
    ) -> FloatTensor<Self> {
        let prepared = Linear.prepare::<C>([x.node()]).compute_bound().stateful();
        let (x, w) = (x.into_primitive(), inner(w));
        let out = B::cubesla_quantized_linear(x, w.clone(), form, activations);
        match prepared {
            OpsKind::Tracked(tracked) => tracked.finish((w, form), out),
            OpsKind::UnTracked(untracked) => untracked.finish(out),
        }
    }

    fn cubesla_quantized_linear_bias(
        x: FloatTensor<Self>,
        w: Packed<Self>,
        bias: FloatTensor<Self>,
        form: Form,
        activations: Activations,
    ) -> FloatTensor<Self> {
        let nodes = [x.node(), bias.node()];
        let prepared = LinearBias.prepare::<C>(nodes).compute_bound().stateful();
        let (x, w, bias) = (x.into_primitive(), inner(w), bias.into_primitive());
        let out = B::cubesla_quantized_linear_bias(x, w.clone(), bias, form, activations);
        match prepared {
            OpsKind::Tracked(tracked) => tracked.finish((w, form), out),
            OpsKind::UnTracked(untracked) => untracked.finish(out),
        }
    }
}

/// Weights in low bits, which nothing tracks.
fn inner<B: Backend, C: CheckpointStrategy>(w: Packed<Autodiff<B, C>>) -> Packed<B> {
    match w {
        Packed::Symmetric { words, scales } => Packed::Symmetric {
            words,
            scales: scales.into_primitive(),
        },
        Packed::ZeroPoint {
            words,
            scales,
            zeros,
        } => Packed::ZeroPoint {
            words,
            scales: scales.into_primitive(),
            zeros: zeros.into_primitive(),
        },
    }
}
