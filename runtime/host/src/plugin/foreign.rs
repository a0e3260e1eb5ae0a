//! Reads memory that a plugin points at. Its pointers and lengths are not believed: what is not there is an error, and no crash.

use std::mem::MaybeUninit;

use anyhow::{Context, Result, bail, ensure};

/// A copy of `len` bytes at `from`.
///
/// # Errors
/// When there are more than `most`, or not all can be read.
pub fn bytes(from: *const u8, len: usize, most: usize) -> Result<Vec<u8>> {
    ensure!(len <= most, "{len} bytes, {most} are the most");
    let mut copy = Vec::new();
    copy.try_reserve_exact(len).context("there is no memory for it")?;
    // SAFETY: `copy` has that capacity, and `fill` has written all of it when it succeeds.
    unsafe {
        fill(from, copy.as_mut_ptr(), len)?;
        copy.set_len(len);
    }
    Ok(copy)
}

/// A copy of the value at `from`.
///
/// # Errors
/// When it cannot be read.
///
/// # Safety
/// Any bits are a value of `T`.
pub unsafe fn value<T>(from: *const T) -> Result<T> {
    ensure!(from.is_aligned(), "a pointer to it is not aligned");
    let mut copy = MaybeUninit::<T>::uninit();
    // SAFETY: `copy` has that size; all of it is written when `fill` succeeds, and any bits are a value.
    unsafe {
        fill(from.cast(), copy.as_mut_ptr().cast(), size_of::<T>())?;
        Ok(copy.assume_init())
    }
}

/// Copies `len` bytes.
///
/// # Safety
/// `to` can be written and does not overlap what is read.
unsafe fn fill(from: *const u8, to: *mut u8, len: usize) -> Result<()> {
    if len == 0 {
        return Ok(());
    }
    ensure!(!from.is_null(), "it is at null");
    ensure!(
        from.addr().checked_add(len).is_some_and(|end| end <= isize::MAX as usize),
        "{len} bytes are not in memory"
    );
    #[cfg(target_os = "linux")]
    {
        let mut done = 0;
        while done < len {
            let local = libc::iovec { iov_base: to.wrapping_add(done).cast(), iov_len: len - done };
            let remote = libc::iovec { iov_base: from.wrapping_add(done).cast_mut().cast(), iov_len: len - done };
            // SAFETY: `to` can be written; the kernel checks what it reads, which is this process's own.
            let read = unsafe { libc::process_vm_readv(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0) };
            match read {
                1.. => done += read as usize,
                _ if done == 0 && !faulted() => break,
                _ => bail!("{len} bytes at {from:p} cannot be read"),
            }
        }
        if done == len {
            return Ok(());
        }
    }
    // Where the system does not say whether memory is readable, as in a sandbox that forbids to ask.
    // SAFETY: the plugin's contract is that `from` is readable; there is no way to find out.
    unsafe { std::ptr::copy_nonoverlapping(from, to, len) };
    Ok(())
}

#[cfg(target_os = "linux")]
fn faulted() -> bool {
    std::io::Error::last_os_error().raw_os_error() == Some(libc::EFAULT)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_in_memory_is_an_error() {
        let text = b"a record";
        assert_eq!(bytes(text.as_ptr(), text.len(), 8).expect("it is there"), text);
        assert_eq!(bytes(std::ptr::null(), 0, 8).expect("there is nothing to read"), b"");
        let refused =
            |from: *const u8, len| format!("{:#}", bytes(from, len, usize::MAX >> 1).expect_err("it is not there"));
        assert!(refused(std::ptr::null(), 10).contains("at null"));
        for from in [8, 4096, isize::MAX as usize - 4, usize::MAX - 3] {
            let error = refused(std::ptr::without_provenance(from), 10);
            assert!(error.contains("cannot be read") || error.contains("are not in memory"), "{error}");
        }
        assert!(bytes(text.as_ptr(), usize::MAX, 8).is_err());
    }

    /// Bytes that begin where they should and end beyond what is mapped.
    #[test]
    fn a_length_that_runs_into_unmapped_memory_is_an_error() {
        const PAGE: usize = 4096;
        // SAFETY: two new pages, of which the second is given back.
        let pages = unsafe {
            let pages = libc::mmap(
                std::ptr::null_mut(),
                2 * PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            assert_ne!(pages, libc::MAP_FAILED);
            libc::munmap(pages.add(PAGE), PAGE);
            pages.cast::<u8>()
        };
        assert_eq!(bytes(pages, PAGE, PAGE).expect("it is there").len(), PAGE);
        assert!(bytes(pages, PAGE + 1, 2 * PAGE).is_err());
        // SAFETY: any bits are a number.
        assert!(unsafe { value(pages.add(PAGE - 4).cast::<u32>()) }.is_ok());
        // SAFETY: as above.
        assert!(unsafe { value(pages.add(PAGE - 4).cast::<u64>()) }.is_err());
        // SAFETY: it is this test's page.
        unsafe { libc::munmap(pages.cast(), PAGE) };
    }
}
