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
        provider_id: None,
        model: "tutor".into(),
        handler: "near".into(),
        person: person(user),
        messages: json!([{"role": "user", "content": format!("{id}? mail ada@example.org")}]),
        answer: text.into(),
    }
}

fn whose(name: &str) -> Whose<'_> {
    Whose { name, key: None }
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
    assert_eq!(memory.of_person(whose("ada"))?.len(), 3);
    // Another process, as a command is while a server runs.
    let command = Memory::open(place.path(), settings(Kept::Full))?;
    assert_eq!(command.forget_person(whose("ada"))?, 3);
    let after = verify(place.path(), Some(&before.head))?;
    assert_eq!((after.lines, after.contents, after.removed), (5, 1, 3));
    assert!(memory.of_person(whose("ada"))?.is_empty() && memory.of_person(whose("bob"))?.len() == 1);
    assert!(matches!(memory.rate(person("ada"), thought("c", 1, None)), Err(Refused::Unknown)));
    memory.answered(answer("d", "bob", "yes"));
    assert!(memory.settle());
    assert_eq!(verify(place.path(), Some(&after.head))?.contents, 2);
    for file in fs::read_dir(place.path().join("memory/contents"))? {
        assert!(!fs::read_to_string(file?.path())?.contains("\"ada\""));
    }
    Ok(())
}

#[test]
fn of_two_keys_that_have_a_person_of_one_name_one_is_asked_for() -> Result<()> {
    let place = tempfile::tempdir()?;
    let memory = Memory::open(place.path(), settings(Kept::Full))?;
    let of = |key: Option<&str>, user: Option<&str>| Person { key: key.map(Into::into), user: user.map(Into::into) };
    for (id, person) in [
        ("a", of(Some("moodle"), Some("ada"))),
        ("b", of(Some("pad"), Some("ada"))),
        ("c", of(None, Some("ada"))),
        ("d", of(Some("ada"), None)),
        ("e", of(Some("moodle"), Some("bob"))),
    ] {
        memory.answered(Answered { person, ..answer(id, "", "yes") });
    }
    let of_key = |key| Whose { name: "ada", key: Some(key) };
    let names = "there is a `ada` of each of these keys: ada, moodle, pad, and one without a key\nhint: --key NAME";
    for refused in [memory.of_person(whose("ada")).map(|_| 0), memory.forget_person(whose("ada"))] {
        let error = refused.err().map(|error| error.to_string()).unwrap_or_default();
        assert!(error.starts_with(names), "{error}");
    }
    assert_eq!(memory.contents()?.len(), 5, "nothing is deleted");
    for key in ["ada", "moodle", "pad", ""] {
        assert_eq!(memory.of_person(of_key(key))?.len(), 1, "{key}");
    }
    assert!(memory.of_person(of_key("other"))?.is_empty());
    for (key, left) in [("pad", 4), ("", 3), ("ada", 2)] {
        assert_eq!((memory.forget_person(of_key(key))?, memory.contents()?.len()), (1, left), "{key}");
    }
    // Of one key the name is enough.
    assert_eq!((memory.forget_person(whose("ada"))?, memory.of_person(whose("bob"))?.len()), (1, 1));
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
    let more = lines[0].replace("\"number\":1,", "\"number\":4,");
    assert!(check(&format!("{whole}{more}\n{{\"num"))?.contains("content 4: the chain does not know it"));
    drop(Memory::open(place.path(), settings(Kept::Full))?);
    assert_eq!(verify(place.path(), None)?.contents, 3);
    // As is one of a number that was given again.
    let more = lines[1].replace("yes", "no");
    assert!(check(&format!("{}\n{more}\n{}\n{}\n", lines[0], lines[1], lines[2]))?.contains("content 2: is not"));
    drop(Memory::open(place.path(), settings(Kept::Full))?);
    assert_eq!(fs::read_to_string(&day)?, whole);
    // What was changed is no crash, and stays for whoever looks.
    let changed = whole.replace("yes", "no");
    fs::write(&day, &changed)?;
    drop(Memory::open(place.path(), settings(Kept::Full))?);
    assert_eq!(fs::read_to_string(&day)?, changed);
    fs::write(&day, &whole)?;
    let head = verify(place.path(), None)?.head;
    assert!(verify(place.path(), Some(&head)).is_ok());
    assert!(verify(place.path(), Some("0123")).is_err());
    Ok(())
}

