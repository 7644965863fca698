//! Block lists on the device.

use cubesla::{HostBlockList, InverseBlockList};
use harness::{AttentionCase, Lists, client};
use proptest::prelude::*;

fn round_trip(list: &HostBlockList) {
    let client = client();
    let device = list.upload(&client);
    assert_eq!(&HostBlockList::download(&client, &device).unwrap(), list);
    let inverse = InverseBlockList::new(&client, &device).unwrap();
    assert_eq!(
        &HostBlockList::download_inverse(&client, &inverse).unwrap(),
        list
    );
}

#[test]
fn lists_and_their_inverses_round_trip() {
    for lists in [
        Lists::Dense,
        Lists::Empty,
        Lists::TopK(1),
        Lists::Random(0.3),
    ] {
        let case = AttentionCase {
            batch: 2,
            query_heads: 3,
            lists,
            ..AttentionCase::default()
        };
        round_trip(&case.list());
    }
}

#[test]
fn more_key_blocks_than_a_cube_has_units() {
    let case = AttentionCase {
        query_len: 40,
        key_len: 16 * 300,
        options: cubesla::AttentionOptions {
            block_q: 16,
            block_k: 16,
            ..Default::default()
        },
        ..AttentionCase::default()
    };
    round_trip(&case.list());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_list_round_trips(
        shape in [1..3usize, 1..3usize, 1..7usize, 1..40usize],
        density in 0.0..1.0f64,
        seed in any::<u64>(),
    ) {
        let mut rng = harness::Rng::new(seed);
        let mask: Vec<bool> =
            (0..shape.iter().product()).map(|_| rng.uniform() < density).collect();
        round_trip(&HostBlockList::from_mask(shape, &mask).unwrap());
    }
}
