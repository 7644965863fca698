use std::{env, fs};

use super::*;
use crate::inputs::write_small;

#[test]
fn a_file_is_measured_trained_on_and_drawn() {
    let folder = env::temp_dir().join(format!("cubesla-low-bits-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let args = Args {
        inputs: Inputs {
            input: Some(write_small(&folder)),
            dtype: Some(cubesla::DType::F32),
        },
        output: folder.join("pictures"),
        steps: 8,
        block_q: 32,
        block_k: 16,
    };
    let device = env::var(device::DEVICE_VARIABLE).unwrap_or("auto".into());
    run(&args, &device).unwrap();
    let picture = fs::read(args.output.join("a.png")).unwrap();
    assert!(picture.starts_with(b"\x89PNG") && picture.len() > 10_000);

    let client = device::select(&device).unwrap().client();
    let options = AttentionOptions {
        block_q: 32,
        block_k: 16,
        ..AttentionOptions::default()
    };
    let layer = &args.inputs.load(&client, &options).unwrap()[0];
    let progress = indicatif::ProgressBar::hidden();
    let rows = accuracy::layer(&client, layer, &options, &progress).unwrap();
    assert!(rows[0].device.l1 < 1e-5 && rows[1..].iter().all(|row| row.device.l1 < 0.1));
    let curve = training::curve(&client, layer, &options, 8, &progress).unwrap();
    assert!(curve[8] < curve[0], "{curve:?}");
    fs::remove_dir_all(folder).unwrap();
}
