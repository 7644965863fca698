//! What the library wants to know of Burn's tensors, and refusals of those it cannot take.

use burn_core::backend::DispatchDevice;
use burn_core::tensor::{DType, Device, FloatDType, Tensor};
use cubesla::{AttentionOptions, AttentionProblem, Client, MAX_ROW, ProblemError};

use crate::Error;

/// The library's name of a type; none for those that it does not have.
pub(crate) fn element_type(dtype: DType) -> Option<cubesla::DType> {
    match dtype {
        DType::F32 => Some(cubesla::DType::F32),
        DType::F16 => Some(cubesla::DType::F16),
        DType::BF16 => Some(cubesla::DType::BF16),
        _ => None,
    }
}

/// The client of a tensor's device.
pub(crate) fn client(device: &Device) -> Result<Client, Error> {
    match device.clone().without_autodiff().as_dispatch() {
        DispatchDevice::Cube(device) => Ok(device.client()),
        #[allow(unreachable_patterns, reason = "other backends are features of Burn's")]
        _ => Err(Error::Backend {
            device: format!("{device:?}"),
        }),
    }
}

/// An error unless tensors are on the device of the first.
pub(crate) fn expect_device(tensors: &[(&'static str, Device)]) -> Result<(), Error> {
    let &(reference, ref expected) = &tensors[0];
    for &(argument, ref found) in &tensors[1..] {
        if found != expected {
            return Err(Error::Device {
                argument,
                found: format!("{found:?}"),
                reference,
                expected: format!("{expected:?}"),
            });
        }
    }
    Ok(())
}

/// An error if `tensor` is tracked, and a gradient would be missed.
pub(crate) fn expect_untracked<const D: usize>(
    operation: &'static str,
    argument: &'static str,
    tensor: &Tensor<D>,
    hint: &'static str,
) -> Result<(), Error> {
    if tensor.is_tracked() {
        return Err(Error::NotDifferentiable {
            operation,
            argument,
            hint,
        });
    }
    Ok(())
}

/// The problem of these tensors, and the client of their device.
pub(crate) fn problem(
    q: &Tensor<4>,
    k: &Tensor<4>,
    v: &Tensor<4>,
    options: &AttentionOptions,
) -> Result<(AttentionProblem, Client), Error> {
    expect_device(&[("q", q.device()), ("k", k.device()), ("v", v.device())])?;
    let client = client(&q.device())?;
    let dtype = float_type("q", q)?;
    for (argument, tensor) in [("k", k), ("v", v)] {
        let found = float_type(argument, tensor)?;
        if found != dtype {
            return Err(ProblemError::DTypeMismatch {
                argument,
                found,
                expected: dtype,
            }
            .into());
        }
    }
    let problem = AttentionProblem::from_shapes(q.dims(), k.dims(), v.dims(), dtype, options)?;
    expect_supported(dtype, &client)?;
    problem.expect_products(client.properties())?;
    Ok((problem, client))
}

/// An error unless kernels on the client's device can use the type.
pub(crate) fn expect_supported(dtype: cubesla::DType, client: &Client) -> Result<(), Error> {
    if !dtype.is_supported(client.properties()) {
        let instead = cubesla::DType::ALL
            .into_iter()
            .filter(|other| other.is_supported(client.properties()));
        return Err(ProblemError::UnsupportedDType {
            dtype,
            device: client.properties().identity.name.clone(),
            instead: instead
                .map(|other| other.to_string())
                .collect::<Vec<_>>()
                .join(" or "),
        }
        .into());
    }
    Ok(())
}

/// The type of a tensor that kernels on its device can read: not empty, of floats that it has.
pub(crate) fn expect_floats<const D: usize>(
    argument: &'static str,
    tensor: &Tensor<D>,
) -> Result<cubesla::DType, Error> {
    let client = client(&tensor.device())?;
    let dtype = float_type(argument, tensor)?;
    expect_supported(dtype, &client)?;
    if tensor.dims().contains(&0) {
        return Err(ProblemError::ZeroSize {
            argument,
            shape: tensor.dims().to_vec(),
        }
        .into());
    }
    Ok(dtype)
}

fn float_type<const D: usize>(
    argument: &'static str,
    tensor: &Tensor<D>,
) -> Result<cubesla::DType, Error> {
    element_type(tensor.dtype()).ok_or(Error::DType {
        argument,
        found: tensor.dtype(),
        takes: "f32, f16 or bf16",
    })
}

/// Weights in the type that kernels take them in; gradients flow back through the cast.
pub(crate) fn to_f32<const D: usize>(weights: Tensor<D>) -> Tensor<D> {
    if weights.dtype() == DType::F32 {
        return weights;
    }
    weights.cast(FloatDType::F32)
}

/// An error unless a tensor has this shape.
pub(crate) fn expect_shape<const D: usize>(
    argument: &'static str,
    tensor: &Tensor<D>,
    expected: [usize; D],
) -> Result<(), Error> {
    if tensor.dims() == expected {
        return Ok(());
    }
    Err(ProblemError::ShapeMismatch {
        argument,
        found: tensor.dims().to_vec(),
        expected: expected.to_vec(),
    }
    .into())
}

/// An error unless logits have a shape that is broadcast to `[heads, rows]`.
pub(crate) fn expect_logits(
    alpha_logit: &Tensor<2>,
    heads: usize,
    rows: usize,
) -> Result<(), Error> {
    if [[1, 1], [heads, 1]].contains(&alpha_logit.dims()) {
        return Ok(());
    }
    expect_shape("alpha_logit", alpha_logit, [heads, rows])
}

/// An error unless selections take rows of `len`.
pub(crate) fn expect_row(len: usize) -> Result<(), Error> {
    if len > MAX_ROW {
        return Err(ProblemError::RowTooLong {
            len,
            limit: MAX_ROW,
        }
        .into());
    }
    Ok(())
}

/// An error unless a tensor is f32.
pub(crate) fn expect_f32<const D: usize>(
    argument: &'static str,
    tensor: &Tensor<D>,
) -> Result<(), Error> {
    if tensor.dtype() == DType::F32 {
        return Ok(());
    }
    Err(Error::DType {
        argument,
        found: tensor.dtype(),
        takes: "f32",
    })
}
