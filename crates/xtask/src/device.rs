//! A device to run on: a GPU, or Mesa's software Vulkan.

use std::fs;
use std::process::Command;

use crate::workspace::{cargo, cubesla};
use crate::{Result, step};

const HINT: &str = "\
no device to run on. Install a GPU driver, or Vulkan in software:
  Debian, Ubuntu  apt-get install mesa-vulkan-drivers
  Fedora          dnf install mesa-vulkan-drivers
  Arch            pacman -S vulkan-swrast
  Windows         DirectX 12 is part of the system: update the graphics driver
  macOS           Metal is part of the system";

/// Makes sure that there is a device, installing software Vulkan where that is known to work.
pub fn ensure(release: bool) -> Result {
    // Built first, so that a failure to build is not taken for a machine without a device.
    let mut build = cargo("build");
    build.args(["--bin", "cubesla"]);
    if release {
        build.arg("--release");
    }
    step::run(&mut build)?;
    if found(release)? {
        return Ok(());
    }
    if !is_debian() {
        return Err(HINT.into());
    }
    println!("No device found: installing software Vulkan.");
    apt_install("mesa-vulkan-drivers")?;
    if found(release)? {
        Ok(())
    } else {
        Err(HINT.into())
    }
}

fn found(release: bool) -> Result<bool> {
    let mut command = cubesla(release);
    let output = step::output(command.args(["devices", "--quiet"]))?;
    match output.status.code() {
        Some(0) => {
            let names = String::from_utf8_lossy(&output.stdout);
            println!("Devices: {}\n", Vec::from_iter(names.lines()).join(", "));
            Ok(true)
        }
        Some(1) => Ok(false),
        _ => Err(format!("`cubesla devices` ended with {}", output.status).into()),
    }
}

/// Whether this is Debian, Ubuntu or a relative.
pub fn is_debian() -> bool {
    fs::read_to_string("/etc/os-release").is_ok_and(|text| names_debian(&text))
}

fn names_debian(os_release: &str) -> bool {
    os_release
        .lines()
        .filter_map(|line| line.strip_prefix("ID=").or(line.strip_prefix("ID_LIKE=")))
        .flat_map(|value| value.trim_matches('"').split_whitespace())
        .any(|id| ["debian", "ubuntu"].contains(&id))
}

/// Installs a Debian package, through sudo unless this is root.
pub fn apt_install(package: &str) -> Result {
    let user = step::output(Command::new("id").arg("-u"))?;
    let is_root = user.stdout.trim_ascii() == b"0";
    let apt = |args: &[&str]| {
        let mut command = if is_root {
            Command::new("apt-get")
        } else {
            let mut sudo = Command::new("sudo");
            sudo.arg("apt-get");
            sudo
        };
        step::run(command.args(args))
    };
    if !is_root {
        println!("Installing {package} needs root, so sudo may ask for your password.");
    }
    apt(&["update"])?;
    apt(&["install", "--yes", "--no-install-recommends", package])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debian_and_its_relatives_are_known() {
        assert!(names_debian("NAME=\"Debian GNU/Linux\"\nID=debian\n"));
        assert!(names_debian("ID=ubuntu\nID_LIKE=debian\n"));
        assert!(names_debian("ID=linuxmint\nID_LIKE=\"ubuntu debian\"\n"));
        assert!(!names_debian("ID=fedora\nVARIANT_ID=debian\n"));
        assert!(!names_debian(
            "ID=\"opensuse-leap\"\nID_LIKE=\"suse opensuse\"\n"
        ));
    }
}
