//! Tensors of more than 2^31 elements, on devices that hold them.

use cubesla::plan::ForwardPlan;
use cubesla::{AttentionOptions, AttentionProblem, DType, DeviceTensor, HostBlockList, download};
use cubesla_kernels::attention::{ForwardInputs, ForwardOutputs};
use cubesla_reference::Tensor;
use cubesla_reference::attention::{self, Causal};
use cubesla_reference::blocks::BlockWeights;
use cubesla_reference::relative_error;
use half::f16;
use harness::case::{exact, wide};
use harness::client;
use harness::values::Rng;

const D: usize = 64;
const KEYS: usize = 64;
/// Queries of each of the two heads: 2^31 elements in both, and another 2^20.
const LEN: usize = (1 << 24) + (1 << 13);
/// Rows after which the values repeat: a prime, so that a wrapped offset finds other rows.
const PERIOD: usize = 1021;
/// Rows that are compared at a time.
const SAMPLE: usize = 128;

/// Rows of the whole buffer from `first` on.
fn rows(period: &[f16], first: usize, count: usize) -> Tensor {
    let values: Vec<f32> = (first..first + count)
        .flat_map(|row| &period[row % PERIOD * D..][..D])
        .map(|x| x.to_f32())
        .collect();
    exact(&values, [1, 1, count, D])
}

#[test]
fn offsets_past_two_to_the_31() {
    let client = client();
    let bytes = 2 * LEN * D * DType::F16.size();
    let limit = client.properties().memory.max_page_size as usize;
    if limit < bytes {
        eprintln!("not run: the device's buffers hold {limit} bytes, this test needs {bytes}");
        return;
    }
    let mut random = Rng::new(71);
    let period: Vec<f16> = (0..PERIOD * D)
        .map(|_| f16::from_f64(random.normal()))
        .collect();
    let mut data = period.repeat(2 * LEN / PERIOD + 1);
    data.truncate(2 * LEN * D);
    let buffer = client.create_from_slice(bytemuck::cast_slice(&data));
    drop(data);

    // Queries and results end past 2^31, and the second head's keys are the buffer's last.
    let key_head = 2 * LEN - KEYS;
    let tensor = |len: usize, head: usize| {
        let strides = [2 * LEN * D, head * D, D, 1];
        DeviceTensor::new(buffer.clone(), [1, 2, len, D], strides, DType::F16).unwrap()
    };
    let (q, k) = (tensor(LEN, LEN), tensor(KEYS, key_head));
    let options = AttentionOptions::default();
    let problem = AttentionProblem::new(&q, &k, &k, &options).unwrap();
    let blocks = problem.query_blocks();
    let list = HostBlockList::from_rows([1, 2, blocks, 1], vec![vec![0]; 2 * blocks])
        .unwrap()
        .upload(&client);
    for plan in ForwardPlan::all(&problem, client.properties()).unwrap() {
        let out = DeviceTensor::empty(&client, problem.out_shape(), DType::F16);
        let lse = DeviceTensor::empty(&client, problem.lse_shape(), DType::F32);
        let inputs = ForwardInputs {
            q: &q,
            k: &k,
            v: &k,
            list: &list,
        };
        let outputs = ForwardOutputs {
            out: &out,
            lse: &lse,
        };
        plan.launch(&client, &problem, inputs, outputs).unwrap();
        for (head, first) in [(0, 0), (0, LEN - SAMPLE), (1, 0), (1, LEN - SAMPLE)] {
            let first = head * LEN + first;
            let sample = SAMPLE * D * DType::F16.size();
            let start = first * D * DType::F16.size();
            let part = out.handle().clone().offset_start(start as u64);
            let part = part.offset_end((bytes - start - sample) as u64);
            let part = DeviceTensor::new(part, [1, 1, SAMPLE, D], [0, 0, D, 1], DType::F16);
            let found = wide(&download(&client, &part.unwrap()).unwrap());
            let expected = attention::forward(
                &rows(&period, first, SAMPLE),
                &rows(&period, head * key_head, KEYS),
                &rows(&period, head * key_head, KEYS),
                &BlockWeights::dense([1, 1, SAMPLE, KEYS], options.block_q, options.block_k),
                1.0 / (D as f64).sqrt(),
                Causal::None,
            );
            let error = relative_error(&found, expected.out.data());
            assert!(error <= 1e-3, "{error:.2e} from row {first} on by {plan}");
        }
    }
}
