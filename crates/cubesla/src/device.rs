//! Choosing a device at run time, by name.
//!
//! | name | device |
//! |---|---|
//! | `auto` | the best: CUDA, then a real GPU through wgpu, then software |
//! | `cuda`, `cuda:1` | an NVIDIA GPU by CUDA's number |
//! | `wgpu` | wgpu's own choice |
//! | `wgpu:discrete`, `wgpu:integrated:1`, `wgpu:virtual`, `wgpu:other` | a GPU by kind and number |
//! | `wgpu:cpu` | a software rasterizer, such as lavapipe |

use std::str::FromStr;

use cubecl::Device;
use cubecl::device::{DeviceUnavailable, WgpuDeviceKind};

use crate::Error;

/// The environment variable that [`from_env`] reads.
pub const DEVICE_VARIABLE: &str = "CUBESLA_DEVICE";

/// A parsed device name; see the [module](self) for the names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceName {
    /// The best device of the machine.
    Auto,
    /// A CUDA device by its number.
    Cuda(usize),
    /// A wgpu device by its kind.
    Wgpu(WgpuDeviceKind),
}

impl FromStr for DeviceName {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        let error = || Error::DeviceName { name: name.into() };
        let mut parts = name.trim().split(':');
        let runtime = parts.next().unwrap_or_default();
        let rest: Vec<&str> = parts.collect();
        let index = |text: Option<&&str>| text.map_or(Ok(0), |t| t.parse().map_err(|_| error()));
        match (runtime, rest.as_slice()) {
            ("auto", []) => Ok(Self::Auto),
            ("cuda", [] | [_]) => Ok(Self::Cuda(index(rest.first())?)),
            ("wgpu", []) => Ok(Self::Wgpu(WgpuDeviceKind::DefaultDevice)),
            ("wgpu", ["cpu"]) => Ok(Self::Wgpu(WgpuDeviceKind::Cpu)),
            ("wgpu", [kind, number @ ..]) if number.len() <= 1 => {
                let index = index(number.first())?;
                Ok(Self::Wgpu(match *kind {
                    "discrete" => WgpuDeviceKind::DiscreteGpu(index),
                    "integrated" => WgpuDeviceKind::IntegratedGpu(index),
                    "virtual" => WgpuDeviceKind::VirtualGpu(index),
                    "other" => WgpuDeviceKind::Other(index),
                    _ => return Err(error()),
                }))
            }
            _ => Err(error()),
        }
    }
}

/// The device of that name.
///
/// # Errors
/// [`Error::DeviceName`] for a name that is none, [`Error::NoDevice`] with a list of those found if
/// the machine has no such device.
pub fn select(name: &str) -> Result<Device, Error> {
    let unavailable = |reason: DeviceUnavailable| Error::NoDevice {
        asked: name.to_owned(),
        found: found(),
        hint: match reason {
            DeviceUnavailable::NotLinked(_) => {
                "This build was made without that runtime: enable the feature `cuda` or `wgpu`."
            }
            DeviceUnavailable::NoSuchDevice { .. } => {
                "CUDA needs NVIDIA's driver and NVRTC; wgpu needs a Vulkan, Metal or DirectX \
                 driver, and Mesa's lavapipe (Debian: mesa-vulkan-drivers) is one in software."
            }
        },
    };
    match name.parse()? {
        DeviceName::Auto => auto(),
        DeviceName::Cuda(index) => Device::cuda(index).map_err(unavailable),
        DeviceName::Wgpu(WgpuDeviceKind::Cpu) => software().map_err(unavailable),
        DeviceName::Wgpu(kind) => Device::wgpu(kind).map_err(unavailable),
    }
}

/// The device that the environment variable `CUBESLA_DEVICE` names, or else `auto`.
///
/// # Errors
/// As for [`select`].
pub fn from_env() -> Result<Device, Error> {
    match std::env::var(DEVICE_VARIABLE) {
        Ok(name) => select(&name),
        Err(_) => select("auto"),
    }
}

/// The devices of this machine that this build can reach, best first, with their names.
pub fn available() -> Vec<(String, Device)> {
    let mut devices: Vec<(String, Device)> = Device::enumerate_all()
        .into_iter()
        .filter_map(|device| Some((name(&device)?, device)))
        .collect();
    // OpenGL's llvmpipe counts as a GPU, and then Vulkan's adapters are not listed.
    if devices.iter().any(|(_, device)| is_unclassified(device))
        && let Ok(device) = software()
    {
        devices.push(("wgpu:cpu".into(), device));
    }
    devices.sort_by_cached_key(|(_, device)| rank(device));
    devices
}

