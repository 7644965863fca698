//! Linear attention over all keys.

use cubesla::{Client, DType, FeatureMap, linear_attention};
use cubesla_reference::attention::Causal;
use cubesla_reference::blocks::BlockWeights;
use cubesla_reference::linear::{FeatureMap as ReferenceMap, forward};
use cubesla_reference::{Tensor, relative_error};

use super::{Case, Check, Cost, Qkv, Scale, Work, bound};
use crate::bench::host::HostTensor;
use crate::error::Error;

pub fn cases(scale: Scale, dtype: Option<DType>) -> Vec<Case> {
    let (sizes, _) = scale.sizes(dtype);
    sizes
        .into_iter()
        .map(|size| Case {
            name: format!("linear/softmax/{size}"),
            prepare: Box::new(move |client| {
                Ok(Box::new(Linear {
                    client: client.clone(),
                    inputs: Qkv::new(client, size)?,
                }))
            }),
        })
        .collect()
}

struct Linear {
    client: Client,
    inputs: Qkv,
}

impl Linear {
    fn attend(&self, number: usize) -> Result<cubesla::DeviceTensor<4>, Error> {
        let [q, k, v] = self.inputs.copy(number);
        linear_attention(&self.client, q, k, v, FeatureMap::Softmax, false).map_err(Error::from)
    }
}

impl Work for Linear {
    fn call(&self, number: usize) -> Result<(), Error> {
        self.attend(number).map(drop)
    }

    fn check(&self) -> Result<Check, Error> {
        let out = HostTensor::download(&self.client, &self.attend(0)?)?;
        let (mut found, mut exact) = (Vec::new(), Vec::new());
        for at in self.inputs.sample() {
            found.extend_from_slice(out.row(at).data());
            exact.extend_from_slice(
                attended(&self.inputs, at, self.inputs.size.len, |_| true).data(),
            );
        }
        Ok(Check {
            error: relative_error(&found, &exact),
            bound: bound(self.inputs.size.dtype),
        })
    }

    fn cost(&self) -> Cost {
        let size = self.inputs.size;
        Cost {
            flops: size.linear_flops(),
            low_bit_flops: 0.0,
            dense_flops: None,
            bytes: (4 * size.tensor_bytes()) as f64,
            dtype: size.dtype,
        }
    }
}

/// Linear attention of one row over the key blocks that `takes_part` names, `[1, 1, 1, D]`.
pub fn attended(
    inputs: &Qkv,
    [b, h, i]: [usize; 3],
    block_k: usize,
    takes_part: impl Fn(usize) -> bool,
) -> Tensor {
    let [q, k, v] = &inputs.host;
    let weights = BlockWeights::from_fn([1, 1, 1, inputs.size.len], 1, block_k, |[_, _, _, j]| {
        f64::from(takes_part(j))
    });
    let (k, v) = (k.head([b, h]), v.head([b, h]));
    let phi = ReferenceMap::Softmax;
    forward(&q.row([b, h, i]), &k, &v, phi, &weights, Causal::None)
}
