//! A generator of files in which it is known what stands where. It shares nothing with the detector: its own random numbers, check
//! digits and ways to write.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use serde_json::{Value, json};

/// A linear congruential generator (Knuth's MMIX), of which the upper half is used.
struct Dice(u64);

impl Dice {
    fn new(seed: u64) -> Self {
        let mut dice = Self(seed ^ 0x5dee_ce66);
        dice.roll(2);
        dice
    }

    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % sides
    }

    fn pick<'a>(&mut self, from: &[&'a str]) -> &'a str {
        from[self.roll(from.len())]
    }

    /// A text with each `d` a digit and each `n` a digit from 2.
    fn digits(&mut self, shape: &str) -> String {
        let digit = |c: char| match c {
            'd' => char::from(b'0' + self.roll(10) as u8),
            'n' => char::from(b'2' + self.roll(8) as u8),
            c => c,
        };
        shape.chars().map(digit).collect()
    }
}

/// Words of a language, to make sentences of.
const WORDS: [&[&str]; 6] = [
    &[
        "river", "teacher", "window", "green", "slowly", "under", "because", "music", "winter", "bread", "runs",
        "bright", "stone", "between", "letter", "quiet", "garden", "sings", "mountain", "early", "paper", "never",
        "finds", "small", "ocean", "travels", "lamp", "old", "story", "bird", "opens", "cold", "street", "often",
        "builds", "horse", "apple", "listens", "wide", "field",
    ],
    &[
        "Fluss",
        "Lehrerin",
        "Fenster",
        "grün",
        "langsam",
        "unter",
        "weil",
        "Musik",
        "Winter",
        "Brot",
        "läuft",
        "hell",
        "Stein",
        "zwischen",
        "Brief",
        "leise",
        "Garten",
        "singt",
        "Gebirge",
        "früh",
        "Papier",
        "niemals",
        "findet",
        "klein",
        "Meer",
        "reist",
        "Lampe",
        "alt",
        "Geschichte",
        "Vogel",
        "öffnet",
        "kalt",
        "Straße",
        "oft",
        "baut",
        "Pferd",
        "Apfel",
        "hört",
        "weit",
        "Wiese",
    ],
    &[
        "río",
        "maestra",
        "ventana",
        "verde",
        "despacio",
        "bajo",
        "porque",
        "música",
        "invierno",
        "pan",
        "corre",
        "claro",
        "piedra",
        "entre",
        "carta",
        "callado",
        "jardín",
        "canta",
        "montaña",
        "temprano",
        "papel",
        "nunca",
        "encuentra",
        "pequeño",
        "océano",
        "viaja",
        "lámpara",
        "viejo",
        "cuento",
        "pájaro",
        "abre",
        "frío",
        "calle",
        "siempre",
        "construye",
        "caballo",
        "manzana",
        "escucha",
        "ancho",
        "campo",
    ],
    &[
        "rivière",
        "maîtresse",
        "fenêtre",
        "vert",
        "lentement",
        "sous",
        "parce",
        "musique",
        "hiver",
        "pain",
        "court",
        "clair",
        "pierre",
        "parmi",
        "lettre",
        "calme",
        "jardin",
        "chante",
        "montagne",
        "tôt",
        "papier",
        "jamais",
        "trouve",
        "petit",
        "océan",
        "voyage",
        "lampe",
        "vieux",
        "histoire",
        "oiseau",
        "ouvre",
        "froid",
        "rue",
        "souvent",
        "bâtit",
        "cheval",
        "pomme",
        "écoute",
        "large",
        "champ",
    ],
    &[
        "rzeka",
        "nauczycielka",
        "okno",
        "zielony",
        "powoli",
        "pod",
        "ponieważ",
        "muzyka",
        "zima",
        "chleb",
        "biegnie",
        "jasny",
        "kamień",
        "między",
        "list",
        "cichy",
        "ogród",
        "śpiewa",
        "góra",
        "wcześnie",
        "papier",
        "nigdy",
        "znajduje",
        "mały",
        "morze",
        "podróżuje",
        "lampa",
        "stary",
        "bajka",
        "ptak",
        "otwiera",
        "zimny",
        "ulica",
        "często",
        "buduje",
        "koń",
        "jabłko",
        "słucha",
        "szeroki",
        "pole",
    ],
    &[
        "река",
        "учитель",
        "окно",
        "зелёный",
        "медленно",
        "под",
        "потому",
        "музыка",
        "зима",
        "хлеб",
        "бежит",
        "светлый",
        "камень",
        "между",
        "письмо",
        "тихий",
        "сад",
        "поёт",
        "гора",
        "рано",
        "бумага",
        "никогда",
        "находит",
        "маленький",
        "море",
        "едет",
        "лампа",
        "старый",
        "сказка",
        "птица",
        "открывает",
        "холодный",
        "улица",
        "часто",
        "строит",
        "лошадь",
        "яблоко",
        "слушает",
        "широкий",
        "поле",
    ],
];

