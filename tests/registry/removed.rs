//! `rm` and `cp`, one at a time and several at once.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Child;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::{adapter, cached, entries, listed, model, names, program, train, typed};
use crate::support::{Place, fixture, printed_json, refused, succeeds};

/// What a directory holds, by name.
fn contents(path: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let files = fs::read_dir(path)?.map(|entry| {
        let path = entry?.path();
        Ok((path.file_name().unwrap_or_default().to_string_lossy().into_owned(), fs::read(&path)?))
    });
    let mut files = files.collect::<Result<Vec<_>>>()?;
    files.sort();
    Ok(files)
}

#[test]
fn what_others_need_is_removed_only_by_force_and_what_is_whole_in_itself_stays() -> Result<()> {
    let place = Place::new()?;
    place.copy(&fixture("models/llama"), "home/models/base")?;
    adapter(&place, "quiz", &model(&place, "base"), &json!({}))?;
    adapter(&place, "quiz-2", &model(&place, "base"), &json!({"parent": "quiz"}))?;
    adapter(&place, "apart", &fixture("models/llama"), &json!({}))?;
    let run_of = adapter(&place, "of-a-run", &model(&place, "base"), &json!({}))?;
    fs::create_dir_all(place.path("home/runs/quickstart-7/adapters"))?;
    fs::rename(run_of, place.path("home/runs/quickstart-7/adapters/3"))?;
    let path = model(&place, "base");
    let handlers = format!(
        "[handlers.maths]\nkind = \"local\"\nmodel = \"base\"\n[handlers.same]\nkind = \"local\"\nmodel = \"apart\"\nbase_model = \"{}\"\n\
         [handlers.near]\nkind = \"local\"\nmodel = \"models/base\"\n\
         [handlers.far]\nkind = \"openai\"\nmodel = \"base\"\nbase_url = 7\n",
        path.display()
    );
    place.write("home/handlers.toml", &handlers)?;

    let dry = succeeds(&mut typed(&place, &["rm", "--dry-run", "--json", "base", "base"]))?;
    let needed = json!({
        "adapters": ["quiz", "quiz-2"], "runs": ["quickstart-7/3"], "handlers": ["maths", "near", "same"], "models": [],
    });
    let about = &printed_json(&dry)?[0];
    assert_eq!(
        (&about["needed_by"], &about["removed"], about.as_object().map(|about| about.len())),
        (&needed, &json!(false), Some(5))
    );
    assert!(dry.stderr.contains("refused without --force"), "{}", dry.stderr);
    refused(
        &mut typed(&place, &["rm", "base"]),
        &["still needed by 3 adapters and 3 handlers", "`homeroom rm --force base`"],
    )?;
    // What goes together orphans nobody; the run and the handlers still do.
    refused(&mut typed(&place, &["rm", "base", "quiz", "quiz-2"]), &["still needed by 1 adapter and 3 handlers"])?;
    assert_eq!(names(&place)?, ["apart", "base", "quiz", "quiz-2"]);

    let gone = succeeds(&mut typed(&place, &["rm", "quiz"]))?.stderr;
    assert!(gone.contains("which are whole without it: quiz-2"), "{gone}");
    let gone = succeeds(&mut typed(&place, &["rm", "--force", "base"]))?.stderr;
    assert!(
        gone.contains("do not run without it: quiz-2") && gone.contains("handlers.toml: maths, near, same"),
        "{gone}"
    );
    assert_eq!(entries(&place)?, ["apart", "quiz-2"]);
    assert!(listed(&place)?[1]["problem"].as_str().is_some_and(|problem| problem.contains("its base is not there")));
    // A file of handlers that cannot be read stops nobody, and is told.
    place.write("home/handlers.toml", "[handlers.x\n")?;
    let gone = succeeds(&mut typed(&place, &["rm", "apart"]))?.stderr;
    assert!(gone.contains("note: ") && gone.contains("handlers.toml: not TOML"), "{gone}");
    Ok(())
}

#[test]
fn only_what_has_a_name_is_removed_and_a_link_leads_to_nothing_that_is() -> Result<()> {
    let place = Place::new()?;
    let outside = place.copy(&fixture("models/llama"), "outside")?;
    adapter(&place, "keep", &outside, &json!({}))?;
    place.write("home/models/notes.txt", "mine")?;
    place.write("home/secret", "mine")?;
    symlink(&outside, model(&place, "linked"))?;
    symlink("/nowhere/at/all", model(&place, "broken"))?;
    fs::create_dir(model(&place, "holds-links"))?;
    symlink(&outside, model(&place, "holds-links/inside"))?;
    symlink(outside.join("config.json"), model(&place, "holds-links/config.json"))?;
    let before = contents(&outside)?;
    for name in ["..", ".", "", "/", "keep/", "./keep", "../models/keep", "keep/..", "a b", "notes.txt", "KEEP", "*"] {
        refused(&mut typed(&place, &["rm", "--force", name]), &[])?;
    }
    refused(program(&place).arg("rm").arg(model(&place, "keep")), &["is no name of a model", "homeroom list-models"])?;
    refused(&mut typed(&place, &["rm", "kepe"]), &["no such model, did you mean `keep`?"])?;
    // One wrong name, and nothing is removed.
    refused(
        &mut typed(&place, &["rm", "linked", "kepe", "gone"]),
        &["kepe: no such", "gone: no such", "nothing is removed"],
    )?;
    assert_eq!(entries(&place)?, ["broken", "holds-links", "keep", "linked", "notes.txt"]);
    let gone = succeeds(&mut typed(&place, &["rm", "linked", "broken", "holds-links"]))?.stderr;
    assert!(gone.contains("linked   the link alone"), "{gone}");
    assert_eq!(entries(&place)?, ["keep", "notes.txt"]);
    assert_eq!(contents(&outside)?, before);
    assert_eq!(fs::read_to_string(place.path("home/secret"))?, "mine");
    Ok(())
}

