//! What is refused: hubs that lie, redirects that would give a token away, and models that may not be had. Nothing is left behind.

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

const TOKEN: &str = "hf_0123456789abcdefghijklmnop";

/// Nothing but locks and empty directories.
fn is_empty(store: &Path) -> bool {
    tree(store).is_empty()
}

#[test]
fn a_file_that_is_not_what_the_list_names_is_deleted_and_refused() -> Result<()> {
    let place = Place::new()?;
    let store = place.path("hub");
    let repo = llama()?;
    let server = Server::of("a/b", repo.clone())?;
    let mut wrong = repo.files["model.safetensors"].clone();
    wrong[77] ^= 1;
    let sent = wrong.clone();
    server.on(move |asked| (asked.is_storage).then(|| Act::Content(sent.clone())));
    let told = refusal(&server, &store, "a/b");
    assert!(told.contains("model.safetensors: its digest is") && told.contains("deleted"), "{told}");
    assert_eq!(server.count(&blob_name(&repo.files["model.safetensors"])), 2, "once anew");
    let (left, wrong_name) = (tree(&store).join(" "), blob_name(&repo.files["model.safetensors"]));
    assert!(!left.contains(&wrong_name) && !left.contains("snapshots") && !left.contains("refs"), "{left}");
    // Damage on the way is mended.
    let sent = wrong;
    server.is_well();
    server.on(move |asked| (asked.is_storage && asked.before == 0).then(|| Act::Content(sent.clone())));
    BaseModel::load(&pull(&server, &store, "a/b")?.found.path)?;
    // So is that of a small file, whose digest is git's.
    std::fs::remove_dir_all(&store)?;
    server.on(|asked| asked.path.starts_with("/cache/").then(|| Act::Content(vec![b'x'; 3])));
    assert!(pull(&server, &store, "a/b").is_err());
    assert!(!tree(&store).iter().any(|path| path.contains("refs") || path.contains("snapshots")));
    Ok(())
}

#[test]
fn a_size_that_is_not_that_of_the_list_is_refused() -> Result<()> {
    let repo = llama()?;
    let right = repo.files["model.safetensors"].clone();
    let (short, long) = (right[..20_000].to_vec(), [right.clone(), vec![0; 5]].concat());
    for (bytes, is_told, words) in [
        (short.clone(), true, "the server sends 20000"),
        (long.clone(), true, "the server sends"),
        (long, false, "the server sends more"),
        (short, false, "the server has no more"),
    ] {
        let place = Place::new()?;
        let store = place.path("hub");
        let server = Server::of("a/b", repo.clone())?;
        server.on(move |asked| {
            let content = || {
                if is_told || asked.range.is_some() { Act::Content(bytes.clone()) } else { Act::Unsized(bytes.clone()) }
            };
            asked.is_storage.then(content)
        });
        let told = refusal(&server, &store, "a/b");
        assert!(told.contains(words) && told.contains("model.safetensors: the hub's list says"), "{told}");
        // Of the others, which were under way, a part may be kept.
        let wrong = blob_name(&right);
        assert!(!tree(&store).iter().any(|path| path.contains(&wrong) || path.contains("refs")));
    }
    Ok(())
}

#[test]
fn a_model_that_cannot_be_run_is_refused_before_its_weights_are_downloaded() -> Result<()> {
    let place = Place::new()?;
    let store = place.path("hub");
    let config = |change: &dyn Fn(&mut serde_json::Value)| -> Result<String> {
        let mut config = serde_json::from_slice(&llama()?.files["config.json"])?;
        change(&mut config);
        Ok(config.to_string())
    };
    for (config, words) in [
        (config(&|config| config["model_type"] = json!("gemma3n"))?, "unknown architecture `gemma3n`; known are llama"),
        (config(&|config| config["num_local_experts"] = json!(8))?, "num_local_experts"),
        (config(&|config| config["quantization_config"] = json!({"quant_method": "awq"}))?, "quantised by `awq`"),
        ("[]".to_owned(), "not a JSON object"),
    ] {
        let server = Server::of("a/b", llama()?.with("config.json", config))?;
        let told = refusal(&server, &store, "a/b");
        assert!(told.starts_with("a/b: nothing of it was downloaded: config.json") && told.contains(words), "{told}");
        assert!(is_empty(&store) && !server.asked().iter().any(|asked| asked.is_storage), "{:?}", tree(&store));
    }
    // An encoder that lists no modules is served.
    let encoder = config(&|config| config["model_type"] = json!("bert"))?;
    pull(&Server::of("a/b", llama()?.with("config.json", encoder))?, &store, "a/b")?;
    Ok(())
}

