//! `list-models` and `show`.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use anyhow::Result;
use serde_json::json;

use super::{COMMIT, adapter, cached, listed, model, names, program, train, typed};
use crate::support::{Place, fixture, printed_json, refused, run, succeeds};
use crate::terminal::on_terminal_of;

#[test]
fn each_model_says_what_it_came_of_and_each_base_what_there_is_of_it() -> Result<()> {
    let place = Place::new()?;
    let llama = fixture("models/llama");
    train(&place, &llama, "first", &["--eval-fraction", "0.3"])?;
    train(&place, &llama, "second", &["--init-from", "first"])?;
    cached(&place, "hub", "Org/Llama-Tiny", &llama)?;
    cached(&place, "lab", "org/small-gguf", &fixture("models/llama-gguf/model-f32.gguf"))?;
    fs::create_dir_all(place.path("hub/models--org--half/snapshots").join(COMMIT))?;
    let command = |json: bool| {
        let mut command = typed(&place, if json { &["list-models", "--json"] } else { &["list-models"] });
        command.env("HOMEROOM_BASES", place.path("lab"));
        command
    };
    let list = printed_json(&succeeds(&mut command(true))?)?;
    let kinds: Vec<_> = (0..5).map(|at| (list[at]["name"].as_str(), list[at]["kind"].as_str())).collect();
    let expected = [
        ("first", "adapter"),
        ("second", "adapter"),
        ("Org/Llama-Tiny", "base"),
        ("org/half", "base"),
        ("org/small-gguf", "base"),
    ];
    assert_eq!(kinds, expected.map(|(name, kind)| (Some(name), Some(kind))));
    let (first, second) = (&list[0], &list[1]);
    assert_eq!((&first["rows"], &first["eval_rows"], &second["rows"]), (&json!(5), &json!(2), &json!(7)));
    for key in ["eval_loss_before", "eval_loss", "train_loss"] {
        assert!(first[key].as_f64().is_some_and(|loss| loss > 0.0), "{key}: {first}");
    }
    assert_eq!(
        (&first["parent"], &second["parent"], &second["eval_loss"]),
        (&json!(null), &json!("first"), &json!(null))
    );
    let size: u64 =
        fs::read_dir(model(&place, "first"))?.map(|file| Ok(file?.metadata()?.len())).sum::<Result<u64>>()?;
    assert_eq!(first["bytes"], json!(size));
    assert!(first["date"].as_str().is_some_and(|date| date.starts_with("20") && date.ends_with('Z')), "{first}");
    let (own, half, shared) = (&list[2], &list[3], &list[4]);
    assert_eq!(
        (&own["forms"], &own["shared"], &own["commits"]),
        (&json!(["safetensors"]), &json!(false), &json!([COMMIT]))
    );
    let weights = fs::metadata(llama.join("model.safetensors"))?.len();
    assert!(own["bytes"].as_u64().is_some_and(|bytes| bytes > weights), "{own}");
    assert!(half["problem"].as_str().is_some_and(|problem| problem.contains("`homeroom pull org/half`")), "{half}");
    assert_eq!((&shared["shared"], &shared["problem"]), (&json!(true), &json!(null)));

    let lines = succeeds(&mut command(false))?.stdout;
    let lines: Vec<&str> = lines.lines().collect();
    assert_eq!(lines.len(), 5, "{lines:?}");
    let said = [
        &["first ", "adapter", "lora", "5 rows", " → ", " kB ", "on /"][..],
        &["second ", "7 rows", "training loss ", ", from first"],
        &["Org/Llama-Tiny ", "base", "safetensors"],
        &["org/half ", "problem: not all files"],
        &["org/small-gguf:f32 ", "base", " f32 ", "shared, in /"],
    ];
    for (line, words) in lines.iter().zip(said) {
        assert!(words.iter().all(|word| line.contains(word)), "{words:?} in {line}");
    }
    Ok(())
}

