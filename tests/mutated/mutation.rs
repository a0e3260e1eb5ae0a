//! Damage: bytes, numbers, pieces and values of JSON, by a seed.

use serde_json::{Map, Value, json};

/// How a file is written, as far as damage goes by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Bytes.
    Binary,
    /// Lines of text.
    Text,
    /// One JSON value.
    Json,
    /// Eight bytes of a length, and so much JSON, before the rest.
    Safetensors,
}

/// Numbers from a seed (SplitMix64).
pub struct Numbers(pub u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One below `end`; zero where there is none.
    pub fn below(&mut self, end: usize) -> usize {
        if end == 0 { 0 } else { (self.next() % end as u64) as usize }
    }

    fn one<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }
}

/// Numbers at which readers go wrong: of lengths, counts, offsets and widths.
const NUMBERS: [u64; 20] = [
    0,
    1,
    2,
    3,
    7,
    31,
    32,
    255,
    256,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    1 << 32,
    1 << 40,
    0x7fff_ffff_ffff_ffff,
    1 << 63,
    u64::MAX - 7,
    u64::MAX,
];

/// The same in text.
const WORDS: [&str; 20] = [
    "0",
    "-1",
    "1",
    "2",
    "3",
    "1e308",
    "-1e999",
    "1e-400",
    "NaN",
    "null",
    "true",
    "18446744073709551615",
    "9223372036854775808",
    "4294967296",
    "1048577",
    "0.1",
    "\"\"",
    "[]",
    "{}",
    "1.0",
];

/// A few places of a file damaged. `others`: files of the same kind, of which pieces are taken.
pub fn damage(bytes: &[u8], form: Form, others: &[&[u8]], numbers: &mut Numbers) -> Vec<u8> {
    let mut damaged = bytes.to_vec();
    for _ in 0..=numbers.below(3) {
        damaged = match form {
            Form::Json if numbers.below(4) > 0 => json_damaged(&damaged, others, numbers),
            Form::Safetensors if numbers.below(4) > 0 => header_damaged(&damaged, numbers),
            Form::Safetensors | Form::Binary => bytes_damaged(damaged, others, numbers, false),
            Form::Json | Form::Text => bytes_damaged(damaged, others, numbers, true),
        };
    }
    damaged
}

fn bytes_damaged(mut bytes: Vec<u8>, others: &[&[u8]], numbers: &mut Numbers, is_text: bool) -> Vec<u8> {
    if bytes.is_empty() {
        return vec![numbers.below(256) as u8];
    }
    // What says how the rest is read stands at the beginning.
    let near = if numbers.below(3) > 0 { bytes.len().min(2048) } else { bytes.len() };
    let at = numbers.below(near);
    let longest = *numbers.one(&[4, 16, 200, 5000]);
    let length = 1 + numbers.below(longest);
    let end = (at + length).min(bytes.len());
    match numbers.below(if is_text { 10 } else { 8 }) {
        0 => bytes[at] ^= 1 << numbers.below(8),
        1 => bytes[at] = *numbers.one(&[0, 1, 0x7f, 0x80, 0xff, b'"', b'{', b'\n', b'%']),
        2 => bytes.truncate(at),
        3 => drop(bytes.drain(at..end)),
        4 => {
            let piece = bytes[at..end].to_vec();
            let to = numbers.below(bytes.len());
            drop(bytes.splice(to..to, piece));
        }
        5 => {
            let other = others.get(numbers.below(others.len())).copied().unwrap_or_default();
            let from = numbers.below(other.len());
            let piece = other[from..(from + length).min(other.len())].to_vec();
            let to = (at + if numbers.below(2) == 0 { 0 } else { piece.len() }).min(bytes.len());
            drop(bytes.splice(at..to, piece));
        }
        6 | 7 => {
            let number = numbers.one(&NUMBERS).to_le_bytes();
            let width = (*numbers.one(&[1, 2, 4, 8])).min(bytes.len() - at);
            bytes[at..at + width].copy_from_slice(&number[..width]);
        }
        8 => {
            // A number in the text becomes another one.
            let from = bytes[at..].iter().position(u8::is_ascii_digit).map_or(at, |found| at + found);
            let digits = bytes[from..].iter().take_while(|byte| byte.is_ascii_digit() || **byte == b'.').count();
            drop(bytes.splice(from..from + digits, numbers.one(&WORDS).bytes()));
        }
        _ => {
            let deep = *numbers.one(&[10, 200, 3000]);
            let (open, close) =
                *numbers.one(&[("[", "]"), ("{\"a\":", "}"), ("(", ")"), ("{% if 1 %}", "{% endif %}"), ("-", "")]);
            let piece = open.repeat(deep) + &close.repeat(deep);
            drop(bytes.splice(at..at, piece.into_bytes()));
        }
    }
    bytes
}