#[test]
fn a_base_is_removed_from_the_users_cache_and_never_from_a_shared_store() -> Result<()> {
    let place = Place::new()?;
    let own = cached(&place, "hub", "org/tiny", &fixture("models/llama"))?;
    let shared = cached(&place, "lab", "org/tiny", &fixture("models/llama"))?;
    let snapshot = fs::read_dir(own.join("snapshots"))?.next().expect("there is one")?.path();
    adapter(&place, "tutor", &snapshot, &json!({}))?;
    refused(&mut typed(&place, &["rm", "org/tiny"]), &["still needed by 1 adapter"])?;
    refused(
        &mut typed(&place, &["rm", "org/tiny@main"]),
        &["removed with all that there is of it", "`homeroom rm org/tiny`"],
    )?;
    refused(&mut typed(&place, &["rm", "org/other"]), &["no such base in the cache"])?;
    let command = |words: &[&str]| {
        let mut command = typed(&place, words);
        command.env("HOMEROOM_BASES", place.path("lab"));
        command
    };
    let gone = succeeds(&mut command(&["rm", "--force", "org/tiny"]))?.stderr;
    assert!(gone.contains("the cache that Python's programs use, too"), "{gone}");
    assert!(!own.exists() && shared.join("refs/main").exists());
    refused(&mut command(&["rm", "--force", "org/tiny"]), &["a store that is shared, which is only read"])?;
    assert!(shared.join("refs/main").exists());
    // What a link leads to stays, and is not said to be freed.
    let linked = cached(&place, "hub", "org/linked", &fixture("models/llama"))?;
    let kept = place.path("kept");
    fs::rename(linked.join("blobs"), &kept)?;
    symlink(&kept, linked.join("blobs"))?;
    let count = fs::read_dir(&kept)?.count();
    let gone = printed_json(&succeeds(&mut command(&["rm", "--json", "org/linked"]))?)?;
    assert!(!linked.exists() && fs::read_dir(&kept)?.count() == count);
    assert_eq!(gone[0]["bytes"], json!(40));
    Ok(())
}

#[test]
fn a_copy_is_the_same_model_of_its_own_files_and_private() -> Result<()> {
    let place = Place::new()?;
    train(&place, &fixture("models/llama"), "first", &[])?;
    train(&place, &fixture("models/llama"), "second", &["--init-from", "first"])?;
    // Links become files, and what is no file of the model's stays.
    let outside = place.write("chat_template.jinja", "{{ 7 }}")?;
    symlink(&outside, model(&place, "second/chat_template.jinja"))?;
    fs::create_dir(model(&place, "second/mine"))?;
    succeeds(&mut typed(&place, &["cp", "second", "third"]))?;
    let (mut from, to) = (contents(&model(&place, "first"))?, contents(&model(&place, "third"))?);
    from.clear();
    for entry in fs::read_dir(model(&place, "second"))? {
        let path = entry?.path();
        if path.is_file() {
            from.push((path.file_name().unwrap_or_default().to_string_lossy().into_owned(), fs::read(&path)?));
        }
    }
    from.sort();
    assert_eq!(from, to);
    let mode = |path: &Path| -> Result<u32> { Ok(fs::symlink_metadata(path)?.permissions().mode() & 0o777) };
    assert_eq!((mode(&model(&place, "third"))?, mode(&model(&place, "third/chat_template.jinja"))?), (0o700, 0o600));
    assert_eq!(listed(&place)?[2]["parent"], json!("first"));

    refused(
        &mut typed(&place, &["cp", "second", "third"]),
        &["third: a model of this name is there already", "--overwrite"],
    )?;
    refused(&mut typed(&place, &["cp", "second", "second", "--overwrite"]), &["it has that name already"])?;
    refused(&mut typed(&place, &["cp", "secnd", "x"]), &["no such model, did you mean `second`?"])?;
    for bad in ["..", "", "a/b", "Upper"] {
        refused(&mut typed(&place, &["cp", "second", bad]), &["is not a model's name"])?;
    }
    place.write("home/models/third/notes.txt", "mine")?;
    refused(
        &mut typed(&place, &["cp", "first", "third", "--overwrite"]),
        &["holds `notes.txt`, which is no part of a model"],
    )?;
    fs::remove_file(model(&place, "third/notes.txt"))?;
    succeeds(&mut typed(&place, &["cp", "first", "third", "--overwrite"]))?;
    assert_eq!(contents(&model(&place, "third"))?, contents(&model(&place, "first"))?);
    // A model that is a link is copied as what it leads to.
    symlink(model(&place, "first"), model(&place, "linked"))?;
    succeeds(&mut typed(&place, &["cp", "linked", "fourth"]))?;
    assert!(!model(&place, "fourth").is_symlink());
    assert_eq!(contents(&model(&place, "fourth"))?, contents(&model(&place, "first"))?);
    assert_eq!(entries(&place)?, ["first", "fourth", "linked", "second", "third"]);
    Ok(())
}

