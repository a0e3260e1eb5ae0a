//! What is said of a template that fails.

use anyhow::anyhow;
use minijinja::{Error, ErrorKind};

use super::{NAME, bounds};

/// "chat template, line 3: what failed", from the innermost place that is known.
pub(super) fn template_error(error: &Error) -> anyhow::Error {
    let mut deepest = error;
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        if let Some(inner) = inner.downcast_ref::<Error>() {
            deepest = inner;
        }
        source = inner.source();
    }
    let line = deepest.line().or(error.line());
    let place = line.map_or(String::new(), |n| format!(", line {n}"));
    if bounds::is_beyond(deepest.kind(), deepest.detail()) {
        let detail = match deepest.kind() {
            ErrorKind::OutOfFuel => "stopped: it takes more work or memory than a conversation of this size is given",
            _ => deepest.detail().unwrap_or_default(),
        };
        return anyhow!(bounds::Exceeded(format!("{NAME}{place}: {detail}")));
    }
    match (deepest.kind(), deepest.detail().map(bounds::cut)) {
        // `raise_exception` and plain failures say enough by themselves.
        (ErrorKind::InvalidOperation, Some(detail)) => anyhow!("{NAME}{place}: {detail}"),
        (kind, Some(detail)) => anyhow!("{NAME}{place}: {kind}: {detail}"),
        (kind, None) => anyhow!("{NAME}{place}: {kind}"),
    }
}
