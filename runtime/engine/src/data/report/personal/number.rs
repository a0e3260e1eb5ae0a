//! Where a number begins and ends in a text, what is said before it, and numbers of accounts and cards.

/// A place where a number or a word begins.
pub(super) struct Place<'t> {
    pub text: &'t str,
    pub at: usize,
    /// Whether it may be what an operator works on, as in `3 + 45`.
    pub computed: bool,
}

/// Signs between or before numbers that are computed with.
const OPERATORS: &str = "=+*/^×·÷−<>≤≥≈±%";
/// Signs that belong to the number behind them.
const SIGNS: &str = "=+*^/\\#$€£¥<>~-−×·÷_&@";

/// Letters and digits that a word goes on with. Scripts without spaces end a number as a space does.
fn is_word(c: char) -> bool {
    c == '_' || c.is_alphanumeric() && !is_ideograph(c)
}

/// Letters of scripts that write no spaces between words: each counts as a word.
pub(in crate::data::report) fn is_ideograph(c: char) -> bool {
    matches!(c, '\u{0e00}'..='\u{0eff}' | '\u{1000}'..='\u{109f}' | '\u{1780}'..='\u{17ff}' | '\u{3040}'..='\u{30ff}' | '\u{31f0}'..='\u{31ff}'
        | '\u{3400}'..='\u{4dbf}' | '\u{4e00}'..='\u{9fff}' | '\u{f900}'..='\u{faff}' | '\u{20000}'..='\u{3ffff}')
}

impl<'t> Place<'t> {
    /// `None`: a word or number that began before goes on here.
    pub fn new(text: &'t str, at: usize) -> Option<Self> {
        let mut before = text[..at].chars().rev();
        if let Some(last) = before.next() {
            let digit_before = before.next().is_some_and(|c| c.is_ascii_digit());
            let of_number = digit_before && ".,-/:'’".contains(last) || SIGNS.contains(last);
            if is_word(last) || of_number {
                return None;
            }
        }
        let last = text[..at].chars().rev().take(16).find(|c| ![' ', '\u{a0}', '('].contains(c));
        Some(Self { text, at, computed: last.is_some_and(|c| OPERATORS.contains(c)) })
    }

    /// Whether a number ends at `end`, and nothing is computed with it.
    pub fn ends(&self, end: usize) -> bool {
        let mut rest = self.text[end..].chars();
        let (next, second) = (rest.next(), rest.next());
        let Some(next) = next else { return true };
        let digit = second.is_some_and(|c| c.is_ascii_digit());
        if is_word(next) || ".,-/:'’".contains(next) && digit || "%°€$£^@\\".contains(next) {
            return false;
        }
        let rest = self.text[end..].trim_start_matches([' ', '\u{a0}', ')']);
        let mut rest = rest.chars();
        let (next, second) = (rest.next(), rest.next());
        let operates = next.is_some_and(|c| "=*^×·÷<>+≈%€$£".contains(c));
        let minus = next.is_some_and(|c| "-−/".contains(c)) && rest_has_number(second, rest.next());
        !(operates || minus)
    }

    /// Whether one of these words, in small letters, stands shortly before.
    pub fn is_named(&self, words: &[&str]) -> bool {
        let window = self.text[..self.at].char_indices().rev().nth(47).map_or(0, |(at, _)| at);
        let before = self.text[window..self.at].to_lowercase();
        let is_letter = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
        words.iter().any(|word| {
            before.match_indices(word).any(|(at, _)| {
                // Of a long one the beginning is enough: `steuer` of `Steuernummer`, but no `sin` of `sings`.
                let goes_on = word.len() <= 4 && is_letter(before[at + word.len()..].chars().next());
                !goes_on && !is_letter(before[..at].chars().next_back())
            })
        })
    }
}

fn rest_has_number(second: Option<char>, third: Option<char>) -> bool {
    second.is_some_and(|c| c.is_ascii_digit()) || second == Some(' ') && third.is_some_and(|c| c.is_ascii_digit())
}

/// Lengths of account numbers by country. Source: the IBAN registry, ISO 13616, release 98.
const IBAN_LENGTHS: &str = "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 DO28 EE20 EG29 ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 PT25 QA29 RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20";