/// The header of a safetensors file damaged as JSON, its length put right.
fn header_damaged(bytes: &[u8], numbers: &mut Numbers) -> Vec<u8> {
    let length = bytes.first_chunk().map_or(0, |length| u64::from_le_bytes(*length)) as usize;
    let Some(header) = bytes.get(8..).and_then(|rest| rest.get(..length)) else {
        return bytes_damaged(bytes.to_vec(), &[], numbers, false);
    };
    let header = json_damaged(header, &[], numbers);
    [&(header.len() as u64).to_le_bytes()[..], &header, &bytes[8 + length..]].concat()
}

/// A value somewhere in the JSON is another one, is gone, or stands twice.
fn json_damaged(bytes: &[u8], others: &[&[u8]], numbers: &mut Numbers) -> Vec<u8> {
    let Ok(mut value) = serde_json::from_slice::<Value>(bytes) else {
        return bytes_damaged(bytes.to_vec(), others, numbers, true);
    };
    let other = others.get(numbers.below(others.len())).and_then(|other| serde_json::from_slice::<Value>(other).ok());
    let count = count(&value);
    let piece = at(other.as_ref().unwrap_or(&value), &mut numbers.below(count)).cloned().unwrap_or_default();
    // What stands near the root is rare among all values, and matters most.
    let from = if numbers.below(2) == 0 { count } else { count.min(60) };
    change(&mut value, &mut numbers.below(from), piece, numbers);
    serde_json::to_vec(&value).unwrap_or_default()
}

fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(items) => items.iter().map(count).sum(),
        Value::Object(entries) => entries.values().map(count).sum::<usize>(),
        _ => 0,
    }
}

/// The value of a number, counted from the root down.
fn at<'a>(value: &'a Value, number: &mut usize) -> Option<&'a Value> {
    if *number == 0 {
        return Some(value);
    }
    *number -= 1;
    match value {
        Value::Array(items) => items.iter().find_map(|item| at(item, number)),
        Value::Object(entries) => entries.values().find_map(|entry| at(entry, number)),
        _ => None,
    }
}

/// Changes the value of a number, counted from the root down. Returns whether it was there.
fn change(value: &mut Value, number: &mut usize, piece: Value, numbers: &mut Numbers) -> bool {
    if *number == 0 {
        *value = changed(value, piece, numbers);
        return true;
    }
    *number -= 1;
    match value {
        Value::Array(items) => {
            for index in 0..items.len() {
                if *number == 0 && numbers.below(3) == 0 {
                    let item = items[index].clone();
                    if numbers.below(2) == 0 {
                        drop(items.remove(index))
                    } else {
                        items.insert(index, item)
                    }
                    return true;
                }
                if change(&mut items[index], number, piece.clone(), numbers) {
                    return true;
                }
            }
            false
        }
        Value::Object(entries) => {
            let keys: Vec<String> = entries.keys().cloned().collect();
            for key in keys {
                if *number == 0 && numbers.below(3) == 0 {
                    let entry = entries.shift_remove(&key).unwrap_or_default();
                    if numbers.below(2) == 0 {
                        entries.insert(format!("{key}{}", numbers.one(&["_", "x", "\u{0}", "é"])), entry);
                    }
                    return true;
                }
                if change(&mut entries[&key], number, piece.clone(), numbers) {
                    return true;
                }
            }
            false
        }
        _ => false,
    }
}

fn changed(value: &Value, piece: Value, numbers: &mut Numbers) -> Value {
    // Nearly what it was, so that it is not refused at once.
    if let (Some(number), true) = (value.as_f64(), numbers.below(2) == 0) {
        let whole = value.as_i64();
        let near = [1, -1, 2, 64, -64]
            .map(|step| whole.map_or(json!(number + step as f64), |whole| json!(whole.wrapping_add(step))));
        let scaled = [0.0, 0.5, 2.0, -1.0, 1e6].map(|factor| match whole {
            Some(whole) => json!((whole as f64 * factor) as i64),
            None => json!(number * factor),
        });
        return numbers.one(&[near, scaled].concat()).clone();
    }
    if let (Some(text), true) = (value.as_str(), numbers.below(2) == 0) {
        let half: String = text.chars().take(text.chars().count() / 2).collect();
        let all = [
            half,
            text.repeat(2),
            format!("{text}\u{0}"),
            format!("../{text}"),
            text.to_uppercase(),
            format!("/{text}"),
        ];
        return json!(numbers.one(&all));
    }
    match numbers.below(12) {
        0 => Value::Null,
        1 => json!(true),
        2 => json!(*numbers.one(&NUMBERS)),
        3 => json!(-(*numbers.one(&NUMBERS) as f64)),
        4 => json!(*numbers.one(&[1e308, -1e308, 1e-320, 0.5, 1e19])),
        5 => json!(""),
        6 => json!("é\u{202e}x".repeat(1 + numbers.below(2000))),
        7 => json!([]),
        8 => Value::Object(Map::new()),
        9 => (0..*numbers.one(&[3, 60, 120])).fold(json!(1), |inner, _| json!([inner])),
        10 => json!(vec![0; numbers.below(3000)]),
        _ => piece,
    }
}
