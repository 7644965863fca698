//! NVIDIA's compilers, from PyPI.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::device::{apt_install, is_debian};
use crate::{Result, step};

/// One release for all: PTX of a later one may be refused by a CUDA 13.0 driver.
const WHEELS: [&str; 6] = [
    "nvidia-cuda-nvrtc==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
];

/// The CUDA toolkit in the Python environment `folder`, which is made if it is not there.
pub fn provide(folder: &Path) -> Result<PathBuf> {
    let stamp = folder.join("wheels.txt");
    let wheels = WHEELS.join("\n");
    let python = folder.join("bin/python");
    if fs::read_to_string(&stamp).is_ok_and(|installed| installed == wheels) {
        return toolkit(&python);
    }
    make_environment(folder)?;
    let pip = [
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--no-deps",
    ];
    step::run(Command::new(&python).args(pip).args(WHEELS))?;
    // Written last, so that an interrupted installation starts again.
    fs::write(stamp, wheels)?;
    toolkit(&python)
}

fn make_environment(folder: &Path) -> Result {
    let venv = || {
        let mut command = Command::new("python3");
        step::run(command.args(["-m", "venv", "--clear"]).arg(folder))
    };
    match venv() {
        // Debian keeps the module in a package of its own.
        Err(error) if is_debian() => {
            println!("{error}");
            apt_install("python3-venv")?;
            venv()
        }
        result => result,
    }
}

fn toolkit(python: &Path) -> Result<PathBuf> {
    let script = "import sysconfig; print(sysconfig.get_path('purelib'), end='')";
    let output = step::output(Command::new(python).args(["-c", script]))?;
    let packages = PathBuf::from(String::from_utf8(output.stdout)?);
    let toolkit = packages.join("nvidia/cu13");
    if toolkit.join("bin/ptxas").exists() {
        return Ok(toolkit);
    }
    Err(format!(
        "no ptxas in {}: remove {}",
        toolkit.display(),
        python.display()
    )
    .into())
}
