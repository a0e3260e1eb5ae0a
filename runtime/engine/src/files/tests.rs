use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::exchange::Older;
use super::new_directory::{abandon, remove, unfinished};
use super::*;

fn names(directory: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(directory)?;
    let mut names =
        entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect::<Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

#[test]
fn a_directory_appears_whole_or_not_at_all() -> Result<()> {
    let place = tempfile::tempdir()?;
    let target = place.path().join("out");
    let started = NewDirectory::start(&target)?;
    started.write("a", b"1")?;
    assert!(!target.exists());
    drop(started);
    assert_eq!(fs::read_dir(place.path())?.count(), 0);

    let started = NewDirectory::start(&target)?;
    started.write("a", b"1")?;
    started.publish()?;
    assert_eq!(fs::read(target.join("a"))?, b"1");
    assert!(vacant(&target).is_err());

    let again = NewDirectory::start(&target)?;
    again.write("a", b"2")?;
    again.publish()?;
    assert!(!unfinished().iter().any(|path| path.starts_with(place.path())));
    assert_eq!(fs::read(target.join("a"))?, b"2");
    assert_eq!(fs::read_dir(place.path())?.count(), 1);
    Ok(())
}

#[test]
fn an_abandoned_directory_goes_with_what_is_in_it_and_cannot_be_written_or_finished() -> Result<()> {
    let place = tempfile::tempdir()?;
    let target = place.path().join("out");
    let started = NewDirectory::start(&target)?;
    started.write("a", b"1")?;
    let mut ours = vec![started.path().to_owned()];
    abandon(&mut ours);
    assert_eq!(fs::read_dir(place.path())?.count(), 0);
    assert!(started.write("b", b"1").is_err());
    assert!(started.subdirectory(Path::new("c/d")).is_err());
    assert!(started.publish().is_err());
    assert_eq!(fs::read_dir(place.path())?.count(), 0);
    Ok(())
}

#[cfg(unix)]
#[test]
fn whatever_has_the_name_is_replaced_and_only_when_asked() -> Result<()> {
    let place = tempfile::tempdir()?;
    let at = |name: &str| place.path().join(name);
    fs::create_dir(at("elsewhere"))?;
    fs::write(at("elsewhere/theirs"), "")?;
    let link = |name: &str, to: &str| std::os::unix::fs::symlink(to, at(name));
    fs::write(at("file"), "")?;
    link("link", "elsewhere")?;
    link("nowhere", "gone")?;
    for name in ["file", "link", "nowhere", "elsewhere"] {
        let mut refused = NewDirectory::start(&at(name))?;
        refused.replaces = false;
        refused.write("a", b"1")?;
        let error = format!("{:#}", refused.publish().unwrap_err());
        let kept = at(&format!("{name}.kept"));
        assert!(error.contains(&format!("it is whole in {}", kept.display())), "{error}");
        assert_eq!(fs::read(kept.join("a"))?, b"1");
        fs::remove_dir_all(kept)?;
        let replacing = NewDirectory::start(&at(name))?;
        replacing.write("a", b"2")?;
        replacing.publish()?;
        // A link is replaced, not what it leads to.
        assert!(at("elsewhere/theirs").exists() || name == "elsewhere");
        assert_eq!(fs::read(at(name).join("a"))?, b"2");
        assert!(!at(name).is_symlink());
    }
    assert_eq!(names(place.path())?, ["elsewhere", "file", "link", "nowhere"]);
    // An empty directory is nobody's result, nor is a link to one.
    fs::create_dir(at("empty"))?;
    link("to-empty", "empty")?;
    for name in ["to-empty", "empty"] {
        let mut filling = NewDirectory::start(&at(name))?;
        filling.replaces = false;
        filling.publish()?;
    }
    assert!(vacant(&at("empty")).is_ok() && !at("to-empty").is_symlink());
    link("dangling", "gone")?;
    assert!(vacant(&at("dangling")).unwrap_err().to_string().contains("a link that leads nowhere"));
    Ok(())
}

// --- litter ----------------------------------------------------------------------------------------------------------

#[cfg(unix)]
#[test]
fn what_a_killed_process_left_is_swept_and_nothing_else() -> Result<()> {
    let place = tempfile::tempdir()?;
    let at = |name: &str| place.path().join(name);
    let dead = format!("{}0123456789ab", temporary::PREFIX);
    for name in [&dead, &format!("{dead}.ended")] {
        fs::create_dir_all(at(name).join("a/b"))?;
        fs::write(at(name).join("a/b/weights"), "1")?;
    }
    // Names that a user could have given, and a link that leads to what is not ours.
    let theirs = [".homeroom-tmp-settings", ".homeroom-tmp-0123456789abc", "homeroom-tmp-0123456789ab", "out"];
    for name in theirs {
        fs::create_dir(at(name))?;
    }
    fs::write(at("out/mine"), "")?;
    std::os::unix::fs::symlink("out", at(".homeroom-tmp-aaaaaaaaaaaa"))?;
    let living = NewDirectory::start(&at("living"))?;
    living.write("a", b"1")?;

    drop(NewDirectory::start(&at("next"))?);
    let mut left: Vec<String> = theirs.map(str::to_owned).to_vec();
    left.push(living.path().file_name().unwrap().to_string_lossy().into_owned());
    left.sort();
    assert_eq!(names(place.path())?, left);
    assert!(at("out/mine").exists());
    living.publish()?;
    assert_eq!(fs::read(at("living/a"))?, b"1");
    Ok(())
}

#[cfg(unix)]
#[test]
fn another_users_directory_is_not_litter() -> Result<()> {
    let place = tempfile::tempdir()?;
    let theirs = place.path().join(".homeroom-tmp-0123456789ab");
    fs::create_dir(&theirs)?;
    if std::os::unix::fs::chown(&theirs, Some(12345), Some(12345)).is_err() {
        return Ok(()); // Only root can give things away.
    }
    litter::sweep(place.path());
    assert!(theirs.exists());
    Ok(())
}

/// Its maker has not locked a directory yet in the instant after it was made.
#[cfg(unix)]
#[test]
fn a_living_directory_is_never_swept() -> Result<()> {
    let place = in_memory()?;
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    litter::sweep(place.path());
                }
            });
        }
        let make = || -> Result<()> {
            for number in 0..2000 {
                let (path, _alive) = temporary::claim(temporary::PREFIX, place.path())?;
                fs::write(path.join("file"), "1").with_context(|| format!("{number}"))?;
                ensure!(path.join("file").exists(), "{number}");
            }
            Ok(())
        };
        let made = make();
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        made
    })
}

