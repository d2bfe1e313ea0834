//! An open directory: the records of a host directory, followed by those names that are mapped below it and that the
//! host doesn't have; or, for a directory that only exists in the map, just these.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Mutex;

use nix::errno::Errno;
use nix::libc;
use nix::sys::stat::fstat;
use nix::unistd::{Whence, lseek};
use uhyve_interface::v2::parameters::{Dirent64, FileAttr, FileType};

use super::{directory_attributes, host_attributes, lock};

/// At most this much is listed in one call, however large the guest's buffer is.
const LISTING: usize = 32 << 10;

/// A directory that a guest reads.
#[derive(Debug)]
pub struct OpenDirectory {
    host: Option<OwnedFd>,
    mapped: Vec<(String, FileType)>,
    /// How many of `mapped` were listed.
    position: Mutex<usize>,
}

impl OpenDirectory {
    pub(crate) fn new(host: Option<OwnedFd>, mapped: BTreeMap<String, FileType>) -> Self {
        Self { host, mapped: mapped.into_iter().collect(), position: Mutex::new(0) }
    }

    pub(super) fn attributes(&self) -> Result<FileAttr, Errno> {
        match &self.host {
            Some(host) => fstat(host).map(|status| host_attributes(&status)),
            None => Ok(directory_attributes()),
        }
    }

    /// Back to the start, or, in a host directory, to a position that a record named.
    pub(super) fn seek(&self, offset: i64, whence: Whence) -> Result<i64, Errno> {
        let mut position = lock(&self.position);
        match (&self.host, whence, offset) {
            (Some(host), Whence::SeekSet, _) => {
                let reached = lseek(host, offset, whence)?;
                *position = 0;
                Ok(reached)
            }
            (Some(host), Whence::SeekCur, 0) => lseek(host, 0, whence),
            (None, Whence::SeekSet, _) => {
                *position = usize::try_from(offset).ok().filter(|p| *p <= self.mapped.len()).ok_or(Errno::EINVAL)?;
                Ok(offset)
            }
            (None, Whence::SeekCur, 0) => i64::try_from(*position).map_err(|_| Errno::EOVERFLOW),
            _ => Err(Errno::EINVAL),
        }
    }

    pub(super) fn entries(&self, limit: usize) -> Result<Vec<u8>, Errno> {
        let limit = limit.min(LISTING);
        if let Some(host) = &self.host {
            let records = host_records(host, limit)?;
            if !records.is_empty() {
                return Ok(records);
            }
        }
        let mut position = lock(&self.position);
        let mut records = Vec::new();
        for (name, kind) in &self.mapped[*position..] {
            let next = i64::try_from(*position + 1).map_err(|_| Errno::EOVERFLOW)?;
            let record = record(next, *kind, name)?;
            if records.len() + record.len() > limit {
                if records.is_empty() {
                    return Err(Errno::EINVAL);
                }
                break;
            }
            records.extend_from_slice(&record);
            *position += 1;
        }
        Ok(records)
    }
}

fn record(next: i64, kind: FileType, name: &str) -> Result<Vec<u8>, Errno> {
    use std::mem::offset_of;
    let name_at = offset_of!(Dirent64, d_name);
    let length = (name_at + name.len() + 1).next_multiple_of(align_of::<Dirent64>());
    let mut bytes = vec![0; length];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(offset_of!(Dirent64, d_ino), &1u64.to_le_bytes());
    put(offset_of!(Dirent64, d_off), &next.to_le_bytes());
    put(offset_of!(Dirent64, d_reclen), &u16::try_from(length).map_err(|_| Errno::EOVERFLOW)?.to_le_bytes());
    put(offset_of!(Dirent64, d_type), &[u8::from(kind)]);
    put(name_at, name.as_bytes());
    Ok(bytes)
}

/// One `getdents64(2)`, whose records are those of the interface.
fn host_records(directory: &OwnedFd, limit: usize) -> Result<Vec<u8>, Errno> {
    let mut records = vec![0u8; limit];
    // SAFETY: the descriptor is open, and the kernel writes at most `records.len()` bytes to the buffer.
    let length = unsafe {
        libc::syscall(libc::SYS_getdents64, directory.as_fd().as_raw_fd(), records.as_mut_ptr(), records.len())
    };
    records.truncate(usize::try_from(Errno::result(length)?).unwrap_or(0));
    Ok(records)
}
