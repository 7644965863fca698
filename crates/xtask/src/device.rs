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
    let mut names = found(release)?;
    // OpenGL in software is a device too, but one with fewer types and bindings than the tests need.
    if names.iter().all(|name| may_be_opengl(name)) && is_debian() && !is_installed(VULKAN)? {
        println!("No GPU and no software Vulkan found: installing the latter.");
        apt_install(VULKAN)?;
        names = found(release)?;
    }
    if names.is_empty() {
        return Err(HINT.into());
    }
    println!("Devices: {}\n", names.join(", "));
    Ok(())
}

/// Debian's package of software Vulkan.
const VULKAN: &str = "mesa-vulkan-drivers";

/// Whether a device of this name may be a rasterizer through OpenGL.
fn may_be_opengl(name: &str) -> bool {
    name == "wgpu:cpu" || name.starts_with("wgpu:other")
}

/// The names of the machine's devices.
fn found(release: bool) -> Result<Vec<String>> {
    let mut command = cubesla(release);
    let output = step::output(command.args(["devices", "--quiet"]))?;
    match output.status.code() {
        Some(0) => {
            let names = String::from_utf8_lossy(&output.stdout);
            Ok(names.lines().map(str::to_owned).collect())
        }
        Some(1) => Ok(Vec::new()),
        _ => Err(format!("`cubesla devices` ended with {}", output.status).into()),
    }
}

/// Whether a Debian package is installed.
fn is_installed(package: &str) -> Result<bool> {
    let mut query = Command::new("dpkg-query");
    query.args(["--show", "--showformat=${db:Status-Status}", package]);
    Ok(step::output(&mut query)?.stdout == b"installed")
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
    fn gpus_are_no_reason_to_install_anything() {
        for name in ["cuda:0", "wgpu:discrete:0", "wgpu:integrated:1"] {
            assert!(!may_be_opengl(name), "{name}");
        }
        assert!(may_be_opengl("wgpu:cpu") && may_be_opengl("wgpu:other:0"));
    }

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
