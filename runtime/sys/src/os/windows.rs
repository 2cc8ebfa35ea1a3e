//! Windows, from version 10 on.
//!
//! Files are opened as the standard library does it there: others may read, write, rename and remove them meanwhile. Files take the
//! permissions that their folder hands on.

#![allow(unsafe_code)]

use std::ffi::{OsStr, c_void};
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::windows::ffi::OsStrExt as _;
use std::os::windows::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::os::windows::io::AsRawHandle as _;
use std::path::Path;
use std::ptr::{NonNull, null, null_mut};

use memmap2::Mmap;
use windows_sys::Win32::Foundation::{
    CloseHandle, ERROR_HANDLE_EOF, ERROR_IO_PENDING, ERROR_PRIVILEGE_NOT_HELD, HANDLE,
};
use windows_sys::Win32::Storage::FileSystem::{
    BY_HANDLE_FILE_INFORMATION, FILE_ADD_FILE, FILE_ATTRIBUTE_REPARSE_POINT, FILE_FLAG_BACKUP_SEMANTICS,
    FILE_FLAG_NO_BUFFERING, FILE_FLAG_OPEN_REPARSE_POINT, FILE_FLAG_OVERLAPPED, FILE_STANDARD_INFO, FileStandardInfo,
    GetDiskFreeSpaceExW, GetFileInformationByHandle, GetFileInformationByHandleEx, MoveFileExW, ReadFile, WriteFile,
};
use windows_sys::Win32::System::Console::{
    CTRL_BREAK_EVENT, CTRL_C_EVENT, CTRL_CLOSE_EVENT, ENABLE_VIRTUAL_TERMINAL_PROCESSING, FlushConsoleInputBuffer,
    GetConsoleMode, GetConsoleOutputCP, GetStdHandle, STD_ERROR_HANDLE, STD_HANDLE, STD_INPUT_HANDLE,
    STD_OUTPUT_HANDLE, SetConsoleCtrlHandler, SetConsoleMode, SetConsoleOutputCP,
};
use windows_sys::Win32::System::IO::{GetOverlappedResult, OVERLAPPED};
use windows_sys::Win32::System::JobObjects::{
    JOB_OBJECT_LIMIT_JOB_MEMORY, JOB_OBJECT_LIMIT_PROCESS_MEMORY, JOBOBJECT_EXTENDED_LIMIT_INFORMATION,
    JobObjectExtendedLimitInformation, QueryInformationJobObject,
};
use windows_sys::Win32::System::Memory::{
    DiscardVirtualMemory, MEM_COMMIT, MEM_RELEASE, MEM_RESERVE, PAGE_READWRITE, PrefetchVirtualMemory, VirtualAlloc,
    VirtualFree, VirtualUnlock, WIN32_MEMORY_RANGE_ENTRY,
};
use windows_sys::Win32::System::ProcessStatus::{K32GetProcessMemoryInfo, PROCESS_MEMORY_COUNTERS};
use windows_sys::Win32::System::SystemInformation::{
    GetLogicalProcessorInformationEx, RelationProcessorCore, SYSTEM_LOGICAL_PROCESSOR_INFORMATION_EX,
};
use windows_sys::Win32::System::Threading::{
    CreateEventW, GetCurrentProcess, GetCurrentThread, SetThreadPriority, THREAD_PRIORITY_ABOVE_NORMAL,
};
use windows_sys::core::BOOL;

use crate::{Advice, Signal};

