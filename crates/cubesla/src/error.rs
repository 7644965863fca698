use cubecl::server::ServerError;
use cubesla_kernels::ProblemError;

/// Anything that can go wrong in this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument was refused; nothing was launched.
    #[error(transparent)]
    Problem(#[from] ProblemError),
    /// No such device on this machine.
    #[error("no device `{asked}` on this machine, which has: {found}. {hint}")]
    NoDevice {
        /// The device asked for.
        asked: String,
        /// The devices found.
        found: String,
        /// What would help.
        hint: &'static str,
    },
    /// A device's name could not be read.
    #[error(
        "`{name}` is not the name of a device: use auto, cuda, cuda:1, wgpu, wgpu:discrete, \
         wgpu:integrated:1, wgpu:virtual, wgpu:cpu or wgpu:other"
    )]
    DeviceName {
        /// The name.
        name: String,
    },
    /// The device ran out of memory, or a kernel failed to compile, launch or finish.
    #[error("{operation} failed on the device")]
    Device {
        /// The operation.
        operation: &'static str,
        /// CubeCL's report.
        source: ServerError,
    },
    /// Data does not have the length that its shape calls for.
    #[error("`{argument}` has {found} elements where {expected} are expected")]
    Length {
        /// The argument at fault.
        argument: &'static str,
        /// Its length.
        found: usize,
        /// The right length.
        expected: usize,
    },
    /// A list names a key block that does not exist.
    #[error(
        "row {row} of the block list names key block {index}, but there are {key_blocks} key blocks"
    )]
    ListIndex {
        /// The row, counting over (batch, head, query block).
        row: usize,
        /// The index.
        index: i64,
        /// Number of key blocks.
        key_blocks: usize,
    },
    /// A row of a list is out of order.
    #[error(
        "row {row} of the block list has key block {next} after {previous}: rows must be strictly \
         ascending (`from_sla` sorts for you)"
    )]
    ListOrder {
        /// The row, counting over (batch, head, query block).
        row: usize,
        /// An index.
        previous: u32,
        /// The index after it.
        next: u32,
    },
    /// A row of a list claims more entries than it has room for.
    #[error("row {row} of the block list has a count of {count}, outside 0..={width}")]
    ListCount {
        /// The row, counting over (batch, head, query block).
        row: usize,
        /// The count.
        count: i64,
        /// Entries that a row has room for.
        width: usize,
    },
    /// A format without counts cannot hold rows of different lengths.
    #[error(
        "rows 0 and {row} of the block list have {first} and {found} entries, which {format} \
         cannot express: all rows must have the same number"
    )]
    ListNotUniform {
        /// The format.
        format: &'static str,
        /// Entries of row 0.
        first: usize,
        /// The row that differs.
        row: usize,
        /// Its entries.
        found: usize,
    },
}