#[test]
fn a_list_has_a_line_a_model_on_a_terminal_of_any_width() -> Result<()> {
    let place = Place::new()?;
    let training = json!({"rows": 1204, "result": {"eval_loss_before": 2.8129, "eval_loss": 1.9301}});
    let long = "a-name-that-is-as-long-as-one-may-be-with-letters-and-digits-0123";
    assert_eq!(long.len(), 64 + 1);
    adapter(&place, "algebra", &fixture("models/llama"), &training)?;
    adapter(&place, &long[..64], Path::new("/nowhere/größe/日本"), &training)?;
    cached(&place, "hub", "org/tiny", &fixture("models/llama"))?;
    for width in [20, 40, 80, 132, 400] {
        let seen = on_terminal_of(width, &mut typed(&place, &["list-models"]))?;
        let lines: Vec<&str> = seen.lines().collect();
        let hint = lines.last().is_some_and(|line| line.contains("`homeroom show NAME`"));
        assert!(lines.len() == 7 && lines[0] == "your models" && lines[4] == "bases" && hint, "{width}: {seen}");
        for line in &lines[..6] {
            assert!(line.chars().count() <= width.into(), "{width}: {line}");
        }
        assert!(width < 132 || seen.contains("2.813 → 1.930"), "{width}: {seen}");
        assert!(width < 400 || seen.contains("1,204 rows") && seen.contains("--base-model"), "{width}: {seen}");
    }
    Ok(())
}

#[test]
fn a_damaged_entry_hides_no_other_and_is_shown() -> Result<()> {
    let place = Place::new()?;
    let base = fixture("models/llama");
    adapter(&place, "whole", &base, &json!({"rows": 3}))?;
    let evil = "\u{1b}]0;owned\u{7}\u{202e}\n";
    adapter(&place, "evil", Path::new(evil), &json!({"parent": evil, "finished": evil, "options": {evil: evil}}))?;
    adapter(
        &place,
        "huge",
        &base,
        &json!({"rows": 1e300, "eval_rows": -7, "result": {"eval_loss": 1e308, "steps": u64::MAX}}),
    )?;
    adapter(&place, "most", &base, &json!({"rows": u64::MAX, "result": {"train_loss": -1e-308}}))?;
    adapter(&place, "other-types", &base, &json!(["a", {"b": [null]}]))?;
    adapter(&place, "circle-a", &base, &json!({"parent": "circle-b"}))?;
    adapter(&place, "circle-b", &base, &json!({"parent": "circle-a"}))?;
    adapter(&place, "own-parent", &base, &json!({"parent": "own-parent"}))?;
    fs::create_dir_all(model(&place, "empty"))?;
    place.write("home/models/cut/homeroom.json", "{\"format\": 1")?;
    place.write("home/models/garbage/adapter_model.safetensors", [0xff; 31])?;
    place.write("home/models/short.gguf", b"GGUF\x03")?;
    place.write("home/models/a-file", "no model")?;
    place.write("home/models/Not-A-Name/config.json", "{}")?;
    let unreadable = adapter(&place, "unreadable", &base, &json!({}))?;
    fs::set_permissions(&unreadable, fs::Permissions::from_mode(0o000))?;
    symlink("/nowhere/at/all", model(&place, "nowhere"))?;
    symlink(model(&place, "loop"), model(&place, "loop"))?;
    symlink(model(&place, "whole"), model(&place, "linked"))?;
    let expected = [
        "circle-a",
        "circle-b",
        "cut",
        "empty",
        "evil",
        "garbage",
        "huge",
        "linked",
        "loop",
        "most",
        "nowhere",
        "other-types",
        "own-parent",
        "short.gguf",
        "unreadable",
        "whole",
    ];
    let found = names(&place);
    let lines = succeeds(&mut typed(&place, &["list-models"]));
    for name in expected {
        let shown = succeeds(&mut typed(&place, &["show", name]))?.stdout;
        assert!(!shown.contains('\u{1b}') && shown.starts_with("name      "), "{name}: {shown}");
        let json = printed_json(&succeeds(&mut typed(&place, &["show", name, "--json"]))?)?;
        assert_eq!(json["name"], json!(name));
    }
    fs::set_permissions(&unreadable, fs::Permissions::from_mode(0o700))?;
    assert_eq!(found?, expected);
    let lines = lines?.stdout;
    assert!(lines.lines().count() == expected.len() && !lines.contains('\u{1b}'), "{lines}");
    for (name, fine) in
        [("whole", true), ("linked", true), ("most", true), ("empty", false), ("nowhere", false), ("loop", false)]
    {
        let line = lines.lines().find(|line| line.starts_with(&format!("{name} "))).unwrap_or_default();
        assert!(line.contains("problem: ") != fine && !line.is_empty(), "{line}");
    }
    Ok(())
}

