//! The tokens of a script, for what is said of it without running it.

/// A token.
#[derive(Clone, Debug, PartialEq)]
pub enum Token {
    /// A name or a keyword.
    Name(String),
    /// A text; `None`: what it says is not known, as it has escapes or values in it, or is long.
    Text(Option<String>),
    /// A number; not a number if it cannot be read.
    Number(f64),
    /// Any other character.
    Symbol(char),
}

/// Words of Luau that are no names.
pub const KEYWORDS: [&str; 22] = [
    "and", "break", "continue", "do", "else", "elseif", "end", "false", "for", "function", "if", "in", "local", "nil",
    "not", "or", "repeat", "return", "then", "true", "until", "while",
];

/// The tokens of a script, each with its line. `==`, `..` and the like are single symbols in a row.
pub fn tokens(text: &str) -> Vec<(usize, Token)> {
    let chars: Vec<char> = text.chars().collect();
    let (mut at, mut line, mut out) = (0, 1, Vec::new());
    let long = |at: usize| {
        // [[, [=[ and so on: the number of equal signs, if it is one.
        let signs = chars[at..].iter().skip(1).take_while(|c| **c == '=').count();
        (chars.get(at) == Some(&'[') && chars.get(at + signs + 1) == Some(&'[')).then_some(signs)
    };
    let long_end = |from: usize, signs: usize| {
        let close: Vec<char> = format!("]{}]", "=".repeat(signs)).chars().collect();
        let found = chars[from..].windows(close.len()).position(|window| window == close);
        found.map_or(chars.len(), |found| from + found + close.len())
    };
    while at < chars.len() {
        let start = at;
        match chars[at] {
            '-' if chars.get(at + 1) == Some(&'-') => {
                at = match chars.get(at + 2).and_then(|_| long(at + 2)) {
                    Some(signs) => long_end(at + 2, signs),
                    None => chars[at..].iter().position(|c| *c == '\n').map_or(chars.len(), |end| at + end),
                };
            }
            '[' if long(at).is_some() => {
                at = long_end(at, long(at).unwrap_or(0));
                out.push((line, Token::Text(None)));
            }
            quote @ ('"' | '\'' | '`') => {
                at += 1;
                let mut said = String::new();
                let mut is_plain = quote != '`';
                while at < chars.len() && chars[at] != quote {
                    is_plain &= chars[at] != '\\';
                    at += usize::from(chars[at] == '\\');
                    said.extend(chars.get(at));
                    at += 1;
                }
                at += 1;
                out.push((line, Token::Text(is_plain.then_some(said))));
            }
            c if c.is_alphabetic() || c == '_' => {
                let rest = chars[at..].iter().take_while(|c| c.is_alphanumeric() || **c == '_');
                let name: String = rest.collect();
                at += name.chars().count();
                out.push((line, Token::Name(name)));
            }
            c if c.is_ascii_digit() || c == '.' && chars.get(at + 1).is_some_and(char::is_ascii_digit) => {
                let is_hex = c == '0' && matches!(chars.get(at + 1), Some('x' | 'X'));
                while let Some(c) = chars.get(at) {
                    let is_sign = matches!(c, '+' | '-') && !is_hex && matches!(chars[at - 1], 'e' | 'E') && at > start;
                    // `1..2` joins two numbers.
                    let is_point = *c == '.' && chars.get(at + 1) != Some(&'.');
                    if !(c.is_alphanumeric() || *c == '_' || is_point || is_sign) {
                        break;
                    }
                    at += 1;
                }
                out.push((line, Token::Number(number(&chars[start..at]))));
            }
            c => {
                at += 1;
                if !c.is_whitespace() {
                    out.push((line, Token::Symbol(c)));
                }
            }
        }
        line += chars[start..at.min(chars.len())].iter().filter(|c| **c == '\n').count();
    }
    out
}

fn number(digits: &[char]) -> f64 {
    let text: String = digits.iter().filter(|c| **c != '_').collect::<String>().to_lowercase();
    let whole = |digits: &str, radix| u64::from_str_radix(digits, radix).map_or(f64::NAN, |number| number as f64);
    match (text.strip_prefix("0x"), text.strip_prefix("0b")) {
        (Some(digits), _) => whole(digits, 16),
        (_, Some(digits)) => whole(digits, 2),
        _ => text.parse().unwrap_or(f64::NAN),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_texts_are_read_as_the_script_means_them() {
        let values: Vec<Token> = tokens("50 2e-4 .5 1_000 0xff 0b11 5E+3 \"a b\" 'ä' \"a\\n\" `{x}` [[y]]")
            .into_iter()
            .map(|(_, token)| token)
            .collect();
        let text = |text: &str| Token::Text(Some(text.to_owned()));
        let numbers = [50.0, 2e-4, 0.5, 1000.0, 255.0, 3.0, 5000.0].map(Token::Number);
        assert_eq!(values[..7], numbers);
        assert_eq!(values[7..], [text("a b"), text("ä"), Token::Text(None), Token::Text(None), Token::Text(None)]);
        let joined: Vec<Token> = tokens("1 ..2 a.b3").into_iter().map(|(_, token)| token).collect();
        let name = |name: &str| Token::Name(name.to_owned());
        let dot = || Token::Symbol('.');
        assert_eq!(joined, [Token::Number(1.0), dot(), Token::Number(0.2), name("a"), dot(), name("b3")]);
    }
}
