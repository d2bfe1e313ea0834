//! The one file that a client may read through the server: the image, so that gdb needs no file argument. Nothing else
//! of the host is served, whatever path is asked for.

use std::sync::Arc;

use gdbstub::target::ext::host_io::{HostIoErrno, HostIoOpenMode, HostIoStat};

/// How many times the image may be open at once.
const MOST_OPEN: usize = 16;

/// The image, and the descriptors that a client has for it.
pub struct HostFiles {
    /// What `qXfer:exec-file` names and `vFile:open` takes.
    path: String,
    image: Arc<[u8]>,
    open: [bool; MOST_OPEN],
}

impl HostFiles {
    /// Serves `image` as `path`.
    pub fn new(name: &str, image: Arc<[u8]>) -> Self {
        // gdb takes a relative name for one of its own directories.
        let path = std::path::absolute(name).map_or_else(|_| name.to_owned(), |p| p.to_string_lossy().into_owned());
        Self { path, image, open: [false; MOST_OPEN] }
    }

    /// The image's path.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Opens the image for reading.
    pub fn open(&mut self, path: &[u8], writes: bool) -> Result<u32, HostIoErrno> {
        if path != self.path.as_bytes() {
            return Err(HostIoErrno::ENOENT);
        }
        if writes {
            return Err(HostIoErrno::EROFS);
        }
        let free = self.open.iter().position(|open| !open).ok_or(HostIoErrno::EMFILE)?;
        self.open[free] = true;
        Ok(u32::try_from(free).expect("below MOST_OPEN"))
    }

    fn check(&self, descriptor: u32) -> Result<usize, HostIoErrno> {
        let index = usize::try_from(descriptor).unwrap_or(MOST_OPEN);
        if self.open.get(index) == Some(&true) { Ok(index) } else { Err(HostIoErrno::EBADF) }
    }

    /// Closes a descriptor.
    pub fn close(&mut self, descriptor: u32) -> Result<(), HostIoErrno> {
        let index = self.check(descriptor)?;
        self.open[index] = false;
        Ok(())
    }

    /// Reads into `buffer` and returns how many bytes; 0 at the end.
    pub fn read(&self, descriptor: u32, offset: u64, buffer: &mut [u8]) -> Result<usize, HostIoErrno> {
        self.check(descriptor)?;
        Ok(copy_from(&self.image, offset, buffer.len(), buffer))
    }

    /// What `fstat` tells.
    pub fn stat(&self, descriptor: u32) -> Result<HostIoStat, HostIoErrno> {
        self.check(descriptor)?;
        let size = self.image.len() as u64;
        Ok(HostIoStat {
            st_dev: 0,
            st_ino: 1,
            st_mode: HostIoOpenMode::S_IFREG | HostIoOpenMode::S_IRUSR,
            st_nlink: 1,
            st_uid: 0,
            st_gid: 0,
            st_rdev: 0,
            st_size: size,
            st_blksize: 4096,
            st_blocks: size.div_ceil(512),
            st_atime: 0,
            st_mtime: 0,
            st_ctime: 0,
        })
    }
}

/// Copies what there is of `data` from `offset`, `length` bytes at most and no more than fit.
pub fn copy_from(data: &[u8], offset: u64, length: usize, buffer: &mut [u8]) -> usize {
    let start = usize::try_from(offset).unwrap_or(usize::MAX).min(data.len());
    let piece = &data[start..];
    let size = piece.len().min(length).min(buffer.len());
    buffer[..size].copy_from_slice(&piece[..size]);
    size
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_other_paths_and_writing_are_refused() {
        let mut files = HostFiles::new("/image", vec![1, 2, 3].into());
        assert!(matches!(files.open(b"/etc/passwd", false), Err(HostIoErrno::ENOENT)));
        assert!(matches!(files.open(b"/image", true), Err(HostIoErrno::EROFS)));
    }

    #[test]
    fn test_descriptors_are_checked_limited_and_used_again() {
        let mut files = HostFiles::new("/image", vec![1, 2, 3].into());
        let all: Vec<u32> = (0..MOST_OPEN).map(|_| files.open(b"/image", false).ok().unwrap()).collect();
        assert!(matches!(files.open(b"/image", false), Err(HostIoErrno::EMFILE)));
        files.close(all[3]).ok().unwrap();
        assert!(matches!(files.close(all[3]), Err(HostIoErrno::EBADF)));
        assert_eq!(files.open(b"/image", false).ok(), Some(all[3]));
        assert!(matches!(files.stat(99), Err(HostIoErrno::EBADF)));
    }

    #[test]
    fn test_read_ends_at_the_end_of_the_image_and_of_the_buffer() {
        let mut files = HostFiles::new("/image", vec![1, 2, 3].into());
        let fd = files.open(b"/image", false).ok().unwrap();
        let mut buffer = [0; 8];
        assert_eq!(files.read(fd, 1, &mut buffer).ok(), Some(2));
        assert_eq!(buffer[..2], [2, 3]);
        assert_eq!(files.read(fd, u64::MAX, &mut buffer).ok(), Some(0));
        assert_eq!(files.read(fd, 0, &mut buffer[..1]).ok(), Some(1));
    }
}
