//! Commands that are given a name of the hub.

use super::*;
use crate::command_line::read_json;
use crate::support::{eval, homeroom, loss, printed_json, refused, run, succeeds};

#[test]
fn a_model_is_trained_by_its_name_and_the_result_says_which_it_was() -> Result<()> {
    let place = Place::new()?;
    let (hub, rows, home) = (Hub::with_model(&place, "llama")?, place.rows("klasse-7.jsonl", 5)?, place.path("home"));
    let mut train = homeroom();
    train.args(["fine-tune", "--model-name", NAME, "--max-steps", "2", "--learning-rate", "1e-2", "--training-file"]);
    train.arg(&rows).env("HOMEROOM_HOME", &home).current_dir(place.path("outputs"));
    let ran = succeeds(hub.seen_by(&mut train))?;
    assert!(ran.stderr.contains("model     Org-7/tiny_Llama.v2@1a2b3c4   "), "{}", ran.stderr);
    // What the result is called comes from the rows, as always.
    let adapter = home.join("models/klasse-7");
    let peft = read_json(&adapter.join("adapter_config.json"))?;
    assert_eq!((&peft["base_model_name_or_path"], &peft["revision"]), (&NAME.into(), &FIRST.into()));
    let base = &read_json(&adapter.join("homeroom.json"))?["base"];
    assert_eq!((&base["name"], &base["revision"]), (&NAME.into(), &FIRST.into()));
    let snapshot = hub.snapshot(NAME, FIRST).canonicalize()?;
    assert_eq!(base["path"], snapshot.display().to_string());
    // By its name and by its path it is one model; a path into the cache is known for what it is.
    let of = |model: &Path| -> Result<f64> {
        let mut eval = eval(model, &rows);
        hub.seen_by(&mut eval).env("HOMEROOM_HOME", &home).current_dir(place.path("outputs"));
        printed_json(&succeeds(&mut eval)?)?["loss"].as_f64().context("a loss is a number")
    };
    let untrained = of(Path::new(NAME))?;
    assert_eq!(untrained.to_bits(), loss(&fixture("models/llama"), &rows)?.to_bits());
    assert!(of(Path::new("klasse-7"))? < untrained);
    let mut train = place.fine_tune(&hub.snapshot(NAME, FIRST), &rows);
    let ran = succeeds(hub.seen_by(train.args(["--max-steps", "1"])))?;
    assert!(ran.stderr.contains("model     Org-7/tiny_Llama.v2@1a2b3c4   "), "{}", ran.stderr);
    assert_eq!(read_json(&place.path("outputs/out/adapter_config.json"))?["base_model_name_or_path"], NAME);
    // Without a store around it it is a path.
    let mut train = place.fine_tune(&hub.snapshot(NAME, FIRST), &rows);
    succeeds(train.args(["--max-steps", "1", "--overwrite"]))?;
    let peft = read_json(&place.path("outputs/out/adapter_config.json"))?;
    assert_eq!(peft["base_model_name_or_path"], snapshot.display().to_string());
    assert!(peft.get("revision").is_none());
    Ok(())
}

#[test]
fn every_command_takes_a_name_of_the_hub_and_says_the_same_of_it_as_of_the_directory() -> Result<()> {
    let place = Place::new()?;
    let hub = Hub::with_model(&place, "qwen2")?;
    hub.set(NAME, "refs/pr/7", FIRST)?;
    let chat = |model: &str| -> Result<String> {
        let mut chat = homeroom();
        chat.args(["chat", "--prompt", "hi", "--max-tokens", "5", "--temperature", "0", "--model-dir", model]);
        Ok(succeeds(hub.seen_by(chat.current_dir(place.path("outputs"))))?.stdout)
    };
    let expected = chat(&fixture("models/qwen2").display().to_string())?;
    for name in [
        NAME.to_owned(),
        format!("{NAME}@main"),
        format!("{NAME}@refs/pr/7"),
        format!("{NAME}@{FIRST}"),
        format!("hf.co/{NAME}"),
    ] {
        assert_eq!(chat(&name)?, expected, "{name}");
    }
    // What is there as a path wins.
    place.copy(&fixture("models/llama"), &format!("outputs/{NAME}"))?;
    assert_ne!(chat(NAME)?, expected);
    fs::remove_dir_all(place.path("outputs/Org-7"))?;
    let mut bench = homeroom();
    bench.args(["bench", "decode", "--model-dir", NAME, "--prompt", "3", "--tokens", "2", "--json"]);
    let ran = succeeds(hub.seen_by(&mut bench))?;
    assert!(ran.stderr.contains("model     Org-7/tiny_Llama.v2@1a2b3c4   "), "{}", ran.stderr);
    let mut bench = homeroom();
    bench.args(["bench", "train", "--model-name", NAME, "--seq-len", "8", "--batch-size", "1", "--steps", "1"]);
    succeeds(hub.seen_by(&mut bench))?;
    Ok(())
}

