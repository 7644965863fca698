//! What commands that compute on a model's data take.

use std::path::{Path, PathBuf};

use cubesla::{AttentionOptions, Client, DType};

use crate::common;
use crate::error::Error;
use crate::layers::{self, Layer};

/// Q, K and V of layers 1 and 4 of all-MiniLM-L6-v2 over 512 tokens of English prose.
pub const SHIPPED: &[u8] = include_bytes!("../../../data/minilm_qkv.safetensors");

/// Which layers to compute, and in which type.
#[derive(clap::Args)]
pub struct Inputs {
    /// Safetensors file with `q`, `k`, `v` or `NAME.q`, `NAME.k`, `NAME.v`, each [B, H, L, D] or
    /// [H, L, D]; by default two layers of all-MiniLM-L6-v2 that come with this program
    #[arg(long, value_name = "FILE")]
    pub input: Option<PathBuf>,
    /// Element type on the device: f32, f16 or bf16; by default f16 if the device has it, else f32
    #[arg(long, value_parser = common::dtype)]
    pub dtype: Option<DType>,
}

impl Inputs {
    /// The layers, in the type that the device computes in.
    pub fn load(&self, client: &Client, options: &AttentionOptions) -> Result<Vec<Layer>, Error> {
        let has_f16 = DType::F16.is_supported(client.properties());
        let default = if has_f16 { DType::F16 } else { DType::F32 };
        let dtype = self.dtype.unwrap_or(default);
        println!("Device: {}, {dtype}", client.properties().identity.name);
        match &self.input {
            Some(path) => layers::parse(&read(path)?, dtype, options),
            None => layers::parse(SHIPPED, dtype, options),
        }
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(|source| Error::Read {
        path: path.to_owned(),
        source,
    })
}

/// Writes a small layer `a` into a file of `folder`.
#[cfg(test)]
pub fn write_small(folder: &Path) -> PathBuf {
    use safetensors::tensor::{Dtype, TensorView, serialize};

    let (shape, file) = ([1, 2, 70, 32], folder.join("input.safetensors"));
    let values = |seed: f32| {
        let len: usize = shape.iter().product();
        (0..len)
            .flat_map(|at| (at as f32 * 0.37 + seed).sin().to_le_bytes())
            .collect::<Vec<u8>>()
    };
    let data = [
        ("a.q", values(1.0)),
        ("a.k", values(2.0)),
        ("a.v", values(3.0)),
    ];
    let views = data.iter().map(|(name, bytes)| {
        let view = TensorView::new(Dtype::F32, shape.to_vec(), bytes).expect("bytes of the shape");
        (*name, view)
    });
    let bytes = serialize(views, None).expect("valid tensors");
    std::fs::write(&file, bytes).expect("a folder to write to");
    file
}