#[test]
fn a_scratch_directory_goes_with_its_owner_and_a_dead_ones_with_the_next() -> Result<()> {
    let before = std::env::temp_dir().join("homeroom-enginetest-0123456789ab");
    fs::create_dir(&before)?;
    let scratch = Scratch::new("enginetest")?;
    assert!(scratch.path().is_dir() && !before.exists());
    let other = Scratch::new("enginetest")?;
    assert!(scratch.path().is_dir());
    let paths = [scratch.path().to_owned(), other.path().to_owned()];
    drop((scratch, other));
    assert!(paths.iter().all(|path| !path.exists()));
    Ok(())
}

// --- killed while they replaced --------------------------------------------------------------------------------------

/// This test binary again, with one of the ignored tests below, which goes on until it is killed.
fn child(test: &str, place: &Path) -> Result<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args([&format!("files::tests::{test}"), "--exact", "--ignored", "--nocapture"]);
    Ok(command.env("HOMEROOM_TEST_PLACE", place).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?)
}

fn place_of_child() -> PathBuf {
    std::env::var_os("HOMEROOM_TEST_PLACE").expect("a test starts this one").into()
}

/// In memory, where nothing waits for a disk, the renames are a good part of what is done.
fn in_memory() -> Result<tempfile::TempDir> {
    let memory = Path::new("/dev/shm");
    Ok(if memory.is_dir() { tempfile::tempdir_in(memory)? } else { tempfile::tempdir()? })
}

fn replace_for_ever(replace: impl Fn(&Path, &Path) -> io::Result<Older>) {
    let place = place_of_child();
    loop {
        let (path, alive) = temporary::claim(temporary::PREFIX, &place).expect("the place can be written");
        fs::write(path.join("whole"), "1").expect("the place can be written");
        let older = replace(&path, &place.join("out")).expect("it is replaced");
        drop(alive);
        if let Some((older, _alive)) = older {
            let _ = remove(&older);
        }
    }
}

#[test]
#[ignore = "another test starts and kills it"]
fn replaces_for_ever() {
    replace_for_ever(exchange::replace);
}

#[test]
#[ignore = "another test starts and kills it"]
fn replaces_for_ever_by_renaming() {
    replace_for_ever(exchange::replace_by_renaming);
}

/// `instantly`: without the next process having looked.
fn is_never_without_a_result(test: &str, instantly: bool) -> Result<()> {
    let place = in_memory()?;
    let out = place.path().join("out");
    for kill in 0..60_u64 {
        let mut child = child(test, place.path())?;
        // Its work has begun.
        while !out.exists() {
            ensure!(child.try_wait()?.is_none(), "`{test}` ended");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_micros(2_000 + 137 * kill));
        child.kill()?;
        child.wait()?;
        ensure!(!instantly || out.exists(), "kill {kill}: {:?}", names(place.path())?);
        recover(&out);
        assert_eq!(fs::read(out.join("whole")).with_context(|| format!("kill {kill}"))?, b"1");
        litter::sweep(place.path());
        assert_eq!(names(place.path())?, ["out"], "kill {kill}");
    }
    Ok(())
}

#[cfg(target_os = "linux")]
#[test]
fn whoever_is_killed_while_replacing_leaves_the_old_or_the_new() -> Result<()> {
    is_never_without_a_result("replaces_for_ever", true)
}

#[cfg(unix)]
#[test]
fn where_names_cannot_be_exchanged_the_next_process_finishes_the_replacement() -> Result<()> {
    is_never_without_a_result("replaces_for_ever_by_renaming", false)
}

