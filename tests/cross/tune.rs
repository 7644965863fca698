//! Plans other than the table's: stages, candidates, and the measured choice with its cache.

use std::path::PathBuf;
use std::process::Command;
use std::{env, fs, process};

use cubesla::plan::{self, Choice, ForwardEngine, ForwardPlan};
use cubesla::{block_sparse_attention, download};
use cubesla_kernels::attention;
use cubesla_kernels::engine::Tile;
use harness::{AttentionCase, Lists, client};

/// Several tiles to a row, of which some rows have none.
fn case() -> AttentionCase {
    AttentionCase {
        head_dim: 32,
        value_dim: 40,
        ..AttentionCase::default()
    }
}

#[test]
fn tiles_come_through_any_number_of_stages() {
    let client = client();
    let inputs = case().inputs();
    let staged = |stages| ForwardPlan {
        engine: ForwardEngine::Tile(attention::ForwardPlan::Simt(Tile {
            rows: 16,
            cols: 16,
            units: 64,
            stages,
        })),
        passed_over: Vec::new(),
    };
    let outputs = case().run_plans(&client, &inputs, |_, _| [1, 2, 3].map(staged).to_vec());
    for (plan, other) in &outputs[1..] {
        assert_eq!(outputs[0].1.out, other.out, "{plan}");
        assert_eq!(outputs[0].1.lse, other.lse, "{plan}");
    }
    case().check_all(&inputs, outputs);
}

#[test]
fn every_candidate_is_right() {
    let client = client();
    for dtype in harness::dtypes(&client) {
        let case = AttentionCase { dtype, ..case() };
        let inputs = case.inputs();
        let outputs = case.run_plans(&client, &inputs, |problem, _| {
            ForwardPlan::candidates(problem, client.properties()).expect("a plan")
        });
        assert!(outputs.len() > 1, "{outputs:?}");
        case.check_all(&inputs, outputs);
    }
}

#[test]
fn a_refused_argument_is_not_measured() {
    let client = client();
    let inputs = case().inputs();
    let other = AttentionCase {
        lists: Lists::Dense,
        batch: case().batch + 1,
        ..case()
    };
    let (_, list) = other.upload_inputs(&client, &other.inputs());
    case().run_plans(&client, &inputs, |problem, inputs| {
        let inputs = attention::ForwardInputs {
            list: &list,
            ..inputs
        };
        ForwardPlan::tuned(&client, problem, inputs).expect_err("a list of another batch");
        Vec::new()
    });
}

#[test]
#[ignore = "run by the tests of the cache, in processes of their own"]
fn a_process_that_tunes() {
    let client = client();
    let inputs = case().inputs();
    let run = |tuned: bool| {
        case().run_plans(&client, &inputs, |problem, inputs| {
            let candidates = ForwardPlan::candidates(problem, client.properties());
            let candidates = candidates.expect("a plan");
            for plan in candidates.iter().filter(|_| !tuned) {
                println!("candidate: {}", plan.engine);
            }
            if !tuned {
                return candidates;
            }
            vec![ForwardPlan::tuned(&client, problem, inputs).expect("a plan")]
        })
    };
    let all = run(false);
    let [first, again] = [true, true].map(run);
    assert_eq!(first, again);
    assert!(all.contains(&first[0]), "not the bits of the same plan");
    // What callers see once they have asked for it.
    assert_eq!(plan::choice(), Choice::Table);
    plan::set_choice(Choice::Tuned);
    let ([q, k, v], list) = case().upload_inputs(&client, &inputs);
    let called = block_sparse_attention(&client, &q, &k, &v, &list, &case().options);
    let out = download(&client, &called.expect("a valid call").out).expect("the output");
    assert_eq!(out, first[0].1.out);
    println!("chosen: {}", first[0].0.engine);
    if let Some(fault) = plan::cache_fault() {
        println!("fault: {fault}");
    }
    case().check_all(&inputs, first);
}

/// A folder that goes away again.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let folder = env::temp_dir().join(format!("cubesla-{name}-{}", process::id()));
        fs::create_dir_all(&folder).expect("a temporary folder");
        Self(folder)
    }

    fn file(&self) -> PathBuf {
        self.0.join("plans.json")
    }

    /// What a process with this folder as its cache says.
    fn tune(&self) -> Said {
        let program = env::current_exe().expect("this program");
        let output = Command::new(program)
            .args(["--ignored", "--exact", "tune::a_process_that_tunes"])
            .arg("--nocapture")
            .env("CUBESLA_CACHE", &self.0)
            .output()
            .expect("the process to start");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{text}{errors}");
        let after = |mark: &str| -> Vec<String> {
            let lines = text.lines().filter_map(|line| line.split_once(mark));
            lines.map(|(_, rest)| rest.to_owned()).collect()
        };
        Said {
            candidates: after("candidate: "),
            chosen: after("chosen: ").remove(0),
            fault: after("fault: ").pop(),
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

struct Said {
    candidates: Vec<String>,
    chosen: String,
    fault: Option<String>,
}

#[test]
fn a_later_process_takes_the_choice_from_the_file() {
    let folder = Folder::new("cache");
    let first = folder.tune();
    assert_eq!(first.fault, None);
    assert!(first.candidates.contains(&first.chosen));
    // Another choice than the measured one can only come from the file.
    let other = first.candidates.iter().find(|name| **name != first.chosen);
    let other = other.expect("two candidates");
    let text = fs::read_to_string(folder.file()).expect("the file of choices");
    assert!(text.contains(&first.chosen), "{text}");
    fs::write(folder.file(), text.replace(&first.chosen, other)).expect("the file to be written");
    assert_eq!(folder.tune().chosen, *other);
    // One that no longer exists is measured anew.
    fs::write(folder.file(), text.replace(&first.chosen, "simd 1x1")).expect("as before");
    let third = folder.tune();
    assert!(third.candidates.contains(&third.chosen));
}

#[test]
fn a_broken_file_is_told_of_and_written_anew() {
    let folder = Folder::new("broken-cache");
    fs::write(folder.file(), "not a cache").expect("the file to be written");
    let first = folder.tune();
    assert!(first.fault.expect("a fault").contains("cannot be read"));
    let second = folder.tune();
    assert_eq!(second.fault, None);
    assert_eq!(second.chosen, first.chosen);
}