#[test]
fn one_of_several_gguf_files_is_named_behind_a_colon() -> Result<()> {
    let place = Place::new()?;
    let (rows, from) = (place.rows("rows.jsonl", 4)?, fixture("models/llama-gguf"));
    let files = [("odd-name_1.F32.gguf", "model-f32.gguf"), ("odd-name_1-Q4_K_M.gguf", "model-mixed.gguf")];
    let files = files.map(|(name, file)| (name.to_owned(), from.join(file)));
    let hub = Hub(place.path("hub"));
    hub.add("o/m-GGUF", FIRST, &files.iter().cloned().collect())?;
    hub.set("o/m-GGUF", "main", FIRST)?;
    let mut losses = Vec::new();
    for ((_, file), name) in files.iter().zip(["o/m-GGUF:f32", "o/m-GGUF:Q4_K_M"]) {
        let found = printed_json(&succeeds(hub.seen_by(&mut eval(Path::new(name), &rows)))?)?["loss"].as_f64();
        assert_eq!(found, Some(loss(file, &rows)?), "{name}");
        losses.push(found);
    }
    assert_ne!(losses[0], losses[1]);
    let mut train = place.fine_tune(Path::new("o/m-GGUF:q4_k_m"), &rows);
    let ran = succeeds(hub.seen_by(train.args(["--max-steps", "1"])))?;
    assert!(ran.stderr.contains("model     o/m-GGUF@1a2b3c4:Q4_K_M   "), "{}", ran.stderr);
    let out = place.path("outputs/out");
    let base = read_json(&out.join("homeroom.json"))?["base"].clone();
    assert_eq!((&base["name"], &base["revision"]), (&"o/m-GGUF:Q4_K_M".into(), &FIRST.into()));
    assert_eq!(read_json(&out.join("adapter_config.json"))?["base_model_name_or_path"], "o/m-GGUF");
    succeeds(hub.seen_by(&mut eval(&out, &rows)))?;
    // A name of the result that nothing else gives is made of the model's.
    let unnamed = place.write("练习.jsonl", fs::read(&rows)?)?;
    let mut train = homeroom();
    train.args(["fine-tune", "--model-name", "o/m-GGUF:Q4_K_M", "--max-steps", "1", "--training-file"]).arg(unnamed);
    let ran = succeeds(hub.seen_by(train.env("HOMEROOM_HOME", place.path("home"))))?;
    assert!(ran.stderr.contains("name      m-gguf-q4_k_m   "), "{}", ran.stderr);
    Ok(())
}

