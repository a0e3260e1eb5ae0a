//! Time.

/// What a step computes.
#[derive(Clone, Debug, Default)]
pub struct Work {}
/// Speeds.
pub struct Measured {}
