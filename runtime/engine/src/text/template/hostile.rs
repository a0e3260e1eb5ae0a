//! Templates that would end, hang or fill the program, each stopped within its bounds by one process.

use serde_json::json;

use super::*;

/// What is left of a template's run: its text, or why it was stopped.
fn run(source: &str) -> String {
    let content = "word ".repeat(50);
    let messages = [
        json!({"role": "system", "content": "be brief"}),
        json!({"role": "user", "content": content}),
        json!({"role": "assistant", "content": "yes"}),
        json!({"role": "user", "content": content}),
    ];
    let template = ChatTemplate::new(source, Some("<s>"), Some("</s>"));
    match template.and_then(|template| template.render(&messages, None, true)) {
        Ok(text) => format!("renders {text}"),
        Err(error) => format!("{error:#}"),
    }
}

/// Templates, and a part of what they come to.
fn check(cases: &[(&str, &str)]) {
    let mut wrong = Vec::new();
    for (source, expected) in cases {
        let came = run(source);
        let in_words = came.starts_with("renders ") || came.starts_with("chat template");
        if !in_words || !came.contains(expected) {
            let cut = |text: &str| text.chars().take(200).collect::<String>();
            wrong.push(format!("{}\n  {}\n  does not say {expected:?}", cut(source), cut(&came)));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

const WORK: &str = "stopped: it takes more work or memory";
const DEEP: &str = "nests";

#[test]
fn values_that_hold_themselves_are_stopped() {
    let keeps = "a namespace is kept in a namespace";
    check(&[
        ("{% set ns=namespace() %}{% set ns.a=ns %}{{ ns }}", keeps),
        ("{% set ns=namespace() %}{% set ns.a=[ns] %}{{ ns == ns }}", keeps),
        ("{% set ns=namespace() %}{% set ns.a={'b': [[ns]]} %}{{ ns|tojson }}", keeps),
        ("{% set a=namespace() %}{% set b=namespace(a=a) %}{% set a.b=b %}{{ a }}", keeps),
        ("{% set ns=namespace() %}{% for x in [ns] %}{% set x.a=x %}{% endfor %}{{ ns ~ '' }}", keeps),
        ("{% set ns=namespace() %}{% set x, ns.a = 1, ns %}{{ ns|string }}", keeps),
        ("{% macro f(x) %}{% set x.a=x %}{% endmacro %}{% set ns=namespace() %}{{ f(ns) }}{{ ns }}", keeps),
        ("{% set make=namespace %}{% set ns=make() %}{% set ns.a=ns %}{{ ns }}", keeps),
        ("{% set ns=namespace() %}{% for x in [ns] %}{% set ns.l=loop %}{% endfor %}{{ ns|tojson }}", keeps),
    ]);
    let kept =
        "{% set ns=namespace(x=[]) %}{% for m in messages %}{% set ns.x = ns.x + [m] %}{% endfor %}{{ ns.x|length }}";
    check(&[(kept, "renders 4"), ("{% set ns=namespace(a=1) %}{{ ns }}", "renders {'a': 1}")]);
}

#[test]
fn sources_that_nest_are_stopped() {
    let repeated = |open: &str, n: usize, middle: &str, close: &str| {
        format!("{{{{ {}{middle}{} }}}}", open.repeat(n), close.repeat(n))
    };
    let branches = format!("{{% if a %}}{}{{% endif %}}", "{% elif b %}".repeat(50_000));
    let blocks = format!("{}{}", "{% if true %}".repeat(20_000), "{% endif %}".repeat(20_000));
    let with = format!("{}{}", "{% with a=1 %}".repeat(5000), "{% endwith %}".repeat(5000));
    check(&[
        (&repeated("not ", 50_000, "a", ""), DEEP),
        (&repeated("-", 50_000, "1", ""), DEEP),
        (&repeated("a|", 1, &"trim|".repeat(50_000), "trim"), DEEP),
        (&repeated("a", 1, &".a".repeat(50_000), ""), DEEP),
        (&repeated("a", 1, &"[0]".repeat(50_000), ""), DEEP),
        (&repeated("a", 1, &"()".repeat(50_000), ""), DEEP),
        (&repeated("a", 1, &" is defined".repeat(50_000), ""), DEEP),
        (&repeated("a+", 50_000, "a", ""), DEEP),
        (&repeated("a ~ ", 50_000, "a", ""), DEEP),
        (&repeated("a and ", 50_000, "a", ""), DEEP),
        (&repeated("a if a else ", 50_000, "a", ""), DEEP),
        (&repeated("1 ** ", 50_000, "1", ""), DEEP),
        (&repeated("(", 50_000, "a", ")"), DEEP),
        (&repeated("[", 50_000, "a", "]"), DEEP),
        (&repeated("{1:", 50_000, "a", "}"), DEEP),
        (&repeated("a[", 50_000, "a", "]"), DEEP),
        (&repeated("f(", 50_000, "a", ")"), DEEP),
        (&repeated("not ", 3900, "a", ""), "renders "),
        (&repeated("(", 60, "1", ")"), "renders 1"),
        (&branches, "has more than 1000 branches"),
        (&blocks, "recursion"),
        (&with, "recursion"),
        (&"x".repeat(2 << 20), "has 2097152 bytes"),
        ("{{ (1] }}", "syntax error: its brackets do not match"),
        ("\n{{ ) }}", "line 2: syntax error: its brackets do not match"),
    ]);
}

#[test]
fn values_that_nest_are_stopped() {
    let sets = format!("{{% set x=[] %}}{}{{{{ x }}}}", "{% set x=[x] %}".repeat(60_000));
    let unread = format!("{{% set x=[] %}}{}", "{% set x=[x] %}".repeat(60_000));
    let lists = format!("{}x{}", "[".repeat(90), "]".repeat(90));
    let macros = format!("{{% macro f(x) %}}{{{{ f({lists}) }}}}{{% endmacro %}}{{{{ f(1) }}}}");
    let loops = format!("{{% for x in [1] recursive %}}{{{{ loop([{lists}]) }}}}{{% endfor %}}");
    let wraps = format!("{{% macro f(x) %}}{{{{ f(x{}) }}}}{{% endmacro %}}{{{{ f([1]) }}}}", "|batch(1)".repeat(1500));
    let within = "{% set ns=namespace(x=1) %}{% for a in range(90000) %}{% set ns.x = [ns.x] %}{% endfor %}";
    let compared = "{% set ns=namespace(x=1, y=1) %}{% for a in range(500) %}{% set ns.x = [ns.x] %}{% set ns.y = [ns.y] %}{% endfor %}{{ ns.x == ns.y }}";
    check(&[
        (&sets, "a value nests too deeply"),
        (&unread, "renders "),
        (&macros, "recursion limit"),
        (&loops, "recursion limit"),
        (&wraps, "recursion limit"),
        (within, WORK),
        (compared, "a value nests too deeply"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion limit"),
        (
            "{% macro f() %}{{ caller() }}{% endmacro %}{% macro g() %}{% call f() %}{{ g() }}{% endcall %}{% endmacro %}{{ g() }}",
            "recursion limit",
        ),
        ("{% block a %}{{ self.a() }}{% endblock %}", "recursion limit"),
        ("{% include 'chat template' %}", "template not found"),
        ("{% extends 'chat template' %}", "template not found"),
        ("{% import 'chat template' as a %}", "template not found"),
        (
            "{% set ns=namespace(x=messages) %}{% for i in range(3000) %}{% set ns.x = ns.x[0:] %}{% endfor %}{{ ns.x|length }}",
            WORK,
        ),
        (
            "{% set ns=namespace(x=[]) %}{% for i in range(9000) %}{% set ns.x = ns.x + [i] %}{% endfor %}{{ ns.x|length }}",
            WORK,
        ),
        (
            "{% set ns=namespace(x=[]) %}{% for i in range(900) %}{% set ns.x = ns.x + [i] %}{% endfor %}{{ ns.x|length }}",
            "renders 900",
        ),
    ]);
}

#[test]
fn values_that_grow_are_stopped() {
    let doubled = |step: &str| {
        format!(
            "{{% set ns=namespace(s='xxxxxxxx') %}}{{% for i in range(64) %}}{{% set ns.s={step} %}}{{% endfor %}}{{{{ ns.s|length }}}}"
        )
    };
    let lists = |step: &str| {
        format!(
            "{{% set ns=namespace(s=[1, 2]) %}}{{% for i in range(64) %}}{{% set ns.s={step} %}}{{% endfor %}}{{{{ ns.s|length }}}}"
        )
    };
    let shared = |last: &str| format!("{{% set x=['a'] %}}{}{{{{ {last} }}}}", "{% set x=[x,x] %}".repeat(40));
    let args =
        "{% macro f(x, n) %}{% if n %}{{ f([x,x], n-1) }}{% else %}{{ x }}{% endif %}{% endmacro %}{{ f(1, 40) }}";
    check(&[
        (&doubled("ns.s ~ ns.s"), WORK),
        (&doubled("ns.s + ns.s"), WORK),
        (&doubled("ns.s * 2"), WORK),
        (&lists("ns.s + ns.s"), "it adds to a list of"),
        (&lists("(ns.s + ns.s) + ns.s"), "it adds to a list of"),
        (&lists("ns.s|chain(ns.s)"), WORK),
        (&lists("ns.s[0:] + ns.s[0:]"), "it adds to a list of"),
        (&lists("[ns.s, ns.s]|sum(start=[])"), WORK),
        (&lists("[[ns.s, ns.s]]|map('sum', start=[])|first"), "chat template"),
        (&doubled("ns.s|replace('x', 'xx')"), WORK),
        (&doubled("ns.s.replace('x', 'xx')"), WORK),
        (&doubled("[ns.s, ns.s]|join"), WORK),
        (&doubled("''.join([ns.s, ns.s])"), WORK),
        (&doubled("'%s%s'|format(ns.s, ns.s)"), WORK),
        (&doubled("'{}{}'.format(ns.s, ns.s)"), WORK),
        (&doubled("[ns.s, ns.s]|tojson"), WORK),
        (&doubled("[ns.s, ns.s]|string"), WORK),
        (&doubled("(ns.s ~ '\\n' ~ ns.s)|indent(200)"), WORK),
        (&shared("x"), WORK),
        (&shared("x ~ ''"), WORK),
        (&shared("'' ~ x"), WORK),
        (&shared("x == x[0:]"), WORK),
        (&shared("(x[0:]) != x"), WORK),
        (&shared("x < x[0:]"), WORK),
        (&shared("x in [x[0:]]"), WORK),
        (&shared("x not in 'a'"), WORK),
        (&shared("{x: 1}"), WORK),
        (&shared("{}[x]"), WORK),
        (&shared("{}.get(x)"), WORK),
        (&shared("{}|attr(x)"), WORK),
        (&shared("x|tojson"), WORK),
        (&shared("x|string|length"), WORK),
        (&shared("x|trim"), WORK),
        (&shared("x|lower"), WORK),
        (&shared("x|join(x)"), WORK),
        (&shared("x|pprint"), WORK),
        (&shared("[x, x[0:]]|sort"), WORK),
        (&shared("[x, x[0:]]|unique|list"), WORK),
        (&shared("[x, x[0:]]|min"), WORK),
        (&shared("[x]|map('string')|list"), WORK),
        (&shared("[x]|select('eq', x[0:])|list"), WORK),
        (&shared("[x]|select('in', [x[0:]])|list"), WORK),
        (&shared("x is eq(x[0:])"), WORK),
        (&shared("x is in [x[0:]]"), WORK),
        (&shared("x.count(x[0:])"), WORK),
        (&shared("','.join(x)"), WORK),
        (&shared("'%s'|format(x)"), WORK),
        (&shared("'{}'.format(x)"), WORK),
        (&shared("x|replace('a', 'b')"), WORK),
        (&shared("[{'a': x}]|groupby('a')"), WORK),
        (&shared("{'a': x, 'b': x[0:]}|dictsort(by='value')"), WORK),
        (&shared("x|indent"), WORK),
        (&shared("x|length"), "renders 2"),
        (args, WORK),
        (
            "{% for a in [1] %}{% set ns=namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x=[ns.x,ns.x] %}{% endfor %}{{ loop.changed(ns.x) }}{{ loop.changed(ns.x[0:]) }}{% endfor %}",
            WORK,
        ),
        ("{{ ([0]*100000000)|string|length }}", "it repeats a list"),
        ("{{ 100000000*[0] == [0] }}", "it repeats a list"),
        ("{{ ('a' * 3 * 2) ~ 3 * 4 }}", "renders aaaaaa12"),
        ("{{ range(10**9)|list }}", "range has too many elements"),
        ("{{ 'x' * 10**12 }}", WORK),
        ("{% set x=range(99999)[99900:] %}{% for i in range(99999) %}{% for a in x %}{% endfor %}{% endfor %}", WORK),
        ("{% set x=range(99999) %}{% for i in range(99999) %}{% for a in x[99998:] %}{% endfor %}{% endfor %}", WORK),
        ("{{ range(9)[7:]|tojson ~ range(9)[::-3] ~ 'abc'[1:] ~ (1, 2, 3)[:2] }}", "renders [7, 8][8, 5, 2]bc(1, 2)"),
        (
            "{% for a in range(100000) %}{% for b in range(100000) %}{% for c in range(100000) %}{% endfor %}{% endfor %}{% endfor %}",
            WORK,
        ),
        ("{% for a in range(100000) %}{{ messages[1].content * 10 }}{% endfor %}", WORK),
        ("{{ range(100000)|join('x' * 1000000) }}", WORK),
        (
            "{% filter replace('x', [range(99999), range(99999), range(99999)]|string * 20) %}{{ 'x' * 9999999 }}{% endfilter %}",
            WORK,
        ),
        ("{{ ('\\n' * 60000000)|lines|length }}", WORK),
        ("{{ ('a' * 60000000)|split('a')|length }}", WORK),
        ("{{ ('a' * 60000000).split('a')|length }}", WORK),
        ("{{ ('\\n' * 60000000).splitlines()|length }}", WORK),
        ("{{ ('a' * 9000000).strip('b' * 9000000) }}", WORK),
        ("{{ range(3)|batch(10**9)|list }}", "renders [[0, 1, 2]]"),
        ("{{ range(3)|batch(10**9, 0)|list }}", WORK),
        ("{{ range(3)|slice(10**9)|list }}", WORK),
    ]);
}

#[test]
fn tests_and_sums_are_paid_for() {
    let tested = |test: &str| {
        format!(
            "{{% set l='a'*10000000 %}}{{% set m='a'*10000000 %}}{{% for i in range(20000) %}}{{% if {test} %}}{{% endif %}}{{% endfor %}}"
        )
    };
    check(&[
        (&tested("l is lower"), WORK),
        (&tested("l is upper"), WORK),
        (&tested("[l]|select('lower')|list"), WORK),
        (&tested("[{'a': l}]|rejectattr('a', 'lower')|list"), WORK),
        (&tested("l is eq m"), WORK),
        (&tested("l is ge m"), WORK),
        (&tested("l is startingwith m"), WORK),
        (&tested("l is endingwith m"), WORK),
        (
            "{% set x=['a'*60] %}{% for i in range(20000) %}{% if x*1 is defined %}{% endif %}{% endfor %}",
            "it repeats a list",
        ),
        ("{{ range(99999)|map('string')|sum(start='')|length }}", WORK),
        ("{{ range(99999)|map('string')|sum(none, '')|length }}", WORK),
        (
            "{{ ['ab', 'c']|sum(start='x') ~ [{'a': 1}, {'a': 2}]|sum(attribute='a') ~ [{'a': 'b'}]|sum('a', '') }}",
            "renders xabc3b",
        ),
        (
            "{{ ('Ab' is lower, 'ab' is lower, 'AB' is upper, 1 is lower, 'abc' is startingwith 'ab', 12 is endingwith 2) }}",
            "renders (False, True, True, False, True, True)",
        ),
    ]);
}

/// Whoever renders makes tokens of the text next.
#[test]
fn what_a_template_writes_is_bounded() {
    let longest = "for these messages";
    check(&[
        ("{% for i in range(24) %}{{ 'a'*1000000 }}{% endfor %}", longest),
        ("{% for i in range(20000) %}{{ strftime_now('%Y%Y%Y%Y%Y%Y%Y%Y%Y%Y%Y%Y%Y%Y') }}{% endfor %}", longest),
        ("{{ 'a' * 1000000 }}", "renders aaa"),
    ]);
    let template = ChatTemplate::new("{{ raise_exception('x' * 100000000) }}", None, None).unwrap();
    let said = format!("{:#}", template.render(&[json!({"role": "user", "content": "a"})], None, true).unwrap_err());
    assert_eq!(said, format!("chat template, line 1: {}…", "x".repeat(1000)));
    let said = run("{{ ('x' * 10000000).nope() }}{{ {}['x' * 9999999].a }}");
    assert!(said.len() < 5000, "{}", said.len());
}

/// The reader of tags goes into what stands behind a `%`, but not from one to the next.
#[test]
fn a_chain_of_formats_needs_no_stack() {
    let chain = |n: usize| format!("{{{{ 'a'{} }}}}", " % 'b'".repeat(n));
    check(&[(&chain(1000), "chat template, line 1: "), (&chain(100_000), "an expression nests deeper than")]);
}

#[test]
fn widths_are_stopped() {
    check(&[
        ("{{ [[1]]|tojson(indent=100000000000) }}", "tojson: an indentation of 100000000000 characters"),
        ("{{ [[1]]|tojson(indent='x' * 9999) }}", "tojson: an indentation of 9999 characters"),
        ("{{ [1,2]|tojson(separators=('x' * 9999, '')) }}", "tojson: a separator of 9999 characters"),
        ("{{ 'a'|indent(10**12) }}", "chat template"),
        ("{{ '%999999999d'|format(1) }}", WORK),
        ("{{ '%.999999999f'|format(1.5) }}", WORK),
        ("{{ '%*d'|format(999999999, 1) }}", "chat template"),
        ("{{ '{:999999999}'.format(1) }}", "a width of more than three digits"),
        ("{{ '{:{}}'.format(1, 999999999) }}", "a field inside a field"),
        ("{{ '{:>9}|{{}}'.format('a') }}", "renders         a|{}"),
        ("{{ strftime_now('%999999999d') }}", "strftime_now: a format with a width"),
        ("{{ strftime_now('%Y' * 1000) }}", "strftime_now: a format of 2000 characters"),
        ("{{ 'a'.center(10**12) }}", "center: a width of 1000000000000 characters"),
        ("{{ 'a'|center(10**12) }}", "center: a width of 1000000000000 characters"),
        ("{{ 'a'.zfill(10**12) }}", "zfill: a width of 1000000000000 characters"),
        ("{{ 'a\tb'.expandtabs(10**12) }}", "expandtabs: a width of 1000000000000 characters"),
        ("{{ ('\t' * 9999999).expandtabs(256)|length }}", WORK),
        ("{{ '%999999999d' % 1 }}", WORK),
        ("{{ '%*d' % (999999999, 1) }}", "chat template"),
        ("{% for i in range(20000) %}{{ ('a' * 9000000).find('b', 1) }}{% endfor %}", WORK),
        ("{% for i in range(20000) %}{{ ('a' * 9000000).swapcase()|length }}{% endfor %}", WORK),
        ("{{ ('a ' * 30000000).rsplit()|length }}", WORK),
        ("{{ ('\n' * 60000000).splitlines(keepends=True)|length }}", WORK),
        ("{{ loop.cycle() }}", "undefined"),
        ("{% for a in [1] %}{{ loop.cycle() }}{% endfor %}", "stopped: it fails inside"),
        ("{{ 'abc'[-9223372036854775808:] }}", "renders abc"),
        ("{{ 7 // 0 }}", "unable to calculate"),
    ]);
}

/// What a reader of tags must not mistake for something else.
#[test]
fn weighing_changes_no_value() {
    check(&[
        ("{{ 'a ~ b' ~ \"|c'\" ~ 1.5 ~ none ~ messages[0].role }}", "renders a ~ b|c'1.5Nonesystem"),
        ("{{ messages[0]['role'] ~ messages[0].role|upper ~ (1 if messages else 2) }}", "renders systemSYSTEM1"),
        ("{{ (1, 2) == (1, 2) and [1] + [2] == [1, 2] and not 3 in [4] and 3 not in [4] }}", "renders True"),
        ("{% set x = messages[0].role, 2 %}{{ x[0] ~ x[1] }}", "renders system2"),
        ("{% set ns = namespace(a=1) %}{% set ns.a = messages[0].role if true else 3 %}{{ ns.a }}", "renders system"),
        ("{% set ns = namespace() %}{% set ns.a = 1, 2 %}{{ ns.a }}", "renders (1, 2)"),
        ("{{ messages[1:][0].role ~ messages[-1].role ~ messages[::2]|length }}", "renders useruser2"),
        ("{% if messages[0].role is string and messages[0].role is in ['system'] %}y{% endif %}", "renders y"),
        ("{{ {messages[0].role: 1}['sys' + 'tem'] ~ {'a': 2}.a }}", "renders 12"),
        ("{% raw %}{{ ( }}{% endraw %}{# {{ ( #}{{ '}}' }}", "renders {{ ( }}}}"),
        ("{{ 1.0.a is defined }}{{ messages.0.role }}{{ 1e3 + 0x1F - 1_0 }}", "renders Falsesystem1021.0"),
        (
            "{%- for m in messages if m.role != 'system' -%} {{ loop.index ~ m.role }} {%- endfor %}",
            "renders 1user2assistant3user",
        ),
        ("{% for k, v in messages[0] | dictsort(reverse=true) | list %}{{ k }}{% endfor %}", "renders rolecontent"),
        (
            "{% set x | upper %}a{{ 1 }}{% endset %}{{ x }}{% filter replace('A', 'b') %}{{ x }}{% endfilter %}",
            "renders A1b1",
        ),
        ("{% macro f(a, b=2) -%} {{ a ~ b }} {%- endmacro %}{{ f(1) ~ f(*[1, 3]) ~ f(**{'a': 4}) }}", "renders 121342"),
        (
            "{{ messages | map(attribute='role') | join(', ') }}{{ ['a'] | map('upper') | first }}",
            "renders system, user, assistant, userA",
        ),
        ("{{ (-2 * -3 - -1) ~ 2 }}", "renders 72"),
        ("{{ 7 - 2 * messages|length }} {{ 6 / 2 * 2 }} {{ 2 ** 2 * 3 }}", "renders -1 6.0 12"),
        ("{{ 'a' if messages[0].role == messages[1].role else 'b' }}", "renders b"),
        ("{{ 'x' < messages[0].role ~ 'z' }}", "renders False"),
        ("{{ '%s-%s' % (1, messages[0].role|upper) ~ '%d' % -3 ~ '%s' % ('%d' % 4) }}", "renders 1-SYSTEM-34"),
        ("{{ 7 % 4 * 2 }}{{ ('%s' ~ '%s') % 1 if false else 'n' }}", "renders 6n"),
    ]);
}

/// A pool's threads have two megabytes, of which callers use some.
#[test]
fn calls_in_one_another_need_little_stack() {
    let run = || {
        check(&[
            ("{% macro f(n) %}{% for a in [n] %}{{ f(n + 1) }}{% endfor %}{% endmacro %}{{ f(1) }}", "recursion limit"),
            ("{% macro f(x) %}{{ [x]|map('upper')|join ~ f(x) }}{% endmacro %}{{ f('a') }}", "recursion limit"),
            ("{% for a in [[[1]]] recursive %}{{ loop(a) if a is sequence else a }}{% endfor %}", "renders 1"),
            (
                "{% macro f() %}{{ caller() }}{% endmacro %}{% macro g() %}{% call f() %}{{ g() }}{% endcall %}{% endmacro %}{{ g() }}",
                "recursion limit",
            ),
        ]);
    };
    std::thread::Builder::new().stack_size(1 << 20).spawn(run).unwrap().join().unwrap();
}

/// What a rendering may take grows with the conversation.
#[test]
fn long_conversations_are_rendered() {
    let source = "{% set ns = namespace(kept=[]) %}{% for m in messages %}{% set ns.kept = ns.kept + [m.content | trim] %}{% if loop.index0 == messages | length - 1 %}{{ m.role }}{% endif %}{% endfor %}{{ ns.kept | join }}";
    let template = ChatTemplate::new(source, None, None).unwrap();
    let messages: Vec<Json> = (0..2000).map(|_| json!({"role": "user", "content": "x".repeat(2000)})).collect();
    assert_eq!(template.render(&messages, None, true).unwrap().len(), 4 + 2000 * 2000);
}

/// A model with a template beyond its bounds is refused when it is loaded. One whose template refuses a plain
/// conversation may be meant for others, or be trained on text.
#[test]
fn a_model_is_loaded_with_any_template_in_bounds() {
    let fixture = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models/llama");
    let dir = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(fixture).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), dir.path().join(file.file_name())).unwrap();
    }
    let load = |source: &str| {
        std::fs::write(dir.path().join("chat_template.jinja"), source).unwrap();
        crate::models::BaseModel::load(dir.path()).map(|model| model.template.is_some())
    };
    let place = dir.path().canonicalize().unwrap().display().to_string();
    let refused = format!("{:#}", load("{% set ns=namespace() %}\n{% set ns.a=ns %}{{ ns }}").unwrap_err());
    assert!(refused.starts_with(&place), "{refused}");
    assert!(refused.ends_with("chat template, line 2: stopped: a namespace is kept in a namespace"), "{refused}");
    assert!(load("{{ raise_exception('no') }}").unwrap());
    assert!(load("{{ messages[0].parts[0].text.upper() }}").unwrap());
}
