use super::*;

/// What is found in a text, as `kind:text`.
fn found(text: &str) -> Vec<String> {
    find(text).into_iter().map(|found| format!("{}:{}", found.kind, &text[found.at])).collect()
}

/// Checks all, and tells of all that are otherwise.
fn check<const N: usize>(texts: impl IntoIterator<Item = (&'static str, [&'static str; N])>) {
    let wrong: Vec<_> = texts.into_iter().filter(|(text, expected)| found(text) != expected).collect();
    let wrong: Vec<String> = wrong.iter().map(|(text, _)| format!("{text:?}: {:?}", found(text))).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_is_personal_is_found_where_it_stands() {
    let texts = [
        ("Write to lena.meier@schule-nord.de, please.", "email:lena.meier@schule-nord.de"),
        ("<jörg@müller.example>", "email:jörg@müller.example"),
        ("Tel.: 030 1234567", "phone:030 1234567"),
        ("ruf an: 0151 23456789!", "phone:0151 23456789"),
        ("(030) 90 12 34 56", "phone:(030) 90 12 34 56"),
        ("unter +49 (0)30 901 234 56 erreichbar", "phone:+49 (0)30 901 234 56"),
        ("+34 612 345 678", "phone:+34 612 345 678"),
        ("0034-612-345-678", "phone:0034-612-345-678"),
        ("llama al móvil 612 345 678.", "phone:612 345 678"),
        ("Mon numéro : 06 12 34 56 79 (soir)", "phone:06 12 34 56 79"),
        ("06-12345678", "phone:06-12345678"),
        ("020 7946 0958", "phone:020 7946 0958"),
        ("call (202) 555-0143 now", "phone:(202) 555-0143"),
        ("202-555-0143", "phone:202-555-0143"),
        ("+1 202 555 0143", "phone:+1 202 555 0143"),
        ("01512 3456789", "phone:01512 3456789"),
        ("015123456789", "phone:015123456789"),
        ("电话：+86 138 0013 8000", "phone:+86 138 0013 8000"),
        ("(0341 9012345)", "phone:0341 9012345"),
        ("Büro +43 (0)1 58858-0", "phone:+43 (0)1 58858-0"),
        ("+43 1 58858-0", "phone:+43 1 58858-0"),
        ("au 01 23 45 67 89.", "phone:01 23 45 67 89"),
        ("call (555) 123-4567", "phone:(555) 123-4567"),
        ("Ring 030 1234567 2 times", "phone:030 1234567"),
        ("see https://example.org/a?b=1.", "url:https://example.org/a?b=1"),
        ("(www.schule.de/kontakt)", "url:www.schule.de/kontakt"),
        ("https://de.wikipedia.org/wiki/Bug_(Begriff)", "url:https://de.wikipedia.org/wiki/Bug_(Begriff)"),
        ("from 203.0.113.77 at noon", "ip_address:203.0.113.77"),
        ("2001:db8:85a3::8a2e:370:7334", "ip_address:2001:db8:85a3::8a2e:370:7334"),
        ("IBAN DE89 3704 0044 0532 0130 00.", "iban:DE89 3704 0044 0532 0130 00"),
        ("NL91ABNA0417164300", "iban:NL91ABNA0417164300"),
        ("4111 1111 1111 1111", "credit_card:4111 1111 1111 1111"),
        ("Kreditkarte 5500005555555559", "credit_card:5500005555555559"),
        ("3782 822463 10005", "credit_card:3782 822463 10005"),
        ("Steuer-ID: 86 095 742 719", "de_tax_id:86 095 742 719"),
        ("DNI 12345678Z", "es_dni:12345678Z"),
        ("NIE X1234567L", "es_nie:X1234567L"),
        ("BSN 111222333", "nl_bsn:111222333"),
        ("RSSMRA85T10A562S", "it_codice_fiscale:RSSMRA85T10A562S"),
        ("PESEL: 44051401359", "pl_pesel:44051401359"),
        ("1 85 05 78 006 084 91", "fr_nir:1 85 05 78 006 084 91"),
        ("85.07.30-033.28", "be_rrn:85.07.30-033.28"),
        ("811228-9874", "se_personnummer:811228-9874"),
        ("131052-308T", "fi_hetu:131052-308T"),
        ("NIF 123456789", "pt_nif:123456789"),
        ("111.444.777-35", "br_cpf:111.444.777-35"),
        ("756.9217.0769.85", "ch_ahv:756.9217.0769.85"),
        ("NHS no. 943 476 5919", "gb_nhs:943 476 5919"),
        ("SSN 536-90-4399", "us_ssn:536-90-4399"),
        ("SVNR 1237 010180", "at_svnr:1237 010180"),
        ("CNP 1630615123457", "ro_cnp:1630615123457"),
        ("710319/2745", "cz_rodne_cislo:710319/2745"),
        ("SIN 123-456-782", "ca_sin:123-456-782"),
        ("360426199101010071", "cn_resident_id:360426199101010071"),
        ("20-26756539-3", "ar_cuit:20-26756539-3"),
    ];
    check(texts.map(|(text, expected)| (text, [expected])));
}

#[test]
fn what_only_looks_like_it_is_left_alone() {
    let texts = [
        "from 1914 to 1918, 1939-1945, in 2024/25",
        "12 + 345 = 357 and 1 234 567 - 89 = 1 234 478",
        "3 * 0151 23456789 = ?",
        "x = +49 301 234 567 + 1",
        "0.123456789 and 3.14159265358979",
        "01.02.2023 10:30, 2023-01-02, 01/02/2023",
        "01 02 03 04 05 06",
        "01 11 21 31 41, 02 04 06 08 10, 05 20 35 50 65",
        "(555) 123 4567, f(555) 123+4567, +43 (0)1 5-0",
        "012345678910",
        "ISBN 978-3-16-148410-0 and 0-306-40615-2, 3 16 148410 X",
        "7732-18-5 is water, 64-17-5 ethanol",
        "C6H12O6 + 6 O2",
        "2432902008176640000 is 20!, 1234567812345670 is not",
        "1000000007, 998244353, 123456789",
        "version 1.2.3.4 and section 10.2.3.1, v10.20.30.40",
        "127.0.0.1:8000, 0.0.0.0, 255.255.255.0, http://localhost:8000/x",
        "std::vector<int> a::b::c, 12:30:45, 00:1b:44",
        "lodash@4.17.21 image@2x.png @pytest.fixture a@b git@github.com:a/b.git",
        "0x1F600 \\u0301 #0123456 0b1010101010",
        "if (a[0] == 10) { b = 1234567890; }",
        "population 83 200 000, area 357 022 km", // groups of three
        "9 876 543 210 apples, 12 345 678 pears",
        "DE12 3456 7890 1234 5678 90",
        "4111 1111 1111 1112",
        "111222333 and 86 095 742 719, 44051401359",
        "12345678A, X1234567A",
        "48.137154, 11.576124",
        "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610",
        "00110011 00110011, 0101 0101 0101",
        "010 + 020 = 030, 0815 4711",
        "Note 1-2-3-4-5-6-7",
        "10/12, 03/04 05/06, 3/4",
        "call f(20) 12345678 times",
        "1:100000, 5.972e24 kg, 6.02214076e23",
        "2 000 000 000 000 €",
        "Room 012 345",
        "Zeile 0123, Spalte 0456, Wert 0789",
        "she sings 123 456 782 songs",
        "phone sales reached 123 456 789",
        "Boston, MA 02110-1301, USA",
        "Phys. Rev. E 64, 016132 (2001)",
        "0.0648193359375, 0.0959484397",
        "S(180742845225803)/(10**12)",
    ];
    check(texts.map(|text| (text, [])));
}

#[test]
fn a_value_has_one_placeholder_however_it_is_written() {
    let mut redactor = Redactor::default();
    let text = "Ana: ana@x.org, +34 612 345 678; ANA@X.ORG, 0034 612345678; leo@x.org.";
    let expected = "Ana: [EMAIL_1], [PHONE_1]; [EMAIL_1], [PHONE_1]; [EMAIL_2].";
    assert_eq!(redactor.text(text), expected);
    assert_eq!(redactor.counts().get("email"), Some(&(3, 2)));
    let row = serde_json::json!({"messages": [{"role": "user", "content": "leo@x.org"}], "n": 7, "s": "plain"});
    let expected = r#"{"messages":[{"role":"user","content":"[EMAIL_2]"}],"n":7,"s":"plain"}"#;
    assert_eq!(redactor.row(&row).unwrap().to_string(), expected);
    assert_eq!(redactor.row(&serde_json::json!({"a": ["b", 1]})), None);
}

#[test]
fn any_text_is_gone_through() {
    for text in [
        "@",
        "é@é.é",
        "+",
        "(",
        "((((",
        "1-",
        "A1",
        "www.",
        "://",
        "http://",
        "١٢٣٤٥٦٧٨٩",
        "🇩🇪+49🇩🇪30",
        "\u{a0}0\u{a0}30",
        "DE89\u{a0}3704é",
    ] {
        find(text);
    }
    let signs = "a0 +4(9)-./@:w.é1DE";
    let mut state = 7_u64;
    for _ in 0..20_000 {
        let text: String = (0..24)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                signs.chars().nth((state >> 33) as usize % 19).unwrap()
            })
            .collect();
        let found = find(&text);
        assert!(found.windows(2).all(|pair| pair[0].at.end <= pair[1].at.start), "{text}");
    }
}
