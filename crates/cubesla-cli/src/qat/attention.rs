//! The layer's attention: the library's calls.

use cubesla::{
    AttentionOptions, AttentionOutput, BlockList, Client, DType, DeviceTensor, Format, Granularity,
    HostBlockList, LowBitFormats, LowBitScores, LowBitValues, block_sparse_attention,
    block_sparse_attention_backward, dequantize, download, low_bit_attention, quantize, upload,
};

use super::{BATCH, DIM, HEADS, LEN};
use crate::error::Error;

const SHAPE: [usize; 4] = [BATCH, HEADS, LEN, DIM];
const FORMATS: LowBitFormats = LowBitFormats {
    scores: LowBitScores::Int8,
    values: LowBitValues::Fp8,
};

/// What the backward is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backward {
    /// The queries, keys and values as they are, with the result that the forward saved.
    Saved,
    /// The same, with the result of a forward in full precision.
    Exact,
    /// Queries and keys as the low-bit forward rounded them, with a forward of those.
    Rounded,
}

/// What a forward leaves for its gradients.
pub struct Branches {
    qkv: [Vec<f32>; 3],
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
            qkv,
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
        let tensors = match backward {
            Backward::Rounded => self.rounded(&branches.qkv)?,
            Backward::Saved | Backward::Exact => branches.tensors.clone(),
        };
        let [q, k, v] = &tensors;
        let again;
        let output = if backward == Backward::Saved {
            &branches.output
        } else {
            again = block_sparse_attention(client, q, k, v, list, options)?;
            &again
        };
        let grad_out = upload(client, grad_out, SHAPE, DType::F32)?;
        let (out, lse) = (&output.out, &output.lse);
        let grads =
            block_sparse_attention_backward(client, q, k, v, out, lse, &grad_out, list, options)?;
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

    /// Queries, and keys less their mean, as INT8 holds them, and values as they are.
    fn rounded(&self, [q, k, v]: &[Vec<f32>; 3]) -> Result<[DeviceTensor<4>; 3], Error> {
        let mut k = k.clone();
        for head in k.chunks_exact_mut(LEN * DIM) {
            for d in 0..DIM {
                let mean = head.iter().skip(d).step_by(DIM).sum::<f32>() / LEN as f32;
                head.iter_mut()
                    .skip(d)
                    .step_by(DIM)
                    .for_each(|x| *x -= mean);
            }
        }
        let client = &self.client;
        let [q, k, v] = self.upload(&[q.clone(), k, v.clone()])?;
        let int8 = |x: &DeviceTensor<4>| -> Result<_, cubesla::Error> {
            let codes = quantize(client, x, Format::Int8, Granularity::Block, false)?;
            Ok(dequantize(client, &codes, DType::F32)?)
        };
        Ok([int8(&q)?, int8(&k)?, v])
    }
}
