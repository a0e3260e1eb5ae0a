//! What an answer is held to: tokens that may not come next are not drawn.

use anyhow::Result;

/// The logit of a token that may not come next: its weight is 0 at every temperature, and no division by one makes it infinite.
pub const MASKED: f32 = -1e30;

/// Holds the answer of one sequence to a form, such as JSON by a schema. It sees the sequence's own tokens and no other's.
pub trait Constraint: Send {
    /// Sets the logits, (V), of tokens that may not come next to [`MASKED`]. At least one is left.
    ///
    /// # Errors
    /// When no token can come next, or finding them takes more work than is given.
    fn mask(&mut self, logits: &mut [f32]) -> Result<()>;

    /// Notes the token that was drawn. Returns true if the answer is complete with it.
    ///
    /// # Errors
    /// When the token may not come next.
    fn accept(&mut self, token: u32) -> Result<bool>;
}
