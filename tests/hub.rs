//! Models of the hub, against a server of its protocol in which everything goes wrong that can.

mod cuts;
mod gguf;
mod networks;
mod processes;
mod refused;
mod repairs;
pub mod server;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use homeroom::hub::{Endpoint, Hub, HubName, Patience, Pulled, Token};
use homeroom_engine::models::BaseModel;
use serde_json::json;

use self::server::{Act, Repo, Server, blob_name};
use crate::support::{Place, fixture, homeroom, printed_json, refused, run, succeeds};

/// The patience of these tests: they show what is tried again, and not for how long.
const PATIENCE: Patience = Patience {
    connect: Duration::from_secs(5),
    silence: Duration::from_millis(500),
    bytes_min: 1000,
    pause: Duration::from_millis(1),
    pause_max: Duration::from_millis(10),
    tries: 4,
    asked_max: Duration::from_secs(30),
    requests_max: 60,
    answer_max: Duration::from_secs(3),
    told_after: Duration::from_millis(300),
};

/// The tiny Llama of the fixtures, without the logits that transformers gave.
pub fn llama() -> Result<Repo> {
    Ok(Repo::of(&fixture("models/llama"), "a1")?.without("expected.safetensors"))
}

fn name(text: &str) -> HubName {
    HubName::parse(text).expect("a name")
}

/// What the hub gives into an empty or filled store.
pub fn pull(server: &Server, store: &Path, text: &str) -> Result<Pulled> {
    pull_as(server, store, text, None)
}

fn pull_as(server: &Server, store: &Path, text: &str, token: Option<&str>) -> Result<Pulled> {
    let token = token.map(|token| Token::new(token, "HF_TOKEN")).transpose()?.flatten();
    Hub::new(Endpoint::parse(&server.url())?, token, store.to_owned(), PATIENCE)?.pull(&name(text))
}

/// The error of a pull, with its hint.
fn refusal(server: &Server, store: &Path, text: &str) -> String {
    format!("{:#}", pull(server, store, text).expect_err("it is refused"))
}

/// The program with that server as its hub, and a cache in the place.
pub fn program(server: &Server, place: &Place, arguments: &[&str]) -> Command {
    let mut command = homeroom();
    command.args(arguments).env("HF_ENDPOINT", server.url()).env("HF_HOME", place.path("hf")).env("CI", "1");
    for variable in
        ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HOMEROOM_BASES"]
    {
        command.env_remove(variable);
    }
    command
}

/// Every file and link below a directory, with where links lead; locks are left out.
fn tree(directory: &Path) -> Vec<String> {
    fn gather(directory: &Path, before: &str, found: &mut Vec<String>) {
        for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
            let path = format!("{before}{}", entry.file_name().to_string_lossy());
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => gather(&entry.path(), &format!("{path}/"), found),
                Ok(kind) if kind.is_symlink() => {
                    let to = std::fs::read_link(entry.path()).unwrap_or_default();
                    found.push(format!("{path} -> {}", to.display()));
                }
                _ => found.push(path),
            }
        }
    }
    let mut found = Vec::new();
    gather(directory, "", &mut found);
    found.retain(|path| !path.starts_with(".locks/"));
    found.sort();
    found
}

#[test]
fn a_model_lies_in_the_cache_as_python_has_it_and_can_be_loaded() -> Result<()> {
    let place = Place::new()?;
    let store = place.path("hub");
    let repo = llama()?
        .with("README.md", "what")
        .with("pytorch_model.bin", "no")
        .with("additional_chat_templates/t.jinja", "{{ 1 }}");
    let server = Server::of("a/b", repo.clone())?;
    let pulled = pull(&server, &store, "a/b")?;
    let mut expected = vec!["models--a--b/refs/main".to_owned()];
    for (path, bytes) in &repo.files {
        if ["README.md", "pytorch_model.bin"].contains(&path.as_str()) {
            continue;
        }
        let (up, blob) = (if path.contains('/') { "../../../" } else { "../../" }, blob_name(bytes));
        expected.push(format!("models--a--b/snapshots/{}/{path} -> {up}blobs/{blob}", repo.commit));
        expected.push(format!("models--a--b/blobs/{blob}"));
    }
    expected.sort();
    assert_eq!(tree(&store), expected);
    assert_eq!(std::fs::read_to_string(store.join("models--a--b/refs/main"))?, repo.commit);
    assert!(store.join(format!("models--a--b/snapshots/{}/additional_chat_templates/t.jinja", repo.commit)).exists());
    BaseModel::load(&pulled.found.path)?;
    assert!(pulled.bytes > 0 && pulled.found.commit == repo.commit);

    server.is_well();
    assert_eq!(pull(&server, &store, "a/b")?.bytes, 0);
    let asked: Vec<String> = server.asked().into_iter().map(|asked| asked.path).collect();
    assert_eq!(asked, ["/api/models/a/b/revision/main"], "only what is newest is asked");
    let at_commit = format!("a/b@{}", repo.commit);
    assert_eq!(pull(&server, &store, &at_commit)?.found, pulled.found);
    assert_eq!(server.asked().len(), 1, "a commit does not change");
    Ok(())
}

