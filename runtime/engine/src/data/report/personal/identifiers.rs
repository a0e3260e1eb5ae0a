//! Numbers that a state gives to a person, as data: how they are written, and the check that their digits pass.
//!
//! A form that hardly anything else has stands in `shapes`; of digits that could be anything, `named` says which word has to stand
//! before them. In a shape `9` is a digit, `A` a capital letter, `X` either, and all else is itself.

use super::Found;
use super::number::{Place, luhn};

/// One kind of number.
pub(super) struct Identifier {
    pub kind: &'static str,
    /// What several are called.
    pub words: &'static str,
    shapes: &'static [&'static str],
    /// Shapes that need a name before them.
    bare: &'static [&'static str],
    named: &'static [&'static str],
    /// Digits and letters without what stands between.
    check: fn(&[u8]) -> bool,
}

/// All of them. Sources: the tax or registry office of each country, and `python-stdnum`'s list of what their checks are called.
pub(super) const IDENTIFIERS: &[Identifier] = &[
    Identifier {
        kind: "de_tax_id",
        words: "German tax numbers (IdNr)",
        shapes: &[],
        bare: &["99999999999", "99 999 999 999"],
        named: &["steuer", "idnr", "identifikationsnummer", "tax", "tin"],
        check: german_tax,
    },
    Identifier {
        kind: "es_dni",
        words: "Spanish identity numbers (DNI)",
        shapes: &["99999999A", "99999999-A", "99999999 A", "99.999.999-A", "99.999.999 A"],
        bare: &[],
        named: &[],
        check: |signs| spanish(&digits(&signs[..8]), signs[8]),
    },
    Identifier {
        kind: "es_nie",
        words: "Spanish numbers of foreigners (NIE)",
        shapes: &["A9999999A", "A-9999999-A", "A9999999-A"],
        bare: &[],
        named: &[],
        check: |signs| {
            let Some(first) = b"XYZ".iter().position(|letter| *letter == signs[0]) else { return false };
            let mut number = vec![first as u8];
            number.extend(digits(&signs[1..8]));
            spanish(&number, signs[8])
        },
    },
    Identifier {
        kind: "nl_bsn",
        words: "Dutch citizen numbers (BSN)",
        shapes: &[],
        bare: &["999999999", "9999.99.999", "9999 99 999"],
        named: &["bsn", "burgerservice", "sofinummer", "sofi-nummer", "citizen service"],
        check: |signs| weighted(&digits(signs), &[9, 8, 7, 6, 5, 4, 3, 2, -1]).rem_euclid(11) == 0,
    },
    Identifier {
        kind: "fr_nir",
        words: "French social security numbers (NIR)",
        shapes: &["9 99 99 99 999 999 99"],
        bare: &["999999999999999"],
        named: &["nir", "sécurité sociale", "securite sociale", "insee", "social security"],
        check: |signs| {
            let month = number(&signs[3..5]);
            let key = 97 - number(&signs[..13]) % 97;
            matches!(signs[0], b'1' | b'2')
                && matches!(month, 1..=12 | 20..=42 | 50..=99)
                && number(&signs[13..]) == key
        },
    },
    Identifier {
        kind: "it_codice_fiscale",
        words: "Italian tax codes",
        shapes: &["AAAAAA99A99A999A"],
        bare: &[],
        named: &[],
        check: italian,
    },
    Identifier {
        kind: "pl_pesel",
        words: "Polish numbers (PESEL)",
        shapes: &[],
        bare: &["99999999999"],
        named: &["pesel"],
        check: |signs| {
            let sum = weighted(&digits(signs), &[1, 3, 7, 9, 1, 3, 7, 9, 1, 3, 1]);
            sum % 10 == 0 && is_day(number(&signs[2..4]) % 20, number(&signs[4..6]))
        },
    },
    Identifier {
        kind: "be_rrn",
        words: "Belgian registry numbers",
        shapes: &["99.99.99-999.99"],
        bare: &["99999999999"],
        named: &["rijksregister", "registre national", "insz", "niss"],
        check: |signs| {
            let (base, key) = (number(&signs[..9]), number(&signs[9..]));
            [base, 2_000_000_000 + base].iter().any(|base| 97 - base % 97 == key)
        },
    },
    Identifier {
        kind: "se_personnummer",
        words: "Swedish personal numbers",
        shapes: &["999999-9999", "99999999-9999"],
        bare: &[],
        named: &[],
        check: |signs| {
            let signs = &signs[signs.len() - 10..];
            let day = number(&signs[4..6]);
            luhn(&digits(signs)) && is_day(number(&signs[2..4]), if day > 60 { day - 60 } else { day })
        },
    },
    Identifier {
        kind: "fi_hetu",
        words: "Finnish personal identity codes",
        shapes: &["999999-999X", "999999+999X", "999999A999X"],
        bare: &[],
        named: &[],
        check: |signs| {
            let (birth, rest) = (&signs[..6], &signs[signs.len() - 4..]);
            let number = number(&[birth, &rest[..3]].concat());
            let letters = b"0123456789ABCDEFHJKLMNPRSTUVWXY";
            is_day(self::number(&birth[2..4]), self::number(&birth[..2])) && letters[(number % 31) as usize] == rest[3]
        },
    },
    Identifier {
        kind: "pt_nif",
        words: "Portuguese tax numbers (NIF)",
        shapes: &[],
        bare: &["999999999", "999 999 999"],
        named: &["nif", "contribuinte"],
        check: |signs| {
            let rest = weighted(&digits(&signs[..8]), &[9, 8, 7, 6, 5, 4, 3, 2]) % 11;
            i64::from(signs[8] - b'0') == if rest < 2 { 0 } else { 11 - rest }
        },
    },
    Identifier {
        kind: "br_cpf",
        words: "Brazilian tax numbers (CPF)",
        shapes: &["999.999.999-99"],
        bare: &["99999999999"],
        named: &["cpf"],
        check: |signs| {
            let digits = digits(signs);
            let key = |count: usize| {
                let weights: Vec<i64> = (2..=count as i64 + 1).rev().collect();
                weighted(&digits[..count], &weights) * 10 % 11 % 10
            };
            let varied = digits.iter().any(|digit| *digit != digits[0]);
            varied && key(9) == i64::from(digits[9]) && key(10) == i64::from(digits[10])
        },
    },
    Identifier {
        kind: "ch_ahv",
        words: "Swiss social insurance numbers (AHV)",
        shapes: &["756.9999.9999.99", "7569999999999"],
        bare: &[],
        named: &[],
        check: |signs| weighted(&digits(signs), &[1, 3, 1, 3, 1, 3, 1, 3, 1, 3, 1, 3, 1]) % 10 == 0,
    },
    Identifier {
        kind: "gb_nhs",
        words: "British NHS numbers",
        shapes: &[],
        bare: &["9999999999", "999 999 9999"],
        named: &["nhs"],
        check: |signs| weighted(&digits(signs), &[10, 9, 8, 7, 6, 5, 4, 3, 2, 1]) % 11 == 0,
    },
    Identifier {
        kind: "us_ssn",
        words: "US social security numbers",
        shapes: &[],
        bare: &["999-99-9999"],
        named: &["ssn", "social security"],
        check: |signs| {
            let (area, group, serial) = (number(&signs[..3]), number(&signs[3..5]), number(&signs[5..]));
            !matches!(area, 0 | 666 | 900..) && group > 0 && serial > 0
        },
    },
    Identifier {
        kind: "at_svnr",
        words: "Austrian insurance numbers",
        shapes: &[],
        bare: &["9999 999999", "9999999999"],
        named: &["svnr", "sv-nr", "sozialversicherung", "versicherungsnummer"],
        check: |signs| {
            let digits = digits(signs);
            weighted(&digits, &[3, 7, 9, 0, 5, 8, 4, 2, 1, 6]) % 11 == i64::from(digits[3])
        },
    },
    Identifier {
        kind: "ro_cnp",
        words: "Romanian numbers (CNP)",
        shapes: &[],
        bare: &["9999999999999"],
        named: &["cnp", "cod numeric personal"],
        check: |signs| {
            let rest = weighted(&digits(&signs[..12]), &[2, 7, 9, 1, 4, 6, 3, 5, 8, 2, 7, 9]) % 11;
            i64::from(signs[12] - b'0') == if rest == 10 { 1 } else { rest }
        },
    },
    Identifier {
        kind: "cz_rodne_cislo",
        words: "Czech and Slovak birth numbers",
        shapes: &["999999/9999"],
        bare: &[],
        named: &[],
        check: |signs| {
            let month = number(&signs[2..4]) % 50;
            let month = if month > 20 { month - 20 } else { month };
            number(signs).is_multiple_of(11) && is_day(month, number(&signs[4..6]))
        },
    },
    Identifier {
        kind: "ca_sin",
        words: "Canadian insurance numbers (SIN)",
        shapes: &[],
        bare: &["999 999 999", "999-999-999", "999999999"],
        named: &["sin", "social insurance"],
        check: |signs| luhn(&digits(signs)),
    },
    Identifier {
        kind: "cn_resident_id",
        words: "Chinese resident identity numbers",
        shapes: &["99999999999999999X"],
        bare: &[],
        named: &[],
        check: |signs| {
            let sum = weighted(&digits(&signs[..17]), &[7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2]);
            let is_birth =
                matches!(number(&signs[6..8]), 19 | 20) && is_day(number(&signs[10..12]), number(&signs[12..14]));
            is_birth && b"10X98765432"[(sum % 11) as usize] == signs[17]
        },
    },
    Identifier {
        kind: "ar_cuit",
        words: "Argentine tax numbers (CUIT)",
        shapes: &["99-99999999-9"],
        bare: &[],
        named: &[],
        check: |signs| {
            let known = matches!(number(&signs[..2]), 20 | 23 | 24 | 27 | 30 | 33 | 34);
            known && weighted(&digits(signs), &[5, 4, 3, 2, 7, 6, 5, 4, 3, 2, 1]) % 11 == 0
        },
    },
];

