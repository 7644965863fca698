//! Plans chosen by measuring, with CubeCL's autotuner.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cubecl::AutotuneKey;
use cubecl::client::Client;
use cubecl::tune::{LocalTuner, Tunable, TunableSet, local_tuner};
use cubesla_kernels::attention::{ForwardInputs, ForwardOutputs};
use cubesla_kernels::{AttentionProblem, BlockList, Causal, DType, DeviceTensor, ProblemError};
use serde::{Deserialize, Serialize};

use super::ForwardPlan;

/// How [`block_sparse_attention`](crate::block_sparse_attention) chooses its plan, and with it the
/// modules of Burn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// From the table: [`ForwardPlan::new`].
    #[default]
    Table,
    /// By measuring, at the first call of each kind: [`ForwardPlan::tuned`].
    Tuned,
}

static TUNED: AtomicBool = AtomicBool::new(false);

/// Chooses for all calls of this process that begin afterwards.
pub fn set_choice(choice: Choice) {
    TUNED.store(choice == Choice::Tuned, Ordering::Relaxed);
}

/// What was [chosen](set_choice); the table if nothing was.
pub fn choice() -> Choice {
    if TUNED.load(Ordering::Relaxed) {
        Choice::Tuned
    } else {
        Choice::Table
    }
}

/// Calls that have the same fastest plan. Counts are rounded up to powers of two.
#[derive(AutotuneKey, Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct ForwardKey {
    dtype: String,
    head_dim: usize,
    value_dim: usize,
    block_q: usize,
    block_k: usize,
    causal: bool,
    #[autotune(anchor)]
    heads: usize,
    #[autotune(anchor)]
    query_len: usize,
    #[autotune(anchor)]
    key_len: usize,
    #[autotune(anchor)]
    list_width: usize,
    /// What was measured: an answer is kept by its number.
    candidates: String,
}

/// One call.
#[derive(Clone)]
struct Call {
    client: Client,
    problem: AttentionProblem,
    plans: Arc<[ForwardPlan]>,
    q: DeviceTensor<4>,
    k: DeviceTensor<4>,
    v: DeviceTensor<4>,
    list: BlockList,
    out: DeviceTensor<4>,
    lse: DeviceTensor<3>,
}

impl ForwardKey {
    fn of(problem: &AttentionProblem, list: &BlockList, plans: &[ForwardPlan]) -> Self {
        let names: Vec<String> = plans.iter().map(ForwardPlan::to_string).collect();
        Self::new(
            problem.dtype().to_string(),
            problem.head_dim(),
            problem.value_dim(),
            problem.block_q(),
            problem.block_k(),
            problem.causal() != Causal::None,
            problem.batch() * problem.query_heads(),
            problem.query_len(),
            problem.key_len(),
            list.width(),
            names.join("; "),
        )
    }
}

impl Call {
    fn key(&self) -> ForwardKey {
        ForwardKey::of(&self.problem, &self.list, &self.plans)
    }

    fn launch(&self, number: usize) -> Result<(), String> {
        let plan = self.plans.get(number).ok_or("no such candidate")?;
        self.run(plan).map_err(|refusal| refusal.to_string())
    }

    fn run(&self, plan: &ForwardPlan) -> Result<(), ProblemError> {
        let inputs = ForwardInputs {
            q: &self.q,
            k: &self.k,
            v: &self.v,
            list: &self.list,
        };
        let outputs = ForwardOutputs {
            out: &self.out,
            lse: &self.lse,
        };
        plan.launch(&self.client, &self.problem, inputs, outputs)
    }
}

/// Most candidates of a problem.
const MOST: usize = 8;

impl ForwardPlan {
    /// The fastest of the [`candidates`](Self::candidates) for inputs of this kind on the client's
    /// device.
    ///
    /// Kinds differ in element type, D, Dv, blocks, causal mask, candidates, and the powers of two
    /// that `B * Hq`, `Lq`, `Lk` and the list's width round up to. The first call of a kind runs all
    /// candidates on its inputs; later ones, and later processes, look the answer up. CubeCL keeps
    /// answers in its cache on disk: `cubecl::environment` and `cubecl.toml` say where, and turn
    /// it off. A cache that cannot be read or written is logged, and measured anew.
    ///
    /// Which plan is the fastest may differ from one measurement to the next, and plans differ by
    /// rounding; while the cache is kept, so are results to the bit.
    ///
    /// # Errors
    /// A [`ProblemError`] that names the argument at fault; nothing is launched then.
    pub fn tuned(
        client: &Client,
        problem: &AttentionProblem,
        inputs: ForwardInputs<'_>,
    ) -> Result<Self, ProblemError> {
        static TUNER: LocalTuner<ForwardKey, String> = local_tuner!("forward");

        let device = client.properties();
        let mut plans = Self::candidates(problem, device)?;
        plans.truncate(MOST);
        if plans.len() == 1 {
            return Ok(plans.swap_remove(0));
        }
        let identity = &device.identity;
        let device = format!("{} {}", identity.name, identity.fingerprint);
        let set = TUNER.init(&device, || {
            let set = TunableSet::<ForwardKey, Call, (), usize>::new_cloning_inputs(Call::key);
            (0..MOST).fold(set, |set, number| {
                set.with(Tunable::identified(number, move |call: Call| {
                    call.launch(number)
                }))
            })
        });
        let key = ForwardKey::of(problem, inputs.list, &plans);
        let known = || TUNER.fastest_identity(&device, &set, &key);
        if let Some(number) = known() {
            return Ok(plans.swap_remove(number.min(plans.len() - 1)));
        }
        let call = Call {
            client: client.clone(),
            problem: *problem,
            plans: plans.into(),
            q: inputs.q.clone(),
            k: inputs.k.clone(),
            v: inputs.v.clone(),
            list: inputs.list.clone(),
            out: DeviceTensor::empty(client, problem.out_shape(), problem.dtype()),
            lse: DeviceTensor::empty(client, problem.lse_shape(), DType::F32),
        };
        // A refusal is an error; the tuner panics where every candidate fails.
        call.run(&call.plans[0])?;
        TUNER.execute(&device, client, set.clone(), call.clone());
        let number = known().unwrap_or(0).min(call.plans.len() - 1);
        Ok(call.plans[number].clone())
    }
}
