//! Plans chosen by measuring.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use cubecl::client::Client;
use cubesla_kernels::attention::{ForwardInputs, ForwardOutputs};
use cubesla_kernels::{
    AttentionProblem, BlockList, Causal, DType, DeviceTensor, F32Products, ProblemError,
};

use super::ForwardPlan;
use super::answers::{Answers, CacheFault};

/// How [`block_sparse_attention`](crate::block_sparse_attention) chooses its plan, and with it the
/// operation of Burn.
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

/// The answers of this process. Held while measuring, so that two threads do not measure each other.
static ANSWERS: Mutex<Option<Answers>> = Mutex::new(None);

/// Why the cache of measured choices could not be read or written, if that happened: choices then
/// last as long as the process, and what could not be read is measured and written anew.
pub fn cache_fault() -> Option<CacheFault> {
    let answers = ANSWERS.lock().unwrap_or_else(PoisonError::into_inner);
    answers.as_ref().and_then(Answers::fault).cloned()
}

/// What has the same fastest plan: counts are rounded up to powers of two.
struct Kind<'a> {
    problem: &'a AttentionProblem,
    width: usize,
}

impl fmt::Display for Kind<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { problem, width } = self;
        let [heads, queries, keys, width] = [
            problem.batch() * problem.query_heads(),
            problem.query_len(),
            problem.key_len(),
            *width,
        ]
        .map(usize::next_power_of_two);
        let products = match problem.products() {
            F32Products::F32 => "",
            F32Products::Tf32 => " by tf32",
        };
        write!(
            f,
            "{}{products} D={} Dv={} blocks {}x{} causal {} B*Hq={heads} Lq={queries} Lk={keys} list {width}",
            problem.dtype(),
            problem.head_dim(),
            problem.value_dim(),
            problem.block_q(),
            problem.block_k(),
            problem.causal() != Causal::None,
        )
    }
}

impl ForwardPlan {
    /// The fastest of the [`candidates`](Self::candidates) for inputs of this kind on the client's
    /// device.
    ///
    /// Kinds differ in element type, D, Dv, blocks, causal mask, and the powers of two that `B * Hq`,
    /// `Lq`, `Lk` and the list's width round up to. The first call of a kind measures all candidates
    /// on its inputs; later ones, and later processes, look the answer up in a file: `plans.json` in
    /// the folder that `CUBESLA_CACHE` names, or else in `cubesla` in the user's cache folder. If
    /// `CUBESLA_CACHE` is empty, nothing is kept. A file that cannot be read or written is no error:
    /// see [`cache_fault`].
    ///
    /// Plans differ by rounding, and which is the fastest may differ from one measurement to the
    /// next. While the file is kept, two runs give the same bits.
    ///
    /// # Errors
    /// A [`ProblemError`] that names the argument at fault; nothing is launched then.
    pub fn tuned(
        client: &Client,
        problem: &AttentionProblem,
        inputs: ForwardInputs<'_>,
    ) -> Result<Self, ProblemError> {
        let mut plans = Self::candidates(problem, client.properties())?;
        if plans.len() == 1 {
            return Ok(plans.swap_remove(0));
        }
        let identity = &client.properties().identity;
        let device = format!("{} {}", identity.name, identity.fingerprint);
        let width = BlockList::width(inputs.list);
        let kind = Kind { problem, width }.to_string();
        let mut answers = ANSWERS.lock().unwrap_or_else(PoisonError::into_inner);
        let answers = answers.get_or_insert_with(Answers::load);
        let known = answers.get(&device, &kind);
        let found = known.and_then(|name| {
            plans
                .iter()
                .position(|plan| plan.engine.to_string() == name)
        });
        if let Some(number) = found {
            return Ok(plans.swap_remove(number));
        }
        let measured = Self::measure(client, problem, inputs, plans)?;
        let fastest = fastest(&measured).clone();
        answers.put(&device, &kind, fastest.engine.to_string());
        Ok(fastest)
    }

    /// Those of `plans` that run on these inputs, each with the time of a call; [`Duration::MAX`] for
    /// one that fails on the device.
    ///
    /// # Errors
    /// A [`ProblemError`] that names the argument at fault if the first plan is refused.
    pub fn measure(
        client: &Client,
        problem: &AttentionProblem,
        inputs: ForwardInputs<'_>,
        plans: Vec<Self>,
    ) -> Result<Vec<(Self, Duration)>, ProblemError> {
        let out = DeviceTensor::empty(client, problem.out_shape(), problem.dtype());
        let lse = DeviceTensor::empty(client, problem.lse_shape(), DType::F32);
        let outputs = ForwardOutputs {
            out: &out,
            lse: &lse,
        };
        // The time of one of so many calls; the clock stops when the device is done.
        let time = |plan: &Self, calls: u32| -> Result<Duration, ProblemError> {
            let start = Instant::now();
            for _ in 0..calls {
                plan.launch(client, problem, inputs, outputs)?;
            }
            let done = crate::sync(client);
            Ok(done.map_or(Duration::MAX, |()| start.elapsed() / calls))
        };
        let mut measured = Vec::new();
        for plan in plans {
            // The first call compiles.
            match time(&plan, 1).and_then(|_| time(&plan, 1)) {
                Ok(once) => measured.push((plan, once)),
                Err(refusal) if measured.is_empty() => return Err(refusal),
                // Its tiles need more loops than a software device allows.
                Err(_) => {}
            }
        }
        let times = measured.iter().map(|(_, time)| *time);
        let longest = times.filter(|time| *time < Duration::MAX).max();
        let longest = longest.unwrap_or_default().as_nanos().max(1);
        let calls = (BATCH.as_nanos() / longest).clamp(1, 64);
        let rounds = (BUDGET.as_nanos() / (calls * longest)).min(5);
        // In turn, as clocks change.
        for _ in 0..rounds {
            for (plan, best) in &mut measured {
                if *best < Duration::MAX {
                    *best = time(plan, calls as u32)?.min(*best);
                }
            }
        }
        Ok(measured)
    }
}

/// The fastest plan; the first if none is faster by more than noise.
fn fastest(measured: &[(ForwardPlan, Duration)]) -> &ForwardPlan {
    let (mut fastest, mut time) = (&measured[0].0, measured[0].1);
    for (plan, other) in &measured[1..] {
        if other.as_secs_f64() < 0.98 * time.as_secs_f64() {
            (fastest, time) = (plan, *other);
        }
    }
    fastest
}

/// About how long the calls between two waits for the device take, so that the wait is lost in them.
const BATCH: Duration = Duration::from_millis(10);
/// About how long a candidate is measured.
const BUDGET: Duration = Duration::from_millis(200);