/// How many of several processes end well; none of them panics, and those that do not say why.
fn together(mut commands: Vec<std::process::Command>, why: &[&str]) -> Result<usize> {
    use std::process::Stdio;
    let started: Vec<Child> = commands
        .iter_mut()
        .map(|command| Ok(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?))
        .collect::<Result<_>>()?;
    let mut well = 0;
    for child in started {
        let output = child.wait_with_output()?;
        let said = String::from_utf8(output.stderr)?;
        ensure!(!said.contains("panicked at"), "{said}");
        match output.status.code() {
            Some(0) => well += 1,
            Some(1) => ensure!(why.iter().any(|why| said.contains(why)), "{said}"),
            code => anyhow::bail!("{code:?}: {said}"),
        }
    }
    Ok(well)
}

#[test]
fn of_several_that_change_one_name_at_once_each_finds_a_whole_model_or_none() -> Result<()> {
    let place = Place::new()?;
    for name in ["x", "y"] {
        adapter(&place, name, &fixture("models/llama"), &json!({"rows": if name == "x" { 3 } else { 5 }}))?;
    }
    let many = |words: &[&str], count: usize| (0..count).map(|_| typed(&place, words)).collect::<Vec<_>>();
    let taken = ["a model of this name is there already", "another process has taken this name"];
    assert_eq!(together(many(&["cp", "x", "new"], 9), &taken)?, 1);
    assert_eq!(together(many(&["rm", "new"], 7), &["no such model", "another process has removed it"])?, 1);
    assert_eq!(entries(&place)?, ["x", "y"]);
    assert_eq!(together(many(&["cp", "x", "new", "--overwrite"], 9), &[])?, 9);
    // All kinds at once: every reader and writer finds one of both, or none.
    let source = fixture("curves/lora/trained");
    for _ in 0..5 {
        let mut commands = many(&["cp", "x", "new", "--overwrite"], 2);
        commands.extend(many(&["cp", "y", "new", "--overwrite"], 2));
        commands.extend(many(&["rm", "new"], 2));
        commands.extend(many(&["cp", "new", "other", "--overwrite"], 2));
        commands.extend(many(&["list-models"], 2));
        let mut import = typed(&place, &["import", "--name", "new", "--overwrite"]);
        import.arg(&source);
        commands.push(import);
        let none = ["no such model", "another process has removed it", "cannot open", "No such file"];
        let well = together(commands, &none)?;
        assert!(well >= 7, "{well}");
        for entry in listed(&place)? {
            let problem = entry["problem"].as_str().unwrap_or_default();
            assert!(problem.is_empty() || problem.contains("its base is not there"), "{entry}");
        }
        assert!(
            entries(&place)?.iter().all(|name| ["new", "other", "x", "y"].contains(&name.as_str())),
            "{:?}",
            entries(&place)?
        );
    }
    Ok(())
}

#[test]
fn a_training_is_not_harmed_by_what_is_removed_beside_it() -> Result<()> {
    let place = Place::new()?;
    adapter(&place, "old", &fixture("models/llama"), &json!({}))?;
    place.rows("rows.jsonl", 7)?;
    let mut command = typed(&place, &["fine-tune", "--max-steps", "300", "--name", "old", "--overwrite"]);
    command.arg("--model-name").arg(fixture("models/llama")).arg("--training-file").arg(place.path("rows.jsonl"));
    let mut training = command.spawn()?;
    // Its place too, which is then free.
    for number in 0..9 {
        let name = if number == 0 { "old" } else { "other" };
        succeeds(&mut typed(&place, &["rm", name]))?;
        adapter(&place, "other", &fixture("models/llama"), &json!({}))?;
    }
    succeeds(&mut typed(&place, &["rm", "other"]))?;
    ensure!(training.wait()?.success());
    let list = listed(&place)?;
    assert_eq!((list.len(), &list[0]["rows"], &list[0]["problem"]), (1, &json!(7), &Value::Null));
    assert_eq!(entries(&place)?, ["old"]);
    Ok(())
}
