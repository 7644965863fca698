//! Training of attention: SLA2's two stages, and what tells how well they went.
//!
//! | stage | what learns | against | here |
//! |---|---|---|---|
//! | 1 | router and alpha of each attention | full attention, through soft masks | [`train_router`] |
//! | 2 | the model, with alpha and hard masks; the router is frozen | the model's own loss | [`fit`] |
//!
//! In the second stage a [`PrecisionConfig`](crate::PrecisionConfig) in low bits makes it
//! quantization-aware. Source: SLA2 (arXiv 2602.12675).

mod fit;
mod metrics;
mod resume;
mod router;

pub use fit::{Fit, FitOptions, fit};
pub use metrics::{Metrics, block_mass, distance, evaluate, full_attention};
pub use resume::Resume;
pub use router::{RouterTraining, train_router};
