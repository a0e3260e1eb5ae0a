use anyhow::Context;
use serde_json::json;

use super::*;
use crate::runs::history;

/// What a training of so many steps says of itself.
fn lines(steps: u64) -> Vec<Value> {
    let mut lines = vec![json!({"event": "started", "training": 1, "steps": steps, "rows": 1204})];
    for step in 1..=steps {
        let done = step as f64 / steps as f64;
        let wave = 0.25 * ((step * 7919 % 101) as f64 / 101.0 - 0.5);
        lines.push(json!({
            "event": "step", "training": 1, "step": step, "epoch": 3.0 * done,
            "loss": 0.6 + 2.4 * (-4.0 * done).exp() + wave, "grad_norm": 0.5 + wave.abs() * 8.0,
            "learning_rate": 2e-4 * (1.0 - done).max(0.0), "tokens": 900, "seconds": 0.5,
        }));
        if step % (steps / 10).max(1) == 0 {
            lines.push(json!({
                "event": "eval", "training": 1, "step": step, "eval_loss": 1.1 + 1.9 * (-5.0 * done).exp() + 0.3 * done * done,
                "perplexity": 3.0, "token_accuracy": 0.4 + 0.3 * done,
            }));
            lines.push(json!({"event": "checkpoint", "training": 1, "step": step, "seconds": 0.1, "bytes": 9}));
        }
    }
    lines.push(json!({"event": "swapped", "training": 1, "step": steps / 2, "id": "lora-2"}));
    lines
}

fn data(events: &[Value]) -> ReportData {
    ReportData {
        id: "geo-1".to_owned(),
        kind: "Training run geo-1".to_owned(),
        status: Status::Finished,
        title: "geo: what SmolLM2 learned".to_owned(),
        summary: vec!["It was trained.".to_owned()],
        error: None,
        trainings: history::trainings(events),
        next: vec![("Ask it".to_owned(), "homeroom chat --model-dir geo".to_owned())],
        data: vec![("rows".to_owned(), "1,204".to_owned())],
        licences: vec![],
        settings: vec![("learning_rate".to_owned(), "0.0002".to_owned())],
        digests: vec![],
        machine: vec![],
        script: None,
    }
}

/// Elements whose end is left out, as HTML has it.
const EMPTY: [&str; 6] = ["meta", "line", "circle", "path", "!doctype", "br"];

/// The names of a page's elements, each of which has its end in its place.
fn elements(page: &str) -> Result<Vec<String>> {
    let (mut open, mut all): (Vec<String>, Vec<String>) = (Vec::new(), Vec::new());
    let mut rest = page;
    while let Some(at) = rest.find('<') {
        let tag = &rest[at + 1..];
        let end = tag.find('>').context("a tag ends")?;
        let name: String = tag[..end].split([' ', '/']).find(|part| !part.is_empty()).unwrap_or_default().to_owned();
        if tag.starts_with('/') {
            anyhow::ensure!(open.pop().as_deref() == Some(&name), "`{name}` ends where `{open:?}` are open");
        } else {
            if !EMPTY.contains(&name.as_str()) {
                open.push(name.clone());
            }
            all.push(name);
        }
        rest = &tag[end + 1..];
    }
    anyhow::ensure!(open.is_empty(), "{open:?} do not end");
    Ok(all)
}

#[test]
fn a_page_is_whole_at_thirty_steps_and_at_three_thousand_and_loads_nothing() -> Result<()> {
    for steps in [0, 1, 30, 3000] {
        let page = html(&data(&lines(steps)[..]));
        let elements = elements(&page).with_context(|| format!("{steps} steps"))?;
        let has = |name: &str| elements.iter().any(|element| element == name);
        assert!(!has("script") && !has("img") && !has("link") && !has("iframe"));
        assert!(!page.contains("http://") && !page.contains("https://") && !page.contains("url("));
        assert_eq!(has("svg"), steps > 0);
        assert!(steps < 30 || ["figcaption", "table", "caption", "title", "desc"].iter().all(|name| has(name)));
        assert!(!page.contains("NaN"));
        // The rate falls to 0, which no logarithm has; the losses fall less than twentyfold.
        assert!(!page.contains("logarithmic"));
        assert!(page.len() < 200_000, "{} bytes", page.len());
        // For who wants to look at it.
        if let Some(directory) = std::env::var_os("HOMEROOM_REPORTS") {
            std::fs::write(Path::new(&directory).join(format!("{steps}.html")), &page)?;
        }
    }
    Ok(())
}

