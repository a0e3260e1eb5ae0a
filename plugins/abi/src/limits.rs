//! How much a strategy may say. A host refuses what is more before it works on it, see [`crate::check`]: a plan may come from a
//! mistake of its author, and a mistake should be a sentence, not a machine without memory.
//!
//! The figures are some ten times what the largest models and strategies that are known would take.

/// Bytes of a description.
pub const DESCRIPTION_BYTES_MAX: usize = 1 << 20;
/// Bytes of a plan.
pub const PLAN_BYTES_MAX: usize = 64 << 20;
/// Bytes of an answer to a step, its state included.
pub const ANSWER_BYTES_MAX: usize = 1 << 20;
/// Bytes of an error.
pub const ERROR_BYTES_MAX: usize = 64 << 10;

/// Bytes of a name: of an option, a parameter, a tensor, a module, a scalar, a group, a codec, or of a pattern.
pub const NAME_BYTES_MAX: usize = 512;
/// Bytes of a strategy's or an option's line of doc.
pub const DOC_BYTES_MAX: usize = 4096;
/// Options of a strategy.
pub const OPTIONS_MAX: usize = 1000;
/// Modules that a plan adapts or stores.
pub const MODULES_MAX: usize = 1 << 16;
/// Parameters of a plan, those of all modules and of the model.
pub const PARAMETERS_MAX: usize = 1 << 18;
/// Dimensions of a parameter or a node.
pub const DIMENSIONS_MAX: usize = 8;
/// Values of a parameter, or of a node whose size does not depend on the batch.
pub const VALUES_MAX: usize = 1 << 31;
/// Values of a node for each row of the batch.
pub const VALUES_PER_ROW_MAX: usize = 1 << 22;
/// Recipes of a plan.
pub const RECIPES_MAX: usize = 1 << 12;
/// Nodes of a recipe.
pub const NODES_MAX: usize = 1 << 10;
/// Names that are looked at while the recipes of all modules are checked: nodes times the parameters that each may mean.
pub const LOOKUPS_MAX: usize = 100_000_000;
/// Scalars of a plan.
pub const SCALARS_MAX: usize = 1 << 16;
/// Optimizer groups of a plan.
pub const GROUPS_MAX: usize = 1 << 10;
/// Codecs of a plan.
pub const CODECS_MAX: usize = 64;
/// Directives after one step.
pub const DIRECTIVES_MAX: usize = 1 << 12;

/// What is said when there are too many of something.
pub fn too_many(verb: &str, count: usize, what: &str, most: usize) -> String {
    format!("{verb} {} {what}, {} are the most", thousands(count), thousands(most))
}

/// A number with a comma before each three digits.
pub(crate) fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().map(|group| str::from_utf8(group).unwrap_or("")).collect();
    groups.join(",")
}

/// Whether a character acts on a terminal instead of being seen: an escape or another control, or one that turns the direction of
/// writing.
pub fn is_hidden(c: char) -> bool {
    let directs = matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    c.is_control() || directs
}
