//! One benchmark of each operation on whatever device `CUBESLA_DEVICE` names, or the best there is.
//!
//! A sample is a call and the wait for the device: good for changes over time on one machine. Speeds
//! to compare with others come from `cargo xtask bench`, which checks results and fills a GPU.

use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use cubesla::{
    AttentionOptions, Client, DType, Error, FeatureMap, HostBlockList, RouterOptions, SlaOptions,
    TopKOrder, block_sparse_attention, device, linear_attention, route, sla2_forward, sync, top_k,
    upload,
};
use cubesla_benches::{SHAPE, noise, qkv};

fn operations(criterion: &mut Criterion) {
    let client = device::from_env().expect("a device").client();
    all(criterion, &client).expect("arguments that fit");
}

fn all(criterion: &mut Criterion, client: &Client) -> Result<(), Error> {
    let [q, k, v] = &qkv(client)?;
    let options = AttentionOptions::default();
    let [batch, heads, len, _] = SHAPE;
    let [m, n] = [options.block_q, options.block_k].map(|block| len.div_ceil(block));
    let dense = HostBlockList::dense([batch, heads, m, n]).upload(client);
    let critical = RouterOptions {
        critical: 0.25,
        ..RouterOptions::sla2()
    };
    let routed = route(client, q, k, &options, &critical)?.critical;
    let rows = upload(client, &noise(256 * 256), [256, 256], DType::F32)?;
    let alpha_logit = upload(client, &[0.0], [1, 1], DType::F32)?;

    let mut bench = |name: &str, call: &dyn Fn() -> Result<(), Error>| {
        let call = || {
            call().expect("arguments that fit");
            sync(client).expect("a device that works");
        };
        call(); // compiles the kernels, which would mislead Criterion's estimate
        criterion.bench_function(name, |bencher| bencher.iter(call));
    };
    bench("attention/dense", &|| {
        block_sparse_attention(client, q, k, v, &dense, &options).map(drop)
    });
    bench("attention/75 % sparse", &|| {
        block_sparse_attention(client, q, k, v, &routed, &options).map(drop)
    });
    bench("route", &|| {
        route(client, q, k, &options, &critical).map(drop)
    });
    bench("top_k/256x256 k 8", &|| {
        Ok(top_k(client, &rows, 8, TopKOrder::Value).map(drop)?)
    });
    bench("linear_attention", &|| {
        linear_attention(client, q, k, v, FeatureMap::Softmax, false).map(drop)
    });
    bench("sla2_forward", &|| {
        sla2_forward(client, q, k, v, &alpha_logit, &SlaOptions::sla2()).map(drop)
    });
    Ok(())
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = operations
}
criterion_main!(benches);
