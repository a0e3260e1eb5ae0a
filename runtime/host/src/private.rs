//! Files for their owner alone.

use std::fs::{File, OpenOptions};

/// Options by which a file that is made is for its owner alone, where the system knows owners.
pub fn options() -> OpenOptions {
    let mut options = File::options();
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options
}

/// The same; no link is followed, and a pipe does not block.
pub fn plain_options() -> OpenOptions {
    let mut options = options();
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NOFOLLOW | libc::O_NONBLOCK);
    options
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_is_made_is_its_owners_alone() -> std::io::Result<()> {
        let place = tempfile::tempdir()?;
        let (one, two, link) = (place.path().join("one"), place.path().join("two"), place.path().join("link"));
        options().write(true).create_new(true).open(&one)?;
        plain_options().append(true).create(true).open(&two)?;
        for path in [&one, &two] {
            assert_eq!(std::fs::metadata(path)?.permissions().mode() & 0o777, 0o600);
        }
        std::os::unix::fs::symlink(&one, &link)?;
        assert!(options().read(true).open(&link).is_ok() && plain_options().read(true).open(&link).is_err());
        Ok(())
    }
}
