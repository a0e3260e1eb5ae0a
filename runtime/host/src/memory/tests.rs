use std::fs;

use serde_json::json;

use super::rows::{Form, rows};
use super::*;

fn settings(content: Kept) -> Settings {
    Settings { content, ..Settings::default() }
}

fn person(user: &str) -> Person {
    Person { key: Some("moodle".into()), user: Some(user.into()) }
}

fn answer(id: &str, user: &str, text: &str) -> Answered {
    Answered {
        id: id.into(),
        model: "tutor".into(),
        handler: "near".into(),
        person: person(user),
        messages: json!([{"role": "user", "content": format!("{id}? mail ada@example.org")}]),
        answer: text.into(),
    }
}

fn thought(id: &str, rating: i8, correction: Option<&str>) -> Feedback {
    Feedback { response_id: id.into(), rating: Some(rating), correction: correction.map(str::to_owned), comment: None }
}

#[test]
fn what_is_thought_of_answers_becomes_rows() -> Result<()> {
    let place = tempfile::tempdir()?;
    let memory = Memory::open(place.path(), settings(Kept::Redacted))?;
    for (id, text) in [("a", "yes"), ("b", "no"), ("c", "perhaps"), ("d", "unrated")] {
        memory.answered(answer(id, "ada", text));
    }
    assert!(memory.rate(person("ada"), thought("a", 1, None)).is_ok_and(|kept| kept));
    assert!(memory.rate(person("ada"), thought("b", -1, Some("call 030 901820"))).is_ok());
    assert!(memory.rate(person("ada"), thought("c", -1, None)).is_ok());
    // Who changes their mind is heard.
    assert!(memory.rate(person("ada"), thought("c", 1, None)).is_ok());
    assert!(matches!(memory.rate(person("bob"), thought("a", 1, None)), Err(Refused::Unknown)), "it is Ada's");
    assert!(matches!(memory.rate(person("ada"), thought("x", 1, None)), Err(Refused::Unknown)));
    // A server that is started again knows whose they are.
    drop(memory);
    let memory = Memory::open(place.path(), settings(Kept::Redacted))?;
    for _ in 0..FEEDBACK_MAX - 1 {
        assert!(memory.rate(person("ada"), thought("a", 1, None)).is_ok());
    }
    assert!(matches!(memory.rate(person("ada"), thought("a", 1, None)), Err(Refused::Enough)));
    let contents = memory.contents()?;
    let labels: Vec<Value> = rows(&contents, Form::Ratings, None).iter().map(|row| row["label"].clone()).collect();
    assert_eq!(labels, [json!(true), json!(false), json!(true), json!(true)]);
    let pairs = rows(&contents, Form::Pairs, Some("tutor"));
    assert_eq!(
        (pairs.len(), &pairs[0]["prompt"], &pairs[0]["rejected"]),
        (1, &json!("b? mail [EMAIL_1]"), &json!("no"))
    );
    assert_eq!(pairs[0]["chosen"], "call [PHONE_1]");
    assert_eq!(rows(&contents, Form::Ratings, Some("other")), Vec::<Value>::new());
    assert_eq!(verify(place.path(), None)?.contents, contents.len());
    Ok(())
}

#[test]
fn without_consent_nothing_of_a_conversation_is_written() -> Result<()> {
    let place = tempfile::tempdir()?;
    let memory = Memory::open(place.path(), settings(Kept::None))?;
    memory.answered(answer("a", "ada", "yes"));
    assert!(memory.rate(person("ada"), thought("a", 1, Some("secret"))).is_ok_and(|kept| !kept));
    let all = fs::read_to_string(place.path().join("memory/chain.jsonl"))?;
    let contents = memory.contents()?;
    let [only] = contents.as_slice() else { panic!("{contents:?}") };
    assert_eq!(only.person, Person::default());
    assert!(matches!(&only.about, About::Feedback { rating: Some(1), correction: None, .. }), "{only:?}");
    assert!(!all.contains("user") && !all.contains("secret") && !serde_json::to_string(only)?.contains("secret"));
    Ok(())
}