#[test]
fn a_shown_model_says_what_it_went_on_from_and_what_went_on_from_it() -> Result<()> {
    let place = Place::new()?;
    let base = fixture("models/llama");
    train(&place, &base, "a", &["--lora-r", "3", "--target-modules", "v_proj,q_proj", "--eval-fraction", "0.3"])?;
    for (name, parent) in [("b", "a"), ("c", "b"), ("c2", "b"), ("d", "gone")] {
        adapter(&place, name, &base, &json!({"parent": parent, "rows": 5}))?;
    }
    let show = |name: &str| printed_json(&succeeds(&mut typed(&place, &["show", "--json", name]))?);
    let parent = |name: &str, is_there: bool| json!({"name": name, "is_there": is_there});
    for (name, parents, children) in [
        ("a", json!([]), json!(["b"])),
        ("b", json!([parent("a", true)]), json!(["c", "c2"])),
        ("c", json!([parent("b", true), parent("a", true)]), json!([])),
        ("d", json!([parent("gone", false)]), json!([])),
    ] {
        assert_eq!(show(name)?["lineage"], json!({"parents": parents, "children": children}), "{name}");
    }
    let about = show("a")?;
    assert_eq!((&about["r"], &about["target_modules"]), (&json!(3), &json!(["q_proj", "v_proj"])));
    assert_eq!((&about["steps"], &about["strategy"], &about["rows"]), (&json!(2), &json!("lora"), &json!(5)));
    assert!(about["next"].as_str().is_some_and(|next| next.contains("chat --model-dir a ")), "{about}");
    let text = succeeds(&mut typed(&place, &["show", "a"]))?.stdout;
    for words in
        ["children  b", "rank 3, q_proj, v_proj", "held-out before ", "batch size 8", "adapter_model.safetensors "]
    {
        assert!(text.contains(words), "no `{words}` in {text}");
    }
    // A path is shown as well, in the registry or not, and a base with what it is.
    let shown = printed_json(&succeeds(program(&place).args(["show", "--json"]).arg(model(&place, "a")))?)?;
    assert_eq!(shown["name"], json!("a"));
    let base = printed_json(&succeeds(program(&place).args(["show", "--json"]).arg(&base))?)?;
    assert_eq!(
        (&base["kind"], &base["model"]["layers"], &base["model"]["hidden_size"]),
        (&json!("model"), &json!(2), &json!(48))
    );
    Ok(())
}