/// The error of a call that said whether it did what it was asked.
fn check(done: BOOL) -> io::Result<()> {
    if done == 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// What a thread waits for until its read or write has ended. Dropping it gives it back.
struct Event(HANDLE);

impl Event {
    fn new() -> Self {
        // SAFETY: neither attributes nor a name are given; null stands for failure, and is never used.
        Self(unsafe { CreateEventW(null(), 1, 0, null()) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the handle is this value's own; a null one is refused.
        unsafe { CloseHandle(self.0) };
    }
}

/// Runs one read or write at `offset` to its end: `begin` starts it. Files of both sorts take it, those that are read by several threads
/// at a time (`FILE_FLAG_OVERLAPPED`) and those that the standard library opens.
fn transfer(
    file: &File,
    offset: u64,
    begin: impl FnOnce(HANDLE, *mut u32, *mut OVERLAPPED) -> BOOL,
) -> io::Result<usize> {
    thread_local!(static DONE: Event = Event::new());
    DONE.with(|done| {
        if done.0.is_null() {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let mut state = OVERLAPPED { hEvent: done.0, ..OVERLAPPED::default() };
        state.Anonymous.Anonymous.Offset = offset as u32;
        state.Anonymous.Anonymous.OffsetHigh = (offset >> 32) as u32;
        let (file, mut bytes) = (file.as_raw_handle(), 0);
        let mut result = check(begin(file, &raw mut bytes, &raw mut state));
        if matches!(&result, Err(error) if error.raw_os_error() == Some(ERROR_IO_PENDING as i32)) {
            // SAFETY: the file is open, and `state` is that of the transfer under way, which has ended when this returns.
            result = check(unsafe { GetOverlappedResult(file, &raw const state, &raw mut bytes, 1) });
        }
        match result {
            Ok(()) => Ok(bytes as usize),
            Err(error) if error.raw_os_error() == Some(ERROR_HANDLE_EOF as i32) => Ok(0),
            Err(error) => Err(error),
        }
    })
}

/// The longest transfer that is asked for at once: a whole number of pages.
const MOST: usize = 1 << 30;

pub(crate) fn read_at(file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    let len = buf.len().min(MOST) as u32;
    transfer(file, offset, |file, bytes, state| {
        // SAFETY: `buf` is borrowed until the transfer has ended, and is at least `len` bytes long.
        unsafe { ReadFile(file, buf.as_mut_ptr(), len, bytes, state) }
    })
}

pub(crate) fn write_at(file: &File, buf: &[u8], offset: u64) -> io::Result<usize> {
    let len = buf.len().min(MOST) as u32;
    transfer(file, offset, |file, bytes, state| {
        // SAFETY: as above.
        unsafe { WriteFile(file, buf.as_ptr(), len, bytes, state) }
    })
}

pub(crate) fn open_uncached(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(FILE_FLAG_NO_BUFFERING | FILE_FLAG_OVERLAPPED).open(path)
}

pub(crate) fn create_claimable(path: &Path, _existing: Option<&Metadata>) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).custom_flags(FILE_FLAG_OPEN_REPARSE_POINT);
    let file = options.open(path)?;
    if file.metadata()?.file_attributes() & FILE_ATTRIBUTE_REPARSE_POINT != 0 {
        return Err(io::Error::other("a link is in its place"));
    }
    Ok(file)
}

pub(crate) fn restrict(_file: &File, _existing: &Metadata) -> io::Result<()> {
    Ok(())
}

pub(crate) fn inherit(_file: &File, _existing: &Metadata) -> io::Result<()> {
    Ok(())
}

pub(crate) fn may_write_into(folder: &Path) -> io::Result<()> {
    OpenOptions::new().access_mode(FILE_ADD_FILE).custom_flags(FILE_FLAG_BACKUP_SEMANTICS).open(folder).map(drop)
}

pub(crate) fn shows_processes(_folder: &Path) -> bool {
    false
}

/// The cache looks after itself here.
pub(crate) fn advise(_file: &File, _range: Range<u64>, _advice: Advice) {}

/// The volume, and the file's number there.
fn identity(file: &File) -> io::Result<(u32, u32, u32)> {
    let mut info = BY_HANDLE_FILE_INFORMATION::default();
    // SAFETY: the handle is an open file's, and `info` is written to and outlives the call.
    check(unsafe { GetFileInformationByHandle(file.as_raw_handle(), &raw mut info) })?;
    Ok((info.dwVolumeSerialNumber, info.nFileIndexHigh, info.nFileIndexLow))
}

/// Opens whatever is there, a folder too, to ask about it alone.
fn look(path: &Path, flags: u32) -> io::Result<File> {
    OpenOptions::new().access_mode(0).custom_flags(FILE_FLAG_BACKUP_SEMANTICS | flags).open(path)
}

pub(crate) fn same_file(a: &File, b: &File) -> bool {
    identity(a).is_ok_and(|a| identity(b).is_ok_and(|b| a == b))
}

pub(crate) fn same_path(a: &Path, b: &Path) -> bool {
    look(a, 0).is_ok_and(|a| look(b, 0).is_ok_and(|b| same_file(&a, &b)))
}

pub(crate) fn is_named(file: &File, path: &Path) -> io::Result<bool> {
    Ok(identity(&look(path, FILE_FLAG_OPEN_REPARSE_POINT)?)? == identity(file)?)
}

pub(crate) fn strip_prefix<'a>(text: &'a OsStr, prefix: &str) -> Option<&'a OsStr> {
    let rest = text.as_encoded_bytes().strip_prefix(prefix.as_bytes())?;
    // SAFETY: the bytes are those of a text from behind a whole piece of UTF-8 on.
    Some(unsafe { OsStr::from_encoded_bytes_unchecked(rest) })
}

