//! Telephone numbers, as they are written within a country and from abroad.
//!
//! A number is told by how it begins (`+49`, `0049`, a trunk `0`), by the groups of North America, or by a word before it (`Tel.`).
//! Digits that could be a sum, a date, a count or a book's number are none.

use super::number::{Place, varied};

/// Country codes of one or two digits, with the least and most digits behind them. Source: ITU-T E.164 and national numbering plans.
const COUNTRIES: [(&str, usize, usize); 46] = [
    ("1", 10, 10),
    ("7", 10, 10),
    ("20", 8, 10),
    ("27", 9, 9),
    ("30", 10, 10),
    ("31", 9, 9),
    ("32", 8, 9),
    ("33", 9, 9),
    ("34", 9, 9),
    ("36", 8, 9),
    ("39", 6, 11),
    ("40", 9, 9),
    ("41", 9, 9),
    ("43", 7, 12),
    ("44", 9, 10),
    ("45", 8, 8),
    ("46", 7, 10),
    ("47", 8, 8),
    ("48", 9, 9),
    ("49", 7, 12),
    ("51", 8, 9),
    ("52", 10, 11),
    ("53", 8, 8),
    ("54", 10, 11),
    ("55", 10, 11),
    ("56", 9, 9),
    ("57", 8, 10),
    ("58", 10, 10),
    ("60", 8, 10),
    ("61", 9, 9),
    ("62", 8, 12),
    ("63", 8, 10),
    ("64", 8, 10),
    ("65", 8, 8),
    ("66", 8, 9),
    ("81", 9, 10),
    ("82", 8, 11),
    ("84", 9, 10),
    ("86", 10, 11),
    ("90", 10, 10),
    ("91", 10, 10),
    ("92", 9, 10),
    ("93", 9, 9),
    ("94", 9, 9),
    ("95", 7, 10),
    ("98", 10, 10),
];
/// The first two digits of those with three, which have 7 to 10 digits behind them.
const REGIONS: &str = "21 22 23 24 25 26 29 35 37 38 42 50 59 67 68 80 85 87 88 96 97 99";

/// Words before a number that say what it is.
const NAMES: [&str; 26] = [
    "tel",
    "telf",
    "tlf",
    "tél",
    "phone",
    "telephone",
    "mobile",
    "mobil",
    "mobilnummer",
    "handy",
    "handynummer",
    "móvil",
    "movil",
    "cell",
    "cellphone",
    "cellulare",
    "celular",
    "whatsapp",
    "sms",
    "fax",
    "fon",
    "rufnummer",
    "portable",
    "gsm",
    "komórka",
    "telefon",
];
/// How longer ones begin.
const NAME_STEMS: [&str; 9] =
    ["telefon", "telefoon", "teléfono", "téléphone", "telefono", "telefone", "电话", "手机", "電話"];
/// Words between the two.
const BETWEEN: [&str; 29] = [
    "number", "nummer", "no", "nr", "num", "número", "numero", "numéro", "is", "ist", "es", "è", "est", "lautet", "my",
    "at", "on", "under", "unter", "al", "au", "het", "de", "mobile", "mobil", "móvil", "jest", "é", "или",
];

/// A group of digits: where it ends, and what stands before it.
struct Group<'t> {
    digits: &'t str,
    end: usize,
    before: &'t str,
}

/// Where a telephone number that begins here ends.
pub(super) fn find(place: &Place<'_>) -> Option<usize> {
    let rest = &place.text[place.at..];
    let plus = rest.starts_with('+');
    let groups = groups(place.text, place.at + usize::from(plus));
    // A bracket that opens belongs to the number where it closes behind the first digits.
    if rest.starts_with('(') && !groups.get(1).is_some_and(|group| group.before.starts_with(')')) {
        return None;
    }
    // Behind the number another may stand: the longest that is one is it.
    (1..=groups.len()).rev().find_map(|count| {
        let groups = &groups[..count];
        let end = groups.last()?.end;
        (place.ends(end) && is_number(place, plus, groups)).then_some(end)
    })
}

