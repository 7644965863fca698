use burn_core::module::{Module, ModuleVisitor, Param};
use burn_core::tensor::{Int, Tensor};
use cubesla_burn::{SlaMultiHeadAttentionConfig, SlaVariant, SparseLinearAttentionConfig};

use crate::common::{device, noise};

/// Collects the names of parameters, which are the keys of records.
#[derive(Default)]
struct Names {
    path: Vec<String>,
    names: Vec<String>,
}

impl ModuleVisitor for Names {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, _param: &Param<Tensor<D>>) {
        self.names.push(self.path.join("."));
    }

    fn visit_int<const D: usize>(&mut self, _param: &Param<Tensor<D, Int>>) {
        self.names.push(self.path.join("."));
    }
}

pub fn names(module: &impl Module) -> Vec<String> {
    let mut visitor = Names::default();
    module.visit(&mut visitor);
    visitor.names
}

#[test]
fn names_are_stable() {
    let device = device();
    let config = SparseLinearAttentionConfig::new(32).with_router_weights(true);
    assert_eq!(
        names(&config.init(&device)),
        ["alpha_logit", "proj_q.weight", "proj_k.weight"]
    );
    let config = SparseLinearAttentionConfig::new(32).with_variant(SlaVariant::Sla);
    assert_eq!(
        names(&config.clone().init(&device)),
        ["proj_l.weight", "proj_l.bias"]
    );
    let mha = SlaMultiHeadAttentionConfig::new(64, 2)
        .with_attention(Some(config))
        .with_output_bias(false)
        .init(&device);
    assert_eq!(
        names(&mha),
        [
            "query.weight",
            "query.bias",
            "key.weight",
            "key.bias",
            "value.weight",
            "value.bias",
            "output.weight",
            "attention.proj_l.weight",
            "attention.proj_l.bias",
        ]
    );
}

#[test]
fn a_record_brings_the_parameters_back() {
    let device = device();
    let config = SparseLinearAttentionConfig::new(32)
        .with_alpha_heads(4)
        .with_alpha_blocks(3);
    let mut module = config.init(&device);
    let logits = noise([4, 3], 1, &device);
    module.alpha_logit = Some(Param::from_tensor(logits.clone()));

    let folder = std::env::temp_dir().join(format!("cubesla-burn-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("sla2");
    module.save_file(&path).unwrap();
    let loaded = config.init(&device).load_file(&path);
    let loaded = loaded.alpha_logit.expect("SLA2 has logits").val();
    loaded.into_data().assert_eq(&logits.into_data(), true);
    // Not before: a record is read when its tensors are.
    std::fs::remove_dir_all(folder).unwrap();
}
