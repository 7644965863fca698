use crate::DType;

/// Why an operation is refused before anything is launched.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ProblemError {
    /// A shape does not fit the others.
    #[error("`{argument}` has shape {found:?}, but the other arguments call for {expected:?}")]
    ShapeMismatch {
        /// The argument at fault.
        argument: &'static str,
        /// Its shape.
        found: Vec<usize>,
        /// The shape that would fit.
        expected: Vec<usize>,
    },
    /// An axis is empty.
    #[error("`{argument}` has shape {shape:?}: every axis must have at least one element")]
    ZeroSize {
        /// The argument at fault.
        argument: &'static str,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// A shape and strides reach past the end of their buffer.
    #[error(
        "shape {shape:?} with strides {strides:?} needs {needed} bytes, but the buffer holds \
         {found}: allocate a larger buffer or correct the strides"
    )]
    BufferTooSmall {
        /// The shape.
        shape: Vec<usize>,
        /// The strides, in elements.
        strides: Vec<usize>,
        /// Bytes up to the end of the last element.
        needed: usize,
        /// Bytes that the buffer holds.
        found: usize,
    },
    /// Tensors that must agree in type do not.
    #[error("`{argument}` is {found} where {expected} is expected: convert one of them")]
    DTypeMismatch {
        /// The argument at fault.
        argument: &'static str,
        /// Its type.
        found: DType,
        /// The type it should have.
        expected: DType,
    },
    /// The device has no such type.
    #[error("{device} has no {dtype}: convert the tensors to {instead}")]
    UnsupportedDType {
        /// The type asked for.
        dtype: DType,
        /// The device's name.
        device: String,
        /// Types that it has.
        instead: String,
    },
    /// Query heads cannot be shared out over key heads.
    #[error(
        "{query_heads} query heads cannot be shared out over {kv_heads} key heads: the first must \
         be a multiple of the second"
    )]
    HeadGroups {
        /// Heads of `q`.
        query_heads: usize,
        /// Heads of `k` and `v`.
        kv_heads: usize,
    },
    /// The head dimension is out of range.
    #[error("`{argument}` has head dimension {dim}: pad it to a multiple of 8 from 32 to 256")]
    HeadDim {
        /// The argument at fault.
        argument: &'static str,
        /// Its last axis.
        dim: usize,
    },
    /// A block size is out of range.
    #[error("`{argument}` is {size}: it must be a multiple of 16 from 16 to 128")]
    BlockSize {
        /// The argument at fault.
        argument: &'static str,
        /// Its value.
        size: usize,
    },
    /// A sequence is longer than row numbers can count.
    #[error("`{argument}` has {len} rows: kernels count rows in 31 bits, so split the sequence")]
    TooLong {
        /// The argument at fault.
        argument: &'static str,
        /// Its length.
        len: usize,
    },
    /// The scale is NaN or infinite.
    #[error("`scale` is {scale}: it must be finite")]
    Scale {
        /// The scale.
        scale: f32,
    },
    /// A block list does not fit the problem.
    #[error("the block list has {axis} = {found}, but the problem has {expected}")]
    ListMismatch {
        /// The axis.
        axis: &'static str,
        /// The list's size.
        found: usize,
        /// The problem's size.
        expected: usize,
    },
    /// A launch needs more cubes along an axis than the device allows.
    #[error(
        "{what} = {count} is more than the {limit} cubes that the device allows along one axis: \
         split the call along that axis"
    )]
    GridTooLarge {
        /// What is counted along the axis.
        what: &'static str,
        /// Cubes needed.
        count: usize,
        /// Cubes allowed.
        limit: usize,
    },
    /// A tensor must be contiguous and is not.
    #[error("`{argument}` must be contiguous: copy it first")]
    NotContiguous {
        /// The argument at fault.
        argument: &'static str,
    },
    /// A row is longer than a cube can rank.
    #[error("rows of {len} elements cannot be ranked: at most {limit} fit, so use larger blocks")]
    RowTooLong {
        /// Elements of a row.
        len: usize,
        /// Most elements.
        limit: usize,
    },
    /// Groups that share a scale do not fit.
    #[error(
        "groups of {group} do not fit rows of {columns} elements: a group has 32, 64 or 128, and \
         must divide the row"
    )]
    Group {
        /// Elements of a group.
        group: usize,
        /// Elements of a row.
        columns: usize,
    },
    /// A packed buffer has another length than its shape calls for.
    #[error(
        "the packed buffer has {found} bytes where {expected} are expected: each row is padded to \
         a multiple of 16"
    )]
    PackedLength {
        /// Its bytes.
        found: usize,
        /// The bytes that its shape calls for.
        expected: usize,
    },
    /// A number of elements to select is out of range.
    #[error("`{argument}` is {found}: it must be from 1 to {limit}")]
    Count {
        /// The argument at fault.
        argument: &'static str,
        /// Its value.
        found: usize,
        /// The largest possible.
        limit: usize,
    },
    /// A temperature is out of range.
    #[error("`tau` is {tau}: it must be positive and finite")]
    Temperature {
        /// The temperature.
        tau: f32,
    },
    /// A share of blocks is out of range.
    #[error("`{argument}` is {ratio}: it must be from 0 to 1")]
    Share {
        /// The argument at fault.
        argument: &'static str,
        /// Its value.
        ratio: f64,
    },
    /// A ratio of selected blocks is out of range.
    #[error("`ratio` is {ratio}: a soft selection needs one above 0 and below 1")]
    Ratio {
        /// The ratio.
        ratio: f32,
    },
    /// A softmax mass is out of range.
    #[error("`mass` is {mass}: it must be above 0 and at most 1")]
    Mass {
        /// The mass.
        mass: f32,
    },
    /// A combination that is not built.
    #[error("not supported: {what}: {why}")]
    NotSupported {
        /// What was asked for.
        what: String,
        /// Why it is refused, and what to do instead.
        why: &'static str,
    },
    /// A buffer is larger than the device allocates.
    #[error(
        "`{what}` needs {bytes} bytes in one buffer, and the device allocates at most {limit}: \
         split the batch or the heads over several calls"
    )]
    BufferTooLarge {
        /// The tensor.
        what: &'static str,
        /// Bytes needed.
        bytes: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// A kernel has more buffers than the device binds.
    #[error(
        "{operation} binds {buffers} buffers at once, and {device} at most {limit}: use another \
         device or graphics API; Vulkan, Metal and DirectX 12 have more than OpenGL"
    )]
    Bindings {
        /// The operation.
        operation: &'static str,
        /// Name of the device.
        device: String,
        /// Buffers of the kernel.
        buffers: usize,
        /// Buffers allowed.
        limit: usize,
    },
    /// A software device would leave a kernel's loops early.
    #[error(
        "{operation} may take {iterations} loop iterations in one invocation, and llvmpipe stops \
         after {budget} without an error: use fewer selected blocks or a shorter sequence, or a \
         real GPU"
    )]
    LoopBudget {
        /// The operation.
        operation: &'static str,
        /// Most iterations of one invocation.
        iterations: usize,
        /// Iterations that the device carries out.
        budget: usize,
    },
    /// No engine can run the problem on the device.
    #[error("no plan for this problem on {device}: {reason}")]
    NoPlan {
        /// The device's name.
        device: String,
        /// What stands in the way.
        reason: String,
    },
}
