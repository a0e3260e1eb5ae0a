//! Memory of a library whose code seldom runs. Libraries are never unloaded, but what is mapped from the file and never
//! written can leave memory, and is read again from the file when the code runs next.

use std::ffi::c_void;
use std::ops::Range;
use std::sync::Arc;

/// The pages of one library that are as in its file, and always will be.
#[derive(Clone, Debug, Default)]
pub struct Pages(Arc<[Range<usize>]>);

#[cfg(target_os = "linux")]
impl Pages {
    /// Those of the library that an address lies in; none if no library is there, or its code was relocated in place.
    pub fn around(address: *const c_void) -> Self {
        struct Asked {
            address: usize,
            pages: Vec<Range<usize>>,
        }
        /// Looks at one library; 1 ends the walk.
        ///
        /// # Safety
        /// `info` is a library of the linker, and `asked` the walk's own [`Asked`].
        unsafe extern "C" fn look(info: *mut libc::dl_phdr_info, _: usize, asked: *mut c_void) -> i32 {
            // SAFETY: the walk below passes its `asked`, and the linker a library whose headers stay mapped.
            let (info, asked) = unsafe { (&*info, &mut *asked.cast::<Asked>()) };
            // SAFETY: as above; the linker counts its headers.
            let headers = unsafe { std::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()) };
            let place = |header: &libc::Elf64_Phdr| {
                let start = info.dlpi_addr as usize + header.p_vaddr as usize;
                start..start + header.p_memsz as usize
            };
            let loaded = || headers.iter().filter(|header| header.p_type == libc::PT_LOAD);
            if !loaded().any(|header| place(header).contains(&asked.address)) {
                return 0;
            }
            let dynamic = headers.iter().find(|header| header.p_type == libc::PT_DYNAMIC);
            // SAFETY: the linker keeps a library's dynamic table mapped; it consists of pairs of words.
            let dynamic = dynamic.map(|header| unsafe {
                std::slice::from_raw_parts(place(header).start as *const [u64; 2], place(header).len() / 16)
            });
            const TEXTREL: u64 = 22;
            const FLAGS: u64 = 30;
            let relocated = |[tag, value]: &[u64; 2]| *tag == TEXTREL || *tag == FLAGS && value & 4 != 0;
            if !dynamic.is_some_and(|table| table.iter().any(relocated)) {
                // SAFETY: sysconf has no preconditions.
                let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
                // A page at either end may be shared with what is written.
                let whole = |place: Range<usize>| place.start.next_multiple_of(page)..place.end / page * page;
                let clean = loaded().filter(|header| header.p_flags & libc::PF_W == 0);
                asked.pages = clean.map(|header| whole(place(header))).filter(|place| !place.is_empty()).collect();
            }
            1
        }
        let mut asked = Asked { address: address.addr(), pages: Vec::new() };
        // SAFETY: `look` gets `asked` during the walk only, and does not unwind: it only adds and compares.
        unsafe { libc::dl_iterate_phdr(Some(look), (&raw mut asked).cast()) };
        Self(asked.pages.into())
    }

    /// Lets them leave memory. Code that runs in them meanwhile goes on, and is read again as it does.
    pub fn release(&self) {
        for pages in &*self.0 {
            // SAFETY: these pages map a file privately and no one has written them: the program does not, and the linker
            // writes to writable segments only, `around` having seen that there are no relocations in others. So what is read
            // again is what is there now. The library is never unmapped, and its file is a private copy that nobody writes.
            unsafe { libc::madvise(pages.start as *mut c_void, pages.len(), libc::MADV_DONTNEED) };
        }
    }
}

#[cfg(not(target_os = "linux"))]
impl Pages {
    /// None: other systems say nothing of a library's segments.
    pub fn around(_: *const c_void) -> Self {
        Self::default()
    }

    /// Nothing.
    pub fn release(&self) {}
}