#[test]
fn no_word_of_a_row_is_markup() -> Result<()> {
    let hostile = "</p><script>alert(1)</script><img src=x onerror=y>\" ' & \u{202e}\u{1b}[2J\0";
    let mut events = lines(3);
    events.push(json!({"event": "sample", "training": 1, "prompt": hostile, "expected": hostile, "before": hostile, "after": hostile}));
    events.push(json!({"event": hostile, "training": 1, "step": 2, "id": hostile}));
    events.push(json!({"event": "stopped", "training": 1, "step": 2, "reason": hostile}));
    let pair = || vec![(hostile.to_owned(), hostile.to_owned())];
    let page = html(&ReportData {
        id: hostile.to_owned(),
        kind: hostile.to_owned(),
        title: hostile.to_owned(),
        summary: vec![hostile.to_owned()],
        error: Some(hostile.to_owned()),
        next: pair(),
        data: pair(),
        settings: pair(),
        digests: pair(),
        machine: pair(),
        licences: vec![Licence {
            model: hostile.to_owned(),
            licence: Some(hostile.to_owned()),
            source: hostile.to_owned(),
        }],
        script: Some(hostile.to_owned()),
        ..data(&events)
    });
    let elements = elements(&page)?;
    assert!(!elements.iter().any(|element| element == "script" || element == "img"));
    assert!(!page.contains('\u{202e}') && !page.contains('\u{1b}') && !page.contains('\0'));
    assert!(page.matches("&lt;script&gt;alert(1)").count() >= 18, "{}", page.matches("&lt;script&gt;").count());
    Ok(())
}

#[test]
fn the_words_below_a_curve_say_what_it_shows() {
    let of = |losses: &[f64]| {
        let evals = losses.iter().enumerate();
        let evals = evals.map(|(step, loss)| json!({"event": "eval", "training": 1, "step": step, "eval_loss": loss}));
        html(&data(&lines(4).into_iter().filter(|line| line["event"] != "eval").chain(evals).collect::<Vec<_>>()))
    };
    assert!(of(&[]).contains("No rows were held out"));
    assert!(of(&[3.0, 2.0]).contains("went from 3 to 2,"));
    assert!(of(&[3.0, 1.0, 2.0]).contains("lowest, 1, at step 1, and has risen since"));
    assert!(of(&[2.0, 2.5]).contains("worse than before the training"));
    let preferring = json!({"event": "started", "training": 1, "objective": "dpo"});
    let others = lines(4).into_iter().filter(|line| line["event"] != "started");
    let page = html(&data(&std::iter::once(preferring).chain(others).collect::<Vec<_>>()));
    assert!(page.contains("far the model is from preferring") && !page.contains("right answers surprise"));
    // Rows of kto are single answers.
    let of = |objective: &str| {
        let mut events = vec![json!({"event": "started", "training": 1, "objective": objective})];
        events.extend((1..4).map(|step| {
            let rewards = json!({"chosen": step, "rejected": 0, "accuracy": 0.5, "margin": step});
            json!({"event": "step", "training": 1, "step": step, "loss": 1.0, "rewards": rewards})
        }));
        html(&data(&events))
    };
    assert!(of("dpo").contains("Pairs ranked right") && of("dpo").contains("coin"));
    let page = of("kto");
    assert!(page.contains("Answers judged right") && page.contains("rated as good or as bad"));
    assert!(
        !["pair", "prefer", "coin"]
            .iter()
            .any(|word| page.contains(&format!("{word}s ")) || page.contains(&format!("{word} ")))
    );
}

#[test]
fn a_licence_is_read_from_what_lies_beside_a_model() -> Result<()> {
    let place = tempfile::tempdir()?;
    let write = |name: &str, text: &str| std::fs::write(place.path().join(name), text);
    let licence = || licence_of(place.path());
    assert_eq!(licence(), None);
    write("LICENSE", "\n   Apache License\n   Version 2.0\n")?;
    assert_eq!(licence(), Some(("Apache License".to_owned(), "first line of its LICENSE".to_owned())));
    write("README.md", "# A model\nlicense: mit\n")?;
    assert_eq!(licence().map(|(licence, _)| licence).as_deref(), Some("Apache License"), "it is no head");
    for (head, expected) in [
        ("license: apache-2.0\nlanguage: en", "apache-2.0"),
        ("license: \"mit\"", "mit"),
        ("license: other\nlicense_name: llama3.2\nlicense_link: https://x/y", "llama3.2, https://x/y"),
    ] {
        write("README.md", &format!("---\n{head}\n---\n# A model\n"))?;
        assert_eq!(licence(), Some((expected.to_owned(), "in its README.md".to_owned())));
    }
    Ok(())
}
