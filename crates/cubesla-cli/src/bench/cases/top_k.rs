//! Top-k of general rows.

use cubesla::{Client, DType, DeviceTensor, TopKOrder, download_top_k, top_k};
use cubesla_reference::router::rank;

use super::{Case, Check, Cost, Scale, Work, copies};
use crate::bench::host::{HostTensor, Random};
use crate::error::Error;

/// `(rows, length, k)`.
const LARGE: [[usize; 3]; 3] = [[40 * 591, 1182, 35], [12 * 256, 512, 25], [8192, 256, 8]];
const SMALL: [[usize; 3]; 2] = [[512, 256, 8], [256, 1182, 35]];

pub fn cases(scale: Scale) -> Vec<Case> {
    let sizes = match scale {
        Scale::Large => &LARGE[..],
        Scale::Small => &SMALL,
    };
    sizes
        .iter()
        .map(|&[rows, len, k]| Case {
            name: format!("top_k/k{k}/r{rows}n{len}/f32"),
            prepare: Box::new(move |client| Ok(Box::new(TopK::new(client, rows, len, k)?))),
        })
        .collect()
}

struct TopK {
    client: Client,
    host: HostTensor,
    device: Vec<DeviceTensor<2>>,
    k: usize,
}

impl TopK {
    fn new(client: &Client, rows: usize, len: usize, k: usize) -> Result<Self, Error> {
        let host = HostTensor::normal([1, 1, rows, len], DType::F32, 4);
        let device = (0..copies(client, host.size()))
            .map(|_| {
                let handle = host.upload(client)?.handle().clone();
                DeviceTensor::new(handle, [rows, len], [len, 1], DType::F32)
                    .map_err(|source| cubesla::Error::from(source).into())
            })
            .collect::<Result<_, Error>>()?;
        Ok(Self {
            client: client.clone(),
            host,
            device,
            k,
        })
    }

    fn select(&self, number: usize) -> Result<cubesla::TopK, Error> {
        let rows = &self.device[number % self.device.len()];
        top_k(&self.client, rows, self.k, TopKOrder::Value)
            .map_err(|source| cubesla::Error::from(source).into())
    }
}

impl Work for TopK {
    fn call(&self, number: usize) -> Result<(), Error> {
        self.select(number).map(drop)
    }

    /// Values, indices and their order are exact; the error is the share of wrong places.
    fn check(&self) -> Result<Check, Error> {
        let (values, indices) = download_top_k(&self.client, &self.select(0)?)?;
        let [rows, _] = self.device[0].shape();
        let mut random = Random::new(5);
        let mut sample = vec![0, rows - 1];
        sample.extend((0..62).map(|_| random.below(rows)));
        let mut wrong = 0;
        for &row in &sample {
            let exact = self.host.row([0, 0, row]);
            let places = row * self.k..(row + 1) * self.k;
            let found = values[places.clone()].iter().zip(&indices[places]);
            wrong += rank(exact.data())
                .into_iter()
                .zip(found)
                .filter(|&(at, (&value, &index))| {
                    at != index as usize || exact.data()[at] != f64::from(value)
                })
                .count();
        }
        Ok(Check {
            error: wrong as f64 / (sample.len() * self.k) as f64,
            bound: 0.0,
        })
    }

    fn cost(&self) -> Cost {
        let [rows, _] = self.device[0].shape();
        Cost {
            flops: 0.0,
            low_bit_flops: 0.0,
            dense_flops: None,
            bytes: (self.host.size() + 8 * rows * self.k) as f64,
            dtype: DType::F32,
        }
    }
}