/// Where an IBAN that begins here ends. Source: ISO 13616, its check digits ISO 7064 MOD 97-10.
pub(super) fn iban(text: &str, at: usize) -> Option<usize> {
    let bytes = text.as_bytes();
    let digits = bytes.get(at + 2..at + 4)?;
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let country = text.get(at..at + 2)?;
    let length: usize = IBAN_LENGTHS.split(' ').find_map(|entry| entry.strip_prefix(country)?.parse().ok())?;
    let mut signs = Vec::with_capacity(length);
    let mut end = at;
    for (offset, c) in text[at..].char_indices() {
        match c {
            'A'..='Z' | '0'..='9' => signs.push(c as u8),
            ' ' | '\u{a0}' | '-' if bytes[end - 1].is_ascii_alphanumeric() => {}
            _ => break,
        }
        end = at + offset + c.len_utf8();
        if signs.len() == length {
            break;
        }
    }
    if signs.len() < length || text[end..].chars().next().is_some_and(is_word) {
        return None;
    }
    signs.rotate_left(4);
    let rest = signs.iter().fold(0, |rest: u32, sign| match sign {
        b'0'..=b'9' => (rest * 10 + u32::from(sign - b'0')) % 97,
        _ => (rest * 100 + u32::from(sign - b'A') + 10) % 97,
    });
    (rest == 1).then_some(end)
}

/// Words before a card's number that is not written in groups.
const CARD_NAMES: [&str; 17] = [
    "card",
    "visa",
    "mastercard",
    "amex",
    "american express",
    "discover",
    "kreditkart",
    "karte",
    "tarjeta",
    "carte",
    "cartão",
    "cartao",
    "carta",
    "kaart",
    "karta",
    "kort",
    "卡",
];

/// Where the number of a payment card that begins here ends: issuer and length are known (ISO/IEC 7812), its last digit is Luhn's.
pub(super) fn card(place: &Place<'_>) -> Option<usize> {
    let bytes = place.text.as_bytes();
    let (mut digits, mut groups, mut end) = (Vec::new(), vec![0], place.at);
    while let Some(byte) = bytes.get(end) {
        match byte {
            b'0'..=b'9' => {
                digits.push(byte - b'0');
                *groups.last_mut()? += 1;
            }
            b' ' | b'-' if bytes.get(end + 1).is_some_and(u8::is_ascii_digit) && digits.len() < 19 => groups.push(0),
            _ => break,
        }
        end += 1;
    }
    // The groups may go on with another number.
    while groups.len() > 1 && !matches!(groups[..], [4, 4, 4, 4] | [4, 6, 5] | [4, 4, 4, 4, 3]) {
        let last = groups.pop()?;
        digits.truncate(digits.len() - last);
        end -= last + 1;
    }
    let grouped = groups.len() > 1;
    let number = |count: usize| digits.iter().take(count).fold(0, |number: u32, digit| number * 10 + u32::from(*digit));
    let known = match digits.len() {
        16 => {
            matches!(number(1), 4)
                || matches!(number(2), 51..=55 | 62 | 65)
                || matches!(number(4), 2221..=2720 | 3528..=3589 | 6011)
        }
        15 => matches!(number(2), 34 | 37),
        19 => matches!(number(2), 62),
        _ => false,
    };
    let ends = !place.computed && place.ends(end);
    (known
        && ends
        && luhn(&digits)
        && digits.iter().any(|digit| *digit != digits[0])
        && (grouped || place.is_named(&CARD_NAMES)))
    .then_some(end)
}

/// Luhn's check, ISO/IEC 7812-1: every second digit from the right is doubled.
pub(super) fn luhn(digits: &[u8]) -> bool {
    let doubled = |(place, digit): (usize, &u8)| match (place % 2, 2 * u32::from(*digit)) {
        (0, _) => u32::from(*digit),
        (_, doubled) => doubled / 10 + doubled % 10,
    };
    digits.iter().rev().enumerate().map(doubled).sum::<u32>().is_multiple_of(10)
}

/// Whether digits are more than one or two that repeat.
pub(super) fn varied(digits: &[u8]) -> bool {
    let seen = digits.iter().fold(0_u16, |seen, digit| seen | 1 << digit);
    seen.count_ones() > 2
}
