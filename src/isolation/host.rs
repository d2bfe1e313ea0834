//! One place in the host's file system that a guest path leads to: a directory opened when the VM was built and a
//! relative path that the kernel resolves beneath it. No call here takes an absolute path.

use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{FileStat, Mode, fstat, mkdirat};
use nix::unistd::{UnlinkatFlags, unlinkat};

/// The kernel answers `EAGAIN` when a rename races with the resolution of `..` in a symbolic link.
const RACES: u32 = 8;

/// What a leaf of the file map is on the host.
#[derive(Debug, Clone)]
pub(crate) struct HostNode {
    /// Resolution starts and stays here.
    pub directory: Arc<OwnedFd>,
    /// The node's name in `directory`; empty if it is the directory itself.
    pub base: OsString,
    /// Just this file, not what lies beneath it.
    pub is_file: bool,
    /// Lies in the scratch directory and goes out of the map when it is unlinked.
    pub is_created: bool,
    /// Where the user said that it is, for Landlock.
    pub path: PathBuf,
}

/// A node and what remains of the guest's path.
#[derive(Debug, Clone)]
pub(crate) struct HostPath {
    directory: Arc<OwnedFd>,
    relative: PathBuf,
    resolve: ResolveFlag,
}

impl HostNode {
    /// The place `rest` (cleaned, without a leading slash) below this node.
    pub fn at(&self, rest: &str) -> Result<HostPath, Errno> {
        if self.is_file && !rest.is_empty() {
            return Err(Errno::ENOTDIR);
        }
        let mut relative = PathBuf::from(&self.base);
        if !rest.is_empty() {
            relative.push(rest);
        }
        if relative.as_os_str().is_empty() {
            relative.push(".");
        }
        let mut resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS;
        if self.is_file {
            // Its parent directory is not mapped: a link to a sibling would lead out of the mapping.
            resolve |= ResolveFlag::RESOLVE_NO_SYMLINKS;
        }
        Ok(HostPath { directory: self.directory.clone(), relative, resolve })
    }
}

impl HostPath {
    fn resolve(&self, path: &Path, flags: OFlag, mode: Mode) -> Result<OwnedFd, Errno> {
        let how = OpenHow::new().flags(flags | OFlag::O_CLOEXEC).mode(mode).resolve(self.resolve);
        let mut races = 0;
        loop {
            match openat2(&self.directory, path, how) {
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) if races < RACES => races += 1,
                result => return result,
            }
        }
    }

    /// Opens it. The descriptor never blocks: whoever reads from it waits first.
    pub fn open(&self, flags: OFlag, mode: u32) -> Result<OwnedFd, Errno> {
        let mode = if flags.contains(OFlag::O_CREAT) { Mode::from_bits_truncate(mode & 0o777) } else { Mode::empty() };
        self.resolve(&self.relative, flags | OFlag::O_NOCTTY | OFlag::O_NONBLOCK, mode)
    }

    /// Its metadata, of the link itself unless `follow`.
    pub fn stat(&self, follow: bool) -> Result<FileStat, Errno> {
        // With O_PATH the link itself may be opened, which RESOLVE_NO_SYMLINKS permits together with O_NOFOLLOW.
        let flags = if follow { OFlag::O_PATH } else { OFlag::O_PATH | OFlag::O_NOFOLLOW };
        fstat(self.resolve(&self.relative, flags, Mode::empty())?.as_fd())
    }

    fn parent(&self, if_root: Errno) -> Result<(OwnedFd, OsString), Errno> {
        let name = self.relative.file_name().filter(|name| name.as_bytes() != b".").ok_or(if_root)?;
        let parent = self.relative.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let parent = self.resolve(parent, OFlag::O_PATH | OFlag::O_DIRECTORY, Mode::empty())?;
        Ok((parent, name.to_os_string()))
    }

    /// Removes a file's name; a directory is `EISDIR`.
    pub fn unlink(&self) -> Result<(), Errno> {
        let (parent, name) = self.parent(Errno::EISDIR)?;
        unlinkat(parent, name.as_os_str(), UnlinkatFlags::NoRemoveDir)
    }

    /// Makes a directory here.
    pub fn mkdir(&self) -> Result<(), Errno> {
        let (parent, name) = self.parent(Errno::EEXIST)?;
        mkdirat(parent, name.as_os_str(), Mode::from_bits_truncate(0o777))
    }
}
