//! Unix systems. Linux has all of it, macOS nearly all; the others lack what is marked.

#![allow(unsafe_code)]

use std::ffi::OsStr;
use std::fs::{File, Metadata, OpenOptions, Permissions};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;

use memmap2::{Mmap, UncheckedAdvice};
use rustix::fd::OwnedFd;
use rustix::termios::{OptionalActions, QueueSelector, Termios};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};

use crate::{Advice, Signal};

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

/// The cache is left out where it does not have the pages already; nothing has to be aligned.
#[cfg(target_vendor = "apple")]
pub(crate) fn open_uncached(path: &Path) -> io::Result<File> {
    let file = File::open(path)?;
    // SAFETY: the descriptor is an open file's, and this command takes a number.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_NOCACHE, 1) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(file),
    }
}

#[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
pub(crate) fn open_uncached(_path: &Path) -> io::Result<File> {
    Err(io::ErrorKind::Unsupported.into())
}

/// The permissions of what replaces a file, for as long as it is written: private from the first byte where that one is.
fn mode_of(existing: &Metadata) -> u32 {
    existing.mode() & 0o777 | 0o600
}

pub(crate) fn create_claimable(path: &Path, existing: Option<&Metadata>) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(existing.map_or(0o666, mode_of));
    options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)
}

pub(crate) fn restrict(file: &File, existing: &Metadata) -> io::Result<()> {
    let (now, mode) = (file.metadata()?, mode_of(existing));
    if now.is_file() && now.mode() & 0o777 & !mode != 0 {
        file.set_permissions(Permissions::from_mode(now.mode() & mode))?;
    }
    Ok(())
}

pub(crate) fn inherit(file: &File, existing: &Metadata) -> io::Result<()> {
    let group = Some(existing.gid());
    let given = std::os::unix::fs::fchown(file, Some(existing.uid()), group)
        .or_else(|_| std::os::unix::fs::fchown(file, None, group));
    // What another group was allowed is not what this one is.
    let mask = if given.is_ok() { 0o777 } else { 0o707 };
    file.set_permissions(Permissions::from_mode(existing.mode() & mask))
}

pub(crate) fn may_write_into(folder: &Path) -> io::Result<()> {
    use rustix::fs::Access;
    Ok(rustix::fs::access(folder, Access::WRITE_OK | Access::EXEC_OK)?)
}

#[cfg(target_os = "linux")]
pub(crate) fn shows_processes(folder: &Path) -> bool {
    rustix::fs::statfs(folder).is_ok_and(|system| system.f_type == rustix::fs::PROC_SUPER_MAGIC)
}

/// Other systems have devices there, which are no regular files.
#[cfg(not(target_os = "linux"))]
pub(crate) fn shows_processes(folder: &Path) -> bool {
    folder.starts_with("/dev")
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

fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

pub(crate) fn same_file(a: &File, b: &File) -> bool {
    a.metadata().is_ok_and(|a| b.metadata().is_ok_and(|b| identity(&a) == identity(&b)))
}

pub(crate) fn same_path(a: &Path, b: &Path) -> bool {
    a.metadata().is_ok_and(|a| b.metadata().is_ok_and(|b| identity(&a) == identity(&b)))
}

pub(crate) fn is_named(file: &File, path: &Path) -> io::Result<bool> {
    Ok(identity(&std::fs::symlink_metadata(path)?) == identity(&file.metadata()?))
}

pub(crate) fn strip_prefix<'a>(text: &'a OsStr, prefix: &str) -> Option<&'a OsStr> {
    text.as_bytes().strip_prefix(prefix.as_bytes()).map(OsStr::from_bytes)
}

pub(crate) fn allocated(file: &File) -> Option<u64> {
    // In units of 512 bytes, whatever the file system's blocks are.
    file.metadata().ok().map(|metadata| metadata.blocks().saturating_mul(512))
}

pub(crate) fn free_space(dir: &Path) -> io::Result<Option<u64>> {
    let stat = rustix::fs::statvfs(dir)?;
    Ok((stat.f_blocks > 0).then(|| stat.f_bavail.saturating_mul(stat.f_frsize)))
}

