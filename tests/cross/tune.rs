//! Plans other than the table's: stages, candidates, and the measured choice with its cache.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, process};

use cubecl::environment;
use cubesla::plan::{ForwardEngine, ForwardPlan};
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

/// Names the cache of [`a_process_that_tunes`].
const CACHE: &str = "CUBESLA_TEST_CACHE";

#[test]
#[ignore = "run by the tests of the cache, in processes of their own"]
fn a_process_that_tunes() {
    environment::set_root(env::var_os(CACHE).expect("the folder of the cache"));
    let client = client();
    let inputs = case().inputs();
    let tuned = |_: usize| {
        case().run_plans(&client, &inputs, |problem, inputs| {
            vec![ForwardPlan::tuned(&client, problem, inputs).expect("a plan")]
        })
    };
    let [first, again] = [0, 1].map(tuned);
    assert_eq!(first[0].0, again[0].0);
    assert_eq!(first[0].1.out, again[0].1.out);
    println!("chosen: {}", first[0].0);
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

    /// Files of the cache.
    fn files(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.0).expect("the folder");
        let files = entries.map(|entry| entry.expect("an entry").path());
        files
            .filter(|path| path.is_file() && path.extension().is_none_or(|end| end != "log"))
            .collect()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The choice of a process with that cache, and whether it measured.
fn tune_in(cache: &Path) -> (String, bool) {
    let log = cache.join("tuning.log");
    let _ = fs::remove_file(&log);
    let program = env::current_exe().expect("this program");
    let output = Command::new(program)
        .args(["--ignored", "--exact", "tune::a_process_that_tunes"])
        .arg("--nocapture")
        .env(CACHE, cache)
        .env("CUBECL_DEBUG_LOG", &log)
        .output()
        .expect("the process to start");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
    let mut choices = text.lines().filter_map(|line| {
        let (_, plan) = line.split_once("chosen: ")?;
        Some(plan.to_owned())
    });
    let chosen = choices.next().expect("a choice");
    let logged = fs::read_to_string(&log).unwrap_or_default();
    (chosen, logged.contains("Fastest result"))
}

#[test]
fn a_later_process_reads_the_choice() {
    let folder = Folder::new("cache");
    let (first, measured) = tune_in(&folder.0);
    assert!(measured, "nothing was measured");
    assert!(!folder.files().is_empty(), "nothing was kept");
    let (second, measured) = tune_in(&folder.0);
    assert!(!measured, "the choice was not read");
    assert_eq!(first, second);
}

#[test]
fn a_cache_that_cannot_be_read_is_done_without() {
    let folder = Folder::new("broken-cache");
    tune_in(&folder.0);
    let files = folder.files();
    assert!(!files.is_empty(), "nothing was kept");
    for file in files {
        fs::write(file, "not a cache").expect("the file to be written");
    }
    let (_, measured) = tune_in(&folder.0);
    assert!(measured, "nothing was measured");
}
