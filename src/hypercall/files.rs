//! File hypercalls that move no data: open, close, seek, unlink, metadata, directories.

use nix::errno::Errno;
use std::mem::offset_of;
use uhyve_interface::v2::parameters::{
    CloseParams, FileAttr, FstatParams, GetdentParams, GetdentResult, MkdirParams, MkdirResult, OpenParams, StatKind,
    StatParams, StatResult, UnlinkParams,
};
use uhyve_interface::{v1, v2};

use super::errno::{OTHER, OTHER_OF_ENUM, guest_errno};
use super::parameters::{ResultBytes, answer, block, field, file_attr_bytes};
use super::{Failure, Request, Services};
use crate::isolation::descriptors::FIRST;

/// The longest path, its NUL included.
const PATH_MAX: usize = 4096;

impl Services {
    /// A path of the guest: a C string in UTF-8.
    fn path(&self, request: &Request<'_>, address: u64) -> Result<String, Errno> {
        match self.memory.read_cstring(address, PATH_MAX) {
            Ok(Some(bytes)) => String::from_utf8(bytes).map_err(|_| Errno::EINVAL),
            Ok(None) => Err(Errno::EINVAL),
            Err(fault) => {
                self.warn(request.call, &fault);
                Err(Errno::EFAULT)
            }
        }
    }

    pub(super) fn file_open(&self, request: &Request<'_>) -> Result<(), Failure> {
        let block = block!(&self.memory, request.address(), OpenParams)?;
        let flags = field!(block, OpenParams, flags as i32);
        let mode = field!(block, OpenParams, mode as u32);
        let result = self
            .path(request, field!(block, OpenParams, name as u64))
            .and_then(|path| self.descriptors.insert(|| self.files.open(&path, flags, mode)));
        answer!(block, &self.memory, OpenParams, ret = result.unwrap_or_else(negated));
        Ok(())
    }

    pub(super) fn file_close(&self, request: &Request<'_>) -> Result<(), Failure> {
        let block = block!(&self.memory, request.address(), CloseParams)?;
        let fd = field!(block, CloseParams, fd as i32);
        // The standard streams stay open.
        let result = if (0..FIRST).contains(&fd) { Ok(()) } else { self.descriptors.close(fd) };
        answer!(block, &self.memory, CloseParams, ret = result.map_or_else(negated, |()| 0));
        Ok(())
    }

    pub(super) fn file_unlink(&self, request: &Request<'_>) -> Result<(), Failure> {
        let block = block!(&self.memory, request.address(), UnlinkParams)?;
        let result =
            self.path(request, field!(block, UnlinkParams, name as u64)).and_then(|path| self.files.unlink(&path));
        answer!(block, &self.memory, UnlinkParams, ret = result.map_or_else(negated, |()| 0));
        Ok(())
    }

    fn seek(&self, fd: i32, offset: i64, whence: i32) -> Result<i64, Errno> {
        if (0..FIRST).contains(&fd) {
            return Err(Errno::ESPIPE);
        }
        self.descriptors.get(fd)?.seek(offset, whence)
    }

    pub(super) fn file_lseek_v1(&self, request: &Request<'_>) -> Result<(), Failure> {
        use v1::parameters::LseekParams as Params;
        let block = block!(&self.memory, request.address(), Params)?;
        let (offset, whence) = (field!(block, Params, offset as i64), field!(block, Params, whence as i32));
        let result = self.seek(field!(block, Params, fd as i32), offset, whence).unwrap_or(-1);
        answer!(block, &self.memory, Params, offset = result);
        Ok(())
    }

    pub(super) fn file_lseek_v2(&self, request: &Request<'_>) -> Result<(), Failure> {
        use v2::parameters::LseekParams as Params;
        let block = block!(&self.memory, request.address(), Params)?;
        let (offset, whence) = (field!(block, Params, offset as i64), field!(block, Params, whence as i32));
        let result = self.seek(field!(block, Params, fd as i32), offset, whence);
        answer!(block, &self.memory, Params, offset = result.unwrap_or_else(|e| i64::from(negated(e))));
        Ok(())
    }

    pub(super) fn getdents(&self, request: &Request<'_>) -> Result<(), Failure> {
        let block = block!(&self.memory, request.address(), GetdentParams)?;
        let (buffer, length) = (field!(block, GetdentParams, buf as u64), field!(block, GetdentParams, len as u64));
        let records = self.descriptors.get(field!(block, GetdentParams, fd as i32)).and_then(|file| {
            let limit =
                usize::try_from(length).ok().filter(|_| self.memory.contains(buffer, length)).ok_or(Errno::EFAULT)?;
            let records = file.entries(limit)?;
            self.memory.write(buffer, &records).map_err(|_| Errno::EFAULT)?;
            Ok(records.len() as u64)
        });
        let result = match records {
            Ok(0) => GetdentResult::EndOfDirectory,
            Ok(length) => GetdentResult::Success(length),
            Err(e) => GetdentResult::Error(guest_errno(e, OTHER_OF_ENUM)),
        };
        ResultBytes::getdents(result).put(&block, &self.memory, offset_of!(GetdentParams, ret));
        Ok(())
    }

    /// Gives the guest metadata.
    fn put_attributes(&self, request: &Request<'_>, address: u64, attributes: Result<FileAttr, Errno>) -> StatResult {
        let written = attributes.and_then(|attributes| {
            self.memory.write(address, &file_attr_bytes(&attributes)).map_err(|fault| {
                self.warn(request.call, &fault);
                Errno::EFAULT
            })
        });
        written.map_or_else(|e| StatResult::Error(guest_errno(e, OTHER_OF_ENUM)), |()| StatResult::Success)
    }

    pub(super) fn file_stat(&self, request: &Request<'_>) -> Result<(), Failure> {
        let block = block!(&self.memory, request.address(), StatParams)?;
        let kind = StatKind::try_from(field!(block, StatParams, kind as u32)).map_err(|_| Errno::EINVAL);
        let attributes = kind.and_then(|kind| {
            let path = self.path(request, field!(block, StatParams, name as u64))?;
            self.files.stat(&path, kind == StatKind::Stat)
        });
        let result = self.put_attributes(request, field!(block, StatParams, attr as u64), attributes);
        ResultBytes::stat(result).put(&block, &self.memory, offset_of!(StatParams, ret));
        Ok(())
    }

    /// Metadata of a descriptor; of the standard streams it would tell about the host.
    pub(super) fn file_fstat(&self, request: &Request<'_>) -> Result<(), Failure> {
        let block = block!(&self.memory, request.address(), FstatParams)?;
        let attributes = self.descriptors.get(field!(block, FstatParams, fd as i32)).and_then(|file| file.attributes());
        let result = self.put_attributes(request, field!(block, FstatParams, attr as u64), attributes);
        ResultBytes::stat(result).put(&block, &self.memory, offset_of!(FstatParams, ret));
        Ok(())
    }

    pub(super) fn mkdir(&self, request: &Request<'_>) -> Result<(), Failure> {
        let block = block!(&self.memory, request.address(), MkdirParams)?;
        // The path ends with its NUL; its length is not needed.
        let made = self.path(request, field!(block, MkdirParams, path as u64)).and_then(|path| self.files.mkdir(&path));
        let result = made.map_or_else(|e| MkdirResult::Error(guest_errno(e, OTHER_OF_ENUM)), |()| MkdirResult::Success);
        ResultBytes::mkdir(result).put(&block, &self.memory, offset_of!(MkdirParams, ret));
        Ok(())
    }
}

fn negated(error: Errno) -> i32 {
    -guest_errno(error, OTHER)
}