#[test]
fn a_branch_that_moves_is_followed_and_what_did_not_change_is_not_downloaded_again() -> Result<()> {
    let place = Place::new()?;
    let store = place.path("hub");
    let server = Server::start()?;
    server.set("a/b", "feature/x", llama()?);
    let first = pull(&server, &store, "a/b@feature/x")?;
    let mut moved = llama()?.with("generation_config.json", "{}");
    moved.commit = "b2".repeat(20);
    server.set("a/b", "feature/x", moved.clone());
    // It ends on the way: the old one stays what the branch is.
    server.on(|asked| asked.path.contains("/cache/").then(|| Act::Answer(404, vec![], String::new())));
    assert!(pull(&server, &store, "a/b@feature/x").is_err());
    let branch = store.join("models--a--b/refs/feature/x");
    assert_eq!(std::fs::read_to_string(&branch)?, first.found.commit);
    server.is_well();
    let second = pull(&server, &store, "a/b@feature/x")?;
    assert_eq!((std::fs::read_to_string(&branch)?, second.bytes), (moved.commit.clone(), 2));
    assert_eq!(server.count("/generation_config.json"), 1);
    assert_eq!(server.count("/model.safetensors"), 0);
    assert!(first.found.path.join("config.json").exists());
    Ok(())
}

#[test]
fn of_gguf_files_one_is_downloaded() -> Result<()> {
    let place = Place::new()?;
    let store = place.path("hub");
    let repo = Repo { commit: "c3".repeat(20), gated: json!(false), ..Repo::default() };
    let repo =
        repo.with("m-Q4_K_M.gguf", vec![4; 20_001]).with("m-Q8_0.gguf", vec![8; 30_001]).with("config.json", "{}");
    let server = Server::of("a/b-GGUF", repo)?;
    let pulled = pull(&server, &store, "a/b-GGUF:q4_k_m")?;
    assert!(pulled.found.path.ends_with("m-Q4_K_M.gguf"));
    assert_eq!((std::fs::read(&pulled.found.path)?.len(), pulled.bytes), (20_001, 20_001));
    let told = refusal(&server, &store, "a/b-GGUF");
    assert!(told.contains("Q4_K_M (20.0 kB), Q8_0 (30.0 kB); `homeroom pull a/b-GGUF:Q4_K_M`"), "{told}");
    let told = refusal(&server, &store, "a/b-GGUF:Q2_K");
    assert!(told.contains("there are Q4_K_M (20.0 kB), Q8_0 (30.0 kB)"), "{told}");
    Ok(())
}

#[test]
fn shards_come_by_their_index() -> Result<()> {
    let place = Place::new()?;
    let store = place.path("hub");
    let index =
        json!({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}});
    let repo = llama()?
        .without("model.safetensors")
        .with("model.safetensors.index.json", index.to_string())
        .with("model-00001-of-00002.safetensors", vec![1; 12_345])
        .with("model-00002-of-00002.safetensors", vec![2; 23])
        .with("extra.safetensors", vec![3; 23]);
    let server = Server::of("a/b", repo)?;
    let pulled = pull(&server, &store, "a/b")?;
    assert_eq!(std::fs::read(pulled.found.path.join("model-00001-of-00002.safetensors"))?, vec![1; 12_345]);
    assert_eq!((server.count("/extra.safetensors"), server.count("/model-00002-of-00002.safetensors")), (0, 1));
    Ok(())
}

#[test]
fn pull_prints_the_directory_and_brings_the_base_of_an_adapter() -> Result<()> {
    let place = Place::new()?;
    let server = Server::of("a/base", Repo { license: json!("apache-2.0"), ..llama()? })?;
    let adapter = Repo { commit: "d4".repeat(20), gated: json!(false), ..Repo::default() };
    let config = json!({"peft_type": "LORA", "base_model_name_or_path": "a/base", "r": 4});
    let adapter =
        adapter.with("adapter_config.json", config.to_string()).with("adapter_model.safetensors", vec![0; 99]);
    server.set("a/adapter", "main", adapter);
    let ran = succeeds(&mut program(&server, &place, &["pull", "a/adapter", "--json"]))?;
    let report = printed_json(&ran)?;
    let base = report["base"]["path"].as_str().context("a base")?;
    assert!(Path::new(base).join("model.safetensors").exists() && base.contains("models--a--base"), "{report}");
    assert!(ran.stderr.contains("license apache-2.0") && ran.stderr.contains("in 6 files"), "{}", ran.stderr);
    let ran = succeeds(&mut program(&server, &place, &["pull", "a/base"]))?;
    assert_eq!(ran.stdout.trim_end(), base);
    assert!(ran.stderr.contains("all of it was here"), "{}", ran.stderr);
    refused(&mut program(&server, &place, &["pull", "base"]), &["not a name on the hub"])?;
    Ok(())
}