pub(crate) fn allocated(file: &File) -> Option<u64> {
    let mut info = FILE_STANDARD_INFO::default();
    let bytes = size_of::<FILE_STANDARD_INFO>() as u32;
    // SAFETY: the handle is an open file's, and `info` is written to, has the stated size and outlives the call.
    let told =
        unsafe { GetFileInformationByHandleEx(file.as_raw_handle(), FileStandardInfo, (&raw mut info).cast(), bytes) };
    check(told).ok().and_then(|()| info.AllocationSize.try_into().ok())
}

/// A path as the system's own calls take it, also beyond the 260 characters that they take of a plain one.
fn wide(path: &Path) -> io::Result<Vec<u16>> {
    const PLAIN: usize = 240;
    let whole = std::path::absolute(path)?;
    let mut text: Vec<u16> = whole.as_os_str().encode_wide().collect();
    let begins = |with: &str| text.iter().copied().take(with.len()).eq(with.encode_utf16());
    if text.len() > PLAIN && !begins(r"\\?\") {
        // The same path as it is written where nothing is looked for in it.
        let (prefix, skip) = if begins(r"\\") { (r"\\?\UNC", 1) } else { (r"\\?\", 0) };
        text = prefix.encode_utf16().chain(text[skip..].iter().copied()).collect();
    }
    if text.contains(&0) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    text.push(0);
    Ok(text)
}

pub(crate) fn free_space(dir: &Path) -> io::Result<Option<u64>> {
    let (dir, mut free) = (wide(dir)?, 0);
    // SAFETY: the path ends in a zero and lives on; `free` is written to; the other figures are not asked for.
    check(unsafe { GetDiskFreeSpaceExW(dir.as_ptr(), &raw mut free, null_mut(), null_mut()) })?;
    Ok(Some(free))
}

pub(crate) fn rename_new(from: &Path, to: &Path) -> io::Result<bool> {
    let (from, to) = (wide(from)?, wide(to)?);
    // SAFETY: both paths end in a zero and live on. Without a flag nothing is replaced.
    check(unsafe { MoveFileExW(from.as_ptr(), to.as_ptr(), 0) })?;
    Ok(true)
}

/// Links need a right that most users have only in the system's developer mode.
pub(crate) fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    use std::os::windows::fs::{symlink_dir, symlink_file};
    let is_folder = link.parent().is_some_and(|folder| folder.join(target).is_dir());
    let made = if is_folder { symlink_dir(target, link) } else { symlink_file(target, link) };
    made.map_err(|error| match error.raw_os_error() {
        Some(code) if code == ERROR_PRIVILEGE_NOT_HELD as i32 => io::ErrorKind::Unsupported.into(),
        _ => error,
    })?;
    // Where the call is there and does nothing.
    std::fs::symlink_metadata(link).map(drop).map_err(|_| io::ErrorKind::Unsupported.into())
}

/// See [`crate::create_private_folder`]. What lies in a user's own folder is that user's alone.
pub(crate) fn create_private_folder(dir: &Path) -> io::Result<()> {
    std::fs::create_dir_all(dir)
}

/// Names are in the file system's journal, and are as durable as the file that is synced.
pub(crate) fn sync_folder(_dir: &Path) -> io::Result<()> {
    Ok(())
}

/// The same on every processor that the system runs on.
pub(crate) fn system_page() -> usize {
    crate::PAGE
}

/// Address space of this process. Dropping it gives it back.
#[derive(Debug)]
pub(crate) struct Reserved {
    start: NonNull<c_void>,
}

impl Reserved {
    /// `len` bytes that begin at `align`, and the first of them. Large pages need a right that hardly anybody has, and are not asked for.
    pub(crate) fn new(len: usize, align: usize, _large: usize) -> io::Result<(NonNull<u8>, Self)> {
        let slack = if align > crate::PAGE { align } else { 0 };
        let bytes = len.checked_add(slack).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: address space at a place of the system's choosing touches no existing memory.
        let start = unsafe { VirtualAlloc(null(), bytes, MEM_RESERVE, PAGE_READWRITE) };
        let start = NonNull::new(start).ok_or_else(io::Error::last_os_error)?;
        let reserved = Self { start };
        let skip = start.cast::<u8>().align_offset(align).min(slack);
        // SAFETY: `skip` is at most `slack`, which `bytes` has to spare, so the pointer stays inside what was reserved.
        let base = unsafe { start.cast::<u8>().add(skip) };
        // SAFETY: `len` bytes from `base` on lie inside what was reserved just now, and nobody has it yet.
        if unsafe { VirtualAlloc(base.as_ptr().cast(), len, MEM_COMMIT, PAGE_READWRITE) }.is_null() {
            return Err(io::Error::last_os_error());
        }
        Ok((base, reserved))
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        // SAFETY: this is what `new` reserved, as a whole, and its owner is being dropped.
        unsafe { VirtualFree(self.start.as_ptr(), 0, MEM_RELEASE) };
    }
}

/// Always refused: memory is there when it is first written to.
///
/// # Safety
/// None is needed: nothing is touched.
pub(crate) unsafe fn take(_at: *mut u8, _len: usize) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Gives memory back to the system; the addresses stay committed.
///
/// # Safety
/// The range belongs to a [`Reserved`] that lives on; nobody touches it meanwhile or relies on what was there.
pub(crate) unsafe fn give_back(at: *mut u8, len: usize) -> io::Result<()> {
    // SAFETY: the caller's promise.
    match unsafe { DiscardVirtualMemory(at.cast(), len) } {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(code as i32)),
    }
}