#[test]
fn where_the_chain_was_cut_off_or_is_gone_nothing_is_removed_and_nothing_opens() -> Result<()> {
    let place = tempfile::tempdir()?;
    let memory = Memory::open(place.path(), settings(Kept::Full))?;
    for id in ["a", "b", "c", "d"] {
        memory.answered(answer(id, "ada", "yes"));
    }
    drop(memory);
    let (chain, head) = (place.path().join("memory/chain.jsonl"), place.path().join("memory/head.json"));
    let (whole, of_four) = (fs::read_to_string(&chain)?, fs::read_to_string(&head)?);
    let day = fs::read_dir(place.path().join("memory/contents"))?.next().context("a day")??.path();
    let kept = fs::read_to_string(&day)?;
    let cut = |lines: usize| whole.lines().take(lines).map(|line| format!("{line}\n")).collect::<String>();
    let refused = |words: &str| -> Result<()> {
        let opened = Memory::open(place.path(), settings(Kept::Full)).err();
        let error = opened.map(|error| format!("{error:#}")).unwrap_or_default();
        assert!(error.contains(words) && error.contains("nothing was removed"), "{words}: {error}");
        assert!(Memory::at(place.path())?.forget_person(whose("ada")).is_err() && verify(place.path(), None).is_err());
        assert_eq!(fs::read_to_string(&day)?, kept);
        Ok(())
    };
    fs::remove_file(&chain)?;
    refused("it is gone")?;
    fs::remove_file(&head)?;
    refused("there are 4 contents that it does not know, of numbers 1 to 4")?;
    fs::write(&chain, cut(2))?;
    refused("there are 2 contents that it does not know, of numbers 3 to 4")?;
    fs::write(&head, &of_four)?;
    refused("it ends with line 2, and head.json says that it went to line 4")?;
    // Another chain of the same length.
    let other = tempfile::tempdir()?;
    let memory = Memory::open(other.path(), settings(Kept::Full))?;
    for id in ["a", "b", "c", "d"] {
        memory.answered(answer(id, "ada", "yes"));
    }
    drop(memory);
    fs::copy(other.path().join("memory/chain.jsonl"), &chain)?;
    refused("line 4 is another than head.json says")?;
    // It opens again when the file is back, and also if its head is missing.
    fs::write(&chain, &whole)?;
    fs::remove_file(&head)?;
    drop(Memory::open(place.path(), settings(Kept::Full))?);
    assert_eq!((verify(place.path(), None)?.contents, fs::read_to_string(&head)?), (4, of_four));
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(fs::metadata(&head)?.permissions().mode() & 0o777, 0o600);
    }
    Ok(())
}

#[test]
fn a_head_that_a_crash_left_one_line_behind_or_ahead_is_set_right() -> Result<()> {
    let place = tempfile::tempdir()?;
    let (chain, head) = (place.path().join("memory/chain.jsonl"), place.path().join("memory/head.json"));
    let remember = |id: &str| -> Result<String> {
        Memory::open(place.path(), settings(Kept::Full))?.answered(answer(id, "ada", "yes"));
        Ok(fs::read_to_string(&head)?)
    };
    let (of_one, of_two) = (remember("a")?, remember("b")?);
    fs::write(&head, of_one)?;
    assert_eq!(verify(place.path(), None)?.contents, 2);
    drop(Memory::open(place.path(), settings(Kept::Full))?);
    assert_eq!(fs::read_to_string(&head)?, of_two);
    // The last line was not on the disk yet.
    let whole = fs::read_to_string(&chain)?;
    fs::write(&chain, &whole[..=whole.find('\n').context("two lines")?])?;
    let error = verify(place.path(), None).err().map(|error| error.to_string()).unwrap_or_default();
    assert!(error.contains("one line shorter than head.json says"), "{error}");
    drop(Memory::open(place.path(), settings(Kept::Full))?);
    assert_eq!((verify(place.path(), None)?.contents, verify(place.path(), None)?.lines), (1, 1));
    remember("c")?;
    assert_eq!(verify(place.path(), None)?.contents, 2);
    Ok(())
}

#[cfg(unix)]
#[test]
fn an_answer_that_could_not_be_written_leaves_the_log_whole() -> Result<()> {
    let place = tempfile::tempdir()?;
    let memory = Memory::open(place.path(), settings(Kept::Full))?;
    let remember = |id: &str| {
        memory.answered(answer(id, "ada", "yes"));
        memory.settle();
    };
    remember("a");
    let (chain, elsewhere) = (place.path().join("memory/chain.jsonl"), place.path().join("elsewhere"));
    // A link can be read, and is not written to: the content is written, and its line fails.
    fs::rename(&chain, &elsewhere)?;
    std::os::unix::fs::symlink(&elsewhere, &chain)?;
    remember("b");
    remember("c");
    fs::rename(&elsewhere, &chain)?;
    assert_eq!(verify(place.path(), None)?.contents, 1);
    remember("d");
    let verified = verify(place.path(), None)?;
    assert_eq!((verified.lines, verified.contents), (2, 2));
    Ok(())
}

#[test]
fn no_answer_waits_for_whoever_writes_and_what_is_thought_of_one_that_waits_finds_it() -> Result<()> {
    let place = tempfile::tempdir()?;
    let memory = Arc::new(Memory::open(place.path(), settings(Kept::Full))?);
    Memory::begin(&memory)?;
    let lock = Lock::take(&place.path().join("memory"), &mut |_| {})?;
    let started = Instant::now();
    for id in ["a", "b", "c"] {
        memory.answered(answer(id, "ada", "yes"));
    }
    assert!(started.elapsed() < Duration::from_secs(1));
    thread::scope(|scope| {
        let rating = scope.spawn(|| memory.rate(person("ada"), thought("b", 1, None)).is_ok_and(|kept| kept));
        thread::sleep(Duration::from_millis(200));
        // Others are answered meanwhile.
        memory.answered(answer("d", "bob", "yes"));
        assert!(!rating.is_finished(), "it cannot be written yet");
        drop(lock);
        assert!(rating.join().is_ok_and(|is_kept| is_kept));
    });
    let contents = memory.contents()?;
    let number = contents.iter().find_map(|content| match &content.about {
        About::Feedback { answer_number, .. } => *answer_number,
        About::Answer { .. } => None,
    });
    assert_eq!((contents.len(), number), (5, Some(2)));
    // What waits is written at the end.
    memory.answered(answer("e", "ada", "yes"));
    drop(memory);
    let late = Instant::now() + Duration::from_secs(10);
    while verify(place.path(), None)?.contents < 6 {
        ensure!(Instant::now() < late, "it was not written");
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
