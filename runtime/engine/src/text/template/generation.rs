//! The `{% generation %}` block of transformers, as minijinja's blocks.

/// What `{% generation %}` becomes, less the outer delimiters: a block with its own scope, filtered. Nothing stands
/// between the two tags, so white space is trimmed as around the original one.
const GENERATION: &str = "with %}{% filter homeroom_generation(homeroom_marks)";
const END_GENERATION: &str = "endfilter %}{% endwith";

/// Rewrites `{% generation %}` and `{% endgeneration %}` as [`GENERATION`] and [`END_GENERATION`], leaving
/// the outer delimiters and their white-space control as they are.
pub(super) fn rewrite_generation_tags(source: &str) -> String {
    if !source.contains("endgeneration") {
        return source.into();
    }
    let mut out = String::with_capacity(source.len() + 64);
    let mut rest = source;
    while let Some(at) = rest.find('{') {
        let tag = &rest[at..];
        let len = match tag.as_bytes().get(1) {
            Some(b'#') => tag.find("#}").map_or(tag.len(), |end| end + 2),
            Some(b'{') => 2 + expression_len(&tag[2..], "}}"),
            Some(b'%') => 2 + expression_len(&tag[2..], "%}"),
            _ => 1,
        };
        out.push_str(&rest[..at]);
        let (tag, after) = tag.split_at(len);
        rest = after;
        let word = tag.trim_start_matches("{%").trim_end_matches("%}").trim_matches(['-', '+']).trim();
        match word {
            "generation" if tag.starts_with("{%") => out.push_str(&tag.replacen(word, GENERATION, 1)),
            "endgeneration" if tag.starts_with("{%") => out.push_str(&tag.replacen(word, END_GENERATION, 1)),
            "raw" if tag.starts_with("{%") => {
                let raw = raw_len(rest);
                out.push_str(tag);
                out.push_str(&rest[..raw]);
                rest = &rest[raw..];
            }
            _ => out.push_str(tag),
        }
    }
    out.push_str(rest);
    out
}

/// The length of `text` up to and including `close`, which does not count inside a string, nor (for an expression)
/// inside braces.
fn expression_len(text: &str, close: &str) -> usize {
    let bytes = text.as_bytes();
    let (mut at, mut depth) = (0, 0usize);
    while at < bytes.len() {
        match bytes[at] {
            quote @ (b'"' | b'\'') => {
                at += 1;
                while at < bytes.len() && bytes[at] != quote {
                    at += if bytes[at] == b'\\' { 2 } else { 1 };
                }
            }
            _ if depth == 0 && text.as_bytes()[at..].starts_with(close.as_bytes()) => {
                return at + close.len();
            }
            b'{' => depth += 1,
            b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        at += 1;
    }
    text.len()
}

/// The length of what a `{% raw %}` holds: up to the tag that ends it, which is left to be read as a tag.
fn raw_len(text: &str) -> usize {
    let is_end = |at: &usize| {
        let inner = text[at + 2..].trim_start_matches(['-', '+']).trim_start();
        inner.starts_with("endraw")
    };
    let end = text.match_indices("{%").map(|(at, _)| at).find(is_end);
    end.unwrap_or(text.len())
}