#[test]
fn without_a_network_the_cache_is_read_and_nothing_is_asked() -> Result<()> {
    let place = Place::new()?;
    let server = Server::of("a/b", llama()?)?;
    let offline = |arguments: &[&str]| {
        let mut command = program(&server, &place, arguments);
        command.env("HF_HUB_OFFLINE", "1");
        command
    };
    refused(&mut offline(&["pull", "a/b"]), &["HF_HUB_OFFLINE", "hint: "])?;
    assert!(server.asked().is_empty() && !place.path("hf").exists());
    succeeds(&mut program(&server, &place, &["pull", "a/b"]))?;
    let asked = server.asked().len();
    let commit = format!("a/b@{}", "a1".repeat(20));
    succeeds(&mut offline(&["pull", &commit]))?;
    let ran = succeeds(&mut offline(&["pull", "a/b"]))?;
    assert!(ran.stderr.contains("the hub is not asked (HF_HUB_OFFLINE)"), "{}", ran.stderr);
    succeeds(&mut program(&server, &place, &["--offline", "pull", "a/b"]))?;
    assert_eq!(server.asked().len(), asked);
    Ok(())
}

/// The first command that a person types, and the same one when the network is gone.
#[test]
fn a_model_is_trained_by_its_name_from_an_empty_cache_and_then_without_a_network() -> Result<()> {
    let place = Place::new()?;
    let rows = place.rows("rows.jsonl", 6)?;
    let server = Server::of("school/llama", llama()?)?;
    server.on(|asked| (asked.is_storage && asked.before < 20).then_some(Act::Cut(9_001)));
    let train = |server: &Server, output: &str| {
        let mut command = program(server, &place, &["fine-tune", "--model-name", "school/llama", "--max-steps", "2"]);
        command.arg("--training-file").arg(&rows).arg("--output-dir").arg(place.path(output));
        command
    };
    succeeds(&mut train(&server, "outputs/first"))?;
    assert_eq!(server.asked().iter().filter(|asked| asked.is_storage && asked.range.is_some()).count(), 20);
    let weights = |output: &str| std::fs::read(place.path(output).join("adapter_model.safetensors"));
    drop(server);
    let closed = Server::start()?;
    succeeds(&mut train(&closed, "outputs/second"))?;
    assert!(closed.asked().is_empty(), "{:?}", closed.asked());
    assert!(weights("outputs/first")? == weights("outputs/second")?);
    Ok(())
}

/// A stick, or a directory of a lab, that has the files and not the user's cache.
#[test]
fn what_a_shared_store_has_is_not_downloaded() -> Result<()> {
    let place = Place::new()?;
    let server = Server::of("a/b", llama()?)?;
    pull(&server, &place.path("shared"), "a/b")?;
    server.is_well();
    let mut command = program(&server, &place, &["pull", "a/b"]);
    let ran = succeeds(command.env("HOMEROOM_BASES", place.path("shared")))?;
    assert!(ran.stdout.contains("/shared/models--a--b/snapshots/"), "{}", ran.stdout);
    assert_eq!(server.asked().len(), 1, "only what is newest is asked");
    Ok(())
}

#[test]
fn only_models_on_the_lists_may_be_used() -> Result<()> {
    let place = Place::new()?;
    let server = Server::of("a/b", llama()?)?;
    let list = place.write("home/allowed-bases.txt", "# bases\nqwen/*\n")?;
    let mut command = program(&server, &place, &["pull", "a/b"]);
    command.env("HOMEROOM_HOME", place.path("home"));
    refused(&mut command, &["a/b: not allowed here", "allowed-bases.txt"])?;
    assert!(server.asked().is_empty());
    std::fs::write(list, "a/*\n")?;
    succeeds(&mut command)?;
    place.write("shared/allowed-bases.txt", "qwen/*\n")?;
    refused(command.env("HOMEROOM_BASES", place.path("shared")), &["not allowed here", "shared/allowed-bases.txt"])?;
    Ok(())
}

/// For `tests/peers/hub_cache.py`: serves the fixtures' models until its input ends.
#[test]
#[ignore = "a server for Python, by hand"]
fn serve_for_python() -> Result<()> {
    let server = Server::start()?;
    for model in ["llama", "qwen2", "mistral"] {
        let repo = Repo::of(&fixture("models").join(model), "a1")?.with("README.md", "# what it is\n");
        server.set(&format!("school/{model}"), "main", repo);
    }
    eprintln!("serving {}", server.url());
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    for asked in server.asked() {
        eprintln!("asked {} {} {:?}", asked.method, asked.path, asked.range);
    }
    Ok(())
}

/// The directory of a repository in the program's cache.
fn cached(place: &Place, folder: &str) -> PathBuf {
    place.path("hf/hub").join(folder)
}
