//! Training through the raw calls: gradients that lower a loss, alike in every type.

use cubesla::{
    AttentionOptions, Blocks, Client, DType, HostBlockList, LinearMode, SlaBackwardOptions,
    SlaInputs, SlaOptions, download, sla2_backward, sla2_forward, upload,
};
use harness::{Rng, client, dtypes, rounded};

/// `[batch, heads, length, head dimension]` of queries, keys, values and the target.
const SHAPE: [usize; 4] = [1, 2, 128, 32];
const BLOCK: usize = 32;
const STEPS: usize = 200;

/// A parameter kept in f32, and the moments of Adam (Kingma and Ba, arXiv 1412.6980).
struct Parameter {
    values: Vec<f32>,
    moments: Vec<[f32; 2]>,
}

impl Parameter {
    fn new(values: Vec<f32>) -> Self {
        Self {
            moments: vec![[0.0; 2]; values.len()],
            values,
        }
    }

    fn step(&mut self, gradient: &[f32], number: usize) {
        const RATE: f32 = 0.05;
        const FIRST: f32 = 0.9;
        const SECOND: f32 = 0.99;
        let correction = [FIRST, SECOND].map(|beta| 1.0 - beta.powi(number as i32 + 1));
        let values = self.values.iter_mut().zip(&mut self.moments);
        for ((value, [mean, square]), &g) in values.zip(gradient) {
            *mean += (1.0 - FIRST) * (g - *mean);
            *square += (1.0 - SECOND) * (g * g - *square);
            *value -= RATE * (*mean / correction[0]) / ((*square / correction[1]).sqrt() + 1e-8);
        }
    }
}

/// Fits SLA2's output, with given blocks, to a random target: the loss before the first step and after the
/// last.
fn fit(client: &Client, dtype: DType) -> [f64; 2] {
    let mut rng = Rng::new(7);
    let len: usize = SHAPE.iter().product();
    let [mut q, mut k, mut v] = [(); 3].map(|()| Parameter::new(rng.normals(len, DType::F32)));
    let blocks = SHAPE[2] / BLOCK;
    let mut logits = Parameter::new(vec![0.0; SHAPE[1] * blocks]);
    let target = rng.normals(len, DType::F32);
    // Each block of queries has two neighbouring blocks of keys.
    let rows = (0..SHAPE[1] * blocks).map(|row| {
        let first = (row % blocks).min(blocks - 2) as u32;
        vec![first, first + 1]
    });
    let list = HostBlockList::from_rows([SHAPE[0], SHAPE[1], blocks, blocks], rows.collect());
    let list = list.expect("sorted rows").upload(client);
    let options = SlaOptions {
        attention: AttentionOptions {
            block_q: BLOCK,
            block_k: BLOCK,
            ..AttentionOptions::default()
        },
        blocks: Blocks::Given {
            critical: &list,
            negligible: None,
        },
        linear: LinearMode::Complement,
        save: true,
        ..SlaOptions::sla2()
    };
    let mut losses = Vec::new();
    for number in 0..=STEPS {
        let [on_q, on_k, on_v] = [&q, &k, &v].map(|parameter| {
            let values: Vec<f32> = parameter
                .values
                .iter()
                .map(|&x| rounded(x, dtype))
                .collect();
            upload(client, &values, SHAPE, dtype).expect("a tensor")
        });
        let alpha = upload(client, &logits.values, [SHAPE[1], blocks], DType::F32).unwrap();
        let result = sla2_forward(client, &on_q, &on_k, &on_v, &alpha, &options).expect("a call");
        let out = download(client, &result.out).expect("the launch to succeed");
        let differences = || out.iter().zip(&target).map(|(o, t)| o - t);
        losses.push(differences().map(|d| f64::from(d).powi(2)).sum::<f64>() / len as f64);
        // Of the sum of squares: Adam does not care for its scale, small numbers of f16 do.
        let grad: Vec<f32> = differences().map(|d| rounded(2.0 * d, dtype)).collect();
        let grad = upload(client, &grad, SHAPE, dtype).unwrap();
        let inputs = SlaInputs {
            q: &on_q,
            k: &on_k,
            v: &on_v,
            critical: &list,
            negligible: None,
        };
        let saved = result.saved.expect("it was asked for");
        let options = SlaBackwardOptions::from(&options);
        let grads = sla2_backward(client, inputs, &saved, &alpha, &grad, &options).expect("a call");
        for (parameter, gradient) in [
            (&mut q, &grads.dq),
            (&mut k, &grads.dk),
            (&mut v, &grads.dv),
        ] {
            parameter.step(&download(client, gradient).unwrap(), number);
        }
        logits.step(&download(client, &grads.dalpha_logit).unwrap(), number);
    }
    [losses[0], losses[STEPS]]
}

#[test]
fn two_hundred_steps_lower_the_loss_alike_in_every_type() {
    let client = client();
    let mut exact = None;
    for dtype in dtypes(&client) {
        let [first, last] = fit(&client, dtype);
        println!("{dtype}: {first:.4} to {last:.5}");
        assert!(last < 0.2 * first, "{dtype}: {first} to {last}");
        // f32 comes first. What is left of the loss is as small as what bf16 rounds off parameters.
        let exact = *exact.get_or_insert(last);
        let bound = if dtype == DType::BF16 { 0.5 } else { 0.1 };
        assert!(
            (last / exact - 1.0).abs() < bound,
            "{dtype}: {last}, in f32 {exact}"
        );
    }
}
