//! Everything that an operating system does for st-tool, and that systems answer differently.
//!
//! Owns: positioned reads and writes, reads past the page cache, advice about files, free space, the identity of a file, links, names beside
//! others, permissions that are handed on, renames that replace nothing, anonymous and mapped pages, what happens where there is no memory,
//! the memory of this process and of its container, cores, the priority of I/O threads, the terminal's settings, and requests to stop.
//! Refuses: any knowledge of models, formats or the command line. What a system cannot do is `None`, or an error of the kind `Unsupported`; hints
//! to the system are functions without a result.
//!
//! `os/unix.rs` has the calls of Unix systems, `os/windows.rs` those of Windows. Both have the same functions.
//!
//! ```
//! # fn main() -> std::io::Result<()> {
//! let folder = tempfile::tempdir()?;
//! let path = folder.path().join("weights.bin");
//! std::fs::write(&path, b"0123456789")?;
//!
//! let file = std::fs::File::open(&path)?;
//! let mut middle = [0; 4];
//! st_sys::read_exact_at(&file, &mut middle, 3)?;
//! assert_eq!(&middle, b"3456");
//!
//! let link = folder.path().join("same.bin");
//! std::fs::hard_link(&path, &link)?;
//! assert!(st_sys::same_file(&file, &std::fs::File::open(&link)?));
//!
//! let taken = st_sys::rename_new(&link, &path).unwrap_err();
//! assert_eq!(taken.kind(), std::io::ErrorKind::AlreadyExists);
//!
//! println!("{:?} bytes free, {:?} bytes resident", st_sys::free_space(folder.path()), st_sys::resident());
//! # Ok(())
//! # }
//! ```

mod allocator;
#[cfg(target_os = "linux")]
mod cgroup;
mod cores;
mod file;
mod mapped;
mod memory;
#[cfg_attr(unix, path = "os/unix.rs")]
#[cfg_attr(windows, path = "os/windows.rs")]
mod os;
mod output;
mod pages;
mod signals;
mod terminal;

pub use allocator::Allocator;
pub use cores::{available_threads, physical_cores, prefer_this_thread};
pub use file::{
    Advice, advise, allocated, beside, create_private_folder, free_space, open_uncached, read_at, read_exact_at,
    rename_new, same_file, strip_prefix, symlink, sync_folder, write_all_at,
};
pub use mapped::MappedFile;
pub use memory::{available_memory, memory_limit, peak_resident, reset_peak_resident, resident};
pub use output::{create_claimable, inherit, is_named, may_write_into, same_path, shows_processes};
pub use pages::{LARGE_PAGE, PAGE, Pages, system_page};
pub use signals::{Signal, listen};
pub use terminal::{Terminal, Utf8Output, discard_typed, terminal_size};