/// `false` where the system or the file system knows no such rename.
#[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
pub(crate) fn rename_new(from: &Path, to: &Path) -> io::Result<bool> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    use rustix::io::Errno;
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(true),
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
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

pub(crate) fn system_page() -> usize {
    rustix::param::page_size()
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

/// Takes memory from the system for pages that nobody has written to yet.
///
/// # Safety
/// The range is mapped.
#[cfg(target_os = "linux")]
pub(crate) unsafe fn take(at: *mut u8, len: usize) -> io::Result<()> {
    // SAFETY: the caller's promise; this brings pages in as a write would, and changes no byte.
    let refused = unsafe { libc::madvise(at.cast(), len, libc::MADV_POPULATE_WRITE) };
    if refused == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(not(target_os = "linux"))]
pub(crate) unsafe fn take(_at: *mut u8, _len: usize) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Gives memory back to the system.
///
/// # Safety
/// The range belongs to a [`Reserved`] that lives on; nobody touches it meanwhile or relies on what was there.
#[cfg(target_os = "linux")]
pub(crate) unsafe fn give_back(at: *mut u8, len: usize) -> io::Result<()> {
    // SAFETY: the caller's promise.
    let refused = unsafe { libc::madvise(at.cast(), len, libc::MADV_DONTNEED) };
    if refused == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// As on Linux, where a piece of advice does it: here new pages take the place of the old.
///
/// # Safety
/// As there.
#[cfg(not(target_os = "linux"))]
pub(crate) unsafe fn give_back(at: *mut u8, len: usize) -> io::Result<()> {
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANON | libc::MAP_FIXED);
    // SAFETY: the caller's promise.
    let start = unsafe { libc::mmap(at.cast(), len, prot, flags, -1, 0) };
    if start == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(not(target_os = "linux"))]
unsafe fn populate(_start: *mut libc::c_void, _len: usize) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

pub(crate) fn will_need(map: &Mmap, range: Range<usize>) {
    let _ = map.advise_range(memmap2::Advice::WillNeed, range.start, range.len());
}

pub(crate) fn release(map: &Mmap, range: Range<usize>) {
    // SAFETY: the mapping is file-backed and nobody writes through it, so dropping its pages loses
    // nothing: the next access brings the same bytes back from the file.
    let _ = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len()) };
}

/// A line of `/proc/self/status` in bytes, where there is one.
fn status(name: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// The most that this process took so far, as the system tells it also where there is no `/proc`.
fn most_resident() -> Option<u64> {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: `usage` is a valid place for what the call writes, and all zeros are a value of it.
    let usage = match unsafe { libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr()) } {
        // SAFETY: written by the call.
        0 => unsafe { usage.assume_init() },
        _ => return None,
    };
    // In KiB, but for Apple's systems.
    let unit = if cfg!(target_vendor = "apple") { 1 } else { 1024 };
    u64::try_from(usage.ru_maxrss).ok().filter(|&most| most > 0).map(|most| most * unit)
}

/// Without `/proc` the most so far stands for what is there now: it is never less.
#[cfg(not(target_vendor = "apple"))]
pub(crate) fn resident() -> Option<u64> {
    status("VmRSS").or_else(most_resident)
}

#[cfg(target_vendor = "apple")]
pub(crate) fn resident() -> Option<u64> {
    let mut info = std::mem::MaybeUninit::<libc::mach_task_basic_info>::zeroed();
    let mut words = libc::MACH_TASK_BASIC_INFO_COUNT;
    // SAFETY: `info` has as many words as are stated, lives on, and is asked for of this process itself.
    #[allow(deprecated, reason = "one number of one call is no reason for a crate of its own")]
    let told = unsafe {
        libc::task_info(libc::mach_task_self(), libc::MACH_TASK_BASIC_INFO, info.as_mut_ptr().cast(), &raw mut words)
    };
    // SAFETY: all zeros are a value of it, and so is what the call wrote.
    (told == libc::KERN_SUCCESS).then(|| unsafe { info.assume_init() }.resident_size)
}

