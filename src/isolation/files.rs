//! The file system that a guest sees: the map, the scratch directory and the I/O mode together. Lookups happen under
//! the map's lock, calls to the host outside of it.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::{SFlag, fstat};
use uhyve_interface::v2::parameters as abi;

use super::host::HostNode;
use super::landlock::{Allowed, Rights};
use super::map::{FileMap, Target, clean};
use super::open_file::{OpenDirectory, OpenFile, bytes_attributes, directory_attributes, host_attributes, is};
use super::{IoMode, Scratch, lock};

/// Files and directories that a guest may have outside of mappings at a time; more are `ENOSPC`.
pub const MAX_CREATED: usize = 16_384;

/// The guest's file system.
#[derive(Debug)]
pub struct Files {
    map: Mutex<FileMap>,
    scratch: Scratch,
    mode: IoMode,
    created: AtomicUsize,
}

impl Files {
    /// Puts the parts together.
    pub fn new(map: FileMap, scratch: Scratch, mode: IoMode) -> Self {
        Self { map: Mutex::new(map), scratch, mode, created: AtomicUsize::new(0) }
    }

    /// The host paths that it uses.
    pub fn allowed(&self) -> Allowed {
        let mut allowed = lock(&self.map).allowed();
        allowed.add(self.scratch.path(), Rights::Directory);
        allowed
    }

    #[cfg(test)]
    pub(crate) fn set_created(&self, count: usize) {
        self.created.store(count, Ordering::Relaxed);
    }

    /// Removes the scratch directory, for a VM that is over.
    pub fn remove_scratch(&self) {
        self.scratch.remove();
    }

    /// Where files go that the guest creates at unmapped paths.
    pub fn scratch_path(&self) -> &std::path::Path {
        self.scratch.path()
    }

    /// Opens a guest path with the interface's flags. Flags that it doesn't have, and `O_DIRECTORY` with `O_CREAT`,
    /// are `EINVAL`.
    pub fn open(&self, path: &str, flags: i32, mode: u32) -> Result<OpenFile, Errno> {
        let wanted = host_flags(flags)?;
        let writes = flags & (abi::O_WRONLY | abi::O_RDWR | abi::O_TRUNC) != 0;
        let path = clean(path);
        let target = lock(&self.map).resolve(&path);
        match target {
            Target::BelowFile => Err(Errno::ENOTDIR),
            Target::Bytes(_) | Target::Directory if wanted.contains(OFlag::O_CREAT | OFlag::O_EXCL) => {
                Err(Errno::EEXIST)
            }
            Target::Bytes(_) if wanted.contains(OFlag::O_DIRECTORY) => Err(Errno::ENOTDIR),
            Target::Bytes(_) if writes => Err(Errno::EROFS),
            Target::Bytes(data) => Ok(OpenFile::bytes(data)),
            Target::Directory if writes || wanted.contains(OFlag::O_CREAT) => Err(Errno::EISDIR),
            Target::Directory => Ok(self.directory(&path, None)),
            Target::Host(node, rest) => match self.open_host(&path, &node, &rest, wanted, mode) {
                Err(Errno::ENOENT) if !writes && lock(&self.map).has_children(&path) => Ok(self.directory(&path, None)),
                result => result,
            },
            Target::Missing if wanted.contains(OFlag::O_CREAT) => {
                let node = match self.create(&path, true) {
                    // Another vCPU was first: the path means something now.
                    Err(Errno::EEXIST) => return self.open(&path, flags, mode),
                    result => result?,
                };
                self.open_host(&path, &node, "", wanted, mode).inspect_err(|_| self.forget(&path, &node))
            }
            Target::Missing => Err(Errno::ENOENT),
        }
    }

    fn open_host(&self, path: &str, node: &HostNode, rest: &str, flags: OFlag, mode: u32) -> Result<OpenFile, Errno> {
        let mut with_mode = flags;
        with_mode.set(OFlag::O_DIRECT, self.mode.direct && !flags.contains(OFlag::O_DIRECTORY));
        with_mode.set(OFlag::O_SYNC, self.mode.sync);
        let file = node.at(rest)?.open(with_mode, mode)?;
        let status = fstat(&file)?;
        if is(&status, SFlag::S_IFDIR) {
            Ok(self.directory(path, Some(file)))
        } else {
            Ok(OpenFile::host(file, &status))
        }
    }

    fn directory(&self, path: &str, host: Option<OwnedFd>) -> OpenFile {
        let mut mapped: BTreeMap<_, _> = lock(&self.map).children(path);
        if let Some(host) = &host {
            let exists =
                |name: &str| nix::sys::stat::fstatat(host, name, nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW).is_ok();
            mapped.retain(|name, _| !exists(name));
        }
        OpenFile::Directory(OpenDirectory::new(host, mapped))
    }