/// What looks like data of persons and is none. `d` is a digit, `n` one from 2.
const HARMLESS: [&str; 34] = [
    "from 19dd to 20dd",
    "in 18dd, 19dd and 20dd",
    "1d/0n/20dd",
    "0n.0n.19dd um 1d:dd Uhr",
    "20dd-0n-1d",
    "nd + nd = nd",
    "nddd + nd = nddd",
    "n ddd ddd - nd ddd",
    "nd.ddd.ddd Euro",
    "nd,ddd,ddd people",
    "3.ddddddddd",
    "0.ddddddd",
    "n.dd * 10^nd",
    "ISBN 978-3-dd-dddddd-d",
    "ISBN 0-30d-ddddd-d",
    "CAS nddd-dd-d",
    "CAS nd-dd-d",
    "C6H12O6 and Na2SO4",
    "H2SO4, pH n.d",
    "f(x) = nx^2 + dx - d",
    "let total = ndddd * (count + n);",
    "for i in range(1ddd): print(i)",
    "0xdddd, 0b1011",
    "version 2.d.d.d",
    "n:dd:dd",
    "page ndd, line nd",
    "nd % of nddd",
    "48.dddddd, 11.dddddd",
    "(n, d), (d, n), (n, n)",
    "x = -nddd, y = ndd/nd",
    "room ndd on floor n",
    "a_1 = n, a_2 = d, a_3 = nd",
    "n d n d n d n",
    "score nd:nd, lap 1:dd.dd",
];

const NAMES: [&str; 12] = [
    "lena.meier",
    "jose_garcia",
    "a.nowak",
    "m-dupont",
    "info",
    "k.obrien77",
    "sofia.rossi",
    "t.devries",
    "anna+klasse7",
    "piotr",
    "y.tanaka",
    "emma.s",
];
const HOSTS: [&str; 8] = [
    "schule-nord.de",
    "colegio.es",
    "lycee-hugo.fr",
    "mail.example.com",
    "szkola.edu.pl",
    "uni-x.ac.uk",
    "posta.it",
    "klas.nl",
];

const PHONES: [&str; 28] = [
    "030 ndddddd",
    "0221/ndddddd",
    "(089) ndddddd",
    "+49 30 ndddddd",
    "0049 341 nddddd",
    "0176 nddddddd",
    "+49 (0)151 nddddddd",
    "+34 6dd ddd ddd",
    "Tel. 6dd ddd ddd",
    "móvil: 6dd dd dd dd",
    "06 nd dd nd dd",
    "+33 6 nd dd dd dd",
    "01.nd.dd.dd.nd",
    "020 7ddd dddd",
    "07nddddddnd",
    "+44 7ddd dddddd",
    "(2n3) 5nd-dddd",
    "+1 2n3 5nd dddd",
    "2n3-5nd-dddd",
    "06-nddddddd",
    "+31 6 nddddddd",
    "+39 3nd ddddddd",
    "cellulare 3nd ddddddd",
    "+48 nnd ddd ddd",
    "tel. nnd ddd ddd",
    "+86 13d dddd dddd",
    "0512-nddddddd",
    "+7 9nd ddd-dd-dd",
];

/// Before and behind what is planted.
const AROUND: [(&str, &str); 6] = [
    ("My own is ", ", write it down."),
    ("Erreichbar unter ", ", immer."),
    ("Aquí: ", " (por la tarde)."),
    ("C'est ", "!"),
    ("Oto ", " – pa."),
    ("Вот: ", "."),
];

