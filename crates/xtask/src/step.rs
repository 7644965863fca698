//! Running commands so that one can see what runs, and how long it took.

use std::ffi::OsStr;
use std::process::{Command, Output, Stdio};
use std::time::Instant;

use crate::Result;

/// Runs `command`; an error if it fails.
pub fn run(command: &mut Command) -> Result {
    let shown = format!("$ {}{}", variables(command), words(command));
    timed(&shown, || {
        let status = command
            .status()
            .map_err(|error| not_started(command, error))?;
        if status.success() {
            return Ok(());
        }
        Err(format!("`{}` failed: {status}", words(command)).into())
    })
}

/// Does `work`, saying what it is and how long it took.
pub fn timed<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    println!("{what}");
    let start = Instant::now();
    let result = work();
    let end = if result.is_ok() { "done" } else { "failed" };
    println!("  {end} in {:.1} s\n", start.elapsed().as_secs_f64());
    result
}

/// Runs `command` for its standard output, whether it succeeds or not.
pub fn output(command: &mut Command) -> Result<Output> {
    command.stderr(Stdio::inherit());
    Ok(command
        .output()
        .map_err(|error| not_started(command, error))?)
}

fn not_started(command: &Command, error: std::io::Error) -> String {
    format!("cannot run `{}`: {error}", command.get_program().display())
}

/// The variables set for `command`, as one would type them before it.
fn variables(command: &Command) -> String {
    command
        .get_envs()
        .filter_map(|(name, value)| Some(format!("{}={} ", name.display(), quoted(value?))))
        .collect()
}

/// `command` as one would type it.
fn words(command: &Command) -> String {
    let words = [command.get_program()]
        .into_iter()
        .chain(command.get_args());
    Vec::from_iter(words.map(quoted)).join(" ")
}

fn quoted(word: &OsStr) -> String {
    let word = word.to_string_lossy();
    if word.is_empty() || word.contains(char::is_whitespace) {
        format!("'{word}'")
    } else {
        word.into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_shown_as_typed() {
        let mut command = Command::new("cargo");
        command
            .args(["doc", "--no-deps"])
            .env("RUSTDOCFLAGS", "-D warnings");
        assert_eq!(variables(&command), "RUSTDOCFLAGS='-D warnings' ");
        assert_eq!(words(&command), "cargo doc --no-deps");
    }

    #[test]
    fn a_failure_names_the_command() {
        let error = run(&mut Command::new("false")).unwrap_err().to_string();
        assert!(error.contains("false"), "{error}");
        let error = run(&mut Command::new("no-such-program"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("no-such-program"), "{error}");
    }
}
