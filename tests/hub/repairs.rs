//! Files of the cache that were damaged, and stores that are not there.

use super::*;

/// Changes a byte of a file, and not its size.
fn damage(path: &Path) -> Result<()> {
    let mut bytes = std::fs::read(path)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    Ok(std::fs::write(path, bytes)?)
}

#[test]
fn a_file_that_was_damaged_is_found_and_replaced() -> Result<()> {
    let place = Place::new()?;
    let store = place.path("hub");
    let repo = llama()?;
    let server = Server::of("a/b", repo.clone())?;
    let first = pull(&server, &store, "a/b")?;
    let weights = first.found.path.join("model.safetensors");
    for text in ["a/b".to_owned(), format!("a/b@{}", repo.commit)] {
        damage(&weights)?;
        server.is_well();
        let pulled = pull(&server, &store, &text)?;
        assert_eq!(pulled.bytes, repo.files["model.safetensors"].len() as u64);
        assert!(std::fs::read(&weights)? == repo.files["model.safetensors"] && weights.is_symlink());
    }
    // A file that stands in the snapshot itself, as where there are no links.
    let blob = weights.canonicalize()?;
    std::fs::remove_file(&weights)?;
    std::fs::rename(&blob, &weights)?;
    damage(&weights)?;
    pull(&server, &store, "a/b")?;
    assert!(std::fs::read(&weights)? == repo.files["model.safetensors"]);
    Ok(())
}

#[test]
fn a_damaged_file_is_told_and_without_a_network_refused() -> Result<()> {
    let place = Place::new()?;
    let server = Server::of("a/b", llama()?)?;
    let path = succeeds(&mut program(&server, &place, &["pull", "a/b"]))?.stdout;
    let weights = Path::new(path.trim()).join("model.safetensors");
    damage(&weights)?;
    let words = ["note: a/b: model.safetensors is damaged here", "a/b: damaged, and the hub is not asked (--offline)"];
    let told = run(&mut program(&server, &place, &["--offline", "pull", "a/b"]))?;
    assert!(told.code != Some(0) && told.stderr.contains(words[1]), "{}", told.stderr);
    let ran = succeeds(&mut program(&server, &place, &["pull", "a/b"]))?;
    assert!(ran.stderr.contains(words[0]) && ran.stderr.contains("saved"), "{}", ran.stderr);
    assert!(std::fs::read(weights)? == llama()?.files["model.safetensors"]);
    Ok(())
}

/// A damaged file stays where it is until another one is there: it may be better than none.
#[test]
fn a_damaged_file_is_not_given_up_before_another_has_come() -> Result<()> {
    let place = Place::new()?;
    let store = place.path("hub");
    let server = Server::of("a/b", llama()?)?;
    let weights = pull(&server, &store, "a/b")?.found.path.join("model.safetensors");
    damage(&weights)?;
    let damaged = std::fs::read(&weights)?;
    server.on(|asked| asked.is_storage.then(|| Act::Answer(404, vec![], String::new())));
    assert!(pull(&server, &store, "a/b").is_err());
    assert!(std::fs::read(&weights)? == damaged);
    Ok(())
}

#[test]
fn nothing_is_downloaded_while_a_shared_store_is_not_there() -> Result<()> {
    let place = Place::new()?;
    let server = Server::of("a/b", llama()?)?;
    let mut command = program(&server, &place, &["pull", "a/b"]);
    command.env("HOMEROOM_BASES", place.path("gone"));
    let words = ["HOMEROOM_BASES: ", "gone is not there, so it is not known which models may be downloaded"];
    refused(&mut command, &words)?;
    assert!(server.asked().is_empty());
    std::fs::create_dir(place.path("gone"))?;
    succeeds(&mut command)?;
    // What is here can be used without it.
    std::fs::remove_dir(place.path("gone"))?;
    let mut command = program(&server, &place, &["--offline", "pull", "a/b"]);
    let ran = succeeds(command.env("HOMEROOM_BASES", place.path("gone")))?;
    assert_eq!(ran.stderr.matches("note: HOMEROOM_BASES: ").count(), 1, "{}", ran.stderr);
    Ok(())
}