#[test]
fn one_persons_data_is_handed_out_and_deleted_and_the_chain_stays_whole() -> Result<()> {
    let place = tempfile::tempdir()?;
    let memory = Memory::open(place.path(), settings(Kept::Full))?;
    for (id, user) in [("a", "ada"), ("b", "bob"), ("c", "ada")] {
        memory.answered(answer(id, user, "yes"));
    }
    assert!(memory.rate(person("ada"), thought("c", 1, None)).is_ok());
    let before = verify(place.path(), None)?;
    assert_eq!(memory.of_person("ada")?.len(), 3);
    // Another process, as a command is while a server runs.
    let command = Memory::open(place.path(), settings(Kept::Full))?;
    assert_eq!(command.forget_person("ada")?, 3);
    let after = verify(place.path(), Some(&before.head))?;
    assert_eq!((after.lines, after.contents, after.removed), (5, 1, 3));
    assert!(memory.of_person("ada")?.is_empty() && memory.of_person("bob")?.len() == 1);
    assert!(matches!(memory.rate(person("ada"), thought("c", 1, None)), Err(Refused::Unknown)));
    memory.answered(answer("d", "bob", "yes"));
    assert_eq!(verify(place.path(), Some(&after.head))?.contents, 2);
    for file in fs::read_dir(place.path().join("memory/contents"))? {
        assert!(!fs::read_to_string(file?.path())?.contains("\"ada\""));
    }
    Ok(())
}

#[test]
fn what_is_too_old_or_too_much_goes() -> Result<()> {
    let place = tempfile::tempdir()?;
    let memory = Memory::open(place.path(), settings(Kept::Full))?;
    memory.answered(answer("a", "ada", "yes"));
    memory.answered(answer("b", "ada", "yes"));
    drop(memory);
    let contents = place.path().join("memory/contents");
    let day = fs::read_dir(&contents)?.next().context("a day")??.path();
    fs::rename(&day, contents.join("2020-02-29.jsonl"))?;
    let memory = Memory::open(place.path(), settings(Kept::Full))?;
    assert!(memory.contents()?.is_empty());
    let verified = verify(place.path(), None)?;
    assert_eq!((verified.contents, verified.removed, verified.lines), (0, 2, 3));
    // It is said once.
    drop(Memory::open(place.path(), settings(Kept::Full))?);
    assert_eq!(verify(place.path(), None)?.lines, 3);
    Ok(())
}

#[test]
fn what_was_changed_or_taken_out_shows() -> Result<()> {
    let place = tempfile::tempdir()?;
    let memory = Memory::open(place.path(), settings(Kept::Full))?;
    for id in ["a", "b", "c"] {
        memory.answered(answer(id, "ada", "yes"));
    }
    drop(memory);
    let contents = place.path().join("memory/contents");
    let day = fs::read_dir(&contents)?.next().context("a day")??.path();
    let whole = fs::read_to_string(&day)?;
    let lines: Vec<&str> = whole.lines().collect();
    let check = |text: &str| -> Result<String> {
        fs::write(&day, text)?;
        Ok(verify(place.path(), None).err().map(|error| format!("{error:#}")).unwrap_or_default())
    };
    assert_eq!(check(&whole)?, "");
    assert!(
        check(&whole.replace("\"answer\":\"yes\"", "\"answer\":\"no\""))?
            .contains("content 1: is not what was written")
    );
    assert!(
        check(&format!("{}\n{}\n", lines[0], lines[2]))?.contains("content 2: is gone, and the chain does not say why")
    );
    assert!(check(&format!("{whole}{}\n", lines[0]))?.contains("content 1: is there twice"));
    // A content that a kill left without its line in the chain is removed at the next start.
    let more = lines[0].replace("\"number\":1,", "\"number\":9,");
    assert!(check(&format!("{whole}{more}\n{{\"num"))?.contains("content 9: the chain does not know it"));
    drop(Memory::open(place.path(), settings(Kept::Full))?);
    assert_eq!(verify(place.path(), None)?.contents, 3);
    let head = verify(place.path(), None)?.head;
    assert!(verify(place.path(), Some(&head)).is_ok());
    assert!(verify(place.path(), Some("0123")).is_err());
    Ok(())
}
