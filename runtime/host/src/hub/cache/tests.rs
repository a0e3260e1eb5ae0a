//! Caches as Python, kills and memory sticks leave them.

use std::fs;
use std::os::unix::fs::symlink;

use tempfile::TempDir;

use super::list::{list_in, remove_in};
use super::*;

const OLD: &str = "0123456789abcdef0123456789abcdef01234567";
const NEW: &str = "89abcdef0123456789abcdef0123456789abcdef";

/// A store that can be filled.
struct Store(TempDir);

impl Store {
    fn new() -> Result<Self> {
        Ok(Self(tempfile::tempdir()?))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn write(&self, path: &str, text: &str) -> Result<PathBuf> {
        let path = self.path().join(path);
        fs::create_dir_all(path.parent().expect("a file lies in a directory"))?;
        fs::write(&path, text)?;
        Ok(path)
    }

    /// A file of a snapshot, as a link to a blob that is named by its text.
    fn link(&self, repo: &str, commit: &str, path: &str, text: &str) -> Result<()> {
        self.write(&format!("{repo}/blobs/{text}"), text)?;
        let at = self.path().join(repo).join("snapshots").join(commit).join(path);
        fs::create_dir_all(at.parent().expect("a file lies in a directory"))?;
        let up = "../".repeat(path.split('/').count() + 1);
        Ok(symlink(format!("{up}blobs/{text}"), at)?)
    }

    fn model(&self, repo: &str, commit: &str) -> Result<()> {
        for file in ["config.json", "model.safetensors", "tokenizer.json"] {
            self.link(repo, commit, file, &format!("{file}-{}", &commit[..1]))?;
        }
        Ok(())
    }

    fn found(&self, name: &str) -> Result<Option<Found>> {
        let name = HubName::parse(name).expect("a name");
        find_among(&[self.path().join("missing"), self.path().to_owned()], &name)
    }

    fn commit(&self, name: &str) -> Result<Option<String>> {
        Ok(self.found(name)?.map(|found| found.commit))
    }
}

#[test]
fn a_branch_a_tag_and_a_commit_are_found() -> Result<()> {
    let store = Store::new()?;
    store.model("models--a--b", OLD)?;
    store.model("models--a--b", NEW)?;
    store.write("models--a--b/refs/main", &format!("{NEW}\n"))?;
    store.write("models--a--b/refs/pr/7", OLD)?;
    assert_eq!(store.commit("a/b")?.as_deref(), Some(NEW));
    assert_eq!(store.commit("a/b@pr/7")?.as_deref(), Some(OLD));
    assert_eq!(store.commit(&format!("a/b@{OLD}"))?.as_deref(), Some(OLD));
    for absent in ["a/b@dev", "a/c", &format!("a/b@{}", "f".repeat(40))] {
        assert_eq!(store.commit(absent)?, None, "{absent}");
    }
    Ok(())
}

#[test]
fn where_the_newest_commit_is_not_known_or_not_whole_the_newest_whole_one_is_taken() -> Result<()> {
    let store = Store::new()?;
    store.model("models--a--b", OLD)?;
    assert_eq!(store.commit("a/b")?.as_deref(), Some(OLD), "there is no ref");
    for odd in ["", "../../../../etc", "main", &"0".repeat(2000), &OLD[..39]] {
        store.write("models--a--b/refs/main", odd)?;
        assert_eq!(store.commit("a/b")?.as_deref(), Some(OLD), "{odd}");
    }
    store.write("models--a--b/refs/main", NEW)?;
    store.link("models--a--b", NEW, "config.json", "config")?;
    assert_eq!(store.commit("a/b")?.as_deref(), Some(OLD), "the newest is not whole");
    assert_eq!(store.commit("a/b@main")?, None, "it was asked for");
    // A download that was ended leaves links that lead nowhere.
    store.model("models--a--b", NEW).expect_err("config.json is there");
    for file in ["model.safetensors", "tokenizer.json"] {
        symlink("../../blobs/gone", store.path().join("models--a--b/snapshots").join(NEW).join(file))?;
    }
    assert_eq!(store.commit("a/b")?.as_deref(), Some(OLD));
    Ok(())
}

#[test]
fn a_snapshot_is_known_by_its_files() -> Result<()> {
    let store = Store::new()?;
    let files = |repo: &str, files: &[&str]| {
        files.iter().try_for_each(|file| store.link(repo, OLD, file, &file.replace('/', "-")))
    };
    let at = |repo: &str| kind(&store.path().join(repo).join("snapshots").join(OLD));
    files("model", &["config.json", "model.safetensors", "tokenizer.json"])?;
    files("adapter", &["adapter_config.json", "adapter_model.safetensors"])?;
    files("embedding", &["config.json", "model.safetensors", "vocab.txt", "modules.json", "1_Pooling/config.json"])?;
    files("gguf", &["m-Q4_K_M.gguf", "m-Q8_0.gguf", "mmproj-f16.gguf", "m-F16-00001-of-00002.gguf"])?;
    files("no-tokenizer", &["config.json", "model.safetensors"])?;
    files("pickle", &["config.json", "pytorch_model.bin", "tokenizer.json"])?;
    files("sharded", &["config.json", "tokenizer.json", "model-00001-of-00002.safetensors"])?;
    let index =
        |second: &str| format!(r#"{{"weight_map": {{"a": "model-00001-of-00002.safetensors", "b": "{second}"}}}}"#);
    let index_path = format!("sharded/snapshots/{OLD}/model.safetensors.index.json");
    store.write(&index_path, &index("model-00002-of-00002.safetensors"))?;
    assert_eq!(at("model"), Some(Kind::Model));
    assert_eq!(at("adapter"), Some(Kind::Adapter));
    assert_eq!(at("embedding"), Some(Kind::Embedding));
    assert_eq!(at("gguf"), Some(Kind::Gguf(vec!["Q4_K_M".into(), "Q8_0".into()])));
    for repo in ["no-tokenizer", "pickle", "sharded", "missing"] {
        assert_eq!(at(repo), None, "{repo}");
    }
    store.write(&index_path, &index("../../../model/snapshots/x.safetensors"))?;
    assert_eq!(at("sharded"), None, "a shard lies beside its index");
    files("sharded", &["model-00002-of-00002.safetensors"])?;
    store.write(&index_path, &index("model-00002-of-00002.safetensors"))?;
    assert_eq!(at("sharded"), Some(Kind::Model));
    Ok(())
}

#[test]
fn of_gguf_files_the_one_that_is_named_is_found() -> Result<()> {
    let store = Store::new()?;
    for file in ["m-Q4_K_M.gguf", "m-Q5_K_M.gguf", "sub/m-Q8_0.gguf"] {
        store.link("models--a--b", OLD, file, &file.replace('/', "-"))?;
    }
    let path = |name: &str| Ok::<_, anyhow::Error>(store.found(name)?.map(|found| found.path));
    let snapshot = store.path().join("models--a--b/snapshots").join(OLD);
    assert_eq!(path("a/b:q4_k_m")?, Some(snapshot.join("m-Q4_K_M.gguf")));
    assert_eq!(path("a/b:Q8_0")?, Some(snapshot.join("sub/m-Q8_0.gguf")));
    assert_eq!(path("a/b:m-Q5_K_M.gguf")?, Some(snapshot.join("m-Q5_K_M.gguf")));
    // Of a model in several files the first is named once all are there.
    store.link("models--a--b", OLD, "m-F16-00001-of-00002.gguf", "first")?;
    assert_eq!(path("a/b:F16")?, None);
    store.link("models--a--b", OLD, "m-F16-00002-of-00002.gguf", "second")?;
    assert_eq!(path("a/b:F16")?, Some(snapshot.join("m-F16-00001-of-00002.gguf")));
    assert_eq!(path("a/b:Q2_K")?, None);
    let told = path("a/b").expect_err("three").to_string();
    assert!(told.contains("`a/b:F16`, `a/b:Q4_K_M`, `a/b:Q5_K_M`, `a/b:Q8_0`"), "{told}");
    let told = path("a/b:K_M").expect_err("two").to_string();
    assert!(told.contains("m-Q4_K_M.gguf or m-Q5_K_M.gguf"), "{told}");
    Ok(())
}

#[test]
fn a_list_counts_each_file_once_and_passes_over_what_is_no_model() -> Result<()> {
    let store = Store::new()?;
    store.model("models--a--b", OLD)?;
    store.link("models--a--b", NEW, "config.json", "config.json-0").expect("the same blob");
    store.write("models--a--b/refs/main", OLD)?;
    store.write("models--a--b/refs/pr/1", NEW)?;
    store.write("models--a--b/blobs/abc.incomplete", "1234567")?;
    // Without links the files themselves stand in the snapshot.
    store.write(&format!("models--c--d.e/snapshots/{OLD}/config.json"), "12345")?;
    for odd in ["datasets--a--b", "models--a", "models--..--b", "models--a--b--c", "version.txt", ".locks/models--a--b"]
    {
        fs::create_dir_all(store.path().join(odd))?;
    }
    let list = list_in(store.path())?;
    let mut repos: Vec<(&str, u64)> = list.iter().map(|cached| (cached.repo.as_str(), cached.bytes)).collect();
    repos.sort_unstable();
    let blobs = ["config.json-0", "model.safetensors-0", "tokenizer.json-0"].map(str::len).iter().sum::<usize>() as u64;
    assert_eq!(repos, [("a/b", blobs + 7), ("c/d.e", 5)]);
    let cached = list.iter().find(|cached| cached.repo == "a/b").expect("it is there");
    assert_eq!(cached.refs, [("main".to_owned(), OLD.to_owned()), ("pr/1".to_owned(), NEW.to_owned())]);
    assert_eq!(
        cached.current().map(|snapshot| (snapshot.commit.as_str(), &snapshot.kind)),
        Some((OLD, &Some(Kind::Model)))
    );
    assert_eq!(cached.snapshots.iter().filter(|snapshot| snapshot.kind.is_none()).count(), 1);
    assert!(list_in(&store.path().join("missing"))?.is_empty());
    Ok(())
}

#[test]
fn what_is_removed_is_gone_and_what_is_being_downloaded_stays() -> Result<()> {
    let store = Store::new()?;
    store.model("models--a--b", OLD)?;
    store.model("models--a--c", OLD)?;
    let lock = fs::File::open(store.write(".locks/models--a--b/abc.lock", "")?)?;
    lock.lock()?;
    let told = remove_in(store.path(), "a/b").expect_err("it is locked").to_string();
    assert!(told.contains("another process is downloading it"), "{told}");
    assert!(store.commit("a/b")?.is_some());
    drop(lock);
    assert!(remove_in(store.path(), "a/b")?.is_some_and(|bytes| bytes > 0));
    assert_eq!(remove_in(store.path(), "a/b")?, None);
    assert!(store.commit("a/c")?.is_some() && !store.path().join("models--a--b").exists());
    for odd in ["", "..", "a", "../x", "a/b/c", "/a/b", "a/b@main"] {
        assert!(remove_in(store.path(), odd).is_err(), "{odd}");
    }
    // A link to where another disk has it: what it leads to is not ours.
    let elsewhere = Store::new()?;
    elsewhere.model("models--x--y", OLD)?;
    symlink(elsewhere.path().join("models--x--y"), store.path().join("models--x--y"))?;
    assert!(remove_in(store.path(), "x/y")?.is_some());
    assert!(elsewhere.commit("x/y")?.is_some() && store.commit("x/y")?.is_none());
    Ok(())
}
