//! Low-bit attention against exact attention, by format.

use cubesla::{
    AttentionOptions, Client, DeviceTensor, LowBitFormats, LowBitScores, LowBitValues,
    block_sparse_attention, low_bit_attention,
};
use cubesla_reference::attention::Causal;
use cubesla_reference::low_bit::{self, Formats};
use cubesla_reference::quantize::Format;
use cubesla_reference::{cosine, relative_l1};
use indicatif::ProgressBar;

use crate::error::Error;
use crate::exact::to_host;
use crate::layers::Layer;

/// Every choice of formats.
const FORMATS: [(LowBitScores, LowBitValues); 4] = [
    (LowBitScores::Int8, LowBitValues::Full),
    (LowBitScores::Int8, LowBitValues::Fp8),
    (LowBitScores::Fp8, LowBitValues::Full),
    (LowBitScores::Fp8, LowBitValues::Fp8),
];
/// Steps of progress in a layer.
pub const STEPS: usize = 1 + 2 * FORMATS.len();

/// How far a result is from exact attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Closeness {
    /// Cosine of the angle between the results.
    pub cosine: f64,
    /// L1 norm of the difference, relative to that of the exact result.
    pub l1: f64,
}

impl Closeness {
    pub fn new(found: &[f64], exact: &[f64]) -> Self {
        Self {
            cosine: cosine(found, exact),
            l1: relative_l1(found, exact),
        }
    }
}

/// A choice of formats.
pub struct Row {
    /// Formats of scores and values, in words.
    pub formats: [String; 2],
    /// Of the device's kernel.
    pub device: Closeness,
    /// Of the f64 reference without smoothing of the keys; none for the kernel in full precision.
    pub unsmoothed: Option<Closeness>,
}

/// All choices over all blocks, after the kernel of the inputs' type.
pub fn layer(
    client: &Client,
    layer: &Layer,
    options: &AttentionOptions,
    progress: &ProgressBar,
) -> Result<Vec<Row>, Error> {
    progress.set_message(format!("{}: attention in f64", layer.name));
    let all = layer.all_blocks();
    let exact = layer.sparse(&all).out;
    let [q, k, v] = &layer.upload(client)?;
    let list = all.upload(client);
    let closeness = |out: &DeviceTensor<4>| -> Result<Closeness, Error> {
        Ok(Closeness::new(to_host(client, out)?.data(), exact.data()))
    };
    let full = block_sparse_attention(client, q, k, v, &list, options)?;
    let dtype = layer.problem.dtype().to_string();
    let mut rows = vec![Row {
        formats: [dtype.clone(), dtype.clone()],
        device: closeness(&full.out)?,
        unsmoothed: None,
    }];
    progress.inc(1);
    for (scores, values) in FORMATS {
        let (score_format, score_name) = match scores {
            LowBitScores::Int8 => (Format::Int8, "INT8"),
            LowBitScores::Fp8 => (Format::Fp8, "FP8"),
        };
        let fp8_values = values == LowBitValues::Fp8;
        let value_name = if fp8_values { "FP8" } else { dtype.as_str() };
        let name = format!("{}: {score_name} and {value_name}", layer.name);
        progress.set_message(name.clone());
        let formats = LowBitFormats { scores, values };
        let low = low_bit_attention(client, q, k, v, &list, options, formats)?;
        let device = closeness(&low.out)?;
        progress.inc(1);
        progress.set_message(format!("{name}, unsmoothed, in f64"));
        let rough = low_bit::forward(
            &layer.q,
            &layer.k,
            &layer.v,
            &layer.weights(&all, true),
            layer.problem.scale().into(),
            Causal::None,
            Formats {
                scores: score_format,
                fp8_values,
                smooth: false,
            },
        );
        progress.inc(1);
        rows.push(Row {
            formats: [score_name.to_owned(), value_name.to_owned()],
            device,
            unsmoothed: Some(Closeness::new(rough.out.data(), exact.data())),
        });
    }
    Ok(rows)
}