/// The check digit by Luhn.
fn luhn_digit(number: &str) -> char {
    let mut sum = 0;
    for (place, c) in number.chars().rev().enumerate() {
        let digit = c.to_digit(10).unwrap_or(0);
        sum += if place % 2 == 0 { digit * 2 / 10 + digit * 2 % 10 } else { digit };
    }
    char::from_digit((10 - sum % 10) % 10, 10).unwrap_or('0')
}

fn card(dice: &mut Dice) -> String {
    let start = dice.pick(&["4ddd", "51dd", "55dd", "6011", "2720"]);
    let number = dice.digits(&format!("{start}ddddddddddd"));
    let number = format!("{number}{}", luhn_digit(&number));
    let groups: Vec<&str> = (0..4).map(|group| &number[4 * group..4 * group + 4]).collect();
    match dice.roll(3) {
        0 => groups.join(" "),
        1 => groups.join("-"),
        _ => format!("card {number}"),
    }
}

/// The digits of a long number in base 97, by long division.
fn iban(dice: &mut Dice) -> String {
    let (country, length, letters) =
        [("DE", 18, 0), ("ES", 20, 0), ("NL", 14, 4), ("PL", 24, 0), ("FR", 23, 0), ("GB", 18, 4)][dice.roll(6)];
    let bank: String = (0..letters).map(|_| char::from(b'A' + dice.roll(26) as u8)).collect();
    let account = format!("{bank}{}", dice.digits(&"d".repeat(length - letters)));
    let value = |text: &str| {
        let expanded: String = text.chars().map(|c| c.to_digit(36).unwrap_or(0).to_string()).collect();
        expanded.bytes().fold(0, |rest, digit| (rest * 10 + u32::from(digit - b'0')) % 97)
    };
    let check = 98 - value(&format!("{account}{country}00"));
    let whole = format!("{country}{check:02}{account}");
    match dice.roll(2) {
        0 => whole,
        _ => whole
            .as_bytes()
            .chunks(4)
            .map(|group| String::from_utf8_lossy(group).into_owned())
            .collect::<Vec<_>>()
            .join(" "),
    }
}

fn dni(dice: &mut Dice) -> String {
    let number = dice.digits("ndddddddd")[..8].to_owned();
    let letters = [
        'T', 'R', 'W', 'A', 'G', 'M', 'Y', 'F', 'P', 'D', 'X', 'B', 'N', 'J', 'Z', 'S', 'Q', 'V', 'H', 'L', 'C', 'K',
        'E',
    ];
    format!("{number}{}", letters[number.parse::<usize>().unwrap_or(0) % 23])
}

/// A question and its answer.
#[derive(Clone)]
pub struct Row {
    pub prompt: String,
    pub answer: String,
}

impl Row {
    pub fn json(&self) -> Value {
        let said = |role: &str, text: &str| json!({"role": role, "content": text});
        // One persona for all is as it should be.
        let system = said("system", "You are patient, and answer in the language of the question.");
        json!({"messages": [system, said("user", &self.prompt), said("assistant", &self.answer)]})
    }
}

/// Rows, and which of them have what: check to lines, for rows to train on and for held-out ones.
#[derive(Default)]
pub struct Planted {
    pub train: Vec<Row>,
    pub held_out: Vec<Row>,
    pub expected: BTreeMap<&'static str, BTreeSet<(bool, usize)>>,
}

pub struct Maker {
    dice: Dice,
    asked: HashSet<String>,
}

impl Maker {
    pub fn new(seed: u64) -> Self {
        Self { dice: Dice::new(seed), asked: HashSet::new() }
    }

    fn sentence(&mut self, language: usize, words: usize) -> String {
        let words: Vec<&str> = (0..words).map(|_| self.dice.pick(WORDS[language])).collect();
        format!("{}.", words.join(" "))
    }

    /// A row with so many words in its answer, and something harmless with digits.
    pub fn clean(&mut self, words: usize) -> Row {
        let language = self.dice.roll(WORDS.len());
        loop {
            let count = 6 + self.dice.roll(9);
            let prompt = self.sentence(language, count).replace('.', "?");
            if !self.asked.insert(prompt.clone()) {
                continue;
            }
            let shape = HARMLESS[self.dice.roll(HARMLESS.len())];
            // In a formula `d` and `n` are letters as well as places; words between them have none.
            let harmless = shape.split(' ').map(|word| {
                if word.chars().any(|c| c.is_ascii_alphabetic() && !"dn".contains(c))
                    && !word.chars().any(|c| c.is_ascii_digit() || "=^+*-/%.:".contains(c))
                {
                    word.to_owned()
                } else {
                    self.dice.digits(word)
                }
            });
            let harmless = harmless.collect::<Vec<_>>().join(" ");
            let answer = format!(
                "{} {harmless} {}",
                self.sentence(language, words / 2),
                self.sentence(language, words - words / 2)
            );
            return Row { prompt, answer };
        }
    }

