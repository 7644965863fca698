use std::{env, fs};

use indicatif::ProgressBar;

use super::attention::Backward;
use super::*;

/// It starts as the layer that it learns from: training in full precision would change nothing.
#[test]
fn training_at_rounded_inputs_wins_back_what_low_bits_lose() {
    let device = env::var(device::DEVICE_VARIABLE).unwrap_or("auto".into());
    let attention = Attention::new(device::select(&device).unwrap().client());
    let experiment = Experiment::new(&attention, 1, 1e-2);
    let progress = ProgressBar::hidden();
    let arm = Arm::Low(Backward::Rounded);
    let rounded = experiment.curve(experiment.teacher(), arm, 150, &progress);
    let rounded = rounded.unwrap();
    let (first, last) = (rounded[0], training::last(&rounded));
    assert_eq!(first.full, 0.0);
    let won_back = training::won_back(first, last);
    assert!(won_back > 0.15, "{won_back:.2}: {first:?} to {last:?}");

    let results = [Arm::Full, arm].map(|arm| (arm, rounded.clone()));
    let folder = env::temp_dir().join(format!("cubesla-qat-{}", std::process::id()));
    let picture = fs::read(picture::draw(&folder, &results).unwrap()).unwrap();
    assert!(picture.starts_with(b"\x89PNG") && picture.len() > 10_000);
    assert!(table(&results).to_string().contains("full precision"));
    fs::remove_dir_all(folder).unwrap();
}