#[test]
fn a_gguf_file_that_cannot_be_run_is_refused_by_its_beginning() -> Result<()> {
    let gguf = |keys: &[(&str, &str)], architecture: &str| {
        let string = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
        let entry = |(key, value): (&str, &str)| [string(key), 8_u32.to_le_bytes().to_vec(), string(value)].concat();
        let entries = keys.iter().copied().chain([("general.architecture", architecture)]).map(entry);
        let (tensors, count) = (7_u64.to_le_bytes(), 1000_u64.to_le_bytes());
        let head = [&b"GGUF"[..], &3_u32.to_le_bytes(), &tensors, &count].concat();
        [head, entries.collect::<Vec<_>>().concat(), vec![3; 40_000]].concat()
    };
    for (bytes, words) in [
        (gguf(&[], "qwen3moe"), Some("unknown architecture `qwen3moe`; known are llama")),
        (gguf(&[("general.name", "x"), ("general.type", "model")], "mamba"), Some("`mamba`")),
        (gguf(&[], "qwen3"), None),
        // It does not say so where it is looked at.
        (gguf(&[("general.name", &"x".repeat(20_000))], "mamba"), None),
    ] {
        let place = Place::new()?;
        let store = place.path("hub");
        let server = Server::of("a/b", Repo { gated: json!(false), ..llama()? }.with("m-Q8_0.gguf", bytes))?;
        let Some(words) = words else {
            pull(&server, &store, "a/b:Q8_0")?;
            continue;
        };
        let told = refusal(&server, &store, "a/b:Q8_0");
        assert!(told.starts_with("a/b:Q8_0: nothing of it was downloaded: m-Q8_0.gguf: "), "{told}");
        assert!(told.contains(words) && is_empty(&store), "{told}");
    }
    Ok(())
}

#[test]
fn a_path_that_leads_elsewhere_refuses_the_download_before_anything_is_written() -> Result<()> {
    let place = Place::new()?;
    let store = place.path("hub");
    for path in ["../../evil", "/etc/evil", "a\\..\\evil", "a/../../evil", "evil\u{1b}[2J", ""] {
        let mut repo = llama()?;
        repo.odd = vec![json!({"rfilename": path, "size": 3, "blobId": "a".repeat(40)})];
        let server = Server::of("a/b", repo)?;
        let told = refusal(&server, &store, "a/b");
        assert!(told.contains("a/b: the hub's answer is refused") && !told.contains('\u{1b}'), "{told}");
        assert_eq!(server.asked().len(), 1);
        assert!(!store.exists());
    }
    Ok(())
}

#[test]
fn what_the_disk_has_no_room_for_is_not_begun() -> Result<()> {
    let place = Place::new()?;
    let store = place.path("hub");
    let mut repo = llama()?.without("model.safetensors");
    let lfs = json!({"sha256": "ab".repeat(32), "size": 8_u64 << 40});
    repo.odd =
        vec![json!({"rfilename": "model.safetensors", "size": 8_u64 << 40, "blobId": "a".repeat(40), "lfs": lfs})];
    let server = Server::of("a/b", repo)?;
    let told = refusal(&server, &store, "a/b");
    assert!(told.contains("a/b: 8.80 TB are needed in ") && told.contains(" are free\nhint: "), "{told}");
    assert!(!store.exists() && server.asked().len() == 1);
    Ok(())
}

