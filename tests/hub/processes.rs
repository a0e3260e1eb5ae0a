//! Processes that are ended, and several at once.

use std::process::{Child, Stdio};
use std::thread::sleep;
use std::time::Instant;

use super::*;

fn large() -> Vec<u8> {
    (0..400_009_u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

/// Waits until so many bytes of the large file are here.
fn await_bytes(partial: &Path, bytes: u64) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while std::fs::metadata(partial).map_or(0, |meta| meta.len()) < bytes {
        assert!(Instant::now() < deadline, "{} does not grow", partial.display());
        sleep(Duration::from_millis(20));
    }
}

fn start(server: &Server, place: &Place) -> Result<Child> {
    let mut command = program(server, place, &["pull", "a/b"]);
    Ok(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?)
}

fn signal(child: &Child, signal: i32) {
    // SAFETY: the process is a child that has not been waited for, so the number is its.
    assert_eq!(unsafe { libc::kill(child.id() as i32, signal) }, 0);
}

#[test]
fn a_download_that_was_ended_goes_on_where_it_was() -> Result<()> {
    for (number, code) in [(libc::SIGINT, Some(130)), (libc::SIGTERM, Some(130)), (libc::SIGKILL, None)] {
        let place = Place::new()?;
        let server = Server::of("a/b", llama()?.with("model.safetensors", large()))?;
        server.on(|asked| asked.is_storage.then_some(Act::Stall(200_000)));
        let child = start(&server, &place)?;
        let partial = cached(&place, "models--a--b/blobs").join(format!("{}.incomplete", blob_name(&large())));
        await_bytes(&partial, 200_000);
        signal(&child, number);
        let asked_to_end = Instant::now();
        let ended = child.wait_with_output()?;
        assert!(asked_to_end.elapsed() < Duration::from_secs(20), "it does not wait for the server");
        let told = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert_eq!(ended.status.code(), code, "{told}");
        assert!(code.is_none() || told.contains("are here\nhint: the same command goes on from there"), "{told}");
        assert!(!cached(&place, "models--a--b/refs").exists() && !cached(&place, "models--a--b/snapshots").exists());
        server.is_well();
        let ran = succeeds(&mut program(&server, &place, &["pull", "a/b"]))?;
        assert_eq!(std::fs::read(Path::new(ran.stdout.trim_end()).join("model.safetensors"))?, large());
        assert!(ran.stderr.contains("resumed"), "{}", ran.stderr);
        let ranges: Vec<Option<u64>> =
            server.asked().into_iter().filter(|asked| asked.is_storage).map(|asked| asked.range).collect();
        assert_eq!(ranges, [Some(200_000)]);
    }
    Ok(())
}

#[test]
fn of_two_processes_one_downloads_and_the_other_finds_it() -> Result<()> {
    let place = Place::new()?;
    let server = Server::of("a/b", llama()?.with("model.safetensors", large()))?;
    server.on(|asked| asked.is_storage.then_some(Act::Slow));
    let children = [start(&server, &place)?, start(&server, &place)?];
    let mut told = String::new();
    let mut paths = Vec::new();
    for child in children {
        let ended = child.wait_with_output()?;
        told += &String::from_utf8_lossy(&ended.stderr);
        assert!(ended.status.success(), "{told}");
        paths.push(String::from_utf8(ended.stdout)?);
    }
    assert_eq!(paths[0], paths[1]);
    assert_eq!(std::fs::read(Path::new(paths[0].trim_end()).join("model.safetensors"))?, large());
    assert_eq!(server.asked().iter().filter(|asked| asked.is_storage).count(), 1, "{told}");
    assert!(told.contains("model.safetensors: waiting for another process"), "{told}");
    assert!(!tree(&place.path("hf")).iter().any(|path| path.contains("incomplete") || path.contains(".tmp")));
    Ok(())
}

/// Python's huggingface_hub takes the same lock.
#[test]
fn a_file_that_another_program_has_locked_is_waited_for() -> Result<()> {
    let place = Place::new()?;
    let server = Server::of("a/b", llama()?.with("model.safetensors", large()))?;
    let lock = place.write(&format!("hf/hub/.locks/models--a--b/{}.lock", blob_name(&large())), "")?;
    let held = std::fs::File::open(lock)?;
    held.lock()?;
    let child = start(&server, &place)?;
    let config = cached(&place, "models--a--b/blobs").join(blob_name(&llama()?.files["config.json"]));
    let deadline = Instant::now() + Duration::from_secs(60);
    while !config.exists() && Instant::now() < deadline {
        sleep(Duration::from_millis(20));
    }
    // The other program finishes the file, under the name that it has here.
    std::fs::write(cached(&place, "models--a--b/blobs").join(blob_name(&large())), large())?;
    drop(held);
    let ended = child.wait_with_output()?;
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    assert_eq!(server.asked().iter().filter(|asked| asked.is_storage).count(), 0);
    Ok(())
}
