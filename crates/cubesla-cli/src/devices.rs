//! `cubesla devices`.

use cubesla::{DType, device};

use crate::common;
use crate::error::Error;

#[derive(clap::Args)]
pub struct Args {
    /// Print the names alone, one a line
    #[arg(long)]
    quiet: bool,
}

/// Prints the devices, with a star at the one that `chosen` names; an error if there is none.
pub fn run(args: &Args, chosen: &str) -> Result<(), Error> {
    let devices = device::available();
    if devices.is_empty() {
        // The library's own answer, which says what to install.
        device::select("auto")?;
    }
    if args.quiet {
        for (name, _) in devices {
            println!("{name}");
        }
        return Ok(());
    }

    let selected = device::select(chosen);
    let header = ["", "name", "description", "types", "shared memory per cube"];
    let mut table = common::table(header, header.len());
    for (name, device) in &devices {
        let client = device.client();
        let properties = client.properties();
        let dtypes: Vec<String> = DType::ALL
            .into_iter()
            .filter(|dtype| dtype.is_supported(properties))
            .map(|dtype| dtype.to_string())
            .collect();
        let mark = if selected.as_ref().is_ok_and(|s| s == device) {
            "*"
        } else {
            ""
        };
        table.add_row([
            mark.to_owned(),
            name.clone(),
            properties.identity.name.clone(),
            dtypes.join(" "),
            format!("{} KiB", properties.hardware.max_shared_memory_size / 1024),
        ]);
    }
    println!("{table}");
    selected?;
    Ok(())
}