/// Always refused: here a file's pages cannot take the place of others.
///
/// # Safety
/// None is needed: nothing is touched.
pub(crate) unsafe fn map_file(_at: *mut u8, _len: usize, _file: &File, _offset: u64) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// The part of a mapping that `range` is, as far as there is one.
fn part(map: &Mmap, range: Range<usize>) -> &[u8] {
    map.get(range.start..range.end.min(map.len())).unwrap_or_default()
}

pub(crate) fn will_need(map: &Mmap, range: Range<usize>) {
    let part = part(map, range);
    let entry = WIN32_MEMORY_RANGE_ENTRY { VirtualAddress: part.as_ptr().cast_mut().cast(), NumberOfBytes: part.len() };
    // SAFETY: the range is mapped, and the hint changes no byte of it.
    unsafe { PrefetchVirtualMemory(GetCurrentProcess(), 1, &raw const entry, 0) };
}

pub(crate) fn release(map: &Mmap, range: Range<usize>) {
    let part = part(map, range);
    // SAFETY: the range is mapped and was never locked; unlocking such pages takes them out of the working set, and the next access
    // brings them back from the file.
    unsafe { VirtualUnlock(part.as_ptr().cast(), part.len()) };
}

fn memory() -> Option<PROCESS_MEMORY_COUNTERS> {
    let mut memory = PROCESS_MEMORY_COUNTERS::default();
    let bytes = size_of::<PROCESS_MEMORY_COUNTERS>() as u32;
    // SAFETY: `memory` is written to, has the stated size and outlives the call.
    check(unsafe { K32GetProcessMemoryInfo(GetCurrentProcess(), &raw mut memory, bytes) }).ok().map(|()| memory)
}

pub(crate) fn resident() -> Option<u64> {
    memory().map(|memory| memory.WorkingSetSize as u64)
}

pub(crate) fn peak_resident() -> Option<u64> {
    memory().map(|memory| memory.PeakWorkingSetSize as u64)
}

pub(crate) fn memory_limit() -> Option<u64> {
    let mut job = JOBOBJECT_EXTENDED_LIMIT_INFORMATION::default();
    let bytes = size_of::<JOBOBJECT_EXTENDED_LIMIT_INFORMATION>() as u32;
    // SAFETY: no job stands for the one that this process is in; `job` is written to, has the stated size and outlives the call.
    let told = unsafe {
        QueryInformationJobObject(
            null_mut(),
            JobObjectExtendedLimitInformation,
            (&raw mut job).cast(),
            bytes,
            null_mut(),
        )
    };
    check(told).ok()?;
    let flags = job.BasicLimitInformation.LimitFlags;
    let limits =
        [(JOB_OBJECT_LIMIT_PROCESS_MEMORY, job.ProcessMemoryLimit), (JOB_OBJECT_LIMIT_JOB_MEMORY, job.JobMemoryLimit)];
    limits.into_iter().filter(|(flag, _)| flags & flag != 0).map(|(_, limit)| limit as u64).min()
}

pub(crate) fn available_memory() -> Option<u64> {
    None
}

pub(crate) fn reset_peak_resident() {}

pub(crate) fn physical_cores() -> Option<usize> {
    let mut bytes = 0;
    // SAFETY: without memory the call writes nothing but how much it wants.
    unsafe { GetLogicalProcessorInformationEx(RelationProcessorCore, null_mut(), &raw mut bytes) };
    let mut buffer = vec![0u64; (bytes as usize).div_ceil(8)];
    // SAFETY: `buffer` is at least `bytes` long, aligned for every entry, and lives on.
    check(unsafe {
        GetLogicalProcessorInformationEx(RelationProcessorCore, buffer.as_mut_ptr().cast(), &raw mut bytes)
    })
    .ok()?;
    // An entry for each core, which begins with what it is and how long it is.
    let head = std::mem::offset_of!(SYSTEM_LOGICAL_PROCESSOR_INFORMATION_EX, Anonymous);
    let (mut cores, mut at) = (0, 0);
    while at + head <= bytes as usize {
        let size = (buffer.get(at / 8)? >> 32) as usize;
        if size < head || size % 8 != 0 {
            return None;
        }
        (cores, at) = (cores + 1, at + size);
    }
    (cores > 0).then_some(cores)
}