/// The software rasterizer of the graphics API that wgpu settles on, or else Vulkan's.
fn software() -> Result<Device, DeviceUnavailable> {
    let kind = WgpuDeviceKind::Cpu;
    Device::wgpu(kind.clone()).or_else(|_| Device::vulkan(kind))
}

fn is_unclassified(device: &Device) -> bool {
    matches!(device, Device::Wgpu(device) if matches!(device.kind, WgpuDeviceKind::Other(_)))
}

fn auto() -> Result<Device, Error> {
    let best = available().into_iter().next();
    best.map(|(_, device)| device).ok_or(Error::NoDevice {
        asked: "auto".into(),
        found: found(),
        hint: "Install a GPU driver, or Mesa's lavapipe (Debian: mesa-vulkan-drivers).",
    })
}

/// Real accelerators before software.
fn rank(candidate: &Device) -> usize {
    match candidate {
        Device::Cuda(_) => 0,
        Device::Wgpu(device) => match device.kind {
            WgpuDeviceKind::DiscreteGpu(_) => 1,
            WgpuDeviceKind::IntegratedGpu(_) => 2,
            WgpuDeviceKind::VirtualGpu(_) => 3,
            // Only its adapter tells a GPU from OpenGL's llvmpipe, which lacks what Vulkan's has.
            WgpuDeviceKind::Other(_) if is_llvmpipe(candidate) => 6,
            WgpuDeviceKind::Other(_) => 4,
            _ => 5,
        },
        _ => 7,
    }
}

fn is_llvmpipe(device: &Device) -> bool {
    device
        .client()
        .properties()
        .identity
        .name
        .contains("llvmpipe")
}

/// The name that [`select`] finds the device by; `None` for one of another runtime.
pub fn name(device: &Device) -> Option<String> {
    Some(match device {
        Device::Cuda(device) => format!("cuda:{}", device.index),
        Device::Wgpu(device) => match device.kind {
            WgpuDeviceKind::DiscreteGpu(i) => format!("wgpu:discrete:{i}"),
            WgpuDeviceKind::IntegratedGpu(i) => format!("wgpu:integrated:{i}"),
            WgpuDeviceKind::VirtualGpu(i) => format!("wgpu:virtual:{i}"),
            WgpuDeviceKind::Other(i) => format!("wgpu:other:{i}"),
            WgpuDeviceKind::Cpu => "wgpu:cpu".into(),
            _ => return None,
        },
        _ => return None,
    })
}

fn found() -> String {
    let names: Vec<String> = available().into_iter().map(|(name, _)| name).collect();
    if names.is_empty() {
        "none".into()
    } else {
        names.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse() {
        let kind = |name: &str| name.parse::<DeviceName>().unwrap();
        assert_eq!(kind("auto"), DeviceName::Auto);
        assert_eq!(kind("cuda"), DeviceName::Cuda(0));
        assert_eq!(kind("cuda:3"), DeviceName::Cuda(3));
        assert_eq!(kind("wgpu:cpu"), DeviceName::Wgpu(WgpuDeviceKind::Cpu));
        assert_eq!(
            kind("wgpu:integrated:1"),
            DeviceName::Wgpu(WgpuDeviceKind::IntegratedGpu(1))
        );
    }

    #[test]
    fn other_names_are_refused_with_the_right_ones() {
        for name in [
            "",
            "gpu",
            "cuda:x",
            "cuda:0:1",
            "wgpu:big",
            "wgpu:discrete:0:0",
            "auto:1",
        ] {
            let error = select(name).unwrap_err();
            assert!(matches!(error, Error::DeviceName { .. }), "{name}: {error}");
            assert!(error.to_string().contains("wgpu:cpu"), "{error}");
        }
    }

    #[test]
    fn a_missing_device_lists_those_found() {
        let error = select("wgpu:discrete:4000").unwrap_err();
        assert!(matches!(error, Error::NoDevice { .. }), "{error}");
    }

    #[test]
    fn every_listed_name_selects_its_device() {
        for (name, device) in available() {
            assert_eq!(select(&name).unwrap(), device);
        }
    }
}
