//! Block-sparse attention in low bits, the block list given: quantization is part of a call.

use cubesla::plan::LowBitPlan;
use cubesla::{
    AttentionOptions, AttentionProblem, BlockList, Client, DType, HostBlockList, LowBitFormats,
    LowBitScores, LowBitValues, low_bit_attention,
};
use cubesla_reference::{cosine, relative_l1};

use super::sparse::{attended, list_bytes, pairs, problem, random_list, variants};
use super::{Case, Check, Cost, Qkv, Scale, Size, Work};
use crate::bench::host::HostTensor;
use crate::error::Error;

/// Formats by the name of their variant.
const FORMATS: [(&str, LowBitFormats); 3] = [
    ("int8", LowBitFormats::INT8),
    ("int8-fp8", LowBitFormats::INT8_FP8),
    ("fp8", LowBitFormats::FP8),
];

pub fn cases(scale: Scale, dtype: Option<DType>) -> Vec<Case> {
    let sparse = variants(scale, dtype).into_iter();
    let sparse = sparse.filter(|&(size, sparsity)| sparsity > 0 && size.dtype != DType::F32);
    let of = |(size, sparsity)| {
        FORMATS.map(|(name, formats)| Case {
            name: format!("low_bit_forward/{name}/{sparsity}/{size}"),
            prepare: Box::new(move |client| {
                Ok(Box::new(LowBit::new(client, size, sparsity, formats)?))
            }),
        })
    };
    sparse.flat_map(of).collect()
}

struct LowBit {
    client: Client,
    inputs: Qkv,
    options: AttentionOptions,
    problem: AttentionProblem,
    list: HostBlockList,
    on_device: BlockList,
    formats: LowBitFormats,
}

impl LowBit {
    fn new(
        client: &Client,
        size: Size,
        sparsity: usize,
        formats: LowBitFormats,
    ) -> Result<Self, Error> {
        let options = AttentionOptions::default();
        let problem = problem(size, &options)?;
        let list = random_list(&problem, sparsity)?;
        Ok(Self {
            client: client.clone(),
            inputs: Qkv::new(client, size)?,
            options,
            problem,
            on_device: list.upload(client),
            list,
            formats,
        })
    }

    fn attend(&self, number: usize) -> Result<cubesla::AttentionOutput, Error> {
        let [q, k, v] = self.inputs.copy(number);
        let (client, list) = (&self.client, &self.on_device);
        let output = low_bit_attention(client, q, k, v, list, &self.options, self.formats)?;
        Ok(output)
    }
}

impl Work for LowBit {
    fn call(&self, number: usize) -> Result<(), Error> {
        self.attend(number).map(drop)
    }

    /// By the error rule of low bits: the relative L1 difference, if the cosine is right. Scores in FP8
    /// lose more than those in INT8.
    fn check(&self) -> Result<Check, Error> {
        let out = HostTensor::download(&self.client, &self.attend(0)?.out)?;
        let (mut found, mut exact) = (Vec::new(), Vec::new());
        for at in self.inputs.sample() {
            found.extend_from_slice(out.row(at).data());
            exact.extend_from_slice(attended(&self.inputs, &self.problem, &self.list, at).data());
        }
        let (least, bound) = match self.formats.scores {
            LowBitScores::Int8 => (0.999, 0.05),
            LowBitScores::Fp8 => (0.997, 0.08),
        };
        let error = if cosine(&found, &exact) >= least {
            relative_l1(&found, &exact)
        } else {
            f64::INFINITY
        };
        Ok(Check { error, bound })
    }

    fn cost(&self) -> Cost {
        let size = self.inputs.size;
        let flops = pairs(&self.problem, self.list.rows()) * (4 * size.dim) as f64;
        Cost {
            flops,
            low_bit_flops: match self.formats.values {
                LowBitValues::Full => flops / 2.0,
                LowBitValues::Fp8 => flops,
            },
            dense_flops: Some(size.dense_flops()),
            bytes: (4 * size.tensor_bytes() + 4 * size.batch * size.heads * size.len) as f64
                + list_bytes(&self.list),
            dtype: size.dtype,
        }
    }

    fn plan(&self) -> Option<String> {
        let device = self.client.properties();
        let plan = LowBitPlan::new(&self.problem, device, self.formats).ok()?;
        Some(plan.to_string())
    }
}