#[test]
fn a_base_of_the_cache_is_shown_by_its_name_and_one_that_is_not_there_is_suggested() -> Result<()> {
    let place = Place::new()?;
    let folder = cached(&place, "hub", "org/tiny-model", &fixture("models/llama"))?;
    adapter(&place, "tutor", &fixture("models/llama"), &json!({}))?;
    let about = printed_json(&succeeds(&mut typed(&place, &["show", "--json", "org/tiny-model"]))?)?;
    assert_eq!((&about["kind"], &about["base_revision"]), (&json!("base"), &json!(COMMIT)));
    assert_eq!(about["path"], json!(folder.join("snapshots").join(COMMIT)));
    refused(&mut typed(&place, &["show", "tutr"]), &["no such model", "did you mean `tutor`?"])?;
    refused(&mut typed(&place, &["show", "org/tiny"]), &["org/tiny: not on this machine", "homeroom pull org/tiny"])?;
    for name in ["./x", "/nowhere/x", "a b"] {
        refused(&mut typed(&place, &["show", name]), &[])?;
    }
    assert_eq!(listed(&place)?.len(), 2);
    Ok(())
}

/// Its path is another machine's; by its name on the hub it is found, or what to do is said.
#[test]
fn an_adapter_on_a_base_of_the_hub_says_how_to_fetch_it_and_is_fine_where_it_is_cached() -> Result<()> {
    let place = Place::new()?;
    let directory = adapter(&place, "tutor", Path::new("/another/machine"), &json!({}))?;
    let path = directory.join("homeroom.json");
    let mut manifest: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path)?)?;
    manifest["base"]["name"] = json!("Org/Tiny");
    manifest["base"]["revision"] = json!(COMMIT);
    fs::write(&path, manifest.to_string())?;
    let problem = || Ok::<_, anyhow::Error>(listed(&place)?.first().map(|entry| entry["problem"].clone()));
    let missing = problem()?.unwrap_or_default();
    let pull = format!("`homeroom pull Org/Tiny@{COMMIT}`");
    assert!(missing.as_str().is_some_and(|text| text.contains(&pull) && text.contains("--base-model")), "{missing}");
    // PEFT's own names its base in one field.
    fs::remove_file(&path)?;
    let config = directory.join("adapter_config.json");
    let mut peft: serde_json::Value = serde_json::from_str(&fs::read_to_string(&config)?)?;
    peft["base_model_name_or_path"] = json!("Org/Tiny");
    fs::write(&config, peft.to_string())?;
    let missing = problem()?.unwrap_or_default();
    assert!(missing.as_str().is_some_and(|text| text.contains("`homeroom pull Org/Tiny`")), "{missing}");
    assert!(succeeds(&mut typed(&place, &["list-models"]))?.stdout.contains("on Org/Tiny"));

    cached(&place, "hub", "Org/Tiny", &fixture("models/llama"))?;
    assert_eq!(problem()?, Some(json!(null)));
    fs::write(&path, manifest.to_string())?;
    assert_eq!(
        listed(&place)?.iter().find(|entry| entry["name"] == "tutor").map(|entry| entry["problem"].clone()),
        Some(json!(null))
    );
    // At another commit, whose weights may be the same, it is not missed before it is loaded.
    let revision = manifest["base"]["revision"].clone();
    manifest["base"]["revision"] = json!("f".repeat(40));
    fs::write(&path, manifest.to_string())?;
    assert_eq!(listed(&place)?[1]["problem"], json!(null));
    manifest["base"]["revision"] = revision;
    fs::write(&path, manifest.to_string())?;
    // Whoever removes the base is told, and nobody is where a shared store has it, too.
    refused(&mut typed(&place, &["rm", "Org/Tiny"]), &["still needed by 1 adapter"])?;
    cached(&place, "lab", "Org/Tiny", &fixture("models/llama"))?;
    succeeds(typed(&place, &["rm", "Org/Tiny"]).env("HOMEROOM_BASES", place.path("lab"))).map(drop)
}