/// Groups of digits from here on, at most so many as a number has.
fn groups(text: &str, from: usize) -> Vec<Group<'_>> {
    let mut groups = Vec::new();
    let (mut at, mut count) = (from, 0);
    while groups.len() < 8 && count <= 15 {
        let rest = &text[at..];
        // More than a few are no gap, and the end of the text is no digit.
        let Some((between, _)) = rest.char_indices().take(8).find(|(_, c)| !is_between(*c)) else { break };
        let before = &rest[..between];
        let digits = rest[between..].bytes().take_while(u8::is_ascii_digit).count();
        let allowed = match groups.is_empty() {
            true => matches!(before, "" | "("),
            false => is_gap(before),
        };
        if digits == 0 || !allowed {
            break;
        }
        at += between + digits;
        count += digits;
        groups.push(Group { digits: &text[at - digits..at], end: at, before });
    }
    groups
}

fn is_between(c: char) -> bool {
    matches!(c, ' ' | '-' | '.' | '/' | '(' | ')' | '\u{a0}' | '\u{202f}' | '\u{2010}' | '\u{2011}' | '\u{2013}')
}

/// Whether a number may go on behind this: one sign, with a space or a bracket beside it.
fn is_gap(before: &str) -> bool {
    let signs = before.chars().filter(|c| matches!(c, '-' | '.' | '/' | '\u{2010}' | '\u{2011}' | '\u{2013}')).count();
    let spaces = before.chars().filter(|c| matches!(c, ' ' | '\u{a0}' | '\u{202f}')).count();
    (1..=4).contains(&before.chars().count()) && signs <= 1 && spaces <= 2
}

