//! An open file of a guest: a host descriptor, a directory, or read-only bytes. Data goes straight between the host
//! descriptor and guest RAM. A host file's offset is the kernel's own, so that two vCPUs that share a descriptor meet
//! the kernel's rules; what else has an offset locks it for the length of a copy.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use nix::libc;
use nix::poll::PollFlags;
use nix::sys::stat::{FileStat, SFlag, fstat};
use nix::unistd::{Whence, lseek};
use uhyve_interface::v2::parameters::{FileAttr, Timespec};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice, WriteVolatile};

use super::lock;
use super::wait::{is_ready, wait};
use crate::memory::GuestMemory;

mod directory;
pub(crate) use directory::OpenDirectory;

type Cancelled<'a> = &'a dyn Fn() -> bool;

/// An open file of a guest.
#[derive(Debug)]
pub enum OpenFile {
    /// A file, FIFO or device of the host.
    Host {
        /// Its descriptor, non-blocking.
        file: OwnedFd,
        /// Reads may have to wait for data.
        is_stream: bool,
    },
    /// A directory.
    Directory(OpenDirectory),
    /// A read-only file in memory.
    Bytes {
        /// Its contents.
        data: Arc<[u8]>,
        /// The position of the next read.
        offset: Mutex<u64>,
    },
}

impl OpenFile {
    /// A read-only file with these bytes.
    pub fn bytes(data: Arc<[u8]>) -> Self {
        Self::Bytes { data, offset: Mutex::new(0) }
    }

    /// A host descriptor that is not a directory.
    pub(crate) fn host(file: OwnedFd, status: &FileStat) -> Self {
        Self::Host { file, is_stream: !is(status, SFlag::S_IFREG) && !is(status, SFlag::S_IFBLK) }
    }

    /// Whether a read that got less than it asked for must not be continued: the rest may be long in coming.
    pub fn is_stream(&self) -> bool {
        matches!(self, Self::Host { is_stream: true, .. })
    }

    /// Reads up to `length` bytes to guest-physical `address`. `EINTR`: cancelled, nothing read.
    pub fn read(
        &self,
        memory: &GuestMemory,
        address: u64,
        length: usize,
        cancelled: Cancelled<'_>,
    ) -> Result<usize, Errno> {
        match self {
            Self::Host { file, is_stream } => loop {
                if *is_stream {
                    wait(file.as_fd(), PollFlags::POLLIN, cancelled)?;
                }
                match read_once(memory, address, length, file.as_fd()) {
                    Err(Errno::EINTR) if cancelled() => return Err(Errno::EINTR),
                    Err(Errno::EINTR) => {}
                    Err(Errno::EAGAIN) if *is_stream => {}
                    result => return result,
                }
            },
            Self::Bytes { data, offset } => {
                let mut offset = lock(offset);
                let start = usize::try_from(*offset).unwrap_or(usize::MAX).min(data.len());
                let piece = &data[start..start + length.min(data.len() - start)];
                memory.write(address, piece).map_err(|_| Errno::EFAULT)?;
                *offset += piece.len() as u64;
                Ok(piece.len())
            }
            Self::Directory(_) => Err(Errno::EISDIR),
        }
    }

    /// Writes up to `length` bytes from guest-physical `address`. `EINTR`: cancelled, nothing written.
    pub fn write(
        &self,
        memory: &GuestMemory,
        address: u64,
        length: usize,
        cancelled: Cancelled<'_>,
    ) -> Result<usize, Errno> {
        match self {
            Self::Host { file, is_stream } => loop {
                match write_once(memory, address, length, file.as_fd()) {
                    Err(Errno::EINTR) if cancelled() => return Err(Errno::EINTR),
                    Err(Errno::EINTR) => {}
                    Err(Errno::EAGAIN) if *is_stream => wait(file.as_fd(), PollFlags::POLLOUT, cancelled)?,
                    result => return result,
                }
            },
            Self::Bytes { .. } => Err(Errno::EROFS),
            Self::Directory(_) => Err(Errno::EISDIR),
        }
    }