#[test]
fn each_quantization_is_listed_by_what_can_be_typed_for_it_and_shown_by_the_bare_name() -> Result<()> {
    let place = Place::new()?;
    let files = place.path("gguf");
    fs::create_dir(&files)?;
    for name in ["m-UD-Q4_K.gguf", "m-Q4_K.gguf", "m-f32.gguf"] {
        fs::copy(fixture("models/llama-gguf/model-f32.gguf"), files.join(name))?;
    }
    // A second file of the same bytes would be the same blob.
    let folder = cached(&place, "hub", "org/m-GGUF", &fixture("models/llama-gguf/model-f32.gguf"))?;
    let snapshot = folder.join("snapshots").join(COMMIT);
    fs::remove_file(snapshot.join("model-f32.gguf"))?;
    for name in ["m-UD-Q4_K.gguf", "m-Q4_K.gguf", "m-f32.gguf"] {
        fs::copy(files.join(name), snapshot.join(name))?;
    }
    let lines = succeeds(&mut typed(&place, &["list-models"]))?.stdout;
    let listed: Vec<&str> = lines.lines().filter_map(|line| line.split(' ').next()).collect();
    assert_eq!(listed, ["org/m-GGUF:m-Q4_K", "org/m-GGUF:m-UD-Q4_K", "org/m-GGUF:f32"]);
    for name in &listed {
        let shown = printed_json(&succeeds(&mut typed(&place, &["show", "--json", name]))?)?;
        assert_eq!((&shown["problem"], &shown["model"]["layers"]), (&json!(null), &json!(2)), "{name}");
        succeeds(&mut typed(&place, &["chat", "--model-dir", name, "--prompt", "hi", "--max-tokens", "1"]))?;
    }
    let text = succeeds(&mut typed(&place, &["show", "org/m-GGUF"]))?.stdout;
    assert!(!text.contains("problem") && listed.iter().all(|name| text.contains(name)), "{text}");
    assert!(text.contains("next      homeroom fine-tune --model-name org/m-GGUF:"), "{text}");
    assert!(text.contains("date      downloaded 20"), "{text}");
    Ok(())
}

#[test]
fn a_base_that_is_cut_short_or_not_allowed_says_so() -> Result<()> {
    let place = Place::new()?;
    for (repo, from) in [("org/cut", "models/llama"), ("org/cut-gguf", "models/llama-gguf/model-f32.gguf")] {
        let folder = cached(&place, "lab", repo, &fixture(from))?;
        let file = Path::new(from).file_name().filter(|_| from.ends_with("gguf"));
        let file = file.unwrap_or("model.safetensors".as_ref());
        let blob = folder.join("snapshots").join(COMMIT).join(file).canonicalize()?;
        let bytes = fs::read(&blob)?;
        fs::write(&blob, &bytes[..bytes.len() - 7])?;
    }
    cached(&place, "lab", "org/fine", &fixture("models/llama"))?;
    let list = |place: &Place| {
        let mut command = typed(place, &["list-models", "--json"]);
        printed_json(&succeeds(command.env("HOMEROOM_BASES", place.path("lab")))?)
    };
    let all = list(&place)?;
    let problems: Vec<&str> = (0..3).map(|at| all[at]["problem"].as_str().unwrap_or_default()).collect();
    assert!(problems[0].starts_with("model.safetensors: not a whole"), "{problems:?}");
    assert!(problems[1].starts_with("model-f32.gguf: ") && problems[2].is_empty(), "{problems:?}");
    place.write("home/allowed-bases.txt", "school/*\n")?;
    let all = list(&place)?;
    assert_eq!((&all[2]["problem"], &all[2]["forms"]), (&json!("not allowed here"), &json!(["safetensors"])));
    let mut show = typed(&place, &["show", "org/fine"]);
    let text = succeeds(show.env("HOMEROOM_BASES", place.path("lab")))?.stdout;
    assert!(text.contains("problem   not allowed here, as no line of /") && text.contains(COMMIT), "{text}");
    refused(
        typed(&place, &["rm", "org/fine"]).env("HOMEROOM_BASES", place.path("lab")),
        &["which is only read", "hint: whoever keeps that store removes it there"],
    )
}

