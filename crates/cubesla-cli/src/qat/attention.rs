//! The layer's attention: the library's calls.

use cubesla::{
    AttentionOptions, AttentionOutput, BlockList, Client, DType, DeviceTensor, HostBlockList,
    LowBitFormats, block_sparse_attention, block_sparse_attention_backward, download,
    low_bit_attention, low_bit_attention_backward, upload,
};

use super::{BATCH, DIM, HEADS, LEN};
use crate::error::Error;

const SHAPE: [usize; 4] = [BATCH, HEADS, LEN, DIM];
const FORMATS: LowBitFormats = LowBitFormats::INT8_FP8;

/// How gradients are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backward {
    /// At queries, keys and values as they are, with the result that the forward saved.
    AsIs,
    /// The same, with the result of a forward in full precision.
    Exact,
    /// At queries, keys and values as a low-bit forward rounded them, with the result that it saved.
    Rounded,
}

/// What a forward leaves for its gradients.
pub struct Branches {
    tensors: [DeviceTensor<4>; 3],
    output: AttentionOutput,
    /// The result, `[BATCH, HEADS, LEN, DIM]`.
    pub out: Vec<f32>,
}

/// Attention over all keys on a device, in f32.
pub struct Attention {
    client: Client,
    list: BlockList,
    options: AttentionOptions,
}

impl Attention {
    pub fn new(client: Client) -> Self {
        let options = AttentionOptions {
            block_q: LEN,
            block_k: LEN,
            ..AttentionOptions::default()
        };
        let list = HostBlockList::dense([BATCH, HEADS, 1, 1]).upload(&client);
        Self {
            client,
            list,
            options,
        }
    }

    pub fn forward(&self, qkv: [Vec<f32>; 3], low: bool) -> Result<Branches, Error> {
        let tensors = self.upload(&qkv)?;
        let (client, [q, k, v]) = (&self.client, &tensors);
        let (list, options) = (&self.list, &self.options);
        let output = if low {
            low_bit_attention(client, q, k, v, list, options, FORMATS)?
        } else {
            block_sparse_attention(client, q, k, v, list, options)?
        };
        let out = download(client, &output.out)?;
        Ok(Branches {
            tensors,
            output,
            out,
        })
    }

    /// The gradients of queries, keys and values.
    pub fn backward(
        &self,
        branches: &Branches,
        grad_out: &[f32],
        backward: Backward,
    ) -> Result<[Vec<f32>; 3], Error> {
        let (client, list, options) = (&self.client, &self.list, &self.options);
        let [q, k, v] = &branches.tensors;
        let grad = &upload(client, grad_out, SHAPE, DType::F32)?;
        let AttentionOutput { out, lse } = &branches.output;
        let grads = match backward {
            Backward::AsIs => {
                block_sparse_attention_backward(client, q, k, v, out, lse, grad, list, options)?
            }
            Backward::Exact => {
                let AttentionOutput { out, lse } =
                    &block_sparse_attention(client, q, k, v, list, options)?;
                block_sparse_attention_backward(client, q, k, v, out, lse, grad, list, options)?
            }
            Backward::Rounded => {
                low_bit_attention_backward(client, q, k, v, out, lse, grad, list, options, FORMATS)?
            }
        };
        Ok([
            download(client, &grads.dq)?,
            download(client, &grads.dk)?,
            download(client, &grads.dv)?,
        ])
    }

    fn upload(&self, qkv: &[Vec<f32>; 3]) -> Result<[DeviceTensor<4>; 3], Error> {
        let [q, k, v] = qkv
            .each_ref()
            .map(|x| upload(&self.client, x, SHAPE, DType::F32));
        Ok([q?, k?, v?])
    }
}