    /// Moves the position; returns the new one.
    pub fn seek(&self, offset: i64, whence: i32) -> Result<i64, Errno> {
        match self {
            Self::Host { file, .. } => lseek(file, offset, whence_of(whence)?),
            Self::Directory(directory) => directory.seek(offset, whence_of(whence)?),
            Self::Bytes { data, offset: position } => {
                let mut position = lock(position);
                let base = match whence_of(whence)? {
                    Whence::SeekSet => 0,
                    Whence::SeekCur => *position,
                    _ => data.len() as u64,
                };
                let base = i64::try_from(base).map_err(|_| Errno::EOVERFLOW)?;
                let target = base.checked_add(offset).ok_or(Errno::EOVERFLOW)?;
                *position = u64::try_from(target).map_err(|_| Errno::EINVAL)?;
                Ok(target)
            }
        }
    }

    /// Metadata.
    pub fn attributes(&self) -> Result<FileAttr, Errno> {
        match self {
            Self::Host { file, .. } => fstat(file).map(|status| host_attributes(&status)),
            Self::Directory(directory) => directory.attributes(),
            Self::Bytes { data, .. } => Ok(bytes_attributes(data.len())),
        }
    }

    /// The next directory records, at most `limit` bytes of them; none at the end.
    pub fn entries(&self, limit: usize) -> Result<Vec<u8>, Errno> {
        match self {
            Self::Directory(directory) => directory.entries(limit),
            _ => Err(Errno::ENOTDIR),
        }
    }
}

fn whence_of(whence: i32) -> Result<Whence, Errno> {
    use uhyve_interface::v2::parameters::{SEEK_CUR, SEEK_END, SEEK_SET};
    match whence {
        SEEK_SET => Ok(Whence::SeekSet),
        SEEK_CUR => Ok(Whence::SeekCur),
        SEEK_END => Ok(Whence::SeekEnd),
        _ => Err(Errno::EINVAL),
    }
}

/// Whether a file is of that type.
pub(crate) fn is(status: &FileStat, kind: SFlag) -> bool {
    status.st_mode & SFlag::S_IFMT.bits() == kind.bits()
}

/// Metadata of a host file for a guest.
pub(crate) fn host_attributes(status: &FileStat) -> FileAttr {
    let time = |sec, nsec| Timespec::from_nsecs(sec, nsec).unwrap_or_default();
    FileAttr {
        st_dev: status.st_dev,
        st_ino: status.st_ino,
        st_nlink: status.st_nlink,
        st_mode: status.st_mode,
        st_uid: status.st_uid,
        st_gid: status.st_gid,
        st_rdev: status.st_rdev,
        st_size: status.st_size,
        st_blksize: status.st_blksize,
        st_blocks: status.st_blocks,
        st_atim: time(status.st_atime, status.st_atime_nsec),
        st_mtim: time(status.st_mtime, status.st_mtime_nsec),
        st_ctim: time(status.st_ctime, status.st_ctime_nsec),
    }
}

/// Metadata of a read-only file in memory.
pub(crate) fn bytes_attributes(length: usize) -> FileAttr {
    FileAttr {
        st_mode: libc::S_IFREG | 0o444,
        st_nlink: 1,
        st_size: i64::try_from(length).unwrap_or(i64::MAX),
        st_blksize: 4096,
        st_blocks: i64::try_from(length.div_ceil(512)).unwrap_or(i64::MAX),
        ..FileAttr::default()
    }
}

/// Metadata of a directory that only exists in the map.
pub(crate) fn directory_attributes() -> FileAttr {
    FileAttr { st_mode: libc::S_IFDIR | 0o755, st_nlink: 2, st_blksize: 4096, ..FileAttr::default() }
}

/// One system call on a descriptor, whatever it answers: vm-memory's own loops go on after `EINTR` and forget how
/// much a failing write had written.
struct Once<'a> {
    fd: BorrowedFd<'a>,
    answer: Option<Result<usize, Errno>>,
}

