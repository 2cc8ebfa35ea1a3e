//! Systems that are not Unix: what the standard library alone can do.

#![allow(unsafe_code)]

use std::alloc::Layout;
use std::ffi::OsStr;
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::ops::Range;
use std::path::Path;
use std::ptr::NonNull;

use memmap2::Mmap;

use crate::{Advice, Signal};

#[cfg(windows)]
pub(crate) fn read_at(file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    match std::os::windows::fs::FileExt::seek_read(file, buf, offset) {
        // Reading behind the end is an error there.
        Err(error) if error.raw_os_error() == Some(38) => Ok(0),
        read => read,
    }
}

#[cfg(windows)]
pub(crate) fn write_at(file: &File, buf: &[u8], offset: u64) -> io::Result<usize> {
    std::os::windows::fs::FileExt::seek_write(file, buf, offset)
}

#[cfg(not(windows))]
pub(crate) fn read_at(_file: &File, _buf: &mut [u8], _offset: u64) -> io::Result<usize> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(not(windows))]
pub(crate) fn write_at(_file: &File, _buf: &[u8], _offset: u64) -> io::Result<usize> {
    Err(io::ErrorKind::Unsupported.into())
}

pub(crate) fn open_uncached(_path: &Path) -> io::Result<File> {
    Err(io::ErrorKind::Unsupported.into())
}

pub(crate) fn create_claimable(path: &Path, _existing: Option<&Metadata>) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)
}

pub(crate) fn restrict(_file: &File, _existing: &Metadata) -> io::Result<()> {
    Ok(())
}

pub(crate) fn inherit(_file: &File, _existing: &Metadata) -> io::Result<()> {
    Ok(())
}

pub(crate) fn may_write_into(folder: &Path) -> io::Result<()> {
    match folder.metadata()?.permissions().readonly() {
        true => Err(io::ErrorKind::PermissionDenied.into()),
        false => Ok(()),
    }
}

pub(crate) fn shows_processes(_folder: &Path) -> bool {
    false
}

pub(crate) fn advise(_file: &File, _range: Range<u64>, _advice: Advice) {}

pub(crate) fn same_file(_a: &File, _b: &File) -> bool {
    false
}

pub(crate) fn same_path(a: &Path, b: &Path) -> bool {
    a.canonicalize().is_ok_and(|a| b.canonicalize().is_ok_and(|b| a == b))
}

/// Nothing tells files apart here: whatever has the name is taken for the file.
pub(crate) fn is_named(_file: &File, path: &Path) -> io::Result<bool> {
    Ok(!std::fs::symlink_metadata(path)?.is_symlink())
}

pub(crate) fn strip_prefix<'a>(text: &'a OsStr, prefix: &str) -> Option<&'a OsStr> {
    text.to_str()?.strip_prefix(prefix).map(OsStr::new)
}

pub(crate) fn allocated(_: &File) -> Option<u64> {
    None
}

pub(crate) fn free_space(_dir: &Path) -> io::Result<Option<u64>> {
    Ok(None)
}

pub(crate) fn symlink(_target: &Path, _link: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

pub(crate) fn rename_new(_from: &Path, _to: &Path) -> io::Result<bool> {
    Ok(false)
}

/// See [`crate::create_private_folder`].
pub(crate) fn create_private_folder(dir: &Path) -> io::Result<()> {
    std::fs::create_dir_all(dir)
}

/// A folder cannot be opened as a file here, and names are durable with the file.
pub(crate) fn sync_folder(_dir: &Path) -> io::Result<()> {
    Ok(())
}

/// Memory of the allocator. Dropping it gives it back.
#[derive(Debug)]
pub(crate) struct Reserved {
    start: NonNull<u8>,
    layout: Layout,
}

impl Reserved {
    /// `len` bytes that begin at `align`, and the first of them; nothing is asked for large pages here.
    pub(crate) fn new(len: usize, align: usize, _large: usize) -> io::Result<(NonNull<u8>, Self)> {
        let layout = Layout::from_size_align(len.max(1), align).map_err(|_| io::ErrorKind::OutOfMemory)?;
        // SAFETY: the layout is not empty.
        let start = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) }).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok((start, Self { start, layout }))
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        // SAFETY: allocated by `new` with this layout, and its owner is being dropped.
        unsafe { std::alloc::dealloc(self.start.as_ptr(), self.layout) };
    }
}

/// Always refused.
///
/// # Safety
/// None is needed: nothing is touched.
pub(crate) unsafe fn map_file(_at: *mut u8, _len: usize, _file: &File, _offset: u64) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

pub(crate) fn will_need(_map: &Mmap, _range: Range<usize>) {}

pub(crate) fn release(_map: &Mmap, _range: Range<usize>) {}

pub(crate) fn resident() -> Option<u64> {
    None
}

pub(crate) fn peak_resident() -> Option<u64> {
    None
}

pub(crate) fn reset_peak_resident() {}

pub(crate) fn physical_cores() -> Option<usize> {
    None
}

pub(crate) fn prefer_this_thread() {}

/// There is none to put right here.
#[derive(Debug)]
pub(crate) struct Terminal;

impl Terminal {
    pub(crate) fn remember() -> Option<Self> {
        None
    }

    pub(crate) fn restore(&self) {}
}

pub(crate) fn discard_typed() {}

pub(crate) fn listen(_act: impl Fn(Signal) + Send + 'static) -> io::Result<()> {
    Ok(())
}
