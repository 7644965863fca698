//! Feature maps.

use cubecl::prelude::*;

/// phi, the map that linear attention applies to each row of queries and keys.
///
/// For a map of your own, apply it beforehand and use [`Identity`](Self::Identity).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum FeatureMap {
    /// Softmax over the head dimension, the papers' choice.
    #[default]
    Softmax,
    /// `elu(x) + 1`.
    EluPlusOne,
    /// `max(x, 0)`.
    Relu,
    /// `x` itself.
    Identity,
}

impl FeatureMap {
    /// Every map.
    pub const ALL: [FeatureMap; 4] = [
        FeatureMap::Softmax,
        FeatureMap::EluPlusOne,
        FeatureMap::Relu,
        FeatureMap::Identity,
    ];
}

/// phi of one element; of softmax only the exponential.
#[cube]
pub fn feature(x: f32, #[comptime] phi: FeatureMap) -> f32 {
    match comptime!(phi) {
        FeatureMap::Softmax => x.exp(),
        FeatureMap::EluPlusOne => select(x > 0.0, x + 1.0, x.exp()),
        FeatureMap::Relu => max(x, 0.0),
        FeatureMap::Identity => x,
    }
}
