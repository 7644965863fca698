use burn_core::tensor::{Device, FloatDType, Tensor, TensorData};
use cubesla_burn::{
    AttentionOptions, BlockList, Causal, HostBlockList, LowBitFormats, LowBitScores, LowBitValues,
    block_sparse_attention, low_bit_attention, try_block_sparse_attention, try_low_bit_attention,
};

use crate::common::{
    assert_close, backward, constant, device, floats, gradient, heads, leaf, values,
};
use crate::formula::{self, BLOCK};

const LENS: [usize; 2] = [70, 90];

fn options() -> AttentionOptions {
    AttentionOptions {
        block_q: BLOCK[0],
        block_k: BLOCK[1],
        ..AttentionOptions::default()
    }
}

/// Some blocks of each row, at least one.
fn list(heads: usize) -> HostBlockList {
    let (rows, columns) = (LENS[0].div_ceil(BLOCK[0]), LENS[1].div_ceil(BLOCK[1]));
    let shape = [1, heads, rows, columns];
    let lists = (0..heads * rows)
        .map(|row| {
            (0..columns as u32)
                .filter(|&block| block as usize == row % columns || (block as usize + row) % 3 == 0)
                .collect()
        })
        .collect();
    HostBlockList::from_rows(shape, lists).unwrap()
}

#[test]
fn output_and_gradients_are_the_formulas() {
    check_gradients(device().autodiff());
}

#[test]
fn checkpointed_inputs_are_computed_again() {
    check_gradients(device().autodiff().gradient_checkpointing());
}

fn check_gradients(device: Device) {
    let q = leaf(heads([1, 4, LENS[0], 32], 1, &device));
    let k = leaf(heads([1, 2, LENS[1], 32], 2, &device));
    let v = leaf(heads([1, 2, LENS[1], 40], 3, &device));
    let host = list(4);
    let blocks = BlockList::from_host(&host, &device);
    let mask = formula::element_mask(&host, LENS, &device);

    // Something for fusion to fuse on both sides.
    let scaled = |x: &Tensor<4>| x.clone() * 2.0 - 0.1;
    let exact = formula::attention(scaled(&q), scaled(&k), scaled(&v), mask);
    let found = block_sparse_attention(scaled(&q), scaled(&k), scaled(&v), &blocks, &options());
    assert_close("out", found.clone(), exact.clone(), 1e-5);
    let (found, exact) = (backward(found.exp(), 4), backward(exact.exp(), 4));
    for (name, leaf) in [("dq", &q), ("dk", &k), ("dv", &v)] {
        assert_close(name, gradient(leaf, &found), gradient(leaf, &exact), 1e-4);
    }
}

#[test]
fn only_what_is_tracked_has_a_gradient() {
    let plain = device();
    let device = plain.clone().autodiff();
    let q = heads([1, 4, LENS[0], 32], 1, &device);
    let k = leaf(heads([1, 2, LENS[1], 32], 2, &device));
    let v = heads([1, 2, LENS[1], 32], 3, &device);
    let blocks = BlockList::from_host(&list(4), &plain);
    let output =
        try_block_sparse_attention(q.clone(), k.clone(), v.clone(), &blocks, &options()).unwrap();
    assert!(output.out.is_tracked());
    assert!(!output.lse.is_tracked());
    assert!(floats(output.lse).iter().all(|x| x.is_finite()));
    let grads = backward(output.out, 4);
    assert!(k.grad(&grads).is_some());
    assert!(q.grad(&grads).is_none());

    let untracked = block_sparse_attention(q, constant(&k), v, &blocks, &options());
    assert!(!untracked.is_tracked());
}

#[test]
fn a_causal_mask_is_the_formulas() {
    let device = device();
    let [q, k, v] = [1, 2, 3].map(|seed| heads([1, 2, 70, 32], seed, &device));
    let blocks = [70usize.div_ceil(BLOCK[0]), 70usize.div_ceil(BLOCK[1])];
    let dense = BlockList::dense([1, 2, blocks[0], blocks[1]], &device);
    let options = AttentionOptions {
        causal: Causal::TopLeft,
        ..options()
    };
    let mask = Tensor::<2, burn_core::tensor::Bool>::tril_mask([70, 70], 0, &device)
        .bool_not()
        .reshape([1, 1, 70, 70])
        .expand([1, 2, 70, 70]);
    let exact = formula::attention(q.clone(), k.clone(), v.clone(), mask);
    let found = block_sparse_attention(q, k, v, &dense, &options);
    assert_close("causal", found, exact, 1e-5);
}

