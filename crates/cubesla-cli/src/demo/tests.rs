use std::collections::HashMap;
use std::env;
use std::fs;

use safetensors::tensor::{Dtype, TensorView, serialize};

use super::*;

/// Two layers with grouped heads and lengths that no block divides.
fn input() -> Vec<u8> {
    let shapes = HashMap::from([
        ("q", [2, 4, 70, 40]),
        ("k", [2, 2, 90, 40]),
        ("v", [2, 2, 90, 32]),
    ]);
    let mut files = Vec::new();
    for layer in ["a", "b/c"] {
        for (tensor, shape) in &shapes {
            let len: usize = shape.iter().product();
            let values = (0..len).map(|at| (at as f32 * 0.37 + layer.len() as f32).sin());
            let bytes: Vec<u8> = values.flat_map(f32::to_le_bytes).collect();
            files.push((format!("{layer}.{tensor}"), shape.to_vec(), bytes));
        }
    }
    let views = files.iter().map(|(name, shape, bytes)| {
        (
            name,
            TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap(),
        )
    });
    serialize(views, None).unwrap()
}

#[test]
fn every_layer_of_a_file_is_computed_and_drawn() {
    let folder = env::temp_dir().join(format!("cubesla-demo-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let file = folder.join("input.safetensors");
    fs::write(&file, input()).unwrap();
    let args = Args {
        inputs: Inputs {
            input: Some(file),
            dtype: None,
        },
        output: folder.join("pictures"),
        block_q: 32,
        block_k: 16,
    };
    let device = env::var(device::DEVICE_VARIABLE).unwrap_or("auto".into());
    run(&args, &device).unwrap();
    for name in ["a.png", "b_c.png"] {
        let picture = fs::read(args.output.join(name)).unwrap();
        assert!(picture.starts_with(b"\x89PNG") && picture.len() > 10_000);
    }
    fs::remove_dir_all(folder).unwrap();
}
