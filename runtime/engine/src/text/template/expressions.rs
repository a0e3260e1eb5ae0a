//! Pieces of templates, held to what transformers' Jinja environment makes of them: `tests/fixtures/templates/expressions.json`, beside
//! the Python that made it.

use std::fmt::Write as _;
use std::path::Path;

use super::*;

/// Where we differ, and why. No published template is known to use any of these.
const UNLIKE: [(&str, &str); 23] = [
    ("{{ [1, 2] * 2 }}", "a list is not repeated: that would cost whatever the template likes"),
    ("{{ {'a': 1}.items() }}", "a view is printed as a list"),
    ("{{ {'items': 5}.items }}", "a method that is not called is the item"),
    ("{{ 'x' | attr('upper') }}", "the same"),
    ("{{ messages[2] | attr('role') }}", "the same"),
    ("{{ dict([('a', 1)]) }}", "`dict` takes a mapping"),
    ("{{ messages | map(attribute='n') | list }}", "what is undefined is printed in a list in small letters"),
    ("{{ 'a\\nb' | indent('>>') }}", "`indent` takes a number"),
    ("{{ 'a b&c' | urlencode }}", "no crate for it"),
    ("{{ {'a': 1} | xmlattr }}", "for HTML"),
    ("{{ [1, {'a': none}] | pprint }}", "it breaks lines that Python does not"),
    ("{{ +3 }}", "no such sign"),
    ("{{ lipsum is defined }}", "a text to fill pages with"),
    ("{{ cycler is defined }}", "it could hold itself"),
    ("{{ self is defined }}", "blocks are not called"),
    ("{{ 'line\\\ncont' }}", "a string goes on with its line break"),
    ("{{ 'abc'.encode() }}", "bytes"),
    ("{% set ns = namespace({'a': 1}, b=2) %}{{ ns.a }}{{ ns.b }}", "`namespace` takes one of both"),
    ("{% macro f(a, b=a) %}{{ a }}{{ b }}{% endmacro %}{{ f(1) }}", "a default does not see the arguments before it"),
    ("{% macro f() %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1, x=2) }}", "a macro takes what it names"),
    ("{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}{{ c.current }}", "it could hold itself"),
    ("{{ '\\N{BULLET}' }}", "characters have no names"),
    ("{{ '\\U0001F642' }}", "numbers of characters have four digits; two of them make a character beyond"),
];

#[test]
fn expressions_come_to_what_they_do_in_transformers() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/templates/expressions.json");
    let golden: Json = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let (mut wrong, mut unlike) = (String::new(), 0);
    for case in golden["cases"].as_array().unwrap() {
        let (source, expected) = (case[0].as_str().unwrap(), case[1].as_str());
        let rendered = ChatTemplate::new(source, Some("<s>"), Some("</s>")).and_then(|template| {
            let template = template.with_clock(golden["now"].as_i64().unwrap());
            template.run(golden["messages"].as_array().unwrap(), Some(&golden["tools"]).into(), false, "")
        });
        if UNLIKE.iter().any(|(unlike, _)| *unlike == source) {
            unlike += 1;
            assert!(rendered.is_err() || rendered.ok().as_deref() != expected, "{source} is as in transformers");
            continue;
        }
        match (expected, rendered) {
            (Some(expected), Ok(text)) if text == expected => {}
            // What fails there may come to something here.
            (None, _) => {}
            (Some(expected), Ok(text)) => {
                let _ = writeln!(wrong, "{source:?}\n  {expected:?}\n  {text:?}");
            }
            (Some(expected), Err(error)) => {
                let _ = writeln!(wrong, "{source:?}\n  {expected:?}\n  {error}");
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
    assert_eq!(unlike, UNLIKE.len());
}
