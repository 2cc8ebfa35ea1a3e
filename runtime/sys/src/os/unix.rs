//! Unix systems. Linux has all of it; the others lack what is marked.

#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::ptr::NonNull;

use crate::Advice;

pub(crate) fn read_at(file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    file.read_at(buf, offset)
}

pub(crate) fn write_at(file: &File, buf: &[u8], offset: u64) -> io::Result<usize> {
    file.write_at(buf, offset)
}

#[cfg(any(target_os = "linux", target_os = "android"))]
pub(crate) fn open_uncached(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path)
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
pub(crate) fn open_uncached(_path: &Path) -> io::Result<File> {
    Err(io::ErrorKind::Unsupported.into())
}

pub(crate) fn create_claimable(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).custom_flags(libc::O_NOFOLLOW).open(path)
}

#[cfg(any(target_os = "linux", target_os = "android"))]
pub(crate) fn advise(file: &File, range: Range<u64>, advice: Advice) {
    let advice = match advice {
        Advice::Random => rustix::fs::Advice::Random,
        Advice::DontNeed => rustix::fs::Advice::DontNeed,
    };
    // No length means to the end.
    let _ = rustix::fs::fadvise(file, range.start, std::num::NonZeroU64::new(range.end - range.start), advice);
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
pub(crate) fn advise(_file: &File, _range: Range<u64>, _advice: Advice) {}

pub(crate) fn same_file(a: &File, b: &File) -> bool {
    match (a.metadata(), b.metadata()) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

pub(crate) fn allocated(file: &File) -> Option<u64> {
    // In units of 512 bytes, whatever the file system's blocks are.
    file.metadata().ok().map(|metadata| std::os::unix::fs::MetadataExt::blocks(&metadata).saturating_mul(512))
}

pub(crate) fn free_space(dir: &Path) -> io::Result<Option<u64>> {
    let stat = rustix::fs::statvfs(dir)?;
    Ok((stat.f_blocks > 0).then(|| stat.f_bavail.saturating_mul(stat.f_frsize)))
}

/// `false` where the system or the file system knows no such rename.
#[cfg(any(target_os = "linux", target_os = "android"))]
pub(crate) fn rename_new(from: &Path, to: &Path) -> io::Result<bool> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    use rustix::io::Errno;
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(true),
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
pub(crate) fn rename_new(_from: &Path, _to: &Path) -> io::Result<bool> {
    Ok(false)
}

pub(crate) fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

/// See [`crate::create_private_folder`].
pub(crate) fn create_private_folder(dir: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

pub(crate) fn sync_folder(dir: &Path) -> io::Result<()> {
    match File::open(dir)?.sync_all() {
        // Not every file system can; the names are then as durable as they get.
        Err(error) if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => Ok(()),
        synced => synced,
    }
}

/// Address space of this process. Dropping it gives it back.
#[derive(Debug)]
pub(crate) struct Reserved {
    start: NonNull<libc::c_void>,
    bytes: usize,
}

impl Reserved {
    /// `len` bytes that begin at `align`, and the first of them; large pages are asked for the first `large`.
    pub(crate) fn new(len: usize, align: usize, large: usize) -> io::Result<(NonNull<u8>, Self)> {
        let slack = if align > crate::PAGE { align } else { 0 };
        let bytes = len.checked_add(slack).ok_or(io::ErrorKind::OutOfMemory)?;
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: an anonymous private mapping at an address of the system's choosing touches no existing memory.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, prot, flags | libc::MAP_NORESERVE, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start).ok_or(io::ErrorKind::OutOfMemory)?;
        let reserved = Self { start, bytes };
        let skip = start.cast::<u8>().align_offset(align).min(slack);
        // SAFETY: `skip` is at most `slack`, which `bytes` has to spare, so the pointer stays inside the mapping.
        let base = unsafe { start.cast::<u8>().add(skip) };
        #[cfg(target_os = "linux")]
        if large > 0 {
            // SAFETY: `large` is at most `len`, so the range lies inside the mapping. The advice is a hint: a refusal changes nothing.
            unsafe { libc::madvise(base.as_ptr().cast(), large, libc::MADV_HUGEPAGE) };
        }
        #[cfg(not(target_os = "linux"))]
        let _ = large;
        Ok((base, reserved))
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        // SAFETY: this is the range that `new` mapped, and its owner is being dropped.
        unsafe { libc::munmap(self.start.as_ptr(), self.bytes) };
    }
}

/// Puts a file's pages in the place of others and waits for them.
///
/// # Safety
/// The range belongs to a [`Reserved`] that lives on; nobody touches it meanwhile, nobody writes to it afterwards.
pub(crate) unsafe fn map_file(at: *mut u8, len: usize, file: &File, offset: u64) -> io::Result<()> {
    let (prot, flags) = (libc::PROT_READ, libc::MAP_PRIVATE | libc::MAP_FIXED);
    let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the caller's promise.
    let start = unsafe { libc::mmap(at.cast(), len, prot, flags, file.as_raw_fd(), offset) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the range was mapped just now.
    unsafe { populate(start, len) }
}

/// Waits until all pages of a file's mapping are there. Touching one that cannot be read would be a signal; this is an error.
///
/// # Safety
/// The range is mapped.
#[cfg(target_os = "linux")]
unsafe fn populate(start: *mut libc::c_void, len: usize) -> io::Result<()> {
    // SAFETY: the caller's promise; the one is a hint to read ahead, the other brings pages in, and neither changes a byte.
    let refused = unsafe {
        libc::madvise(start, len, libc::MADV_WILLNEED);
        libc::madvise(start, len, libc::MADV_POPULATE_READ)
    };
    if refused == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(not(target_os = "linux"))]
unsafe fn populate(_start: *mut libc::c_void, _len: usize) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// A line of `/proc/self/status` in bytes, where there is one.
fn status(name: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

pub(crate) fn resident() -> Option<u64> {
    status("VmRSS")
}

pub(crate) fn peak_resident() -> Option<u64> {
    status("VmHWM")
}

pub(crate) fn reset_peak_resident() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// Cores of this machine, where `/sys` tells which processors share one.
pub(crate) fn physical_cores() -> Option<usize> {
    let cores: std::collections::HashSet<(String, String)> = (0..1024)
        .map_while(|cpu| {
            let topology = format!("/sys/devices/system/cpu/cpu{cpu}/topology");
            let read = |name: &str| std::fs::read_to_string(format!("{topology}/{name}")).ok();
            Some((read("physical_package_id")?, read("core_id")?))
        })
        .collect();
    (!cores.is_empty()).then_some(cores.len())
}

/// Asks for a short time slice: from Linux 6.12 on, a thread with a shorter slice that wakes up takes the processor from one with a longer slice.
#[cfg(any(target_os = "linux", target_os = "android"))]
pub(crate) fn prefer_this_thread() {
    /// The shortest slice there is, in nanoseconds.
    const SLICE: u64 = 100_000;
    let size = size_of::<libc::sched_attr>() as u32;
    let mut attr = libc::sched_attr {
        size,
        sched_policy: 0,
        sched_flags: 0,
        sched_nice: 0,
        sched_priority: 0,
        sched_runtime: 0,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: `attr` has the size that is stated, is written by the first call and read by the second; thread 0 is the
    // caller. What else is set (a nice value) is handed back as it was read, and a refusal leaves everything as it is.
    unsafe {
        let known = libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attr, size, 0) == 0;
        if known && attr.sched_policy == libc::SCHED_OTHER as u32 {
            attr.sched_runtime = SLICE;
            libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0);
        }
    }
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
pub(crate) fn prefer_this_thread() {}
