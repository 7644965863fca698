//! Selection in rows: top-k, top-p, block lists and soft top-k.

mod blocks;
mod group;
mod rank;
mod shape;
mod soft;
mod top_k;

pub use blocks::{BlockSelection, Critical, select_blocks};
pub(crate) use group::RowGroup;
pub(crate) use rank::Appender;
pub use shape::MAX_ROW;
pub(crate) use shape::{RowShape, elements, row_of_group};
pub use soft::{soft_top_k, soft_top_k_backward};
pub use top_k::{TopK, TopKOrder, top_k};
