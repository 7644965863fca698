use std::{env, fs};

use safetensors::tensor::{Dtype, TensorView, serialize};

use super::*;

#[test]
fn a_file_is_reported_and_drawn() {
    let folder = env::temp_dir().join(format!("cubesla-report-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
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
        let view = TensorView::new(Dtype::F32, shape.to_vec(), bytes).unwrap();
        (*name, view)
    });
    fs::write(&file, serialize(views, None).unwrap()).unwrap();
    let args = Args {
        inputs: Inputs {
            input: Some(file),
            dtype: Some(cubesla::DType::F32),
        },
        output: folder.join("pictures"),
        block_q: 32,
        block_k: 16,
    };
    let device = env::var(device::DEVICE_VARIABLE).unwrap_or("auto".into());
    run(&args, &device).unwrap();
    let picture = fs::read(args.output.join("a.png")).unwrap();
    assert!(picture.starts_with(b"\x89PNG") && picture.len() > 10_000);
    fs::remove_dir_all(folder).unwrap();
}
