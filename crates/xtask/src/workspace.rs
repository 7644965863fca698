//! Where things are, and cargo on them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Result;

/// The root of the repository.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors()
        .nth(2)
        .expect("this crate lies two folders down")
        .to_owned()
}

/// The folder that cargo builds debug programs into: the one that this program lies in.
pub fn debug_folder() -> Result<PathBuf> {
    let program = std::env::current_exe()?;
    Ok(program
        .parent()
        .ok_or("this program has no folder")?
        .to_owned())
}

/// The target folder, wherever it was configured to be.
pub fn target() -> Result<PathBuf> {
    let debug = debug_folder()?;
    Ok(debug.parent().ok_or("no target folder")?.to_owned())
}

/// `cargo <subcommand>` at the root.
pub fn cargo(subcommand: &str) -> Command {
    let mut command = Command::new("cargo");
    command.current_dir(root()).arg(subcommand);
    command
}

/// `cargo run` of the program `cubesla`, in the folder that the user is in.
///
/// Programs are named by `--bin` and never by `--package`: features are then resolved for the whole
/// workspace as in `cargo test --workspace`, and no dependency is built twice.
pub fn cubesla(release: bool) -> Command {
    let mut command = Command::new("cargo");
    command
        .args(["run", "--quiet"])
        .arg("--manifest-path")
        .arg(root().join("Cargo.toml"));
    if release {
        command.arg("--release");
    }
    command.args(["--bin", "cubesla", "--"]);
    command
}

/// Gives child processes a runtime folder, without which graphics drivers complain on every start.
pub fn provide_runtime_folder() -> Result {
    if std::env::var_os("XDG_RUNTIME_DIR").is_some() {
        return Ok(());
    }
    let folder = target()?.join("runtime");
    fs::create_dir_all(&folder)?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // Others' access would make it invalid.
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o700))?;
    }
    // SAFETY: no other thread has been started.
    unsafe { std::env::set_var("XDG_RUNTIME_DIR", folder) };
    Ok(())
}
