//! Every operation against the f64 reference, on the device that `CUBESLA_DEVICE` names.

mod attention;
mod attention_backward;
mod block_list;
mod large;
mod linear;
mod low_bit;
mod low_bit_backward;
mod matmul;
mod quantize;
mod router;
mod select;
mod sla;
mod sla_backward;
mod sla_low_bit;
mod soft;
mod tf32;
mod training;
mod tune;
