//! Connections that break, stall and repeat themselves, and servers that cannot answer now.

use super::*;

/// A file of the storage, whose bytes are all different enough that a wrong piece is seen.
fn large() -> Vec<u8> {
    (0..1_000_003_u32).flat_map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes()).take(1_000_003).collect()
}

fn repo() -> Result<Repo> {
    Ok(llama()?.with("model.safetensors", large()))
}

/// What came of the large file.
fn came(pulled: &Pulled) -> Result<Vec<u8>> {
    Ok(std::fs::read(pulled.found.path.join("model.safetensors"))?)
}

#[test]
fn a_file_that_is_cut_twenty_times_comes_whole() -> Result<()> {
    let place = Place::new()?;
    let server = Server::of("a/b", repo()?)?;
    server.on(|asked| (asked.is_storage && asked.before < 20).then_some(Act::Cut(40_007)));
    let pulled = pull(&server, &place.path("hub"), "a/b")?;
    assert!(came(&pulled)? == large());
    let asked = server.asked();
    let ranges: Vec<u64> = asked.iter().filter(|asked| asked.is_storage).filter_map(|asked| asked.range).collect();
    assert_eq!(ranges.len(), 20);
    assert!(ranges.is_sorted_by(|a, b| a < b) && ranges[0] > 0, "each goes on where the last ended: {ranges:?}");
    Ok(())
}

#[test]
fn a_connection_that_brings_nothing_more_is_given_up_and_made_anew() -> Result<()> {
    let place = Place::new()?;
    let server = Server::of("a/b", repo()?)?;
    server.on(|asked| match asked.before {
        0 | 1 if asked.is_storage => Some(Act::Stall(30_001)),
        // It is never silent.
        2 if asked.is_storage => Some(Act::Drip),
        _ => None,
    });
    assert!(came(&pull(&server, &place.path("hub"), "a/b")?)? == large());
    Ok(())
}

#[test]
fn patience_with_a_server_that_brings_nothing_ends_and_what_came_is_kept() -> Result<()> {
    let place = Place::new()?;
    let store = place.path("hub");
    let server = Server::of("a/b", repo()?)?;
    server.on(|asked| asked.is_storage.then_some(if asked.before == 0 { Act::Cut(70_001) } else { Act::Cut(0) }));
    let told = refusal(&server, &store, "a/b");
    assert!(told.contains("model.safetensors: the connection was cut") && told.contains("(tried 5 times)"), "{told}");
    assert_eq!(server.asked().iter().filter(|asked| asked.is_storage).count(), 5);
    let partial = store.join("models--a--b/blobs").join(format!("{}.incomplete", blob_name(&large())));
    let kept = std::fs::metadata(&partial)?.len();
    assert!(kept > 0 && !store.join("models--a--b/refs").exists() && !store.join("models--a--b/snapshots").exists());
    server.is_well();
    let pulled = pull(&server, &store, "a/b")?;
    assert!(came(&pulled)? == large() && !partial.exists());
    let first = server.asked().into_iter().find(|asked| asked.is_storage).context("it goes on")?;
    assert_eq!(first.range, Some(kept));
    Ok(())
}

/// It would be asked without end, as each request brings something.
#[test]
fn a_server_that_always_begins_anew_and_is_always_cut_is_given_up() -> Result<()> {
    let place = Place::new()?;
    let server = Server::of("a/b", repo()?)?;
    // It knows no ranges, since it calls the part that it sends the whole.
    server.on(|asked| {
        let cut = || Act::Content(large()[..500_000].to_vec());
        asked.is_storage.then(|| if asked.range.is_some() { Act::IgnoreRange } else { cut() })
    });
    assert!(pull(&server, &place.path("hub"), "a/b").is_err());
    assert!(server.asked().iter().filter(|asked| asked.is_storage).count() <= 5);
    Ok(())
}

#[test]
fn a_server_that_ignores_ranges_or_sends_another_one_does_no_harm() -> Result<()> {
    for act in [|| Act::IgnoreRange, || Act::WrongRange] {
        let place = Place::new()?;
        let server = Server::of("a/b", repo()?)?;
        server.on(move |asked| match asked.before {
            0 if asked.is_storage => Some(Act::Cut(90_001)),
            1 if asked.is_storage => Some(act()),
            _ => None,
        });
        let pulled = pull(&server, &place.path("hub"), "a/b")?;
        assert!(came(&pulled)? == large());
        let asked = server.asked();
        assert!(asked.iter().any(|asked| asked.is_storage && asked.range.is_some()));
    }
    Ok(())
}

#[test]
fn what_another_program_left_of_a_file_is_checked_with_the_rest() -> Result<()> {
    let place = Place::new()?;
    let store = place.path("hub");
    let server = Server::of("a/b", repo()?)?;
    let partial = format!("hub/models--a--b/blobs/{}.incomplete", blob_name(&large()));
    for (left, requests) in [
        (large()[..300_001].to_vec(), 1),
        (large(), 0),
        // Wrong, and too long.
        (vec![7; 300_001], 2),
        ([large(), vec![7; 9]].concat(), 1),
    ] {
        place.write(&partial, left)?;
        server.is_well();
        assert!(came(&pull(&server, &store, "a/b")?)? == large());
        assert_eq!(server.asked().iter().filter(|asked| asked.is_storage).count(), requests);
        std::fs::remove_dir_all(&store)?;
    }
    Ok(())
}

#[test]
fn a_server_that_cannot_answer_now_is_asked_again() -> Result<()> {
    let place = Place::new()?;
    let server = Server::of("a/b", repo()?)?;
    server.on(|asked| {
        let after = vec![("retry-after", "0".to_owned())];
        match (asked.before, asked.path.as_str()) {
            (0, path) if path.starts_with("/api/") => Some(Act::Answer(503, vec![], String::new())),
            (1, path) if path.starts_with("/api/") => Some(Act::Answer(429, after, String::new())),
            (0, path) if path.ends_with("config.json") => Some(Act::Answer(500, vec![], "<html>".into())),
            (0, _) if asked.is_storage => Some(Act::Answer(429, after, String::new())),
            (1, _) if asked.is_storage => Some(Act::Answer(504, vec![], String::new())),
            _ => None,
        }
    });
    assert!(came(&pull(&server, &place.path("hub"), "a/b")?)? == large());
    Ok(())
}

#[test]
fn a_server_that_asks_to_wait_for_long_is_not_waited_for() -> Result<()> {
    let place = Place::new()?;
    let server = Server::of("a/b", repo()?)?;
    server.on(|_| Some(Act::Answer(429, vec![("retry-after", "3600".into())], String::new())));
    let told = refusal(&server, &place.path("hub"), "a/b");
    assert!(told.contains("too many requests") && told.contains("60 minutes"), "{told}");
    assert_eq!(server.asked().len(), 1);
    server.on(|_| Some(Act::Answer(503, vec![], String::new())));
    let told = refusal(&server, &place.path("hub"), "a/b");
    assert!(told.contains("cannot answer now (status 503)") && told.contains("tried 4 times"), "{told}");
    assert!(!place.path("hub").exists());
    Ok(())
}
