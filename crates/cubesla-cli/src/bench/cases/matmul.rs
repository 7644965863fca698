//! Products with low-bit matrices.

use cubesla::{
    Client, DType, DeviceTensor, Format, Granularity, QuantizedTensor, quantize, quantized_matmul,
    weight_only_matmul,
};
use cubesla_reference::quantize as reference;
use cubesla_reference::relative_error;

use super::{Case, Check, Cost, Scale, Work, bound, copies};
use crate::bench::host::{HostTensor, Random};
use crate::error::Error;

/// `(variant, [M, N, K])`.
pub const LARGE: [(&str, [usize; 3]); 8] = [
    ("int8", [8192, 8192, 8192]),
    ("fp8", [8192, 8192, 8192]),
    ("int8", [16, 8192, 8192]),
    ("fp8", [16, 8192, 8192]),
    ("w4a16", [1, 8192, 8192]),
    ("w4a16", [16, 4096, 4096]),
    ("w8a16-int8", [1, 8192, 8192]),
    ("w8a16-fp8", [1, 8192, 8192]),
];
const SMALL: [(&str, [usize; 3]); 8] = [
    ("int8", [256, 256, 512]),
    ("fp8", [256, 256, 512]),
    ("int8", [16, 512, 512]),
    ("fp8", [16, 512, 512]),
    ("w4a16", [1, 1024, 1024]),
    ("w4a16", [16, 512, 512]),
    ("w8a16-int8", [1, 1024, 1024]),
    ("w8a16-fp8", [1, 1024, 1024]),
];

/// Elements of a group of INT4 weights.
const GROUP: usize = 128;

pub fn cases(scale: Scale, dtype: Option<DType>) -> Vec<Case> {
    let dtype = scale.sizes(dtype).0[0].dtype;
    let sizes = match scale {
        Scale::Large => LARGE,
        Scale::Small => SMALL,
    };
    sizes
        .map(|(variant, size)| Case {
            name: name(variant, size, dtype),
            prepare: Box::new(move |client| {
                Ok(Box::new(Matmul::new(client, variant, size, dtype)?))
            }),
        })
        .into()
}

fn name(variant: &str, [m, n, k]: [usize; 3], dtype: DType) -> String {
    format!("matmul/{variant}/m{m}n{n}k{k}/{dtype}")
}

/// Activations of a call.
enum Activations {
    Quantized(Box<QuantizedTensor<4>>),
    Full(DeviceTensor<4>),
}

struct Matmul {
    client: Client,
    /// Activations `[1, 1, M, K]` and weights `[1, 1, N, K]`.
    host: [HostTensor; 2],
    device: Vec<(Activations, QuantizedTensor<2>)>,
    format: Format,
    size: [usize; 3],
    dtype: DType,
}

impl Matmul {
    fn new(client: &Client, variant: &str, size: [usize; 3], dtype: DType) -> Result<Self, Error> {
        let [m, n, k] = size;
        let format = match variant {
            "int8" | "w8a16-int8" => Format::Int8,
            "fp8" | "w8a16-fp8" => Format::Fp8,
            _ => Format::Int4,
        };
        let weight_only = variant.starts_with('w');
        let x = HostTensor::normal([1, 1, m, k], dtype, 31);
        let w = HostTensor::normal([1, 1, n, k], dtype, 32);
        let bytes = (m + n) * k * format.bits() / 8;
        let device = (0..copies(client, bytes))
            .map(|_| {
                let x = x.upload(client)?;
                let activations = if weight_only {
                    Activations::Full(x)
                } else {
                    let x = quantize(client, &x, format, Granularity::Row, false);
                    Activations::Quantized(Box::new(x.map_err(cubesla::Error::from)?))
                };
                let w = w.upload(client)?;
                let weights = DeviceTensor::new(w.handle().clone(), [n, k], [k, 1], dtype)
                    .and_then(|w| quantize(client, &w, format, granularity(format), false))
                    .map_err(cubesla::Error::from)?;
                Ok((activations, weights))
            })
            .collect::<Result<_, Error>>()?;
        Ok(Self {
            client: client.clone(),
            host: [x, w],
            device,
            format,
            size,
            dtype,
        })
    }

    fn multiply(&self, number: usize) -> Result<DeviceTensor<4>, Error> {
        let (x, w) = &self.device[number % self.device.len()];
        let out = match x {
            Activations::Quantized(x) => quantized_matmul(&self.client, x, w, None, self.dtype),
            Activations::Full(x) => weight_only_matmul(&self.client, x, w, None, self.dtype),
        };
        out.map_err(|source| cubesla::Error::from(source).into())
    }
}

/// How weights share scales.
fn granularity(format: Format) -> Granularity {
    match format {
        Format::Int4 => Granularity::Group(GROUP),
        _ => Granularity::Row,
    }
}

/// A row in the reference's low-bit form, as numbers.
fn low_bit(row: &[f64], format: Format, group: usize) -> Vec<f64> {
    let format = match format {
        Format::Int8 => reference::Format::Int8,
        Format::Int4 => reference::Format::Int4,
        Format::Fp8 => reference::Format::Fp8,
    };
    let values: Vec<f32> = row.iter().map(|&x| x as f32).collect();
    let quantized = reference::quantize(&values, [1, row.len()], format, [1, group], false);
    (0..row.len()).map(|at| quantized.value(0, at)).collect()
}

impl Work for Matmul {
    fn call(&self, number: usize) -> Result<(), Error> {
        self.multiply(number).map(drop)
    }

    /// Rows and columns of the result: the first, the last, and some between.
    fn check(&self) -> Result<Check, Error> {
        let out = HostTensor::download(&self.client, &self.multiply(0)?)?;
        let [m, n, k] = self.size;
        let mut random = Random::new(33);
        let mut sample = |len: usize, count: usize| {
            let mut picked = vec![0, len - 1];
            picked.extend((0..count).map(|_| random.below(len)));
            picked
        };
        let (rows, columns) = (sample(m, 4), sample(n, 30));
        let group = if self.format == Format::Int4 {
            GROUP
        } else {
            k
        };
        let weights: Vec<Vec<f64>> = columns
            .iter()
            .map(|&j| low_bit(self.host[1].row([0, 0, j]).data(), self.format, group))
            .collect();
        let (mut found, mut exact) = (Vec::new(), Vec::new());
        for i in rows {
            let x = self.host[0].row([0, 0, i]);
            let x = match self.device[0].0 {
                Activations::Full(_) => x.data().to_vec(),
                Activations::Quantized(_) => low_bit(x.data(), self.format, k),
            };
            let row = out.row([0, 0, i]);
            for (&j, w) in columns.iter().zip(&weights) {
                found.push(row.data()[j]);
                exact.push(x.iter().zip(w).map(|(x, w)| x * w).sum());
            }
        }
        Ok(Check {
            error: relative_error(&found, &exact),
            bound: bound(self.dtype),
        })
    }

    fn cost(&self) -> Cost {
        let [m, n, k] = self.size;
        let (x, w) = &self.device[0];
        let x = match x {
            Activations::Quantized(x) => x.bytes(),
            Activations::Full(x) => x.len() * self.dtype.size(),
        };
        Cost {
            flops: 2.0 * (m * n) as f64 * k as f64,
            low_bit_flops: 0.0,
            dense_flops: None,
            bytes: (x + w.bytes() + m * n * self.dtype.size()) as f64,
            dtype: self.dtype,
        }
    }
}
