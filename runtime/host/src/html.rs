//! Texts in pages: words of others are text there and never markup.

use crate::terminal::shown;

/// A text as it stands in HTML, also between quotes. What turns the direction of writing is shown.
pub fn escaped(text: &str) -> String {
    let text = shown(text);
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&#39;",
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_word_is_markup() {
        assert_eq!(escaped("<a href='x' b=\"&\">"), "&lt;a href=&#39;x&#39; b=&quot;&amp;&quot;&gt;");
        assert!(!escaped("a\u{202e}b").contains('\u{202e}'));
    }
}