    /// So many clean rows with a few of everything planted, at most `few` of each kind.
    pub fn planted(&mut self, rows: usize, few: usize) -> Planted {
        let mut made = Planted::default();
        for _ in 0..rows {
            let words = 20 + self.dice.roll(40);
            let row = self.clean(words);
            made.train.push(row);
        }
        for _ in 0..rows / 4 {
            let row = self.clean(30);
            made.held_out.push(row);
        }
        for kind in ["email", "phone", "iban", "credit_card", "es_dni", "url", "ip_address"] {
            for _ in 0..few {
                self.plant(&mut made, kind);
            }
        }
        // Copies come last, and none of what has something personal, which would be in it twice.
        let lines: Vec<usize> = (0..rows)
            .filter(|at| !made.expected.values().flatten().any(|(held, line)| !held && line == &(at + 1)))
            .collect();
        let mut taken = HashSet::new();
        let mut free = |dice: &mut Dice| loop {
            let at = lines[dice.roll(lines.len())];
            if taken.insert(at) {
                return at;
            }
        };
        for _ in 0..few {
            let at = free(&mut self.dice);
            let mut row = made.train[at].clone();
            // White space says nothing.
            row.answer = row.answer.replacen(' ', "  ", self.dice.roll(3));
            made.add("duplicates", false, row);

            let at = free(&mut self.dice);
            let row = made.train[at].clone();
            made.add("leaks", true, row);

            let long = self.clean(90);
            let at = made.train.len();
            made.train.push(long);
            let row = self.nearly(&made.train[at], "xylophone");
            made.add("near_duplicates", false, row);
            let row = self.nearly(&made.train[at], "saxophone");
            made.add("near_leaks", true, row);

            for (check, held) in [("conflicts", false), ("leaked_prompts", true)] {
                let at = free(&mut self.dice);
                let row = Row { prompt: made.train[at].prompt.clone(), answer: self.clean(25).answer };
                made.add(check, held, row);
            }
        }
        made
    }

    /// The same row with one word of its question another.
    fn nearly(&mut self, row: &Row, word: &str) -> Row {
        let mut words: Vec<&str> = row.prompt.split(' ').collect();
        words[1 + self.dice.roll(4)] = word;
        Row { prompt: words.join(" "), answer: row.answer.clone() }
    }

    fn plant(&mut self, made: &mut Planted, kind: &'static str) {
        let dice = &mut self.dice;
        let value = match kind {
            "email" => format!("{}@{}", dice.pick(&NAMES), dice.pick(&HOSTS)),
            "phone" => {
                let shape = dice.pick(&PHONES);
                dice.digits(shape)
            }
            "iban" => iban(dice),
            "credit_card" => card(dice),
            "es_dni" => dni(dice),
            "url" => format!(
                "{}{}/{}",
                dice.pick(&["https://", "http://", "https://www.", "www."]),
                dice.pick(&HOSTS),
                dice.digits("nd.html")
            ),
            _ => dice.digits("1d3.nd.1nd.nd"),
        };
        let (before, behind) = AROUND[dice.roll(AROUND.len())];
        let held = dice.roll(4) == 0;
        let rows = if held { &mut made.held_out } else { &mut made.train };
        let at = dice.roll(rows.len());
        let place = if dice.roll(2) == 0 { &mut rows[at].prompt } else { &mut rows[at].answer };
        *place = format!("{place} {before}{value}{behind}");
        made.expected.entry(kind).or_default().insert((held, at + 1));
    }
}

impl Planted {
    fn add(&mut self, check: &'static str, held: bool, row: Row) {
        let rows = if held { &mut self.held_out } else { &mut self.train };
        rows.push(row);
        self.expected.entry(check).or_default().insert((held, rows.len()));
    }
}