/// The limit of a file's size, which fails as a full disk does.
#[test]
#[cfg(unix)]
fn a_limit_that_is_met_on_the_way_is_told_and_nothing_is_kept() -> Result<()> {
    let place = Place::new()?;
    let repo = llama()?.with("model.safetensors", vec![5; 3_000_000]);
    let server = Server::of("a/b", repo)?;
    let mut limited = Command::new("sh");
    limited.args(["-c", "ulimit -f 1000; exec \"$0\" pull a/b", env!("CARGO_BIN_EXE_homeroom")]);
    limited.env("HF_ENDPOINT", server.url()).env("HF_HOME", place.path("hf")).env("HOMEROOM_HOME", "/nowhere");
    refused(&mut limited, &["model.safetensors: no file may become so large here", "`ulimit -f`"])?;
    let left = tree(&place.path("hf"));
    assert!(
        !left.iter().any(|path| path.contains("incomplete") || path.contains("snapshots") || path.contains("refs")),
        "{left:?}"
    );
    Ok(())
}

#[test]
fn the_token_goes_to_the_hub_and_to_nobody_else() -> Result<()> {
    let place = Place::new()?;
    let server = Server::of("a/b", llama()?)?;
    pull_as(&server, &place.path("hub"), "a/b", Some(TOKEN))?;
    let asked = server.asked();
    let with =
        |is_storage: bool| asked.iter().filter(|asked| asked.is_storage == is_storage && asked.token.is_some()).count();
    assert!(asked.iter().any(|asked| asked.is_storage));
    assert_eq!(with(true), 0, "the storage is another server");
    assert_eq!(with(false), asked.iter().filter(|asked| !asked.is_storage).count());
    assert!(asked.iter().filter_map(|asked| asked.token.as_ref()).all(|token| *token == format!("Bearer {TOKEN}")));
    Ok(())
}

#[test]
fn a_redirect_to_plain_http_elsewhere_is_refused_and_no_token_sent_on() -> Result<()> {
    let place = Place::new()?;
    let store = place.path("hub");
    for location in
        ["http://192.0.2.1/file", "http://localhost.evil.example/file", "//192.0.2.1/file", "ftp://127.0.0.1/file"]
    {
        for is_list in [true, false] {
            let server = Server::of("a/b", llama()?)?;
            server.on(move |asked| {
                (is_list || asked.path.contains("/resolve/")).then(|| Act::Redirect(302, location.to_owned()))
            });
            let error = pull_as(&server, &store, "a/b", Some(TOKEN)).expect_err("it is refused");
            let told = format!("{error:#}");
            assert!(told.contains("which is not followed") || told.contains("an address begins with"), "{told}");
            assert!(!told.contains(TOKEN) && is_empty(&store), "{told}");
        }
    }
    let server = Server::of("a/b", llama()?)?;
    server.on(|asked| Some(Act::Redirect(307, format!("{}?again", asked.path))));
    assert!(refusal(&server, &store, "a/b").contains("more than 5 redirects"));
    assert_eq!(server.asked().len(), 6);
    Ok(())
}