pub(crate) fn peak_resident() -> Option<u64> {
    status("VmHWM").or_else(most_resident)
}

#[cfg(target_os = "linux")]
pub(crate) fn memory_limit() -> Option<u64> {
    crate::cgroup::memory_limit(Path::new("/"))
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn memory_limit() -> Option<u64> {
    None
}

/// A line of `/proc/meminfo`, where there is one.
pub(crate) fn available_memory() -> Option<u64> {
    let about = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = about.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

pub(crate) fn reset_peak_resident() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// Cores of this machine, where `/sys` tells which processors share one.
#[cfg(not(target_vendor = "apple"))]
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

#[cfg(target_vendor = "apple")]
pub(crate) fn physical_cores() -> Option<usize> {
    let (mut cores, mut bytes) = (0_i32, size_of::<i32>());
    let name = c"hw.physicalcpu".as_ptr();
    // SAFETY: the name ends in a zero, and `cores` has the stated size and lives on.
    let told = unsafe { libc::sysctlbyname(name, (&raw mut cores).cast(), &raw mut bytes, std::ptr::null_mut(), 0) };
    (told == 0).then_some(cores).and_then(|cores| usize::try_from(cores).ok()).filter(|&cores| cores > 0)
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

#[cfg(target_vendor = "apple")]
pub(crate) fn prefer_this_thread() {
    // SAFETY: it concerns the calling thread alone. A refusal changes nothing.
    unsafe { libc::pthread_set_qos_class_self_np(libc::qos_class_t::QOS_CLASS_USER_INTERACTIVE, 0) };
}

#[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
pub(crate) fn prefer_this_thread() {}

/// Pasted text is marked no longer, and what comes next begins on a new line.
const LEAVE: &[u8] = b"\x1b[?2004l\n";

/// A terminal and its settings.
#[derive(Debug)]
pub(crate) struct Terminal {
    device: OwnedFd,
    settings: Termios,
}

impl Terminal {
    pub(crate) fn remember() -> Option<Self> {
        use rustix::fs::{Mode, OFlags, open};
        // One that was told to hold its output must not hold up the end.
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        // The one that line editing takes: that of the session, else the input.
        let device = open("/dev/tty", flags, Mode::empty())
            .or_else(|_| open(rustix::termios::ttyname(io::stdin(), Vec::new())?, flags, Mode::empty()))
            .ok()?;
        let settings = rustix::termios::tcgetattr(&device).ok()?;
        Some(Self { device, settings })
    }

    pub(crate) fn restore(&self) {
        // In the background it is somebody else's, and touching it would stop this process.
        if rustix::termios::tcgetpgrp(&self.device).is_ok_and(|group| group != rustix::process::getpgrp()) {
            return;
        }
        let _ = rustix::termios::tcsetattr(&self.device, OptionalActions::Now, &self.settings);
        let _ = rustix::io::write(&self.device, LEAVE);
    }
}

/// Terminals take UTF-8.
#[derive(Debug)]
pub(crate) struct Utf8Output;

impl Utf8Output {
    pub(crate) fn new() -> Self {
        Self
    }
}

pub(crate) fn discard_typed() {
    let _ = rustix::termios::tcflush(io::stdin(), QueueSelector::IFlush);
}

pub(crate) fn terminal_size() -> Option<(u16, u16)> {
    let size = rustix::termios::tcgetwinsize(std::io::stderr()).ok()?;
    Some((size.ws_row, size.ws_col))
}

pub(crate) fn listen(act: impl Fn(Signal) + Send + 'static) -> io::Result<()> {
    signal_hook::flag::register(SIGXFSZ, Arc::default())?;
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    let listener = move || {
        for signal in signals.forever() {
            act(match signal {
                SIGTERM => Signal::Terminate,
                SIGHUP => Signal::HangUp,
                _ => Signal::Interrupt,
            });
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(listener).map(drop)
}