    /// Reserves a name in the scratch directory for a path that means nothing yet.
    fn create(&self, path: &str, is_file: bool) -> Result<HostNode, Errno> {
        if self.created.fetch_add(1, Ordering::Relaxed) >= MAX_CREATED {
            self.created.fetch_sub(1, Ordering::Relaxed);
            return Err(Errno::ENOSPC);
        }
        let name = self.scratch.fresh_name();
        let node = HostNode {
            directory: self.scratch.directory().clone(),
            path: self.scratch.path().join(&name),
            base: name.into(),
            is_file,
            is_created: true,
        };
        if lock(&self.map).add(path, node.clone()) {
            Ok(node)
        } else {
            self.created.fetch_sub(1, Ordering::Relaxed);
            Err(Errno::EEXIST)
        }
    }

    fn forget(&self, path: &str, node: &HostNode) {
        if node.is_created && lock(&self.map).remove_created(path, &node.base) {
            self.created.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Removes a file's name. A read-only file in memory vanishes from this guest's view.
    pub fn unlink(&self, path: &str) -> Result<(), Errno> {
        let path = clean(path);
        let target = lock(&self.map).resolve(&path);
        match target {
            Target::Missing => Err(Errno::ENOENT),
            Target::BelowFile => Err(Errno::ENOTDIR),
            Target::Directory => Err(Errno::EISDIR),
            Target::Bytes(_) => {
                lock(&self.map).remove_bytes(&path);
                Ok(())
            }
            Target::Host(node, rest) => {
                let place = node.at(&rest)?;
                if node.is_created && node.is_file {
                    // Out of the map first: whoever creates the path from now on gets a file of its own.
                    self.forget(&path, &node);
                }
                place.unlink()
            }
        }
    }

    /// Makes a directory: where the path is mapped, or in the scratch directory.
    pub fn mkdir(&self, path: &str) -> Result<(), Errno> {
        let path = clean(path);
        let (target, has_children) = {
            let map = lock(&self.map);
            (map.resolve(&path), map.has_children(&path))
        };
        match target {
            Target::BelowFile => Err(Errno::ENOTDIR),
            Target::Bytes(_) | Target::Directory => Err(Errno::EEXIST),
            Target::Host(_, _) if has_children => Err(Errno::EEXIST),
            // The mapping gives a file, whether that exists yet or not.
            Target::Host(node, _) if node.is_file => {
                Err(if node.at("")?.stat(false).is_ok() { Errno::EEXIST } else { Errno::EPERM })
            }
            Target::Host(node, rest) => node.at(&rest)?.mkdir(),
            Target::Missing => {
                let node = self.create(&path, false)?;
                node.at("")?.mkdir().inspect_err(|_| self.forget(&path, &node))
            }
        }
    }

    /// Metadata of a path, of a symbolic link itself unless `follow`.
    pub fn stat(&self, path: &str, follow: bool) -> Result<abi::FileAttr, Errno> {
        let path = clean(path);
        let target = lock(&self.map).resolve(&path);
        match target {
            Target::Missing => Err(Errno::ENOENT),
            Target::BelowFile => Err(Errno::ENOTDIR),
            Target::Directory => Ok(directory_attributes()),
            Target::Bytes(data) => Ok(bytes_attributes(data.len())),
            Target::Host(node, rest) => match node.at(&rest)?.stat(follow) {
                Err(Errno::ENOENT) if lock(&self.map).has_children(&path) => Ok(directory_attributes()),
                result => result.map(|status| host_attributes(&status)),
            },
        }
    }
}

/// The host's flags for a guest's.
fn host_flags(flags: i32) -> Result<OFlag, Errno> {
    let directory_created = abi::O_DIRECTORY | abi::O_CREAT;
    if flags & !abi::ALLOWED_OPEN_FLAGS != 0 || flags & directory_created == directory_created {
        return Err(Errno::EINVAL);
    }
    let mut wanted = match flags & (abi::O_WRONLY | abi::O_RDWR) {
        abi::O_RDONLY => OFlag::O_RDONLY,
        abi::O_WRONLY => OFlag::O_WRONLY,
        abi::O_RDWR => OFlag::O_RDWR,
        _ => return Err(Errno::EINVAL),
    };
    for (guest, host) in [
        (abi::O_CREAT, OFlag::O_CREAT),
        (abi::O_EXCL, OFlag::O_EXCL),
        (abi::O_TRUNC, OFlag::O_TRUNC),
        (abi::O_APPEND, OFlag::O_APPEND),
        (abi::O_DIRECTORY, OFlag::O_DIRECTORY),
    ] {
        wanted.set(host, flags & guest != 0);
    }
    Ok(wanted)
}