pub(crate) fn prefer_this_thread() {
    // SAFETY: the handle stands for the calling thread. A refusal changes nothing.
    unsafe { SetThreadPriority(GetCurrentThread(), THREAD_PRIORITY_ABOVE_NORMAL) };
}

/// The mode of the console behind a standard handle.
fn console_mode(of: STD_HANDLE) -> Option<u32> {
    let mut mode = 0;
    // SAFETY: `mode` is written to; a handle that is no console's is refused.
    check(unsafe { GetConsoleMode(GetStdHandle(of), &raw mut mode) }).ok().map(|()| mode)
}

fn set_console_mode(of: STD_HANDLE, mode: u32) {
    // SAFETY: a handle that is no console's is refused, and so is a mode that it does not know.
    unsafe { SetConsoleMode(GetStdHandle(of), mode) };
}

/// The console that is typed at, and what its mode was.
#[derive(Debug)]
pub(crate) struct Terminal {
    mode: u32,
}

impl Terminal {
    pub(crate) fn remember() -> Option<Self> {
        console_mode(STD_INPUT_HANDLE).map(|mode| Self { mode })
    }

    pub(crate) fn restore(&self) {
        set_console_mode(STD_INPUT_HANDLE, self.mode);
    }
}

/// See [`crate::Utf8Output`].
#[derive(Debug)]
pub(crate) struct Utf8Output {
    code_page: u32,
    modes: Vec<(STD_HANDLE, u32)>,
}

impl Utf8Output {
    pub(crate) fn new() -> Self {
        const UTF8: u32 = 65001;
        let consoles = [STD_OUTPUT_HANDLE, STD_ERROR_HANDLE].into_iter();
        let modes: Vec<_> = consoles.filter_map(|of| Some((of, console_mode(of)?))).collect();
        for &(of, mode) in &modes {
            set_console_mode(of, mode | ENABLE_VIRTUAL_TERMINAL_PROCESSING);
        }
        // SAFETY: both take and give a number; without a console it is 0.
        let code_page = unsafe { GetConsoleOutputCP() };
        if code_page != 0 {
            // SAFETY: as above.
            unsafe { SetConsoleOutputCP(UTF8) };
        }
        Self { code_page, modes }
    }
}

impl Drop for Utf8Output {
    fn drop(&mut self) {
        for &(of, mode) in self.modes.iter().rev() {
            set_console_mode(of, mode);
        }
        if self.code_page != 0 {
            // SAFETY: it takes a number, which is the one that was there.
            unsafe { SetConsoleOutputCP(self.code_page) };
        }
    }
}

pub(crate) fn terminal_size() -> Option<(u16, u16)> {
    None
}

pub(crate) fn discard_typed() {
    // SAFETY: a handle that is no console's is refused.
    unsafe { FlushConsoleInputBuffer(GetStdHandle(STD_INPUT_HANDLE)) };
}

type Act = Box<dyn Fn(Signal) + Send>;

/// What is done when a request comes: the system's call takes no state.
static ACT: std::sync::Mutex<Option<Act>> = std::sync::Mutex::new(None);

/// Called by the system on a thread of its own, for one request at a time.
unsafe extern "system" fn requested(event: u32) -> BOOL {
    let signal = match event {
        CTRL_C_EVENT => Signal::Interrupt,
        CTRL_CLOSE_EVENT => Signal::HangUp,
        _ => Signal::Terminate,
    };
    if let Ok(act) = ACT.lock()
        && let Some(act) = &*act
    {
        act(signal);
    }
    if !matches!(event, CTRL_C_EVENT | CTRL_BREAK_EVENT) {
        // The console goes, or the session ends: when this returns, so does the process. It has the seconds that the system gives.
        std::thread::sleep(std::time::Duration::from_secs(60));
    }
    1
}

pub(crate) fn listen(act: impl Fn(Signal) + Send + 'static) -> io::Result<()> {
    *ACT.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(Box::new(act));
    // SAFETY: `requested` is a function of the program, there to its end, and may run at any time.
    check(unsafe { SetConsoleCtrlHandler(Some(requested), 1) })
}