/// The number of a person that begins here.
pub(super) fn find(place: &Place<'_>) -> Option<Found> {
    let rest = &place.text.as_bytes()[place.at..];
    IDENTIFIERS.iter().find_map(|identifier| {
        let Identifier { kind, shapes, bare, named, check, .. } = identifier;
        let fits = |shape: &&&str| {
            matches_shape(rest, shape.as_bytes()) && place.ends(place.at + shape.len()) && {
                let signs = rest[..shape.len()].iter().zip(shape.bytes());
                let signs: Vec<u8> = signs
                    .filter(|(_, sign)| b"9AX7".contains(sign) || sign.is_ascii_digit())
                    .map(|(byte, _)| *byte)
                    .collect();
                check(&signs)
            }
        };
        let shape = shapes.iter().filter(|_| !place.computed).find(fits);
        let shape = shape.or_else(|| bare.iter().find(|shape| fits(shape) && place.is_named(named)))?;
        Some(Found { kind, at: place.at..place.at + shape.len() })
    })
}

fn matches_shape(text: &[u8], shape: &[u8]) -> bool {
    text.len() >= shape.len()
        && text.iter().zip(shape).all(|(byte, sign)| match sign {
            b'9' => byte.is_ascii_digit(),
            b'A' => byte.is_ascii_uppercase(),
            b'X' => byte.is_ascii_uppercase() || byte.is_ascii_digit(),
            sign => byte == sign,
        })
}