#[test]
fn a_name_that_is_not_here_is_answered_with_the_nearest_or_with_what_fetches_it() -> Result<()> {
    let place = Place::new()?;
    let (hub, rows) = (Hub::with_model(&place, "llama")?, place.rows("rows.jsonl", 2)?);
    fs::create_dir(place.path("outputs/Qwen"))?;
    fs::create_dir(place.path("lab"))?;
    let bring = [
        "on a machine with a network `HF_HUB_CACHE=/media/stick homeroom pull Qwen7/Qwen2.5-0.5B`",
        "here `homeroom import /media/stick/models--Qwen7--Qwen2.5-0.5B`; looked in: ",
    ];
    let cache = hub.0.display().to_string();
    let stores = format!("looked in: {cache}, {}", place.path("lab").display());
    for (name, words) in [
        (
            "Qwen7/Qwen2.5-0.5B",
            vec![
                "error: Qwen7/Qwen2.5-0.5B: not on this machine; nothing is downloaded (HF_HUB_OFFLINE)\n",
                bring[0],
                bring[1],
                &stores,
            ],
        ),
        (
            "org-7/tiny_llama.v2",
            vec!["did you mean `Org-7/tiny_Llama.v2`?", "if not, bring it: ", "homeroom pull org-7/"],
        ),
        ("Org-7/tiny_Lama.v2", vec!["did you mean `Org-7/tiny_Llama.v2`?"]),
        (
            "Org-7/tiny_Llama.v2@v9",
            vec![
                "@v9: not on this machine, which has safetensors of it at 1a2b3c4d5e6f; ",
                "pull Org-7/tiny_Llama.v2@v9`",
            ],
        ),
        (
            "Qwen/Qwen2.5",
            vec![
                "`Qwen` is a directory here",
                "if a model of the Hugging Face hub is meant, ",
                "homeroom pull Qwen/Qwen2.5`",
            ],
        ),
        ("tiny_Llama", vec!["no such model", "`owner/name`"]),
    ] {
        for with in ["eval --model-dir", "eval --base-model"] {
            let mut command = match with {
                "eval --model-dir" => eval(Path::new(name), &rows),
                _ => {
                    let mut command = eval(&fixture("curves/lora/trained"), &rows);
                    command.args(["--base-model", name]);
                    command
                }
            };
            command.env("HOMEROOM_BASES", place.path("lab"));
            refused(hub.seen_by(command.current_dir(place.path("outputs"))), &words)?;
        }
        let mut train = place.fine_tune(Path::new(name), &rows);
        train.env("HOMEROOM_BASES", place.path("lab"));
        refused(hub.seen_by(train.current_dir(place.path("outputs"))), &words)?;
    }
    // A path is none, and what is no model is none of the hub's.
    for path in ["./models/none", "models/none.gguf", "models/none.safetensors", "~/models/none", "a/b/c"] {
        let ran = run(hub.seen_by(&mut eval(Path::new(path), &rows)))?;
        assert!(ran.code == Some(1) && !ran.stderr.contains("homeroom pull"), "{path}: {}", ran.stderr);
    }
    assert_eq!(place.outputs()?, ["Qwen"]);
    Ok(())
}

#[test]
fn a_directory_called_as_an_owner_hides_no_model_of_the_cache() -> Result<()> {
    let place = Place::new()?;
    let (hub, rows) = (Hub::with_model(&place, "llama")?, place.rows("rows.jsonl", 2)?);
    fs::create_dir(place.path("outputs/Org-7"))?;
    let eval = |name: &str| -> Result<crate::support::Ran> {
        succeeds(hub.seen_by(eval(Path::new(name), &rows).current_dir(place.path("outputs"))))
    };
    let expected = eval(NAME)?.stdout;
    // Nor does one that has the whole name: it wins, which is said.
    place.copy(&fixture("models/mistral"), &format!("outputs/{NAME}"))?;
    let shadowed = eval(NAME)?;
    assert_ne!(shadowed.stdout, expected);
    let note = format!("note: `{NAME}` means ./{NAME} here; the model of that name is {}", hub.0.display());
    assert!(shadowed.stderr.contains(&note), "{}", shadowed.stderr);
    assert_eq!(eval(&format!("{NAME}@main"))?.stdout, expected);
    Ok(())
}