impl Once<'_> {
    fn keep(&mut self, answer: Result<usize, VolatileMemoryError>) -> usize {
        let answer = answer.map_err(|e| match e {
            VolatileMemoryError::IOError(e) => e.raw_os_error().map_or(Errno::EIO, Errno::from_raw),
            _ => Errno::EFAULT,
        });
        self.answer = Some(answer);
        answer.unwrap_or(0)
    }
}

impl ReadVolatile for Once<'_> {
    fn read_volatile<B: BitmapSlice>(&mut self, buffer: &mut VolatileSlice<B>) -> Result<usize, VolatileMemoryError> {
        if self.answer.is_some() {
            return Ok(0);
        }
        let answer = self.fd.read_volatile(buffer);
        Ok(self.keep(answer))
    }
}

impl WriteVolatile for Once<'_> {
    fn write_volatile<B: BitmapSlice>(&mut self, buffer: &VolatileSlice<B>) -> Result<usize, VolatileMemoryError> {
        if self.answer.is_some() {
            return Ok(0);
        }
        let answer = self.fd.write_volatile(buffer);
        Ok(self.keep(answer))
    }

    fn write_all_volatile<B: BitmapSlice>(&mut self, buffer: &VolatileSlice<B>) -> Result<(), VolatileMemoryError> {
        self.write_volatile(buffer).map(|_| ())
    }
}

/// One `read(2)` into guest RAM.
pub(crate) fn read_once(memory: &GuestMemory, address: u64, length: usize, fd: BorrowedFd<'_>) -> Result<usize, Errno> {
    let mut once = Once { fd, answer: None };
    memory.read_from(address, &mut once, length).map_err(|_| Errno::EFAULT)?;
    once.answer.unwrap_or(Ok(0))
}

/// One `write(2)` from guest RAM.
pub(crate) fn write_once(
    memory: &GuestMemory,
    address: u64,
    length: usize,
    fd: BorrowedFd<'_>,
) -> Result<usize, Errno> {
    let mut once = Once { fd, answer: None };
    memory.write_to(address, &mut once, length).map_err(|_| Errno::EFAULT)?;
    once.answer.unwrap_or(Ok(0))
}

/// The guest's standard input.
#[derive(Debug)]
pub enum Input {
    /// The host's standard input.
    Stdin,
    /// Nothing: every read is at its end.
    Empty,
    /// A descriptor.
    File(OwnedFd),
}

impl Input {
    fn with_fd<T>(&self, nothing: T, work: impl FnOnce(BorrowedFd<'_>) -> T) -> T {
        match self {
            Self::Stdin => work(std::io::stdin().as_fd()),
            Self::Empty => nothing,
            Self::File(file) => work(file.as_fd()),
        }
    }

    /// Reads what there is, at most `length` bytes; `None` if nothing has come yet. The descriptor is shared with
    /// other processes and may block: only a read that follows a look at it, with no other vCPU between, does not.
    pub fn try_read(
        &self,
        memory: &GuestMemory,
        address: u64,
        length: usize,
        turn: &Mutex<()>,
    ) -> Result<Option<usize>, Errno> {
        self.with_fd(Ok(Some(0)), |fd| {
            let _turn = lock(turn);
            if !is_ready(fd, PollFlags::POLLIN) {
                return Ok(None);
            }
            match read_once(memory, address, length, fd) {
                Err(Errno::EINTR | Errno::EAGAIN) => Ok(None),
                result => result.map(Some),
            }
        })
    }

    /// Waits for data and reads at most `length` bytes. `EINTR`: cancelled, nothing read.
    pub fn read(
        &self,
        memory: &GuestMemory,
        address: u64,
        length: usize,
        turn: &Mutex<()>,
        cancelled: Cancelled<'_>,
    ) -> Result<usize, Errno> {
        loop {
            self.with_fd(Ok(()), |fd| wait(fd, PollFlags::POLLIN, cancelled))?;
            if let Some(length) = self.try_read(memory, address, length, turn)? {
                return Ok(length);
            }
        }
    }
}