#[test]
fn only_what_is_a_model_is_suggested() -> Result<()> {
    let place = Place::new()?;
    let work = place.path("work");
    for directory in ["nopa", "tutar"] {
        fs::create_dir_all(work.join(directory))?;
    }
    place.copy(&fixture("curves/lora/trained"), "work/outputs/tutor")?;
    adapter(&place, "tiny-llama-instruct", &fixture("models/llama"), &json!({}))?;
    cached(&place, "hub", "Org/Small-Instruct", &fixture("models/llama"))?;
    let hint = "hint: `homeroom list-models` shows those that are here";
    for (words, near) in [
        (&["rm", "nope"][..], None),
        (&["cp", "nope", "new"], None),
        (&["show", "nope"], None),
        (&["show", "tutr"], None),
        (&["show", "outputs/tutr"], Some("outputs/tutor")),
        (&["rm", "Tiny-Llama-Instruct"], Some("tiny-llama-instruct")),
        (&["cp", "tiny-lama-instruct", "new"], Some("tiny-llama-instruct")),
        (&["show", "Small-Instruct"], Some("Org/Small-Instruct")),
        (&["rm", "small-instruct"], Some("Org/Small-Instruct")),
        (&["export-model", "--model-dir", "Small-Instrukt"], Some("Org/Small-Instruct")),
        (&["chat", "--model-dir", "nope", "--prompt", "x"], None),
    ] {
        let ran = run(typed(&place, words).current_dir(&work))?;
        let said = &ran.stderr;
        let suggested = near.map(|near| format!("did you mean `{near}`?"));
        assert!(ran.code == Some(1) && said.contains("hint: "), "{words:?}: {said}");
        assert_eq!(said.matches("did you mean").count(), usize::from(near.is_some()), "{words:?}: {said}");
        assert!(suggested.is_none_or(|suggested| said.contains(&suggested)), "{words:?}: {said}");
    }
    let ran = run(typed(&place, &["rm", "nope", "none"]).current_dir(&work))?;
    assert_eq!(ran.stderr.matches(hint).count(), 1, "{}", ran.stderr);
    let long = "A".repeat(100_000);
    for words in [&["rm", long.as_str()][..], &["cp", "tiny-llama-instruct", &long]] {
        let ran = run(&mut typed(&place, words))?;
        assert!(ran.code == Some(1) && ran.stderr.len() < 1000, "{}", ran.stderr.len());
    }
    Ok(())
}

/// What a link leads to may be a whole disk.
#[test]
fn a_link_to_everything_is_listed_at_once_and_not_copied() -> Result<()> {
    let place = Place::new()?;
    fs::create_dir_all(place.path("home/models"))?;
    symlink("/", model(&place, "all"))?;
    fs::create_dir(model(&place, "empty"))?;
    symlink("/nowhere/at/all", model(&place, "nowhere"))?;
    let list = listed(&place)?;
    assert_eq!((&list[0]["name"], &list[0]["bytes"]), (&json!("all"), &json!(0)));
    for (name, why) in [
        ("all", "no weights of a model are in it"),
        ("empty", "no weights of a model are in it"),
        ("nowhere", "a link to /nowhere/at/all, which is not there"),
    ] {
        refused(&mut typed(&place, &["cp", name, "new"]), &[why])?;
    }
    // Losses that another program wrote take no more room than others.
    adapter(&place, "huge", &fixture("models/llama"), &json!({"result": {"train_loss": 1e308}}))?;
    let lines = succeeds(&mut typed(&place, &["list-models"]))?.stdout;
    assert!(lines.contains("training loss 1.000e308") && lines.lines().all(|line| line.len() < 400), "{lines}");
    let many = model(&place, "many");
    fs::create_dir(&many)?;
    for at in 0..1100 {
        fs::write(many.join(format!("{at}.safetensors")), "")?;
    }
    refused(&mut typed(&place, &["cp", "many", "new"]), &["1100 files, and a model has at most 800"])
}