/// A refusal of the hub, and what is told of it with and without a token.
#[test]
fn a_refusal_says_what_to_do() -> Result<()> {
    let place = Place::new()?;
    let store = place.path("hub");
    let cases: [(u16, &str, &[&str], &[&str]); 8] = [
        (401, "GatedRepo", &["accept terms", "/a/b, then set HF_TOKEN"], &["account of the token from HF_TOKEN"]),
        (
            403,
            "GatedRepo",
            &["accept terms", "/a/b"],
            &["has not given the account of the token from HF_TOKEN access", "/a/b"],
        ),
        (401, "RepoNotFound", &["no such model, or it is private", "/a/b"], &["no such model", "HF_TOKEN"]),
        (401, "", &["no such model, or it is private"], &["does not accept the token from HF_TOKEN"]),
        (
            404,
            "RepoNotFound",
            &["no such model"],
            &["no such model, or the account of the token from HF_TOKEN may not see it"],
        ),
        (404, "RevisionNotFound", &["no revision `main`"], &["no revision `main`"]),
        (403, "", &["refuses to give it", "/a/b"], &["refuses to give it to the account"]),
        (451, "", &["refuses", "451"], &["refuses", "451"]),
    ];
    for (status, code, without, with) in cases {
        let server = Server::of("a/b", llama()?)?;
        server.on(move |_| {
            let reason = format!("because \u{9b}31m of {TOKEN}");
            let code = code.to_owned();
            Some(Act::Answer(status, vec![("x-error-code", code), ("x-error-message", reason)], "{}".into()))
        });
        for (token, words) in [(None, without), (Some(TOKEN), with)] {
            let error = pull_as(&server, &store, "a/b", token).expect_err("it is refused");
            let told = format!("{error:#}");
            assert!(words.iter().all(|word| told.contains(word)), "{status} {code}: {told}");
            assert!(!told.contains('\u{9b}') && (token.is_none() || !told.contains(TOKEN)), "{told}");
        }
        assert_eq!(server.asked().len(), 2, "it is not asked again");
    }
    assert!(!store.exists());
    Ok(())
}

#[test]
fn a_file_of_the_list_that_is_not_there_is_named() -> Result<()> {
    let place = Place::new()?;
    let mut repo = llama()?.without("tokenizer_config.json");
    repo.odd = vec![json!({"rfilename": "tokenizer_config.json", "size": 3, "blobId": "a".repeat(40)})];
    let server = Server::of("a/b", repo)?;
    let told = refusal(&server, &place.path("hub"), "a/b");
    assert!(told.contains("tokenizer_config.json is in the hub's list and not on the hub"), "{told}");
    Ok(())
}

#[test]
fn a_model_that_is_not_there_is_told_with_one_that_is_near() -> Result<()> {
    let place = Place::new()?;
    let server = Server::of("school/llama", llama()?)?;
    succeeds(&mut program(&server, &place, &["pull", "school/llama"]))?;
    refused(&mut program(&server, &place, &["pull", "school/lama"]), &["did you mean `school/llama`"])?;
    refused(&mut program(&server, &place, &["pull", "school/llama@dev"]), &["no revision `dev`"])?;
    Ok(())
}

/// Nothing came before, so that it is not a network that comes and goes.
#[test]
fn where_there_is_no_connection_it_is_told_soon_and_what_to_do() -> Result<()> {
    let place = Place::new()?;
    let closed = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let url = format!("http://{closed}");
    let hub = || Hub::new(Endpoint::parse(&url)?, None, place.path("hub"), PATIENCE);
    let told = format!("{:#}", hub()?.pull(&name("a/b")).expect_err("nobody is there"));
    assert!(told.contains("a/b: no connection to 127.0.0.1 (there is no network): no server answers there"), "{told}");
    assert!(told.contains("hint: ") && told.contains("models--a--b") && told.contains("HOMEROOM_BASES"), "{told}");
    assert!(!told.contains("what has come is kept"), "{told}");
    let server = Server::of("a/b", llama()?)?;
    let mut command = program(&server, &place, &["pull", "a/b"]);
    refused(command.env("HF_ENDPOINT", &url), &[&format!("there is no network, or HF_ENDPOINT={url} is wrong")])?;
    refused(command.env("HF_ENDPOINT", "http://localhost.invalid:1"), &["no connection to localhost.invalid"])?;
    // What is here can be used.
    let pulled = pull(&server, &place.path("hub"), "a/b")?;
    let told = format!("{:#}", hub()?.pull(&name("a/b")).expect_err("nobody is there"));
    assert!(told.contains(&format!("commit {} is here and can be used", &pulled.found.commit[..12])), "{told}");
    Ok(())
}

