//! The boundary between the host and a strategy plugin.
//!
//! Two kinds of thing live here and nothing else: the C table that a plugin exports ([`table`]), and the data that
//! crosses it as JSON: what a strategy is called and takes ([`describe`]), what it adapts ([`plan`]), how an adapted
//! module computes ([`recipe`]), how frozen weights are stored ([`codec`]), and what it has a run do between two steps
//! ([`step`]). No tensor and no allocation crosses. How much may cross stands in
//! [`limits`], and [`check`] holds what is said to that.
//!
//! Fields and operations are only ever appended. A reader meets unknown operations with a refusal that names them.

pub mod check;
pub mod codec;
pub mod describe;
pub mod limits;
pub mod native;
pub mod plan;
pub mod recipe;
pub mod shape;
pub mod step;
pub mod table;