#[test]
fn a_quantization_that_is_not_here_is_told_with_those_that_are() -> Result<()> {
    let place = Place::new()?;
    let (rows, from) = (place.rows("rows.jsonl", 2)?, fixture("models/llama-gguf/model-mixed.gguf"));
    let hub = Hub(place.path("hub"));
    let files = ["m-Q4_K_M.gguf", "m-Q6_K.gguf"].map(|name| (name.to_owned(), from.clone()));
    hub.add("o/m-GGUF", FIRST, &files.into_iter().collect())?;
    hub.set("o/m-GGUF", "main", FIRST)?;
    let told = "error: o/m-GGUF:Q8_0: not on this machine, which has Q4_K_M, Q6_K of it; ";
    let words = [told, "homeroom pull o/m-GGUF:Q8_0`"];
    refused(hub.seen_by(&mut eval(Path::new("o/m-GGUF:Q8_0"), &rows)), &words)?;
    let words = ["error: o/m-GGUF: several GGUF files of it are here", "Q4_K_M", "Q6_K"];
    refused(hub.seen_by(&mut eval(Path::new("o/m-GGUF"), &rows)), &words)
}

#[test]
fn a_model_that_is_not_allowed_is_not_taken_by_its_path_either() -> Result<()> {
    let place = Place::new()?;
    let (hub, rows) = (Hub::with_model(&place, "llama")?, place.rows("rows.jsonl", 2)?);
    place.write("home/allowed-bases.txt", "Other/*\n")?;
    let adapter = fixture("curves/lora/trained");
    for model in [PathBuf::from(NAME), hub.snapshot(NAME, FIRST)] {
        let mut alone = eval(&model, &rows);
        let mut beside = eval(&adapter, &rows);
        beside.arg("--base-model").arg(&model);
        for command in [&mut alone, &mut beside, &mut place.fine_tune(&model, &rows)] {
            command.env("HOMEROOM_HOME", place.path("home"));
            refused(hub.seen_by(command), &["Org-7/tiny_Llama.v2: not allowed here", "allowed-bases.txt"])?;
        }
    }
    Ok(())
}

#[test]
fn an_embedding_model_is_refused_by_the_name_that_was_typed() -> Result<()> {
    let place = Place::new()?;
    let hub = Hub(place.path("hub"));
    let files = files_of(&fixture("embeddings/bert"))?.into_iter().filter(|(_, path)| path.is_file());
    hub.add("o/vectors", FIRST, &files.collect())?;
    hub.set("o/vectors", "main", FIRST)?;
    let mut chat = homeroom();
    chat.args(["chat", "--prompt", "hi", "--model-dir", "o/vectors"]);
    let words = ["error: o/vectors: it is an embedding model (`bert`)", "`homeroom serve --model-dir o/vectors`"];
    refused(hub.seen_by(&mut chat), &words)
}

#[test]
fn nobody_is_asked_for_a_model_where_the_user_said_so_or_it_is_here() -> Result<()> {
    let place = Place::new()?;
    let (hub, rows, nobody) = (Hub::with_model(&place, "llama")?, place.rows("rows.jsonl", 2)?, Nobody::new()?);
    let asks = |arguments: &[&str], more: &[(&str, &str)]| -> Result<crate::support::Ran> {
        let mut command = homeroom();
        command.args(arguments).arg("--file").arg(&rows);
        nobody.seen_by(hub.seen_by(&mut command))?.envs(more.iter().copied());
        run(&mut command)
    };
    for (arguments, more, reason) in [
        (["--offline", "eval", "--model-dir", "o/n"].as_slice(), [].as_slice(), "--offline"),
        (&["eval", "--model-dir", "o/n", "--offline"], &[], "--offline"),
        (&["eval", "--model-dir", "o/n"], &[("HF_HUB_OFFLINE", "1")], "HF_HUB_OFFLINE"),
        (&["eval", "--model-dir", "o/n"], &[("HF_HUB_OFFLINE", "true")], "HF_HUB_OFFLINE"),
    ] {
        let ran = asks(arguments, more)?;
        let told = ran.stderr.contains(&format!("nothing is downloaded ({reason})"));
        assert!(ran.code == Some(1) && told, "{arguments:?}: {}", ran.stderr);
    }
    assert_eq!(asks(&["eval", "--model-dir", NAME], &[])?.code, Some(0));
    nobody.was_left_alone()
}
