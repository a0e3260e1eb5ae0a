//! The processor in a run's story: what its kernels use, and that a run which goes on uses what it began with.

use homeroom_kernels::{Isa, isa, threads};

use crate::progress::line;
use crate::troubles::{self, CUDA};

/// What kernels use, what each kind of product is made of, and on how many threads: a line of a run's opening.
pub fn words() -> String {
    let refused = if Isa::amx_is_refused() { "; the system refuses AMX" } else { "" };
    let count = threads();
    let threads = if count == 1 { "thread" } else { "threads" };
    let card = troubles::visible_devices().map(|name| format!("\nnote: {name} is set; {}", CUDA.cause));
    let card = card.unwrap_or_default();
    format!("processor {}   {}{refused}   {count} {threads}{card}", isa().name(), isa().units())
}

/// Keeps this process to the instructions that a run began with, by the name that it recorded, as far as the processor and `HOMEROOM_CPU`
/// have them; says so where that is another set than without the run, or not the run's.
pub fn keep_to(began: &str) {
    let Ok(wanted) = began.parse::<Isa>() else {
        line(format_args!(
            "note: the run began on a processor with {began}, which this version does not know: results agree to rounding, and not in every bit"
        ));
        return;
    };
    let before = isa();
    let kept = homeroom_kernels::keep_to(wanted);
    if kept != wanted {
        line(format_args!(
            "note: the run began on a processor with {began}, this one has {} of it: results agree to rounding, and not in every bit",
            kept.name()
        ));
    } else if kept != before {
        line(format_args!(
            "note: kept to {}, with which the run began; this processor has {}",
            kept.name(),
            before.name()
        ));
    }
}