fn digits(signs: &[u8]) -> Vec<u8> {
    signs.iter().map(|sign| sign.wrapping_sub(b'0')).collect()
}

fn number(signs: &[u8]) -> u64 {
    signs.iter().fold(0, |number, sign| number * 10 + u64::from(sign.wrapping_sub(b'0')))
}

fn weighted(digits: &[u8], weights: &[i64]) -> i64 {
    digits.iter().zip(weights).map(|(digit, weight)| i64::from(*digit) * weight).sum()
}

fn is_day(month: u64, day: u64) -> bool {
    (1..=12).contains(&month) && (1..=31).contains(&day)
}

/// ISO 7064 MOD 11,10; and of the first ten digits exactly one occurs twice or three times.
fn german_tax(signs: &[u8]) -> bool {
    let digits = digits(signs);
    let mut counts = [0; 10];
    digits[..10].iter().for_each(|digit| counts[usize::from(*digit)] += 1);
    let repeated: Vec<i32> = counts.into_iter().filter(|count| *count > 1).collect();
    let product = digits[..10].iter().fold(10, |product, digit| {
        let sum = (u32::from(*digit) + product) % 10;
        (if sum == 0 { 10 } else { sum }) * 2 % 11
    });
    digits[0] != 0 && matches!(repeated[..], [2 | 3]) && u32::from(digits[10]) == (11 - product) % 10
}

/// The letter by the rest of a division by 23.
fn spanish(digits: &[u8], letter: u8) -> bool {
    let number = digits.iter().fold(0, |number: u64, digit| number * 10 + u64::from(*digit));
    b"TRWAGMYFPDXBNJZSQVHLCKE"[(number % 23) as usize] == letter
}

/// The last letter by the sum of what the others are worth, at odd places by a table. Source: decreto 12 March 1974, n. 2227.
fn italian(signs: &[u8]) -> bool {
    const ODD: [u32; 26] =
        [1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24, 23];
    let index = |sign: u8| usize::from(if sign.is_ascii_digit() { sign - b'0' } else { sign - b'A' });
    let worth = |(place, sign): (usize, &u8)| if place % 2 == 0 { ODD[index(*sign)] } else { index(*sign) as u32 };
    let sum: u32 = signs[..15].iter().enumerate().map(worth).sum();
    sum % 26 == u32::from(signs[15] - b'A')
}