#[test]
fn half_precision_stays_half() {
    let device = device();
    if !device.supports_dtype(burn_core::tensor::DType::F16) {
        return;
    }
    let host = list(4);
    let blocks = BlockList::from_host(&host, &device);
    let mask = formula::element_mask(&host, LENS, &device);
    let q = heads([1, 4, LENS[0], 32], 1, &device);
    let k = heads([1, 2, LENS[1], 32], 2, &device);
    let v = heads([1, 2, LENS[1], 32], 3, &device);
    let half = |x: &Tensor<4>| x.clone().cast(FloatDType::F16);
    let found = block_sparse_attention(half(&q), half(&k), half(&v), &blocks, &options());
    assert_eq!(found.dtype(), burn_core::tensor::DType::F16);
    assert_close("f16", found, formula::attention(q, k, v, mask), 2e-3);
}

/// Whole numbers, of which each row has 127 or its negative, so that a block's scale is 1, and each pair of
/// rows 0 in the mean.
fn whole_numbers([heads, len, dim]: [usize; 3], seed: u64, device: &Device) -> Tensor<4> {
    let pairs = values(heads * len / 2 * dim, seed);
    let mut numbers = Vec::new();
    for row in pairs.chunks(dim) {
        let mut row: Vec<f32> = row.iter().map(|x| (x * 127.0).round()).collect();
        row[0] = 127f32.copysign(row[1]);
        numbers.extend(row.iter().map(|x| -x));
        numbers.extend(row);
    }
    Tensor::from_data(TensorData::new(numbers, [1, heads, len, dim]), device)
}

/// Of inputs that 8 bits hold exactly low-bit attention is the formula, and so are its gradients.
#[test]
fn low_bits_of_whole_numbers_are_the_formulas() {
    let device = device().autodiff();
    let host = list(4);
    let blocks = BlockList::from_host(&host, &device);
    let mask = formula::element_mask(&host, LENS, &device);
    let q = leaf(whole_numbers([4, LENS[0], 32], 1, &device));
    let k = leaf(whole_numbers([2, LENS[1], 32], 2, &device));
    let v = leaf(heads([1, 2, LENS[1], 40], 3, &device));
    // Scores of about 1.
    let options = AttentionOptions {
        scale: Some(4e-5),
        ..options()
    };
    let formats = LowBitFormats {
        scores: LowBitScores::Int8,
        values: LowBitValues::Full,
    };
    let scaled = q.clone() * (4e-5 * 32f64.sqrt());
    let exact = formula::attention(scaled, k.clone(), v.clone(), mask);
    let inputs = || (q.clone(), k.clone(), v.clone());
    let (a, b, c) = inputs();
    let found = try_low_bit_attention(a, b, c, &blocks, &options, formats).unwrap();
    assert!(found.out.is_tracked() && !found.lse.is_tracked());
    assert_close("out", found.out.clone(), exact.clone(), 1e-5);
    let (grads, exact_grads) = (backward(found.out, 4), backward(exact.clone(), 4));
    for (name, leaf) in [("dq", &q), ("dk", &k), ("dv", &v)] {
        let exact = gradient(leaf, &exact_grads);
        assert_close(name, gradient(leaf, &grads), exact, 1e-4);
    }

    // Values are no whole numbers.
    let (a, b, c) = inputs();
    let fp8 = LowBitFormats {
        values: LowBitValues::Fp8,
        ..formats
    };
    let found = low_bit_attention(a, b, c, &blocks, &options, fp8);
    assert_close("FP8", found.clone(), exact.clone(), 0.05);
    let error = (found - exact).abs().max().into_scalar::<f32>();
    assert!(error > 1e-4, "{error}");
}

#[test]
fn blocks_come_back_as_they_went() {
    let device = device();
    let host = list(2);
    let list = BlockList::from_host(&host, &device);
    assert_eq!(list.shape(), host.shape());
    let indices = list
        .indices()
        .clone()
        .into_data()
        .try_to_vec::<i32>()
        .unwrap();
    let counts = list
        .counts()
        .clone()
        .into_data()
        .try_to_vec::<i32>()
        .unwrap();
    for (row, (indices, count)) in indices.chunks(list.width()).zip(counts).enumerate() {
        let found: Vec<u32> = indices[..count as usize]
            .iter()
            .map(|&i| i as u32)
            .collect();
        assert_eq!(found, host.row(row));
    }
}