/// The states in which a process can be killed that moves both directories, one by one.
#[cfg(unix)]
#[test]
fn a_replacement_that_was_broken_off_is_finished_or_forgotten() -> Result<()> {
    // What exists: the name, the new one aside, the older one aside; and what the name has afterwards.
    for (name, new, old, after) in [
        (Some("old"), false, false, Some("old")),   // nothing was moved
        (Some("old"), true, false, Some("old")),    // the new one was moved aside
        (None, true, true, Some("new")),            // the older one, too
        (Some("new"), false, true, Some("new")),    // the new one has the name
        (None, false, true, None),                  // and the user has removed it since
        (Some("other"), true, true, Some("other")), // another process took the name
    ] {
        let place = tempfile::tempdir()?;
        let aside = place.path().join(".homeroom-tmp-0123456789ab");
        let make = |path: PathBuf, text: &str| -> Result<()> {
            fs::create_dir_all(&path)?;
            Ok(fs::write(path.join("file"), text)?)
        };
        fs::create_dir_all(aside.join("new"))?;
        fs::create_dir_all(aside.join("old"))?;
        if let Some(text) = name {
            make(place.path().join("out"), text)?;
        }
        if new {
            make(aside.join("new/out"), "new")?;
        }
        if old {
            make(aside.join("old/out"), "old")?;
        }
        let case = format!("{name:?} {new} {old}");
        recover(&place.path().join("out"));
        litter::sweep(place.path());
        assert_eq!(fs::read_to_string(place.path().join("out/file")).ok().as_deref(), after, "{case}");
        assert_eq!(names(place.path())?.len(), usize::from(after.is_some()), "{case}");
    }
    Ok(())
}

/// Threads that replace one directory at once, by either way: each result was whole, and the last stays.
#[cfg(unix)]
#[test]
fn several_can_replace_one_directory_at_once() -> Result<()> {
    let place = in_memory()?;
    let replace = |how: fn(&Path, &Path) -> io::Result<Older>| -> io::Result<()> {
        for _ in 0..50 {
            let (path, _alive) = temporary::claim(temporary::PREFIX, place.path())?;
            fs::write(path.join("whole"), "1")?;
            if let Some((older, _alive)) = how(&path, &place.path().join("out"))? {
                let _ = remove(&older);
            }
        }
        Ok(())
    };
    let done: Vec<io::Result<()>> = std::thread::scope(|scope| {
        let ways = [exchange::replace, exchange::replace_by_renaming, exchange::replace_by_renaming];
        let threads = ways.map(|how| scope.spawn(move || replace(how)));
        threads.map(|thread| thread.join().expect("no thread panics")).into()
    });
    for result in done {
        result?;
    }
    assert_eq!(fs::read(place.path().join("out/whole"))?, b"1");
    litter::sweep(place.path());
    assert_eq!(names(place.path())?, ["out"]);
    Ok(())
}

// --- modes -----------------------------------------------------------------------------------------------------------

/// Directories in a result can be entered, whoever wrote their files; nobody else may write them, whatever the writer said.
#[cfg(unix)]
#[test]
fn a_result_is_as_open_as_its_place_all_the_way_down() -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let place = tempfile::tempdir()?;
    let started = NewDirectory::start(&place.path().join("above/out"))?;
    assert_eq!(fs::metadata(started.path())?.permissions().mode() & 0o777, 0o700);
    started.subdirectory(Path::new("a/b"))?;
    started.subdirectory(Path::new("a/c"))?;
    started.write("a/b/file", b"1")?;
    fs::set_permissions(started.path().join("a/b/file"), fs::Permissions::from_mode(0o666))?;
    fs::set_permissions(started.path().join("a/b"), fs::Permissions::from_mode(0o777))?;
    let out = started.publish()?;
    let open = modes::directory_mode(&out);
    assert_eq!(open & !0o755, 0);
    for path in ["..", "a", "a/b", "a/c"] {
        assert_eq!(fs::metadata(out.join(path))?.permissions().mode() & 0o777, open, "{path}");
    }
    assert_eq!(fs::metadata(out.join("a/b/file"))?.permissions().mode() & 0o777, open & 0o666);
    Ok(())
}

#[cfg(unix)]
#[test]
fn a_replaced_file_is_private_and_a_link_to_it_stays_one() -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let place = tempfile::tempdir()?;
    let (file, link) = (place.path().join("file"), place.path().join("link"));
    fs::write(&file, "old")?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o666))?;
    std::os::unix::fs::symlink("file", &link)?;
    fs::write(place.path().join(".homeroom-file-0123456789ab"), "litter")?;
    replace_file(&link, b"new")?;
    assert_eq!((fs::read(&file)?, link.is_symlink()), (b"new".to_vec(), true));
    assert_eq!(fs::metadata(&file)?.permissions().mode() & 0o777, 0o600);
    assert_eq!(names(place.path())?, ["file", "link"]);
    Ok(())
}