#[test]
fn another_hub_that_is_set_is_told_where_the_hub_refuses() -> Result<()> {
    let place = Place::new()?;
    let server = Server::start()?;
    refused(&mut program(&server, &place, &["pull", "a/b"]), &["no such model", "HF_ENDPOINT is set", &server.url()])?;
    Ok(())
}

/// A server that answers each connection with the same bytes, and how often it was asked.
fn answers(bytes: Vec<u8>) -> Result<(String, Arc<AtomicUsize>)> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let (url, asked) = (format!("http://{}", listener.local_addr()?), Arc::<AtomicUsize>::default());
    let counted = asked.clone();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            counted.fetch_add(1, Ordering::SeqCst);
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(&bytes);
        }
    });
    Ok((url, asked))
}

#[test]
fn an_answer_that_is_not_http_is_refused_and_not_asked_for_again() -> Result<()> {
    let place = Place::new()?;
    let long = format!("HTTP/1.1 200 OK\r\nX-Long: {}\r\n\r\n", "x".repeat(1 << 20));
    for bytes in [
        "HTTP/9.7 200 OK\r\n\r\n",
        "SSH-2.0-OpenSSH_9.6\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        "HTTP/1.1 200 OK\r\nX-Bad: a\0b\r\n\r\n",
        long.as_str(),
    ] {
        let (url, asked) = answers(bytes.as_bytes().to_vec())?;
        let hub = Hub::new(Endpoint::parse(&url)?, None, place.path("hub"), PATIENCE)?;
        let told = format!("{:#}", hub.pull(&name("a/b")).expect_err("it is refused"));
        let start: String = bytes.chars().take(60).collect();
        assert_eq!(asked.load(Ordering::SeqCst), 1, "{start:?}: {told}");
        assert!(told.contains("not HTTP as it should be"), "{start:?}: {told}");
    }
    Ok(())
}

/// It is never silent, and never whole.
#[test]
fn a_list_that_drips_is_not_waited_for_without_end() -> Result<()> {
    let place = Place::new()?;
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let url = format!("http://{}", listener.local_addr()?);
    std::thread::spawn(move || -> std::io::Result<()> {
        let mut stream = listener.accept()?.0;
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")?;
        loop {
            stream.write_all(b" ")?;
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    let hub = Hub::new(Endpoint::parse(&url)?, None, place.path("hub"), PATIENCE)?;
    let told = format!("{:#}", hub.pull(&name("a/b")).expect_err("it does not end"));
    assert!(told.contains("takes too long (tried once)"), "{told}");
    Ok(())
}

#[test]
#[cfg(unix)]
fn a_folder_that_was_prepared_to_lead_elsewhere_is_not_written_into() -> Result<()> {
    let place = Place::new()?;
    let store = place.path("hub");
    let (victim, folder) = (place.path("victim"), store.join("models--a--b"));
    std::fs::create_dir_all(&victim)?;
    std::fs::create_dir_all(&folder)?;
    std::os::unix::fs::symlink(&victim, folder.join("snapshots"))?;
    let server = Server::of("a/b", llama()?)?;
    let told = refusal(&server, &store, "a/b");
    assert!(told.contains("snapshots: a link"), "{told}");
    assert!(std::fs::read_dir(&victim)?.next().is_none() && server.asked().iter().all(|asked| !asked.is_storage));
    Ok(())
}

#[test]
fn a_refusal_of_a_file_names_the_model_once() -> Result<()> {
    let place = Place::new()?;
    let server = Server::of("a/b", llama()?)?;
    server.on(|asked| asked.path.contains("/resolve/").then(|| Act::Answer(451, vec![], String::new())));
    let told = refusal(&server, &place.path("hub"), "a/b");
    assert!(told.starts_with("a/b: the hub refuses (status 451)"), "{told}");
    Ok(())
}
