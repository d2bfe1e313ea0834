//! What a guest may see of the host: a map from guest paths to host files and byte strings, the guest's file
//! descriptors, a scratch directory for files that it creates elsewhere, and Landlock as a second wall. A guest path
//! is cleaned lexically, matched against the map, and what remains of it is resolved by `openat2` beneath the
//! directory that was opened when the VM was built, so that neither `..` nor a symbolic link leads out of a mapping.

pub mod descriptors;
pub mod files;
mod host;
pub mod landlock;
pub mod map;
pub mod open_file;
pub mod scratch;
pub mod wait;

pub use descriptors::Descriptors;
pub use files::Files;
pub use landlock::{Allowed, FileIsolation, restrict_thread};
pub use map::{FileMap, Source};
pub use open_file::OpenFile;
pub use scratch::Scratch;

/// How host files are opened, on top of what the guest asks for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IoMode {
    /// Bypass the host's page cache (`O_DIRECT`); the guest's buffers must be aligned, else its call fails with `EINVAL`.
    pub direct: bool,
    /// Wait until the data is on the disk (`O_SYNC`).
    pub sync: bool,
}

/// Locks a mutex whose data stays consistent if a holder panics.
pub(crate) fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
