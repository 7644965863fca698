use std::{env, fs};

use super::*;
use crate::inputs::write_small;

#[test]
fn a_file_is_reported_and_drawn() {
    let folder = env::temp_dir().join(format!("cubesla-report-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let args = Args {
        inputs: Inputs {
            input: Some(write_small(&folder)),
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