fn is_number(place: &Place<'_>, plus: bool, groups: &[Group<'_>]) -> bool {
    let all: String = groups.iter().map(|group| group.digits).collect();
    let digits: Vec<u8> = all.bytes().map(|byte| byte - b'0').collect();
    if !(7..=15).contains(&digits.len()) || !varied(&digits) || is_row_of_numbers(groups) || is_date(groups) {
        return false;
    }
    let named = is_named(place);
    if place.computed && !named {
        return false;
    }
    let spaced =
        groups.iter().skip(1).any(|group| group.before.chars().count() > 2 && !group.before.contains(['(', ')']));
    // Behind a country's code, and the trunk zero, an area may have one digit: `+33 6 12 34 56 78`, `+43 (0)1 58858`. What stands behind
    // a hyphen at the end is an extension: `+43 1 58858-0`.
    let abroad = plus || all.starts_with("00");
    let few = 1 + usize::from(abroad) + usize::from(abroad && groups.get(1).is_some_and(is_trunk));
    let is_extension = |at: usize| abroad && at >= few && at + 1 == groups.len() && groups[at].before == "-";
    let is_single = |group: &Group<'_>| group.digits.len() == 1 && !group.before.contains('(');
    let single = (few..groups.len()).any(|at| is_single(&groups[at]) && !is_extension(at));
    if (spaced || single) && !named {
        return false;
    }
    if plus {
        let variable = place.text[..place.at].trim_end().ends_with(|c: char| c.is_ascii_digit() || c == ')');
        return !variable && is_abroad(groups, 0);
    }
    if let Some(rest) = all.strip_prefix("00").filter(|_| groups[0].digits.starts_with("00")) {
        return !rest.starts_with('0') && is_abroad(groups, 2) && !follows_number(place);
    }
    if follows_number(place) && !named {
        return false;
    }
    let separated = groups.len() > 1;
    if all.starts_with('0') && !all.starts_with("00") {
        return match separated {
            true => named || is_national(groups, digits.len()),
            false => (8..=12).contains(&digits.len()) && (named || is_mobile(&all)),
        };
    }
    is_north_american(groups, named) || named && (separated || digits.len() >= 8)
}

/// Whether digits stand before it as another item of a list would.
fn follows_number(place: &Place<'_>) -> bool {
    place.text[..place.at].trim_end_matches([' ', '(']).ends_with(|c: char| c.is_ascii_digit())
}

/// The trunk zero of `+49 (0)30`.
fn is_trunk(group: &Group<'_>) -> bool {
    group.digits == "0" && group.before.contains('(')
}

/// A country code and as many digits as the country has; `skipped` digits before it are the way abroad.
fn is_abroad(groups: &[Group<'_>], skipped: usize) -> bool {
    let all: String = groups.iter().filter(|group| !is_trunk(group)).map(|group| group.digits).collect();
    let Some(number) = all.get(skipped..) else { return false };
    let fits = |code: usize, least: usize, most: usize| (least..=most).contains(&(number.len() - code));
    let known = COUNTRIES.iter().find(|(code, ..)| number.starts_with(code));
    match known {
        Some(("1", ..)) => {
            let area = number.as_bytes();
            number.len() == 11 && area[1] >= b'2' && area[4] >= b'2'
        }
        Some((code, least, most)) => fits(code.len(), *least, *most),
        None => number.len() > 3 && REGIONS.split(' ').any(|region| number.starts_with(region)) && fits(3, 7, 10),
    }
}

/// A trunk zero, an area and the rest, in groups as people write them.
fn is_national(groups: &[Group<'_>], count: usize) -> bool {
    let gap = |sign: char| groups.iter().filter(|group| group.before.contains(sign)).count();
    let dotted = gap('.');
    let pairs = groups.iter().all(|group| group.digits.len() == 2);
    // A year in brackets, as behind an article's number; and American postal codes.
    let bracketed = groups[1..].iter().any(|group| group.before.contains('('));
    let postal = matches!(groups, [zip, more] if zip.digits.len() == 5 && more.digits.len() == 4 && more.before == "-");
    !(bracketed || postal)
        && (9..=12).contains(&count)
        && (2..=6).contains(&groups[0].digits.len())
        && groups[1..].iter().all(|group| group.digits.len() >= 2)
        && gap('/') <= 1
        && (dotted == 0 || pairs && groups.len() == 5)
}

/// Mobile numbers that are long enough to be told without a gap: of Germany and of Britain.
fn is_mobile(all: &str) -> bool {
    let german = ["015", "016", "017"].iter().any(|prefix| all.starts_with(prefix)) && (11..=12).contains(&all.len());
    german || all.starts_with("07") && all.len() == 11
}

/// `(202) 555-0143`, `202-555-0143`, `202.555.0143`, with or without a `1` before it.
fn is_north_american(groups: &[Group<'_>], named: bool) -> bool {
    let own = match groups {
        [one, rest @ ..] if one.digits == "1" => rest,
        all => all,
    };
    let [area, exchange, line] = own else { return false };
    let lengths = [area, exchange, line].map(|group| group.digits.len());
    let from_two = |group: &Group<'_>| group.digits.as_bytes()[0] >= b'2';
    let bracketed = area.before.ends_with('(') && exchange.before.starts_with(')');
    let alike = exchange.before == line.before && matches!(line.before, "-" | ".");
    // Books and films have exchanges that there are not: `(555) 123-4567`. Nothing else is written so.
    let written = bracketed && line.before == "-";
    lengths == [3, 3, 4] && from_two(area) && (from_two(exchange) && (bracketed || alike || named) || written)
}

/// Groups that count up or down, as a list of numbers does.
fn is_row_of_numbers(groups: &[Group<'_>]) -> bool {
    let numbers: Vec<i64> =
        groups.iter().filter(|group| group.digits.len() < 3).filter_map(|group| group.digits.parse().ok()).collect();
    let steps: Vec<i64> = numbers.windows(2).map(|pair| pair[1] - pair[0]).collect();
    // The five pairs of a French number may ascend by chance, but who counts does so by less, or by tens: `01 23 45 67 89`.
    let french = matches!(groups, [first, ..] if first.digits.starts_with('0'))
        && groups.len() == 5
        && steps.iter().all(|step| *step > 12 && step % 5 != 0);
    !french && numbers.len() == groups.len() && steps.len() >= 3 && steps.windows(2).all(|pair| pair[0] == pair[1])
}

/// A day, a month and a year, or the other way round, whatever follows.
fn is_date(groups: &[Group<'_>]) -> bool {
    let number = |group: &Group<'_>| group.digits.parse::<u32>().unwrap_or(0);
    let is_year = |group: &Group<'_>| group.digits.len() == 4 && (1000..2200).contains(&number(group));
    let is_part = |group: &Group<'_>| group.digits.len() <= 2 && (1..=31).contains(&number(group));
    groups.windows(3).any(|three| {
        let [a, b, c] = three else { return false };
        (is_part(a) && is_part(b) && is_year(c) || is_year(a) && is_part(b) && is_part(c)) && b.before == c.before
    })
}

/// Whether a word says that a number follows.
fn is_named(place: &Place<'_>) -> bool {
    let before = &place.text[..place.at];
    let window = before.char_indices().rev().nth(47).map_or(0, |(at, _)| at);
    let before = before[window..].to_lowercase();
    for word in before.split(|c: char| !c.is_alphanumeric()).rev().filter(|word| !word.is_empty()).take(4) {
        if NAMES.contains(&word) || NAME_STEMS.iter().any(|stem| word.contains(stem)) {
            return true;
        }
        if !BETWEEN.contains(&word) {
            return false;
        }
    }
    false
}
