//! Reading and writing files. A transfer goes piece by piece straight between a descriptor and guest RAM; the whole
//! buffer is checked before the first byte moves. Between pieces, and wherever the host waits, a kick can interrupt.

use nix::errno::Errno;
use uhyve_interface::{v1, v2};

use super::errno::{OTHER, guest_errno};
use super::parameters::{answer, block, field};
use super::serial::console_failure;
use super::{Failure, Outcome, Request, Services};
use crate::error::GuestFault;
use crate::isolation::OpenFile;
use crate::memory::GuestMemory;

/// How much moves in one system call.
const PIECE: usize = 1 << 20;

/// A buffer of the guest.
#[derive(Debug, Clone, Copy)]
pub(super) enum Buffer {
    /// At a guest-physical address.
    Physical(u64),
    /// At a guest-virtual address, in whatever pages that has.
    Virtual(u64),
}

impl Buffer {
    fn fault(self, offset: u64, length: u64) -> GuestFault {
        let (Self::Physical(start) | Self::Virtual(start)) = self;
        GuestFault { address: start.wrapping_add(offset), length, is_virtual: matches!(self, Self::Virtual(_)) }
    }

    /// Checks that all `length` bytes are in RAM. A buffer larger than RAM is not, even if its pages repeat: the walk
    /// of its pages has to end.
    pub fn check(self, memory: &GuestMemory, request: &mut Request<'_>, length: u64) -> Result<(), GuestFault> {
        match self {
            _ if length == 0 => Ok(()),
            Self::Physical(start) if memory.contains(start, length) => Ok(()),
            Self::Virtual(start) if length <= memory.size() && start.checked_add(length - 1).is_some() => {
                let mut done = 0;
                while done < length {
                    done += self.page(memory, request, done, length)?.1;
                }
                Ok(())
            }
            _ => Err(self.fault(0, length)),
        }
    }

    /// The guest-physical address at `offset`, and how many of the buffer's bytes follow it in the same page.
    fn page(
        self,
        memory: &GuestMemory,
        request: &mut Request<'_>,
        offset: u64,
        length: u64,
    ) -> Result<(u64, u64), GuestFault> {
        let fault = self.fault(offset, length - offset);
        let (address, size) = match self {
            Self::Physical(start) => (start.checked_add(offset).ok_or(fault)?, length - offset),
            Self::Virtual(_) => (request.translate)(fault.address).ok_or(fault)?,
        };
        let size = size.min(length - offset);
        if size == 0 || !memory.contains(address, size) { Err(fault) } else { Ok((address, size)) }
    }

    /// The next piece to move at once: physically contiguous, at most `limit` bytes.
    pub fn piece(
        self,
        memory: &GuestMemory,
        request: &mut Request<'_>,
        offset: u64,
        length: u64,
        limit: usize,
    ) -> Result<(u64, usize), GuestFault> {
        let limit = limit as u64;
        let (address, mut size) = self.page(memory, request, offset, length)?;
        while size < limit && offset + size < length {
            match self.page(memory, request, offset + size, length) {
                Ok((next, more)) if next == address + size => size += more,
                _ => break,
            }
        }
        let size = usize::try_from(size.min(limit)).expect("the limit is a usize");
        Ok((address, size))
    }
}

impl Services {
    pub(super) fn file_write_v1(&self, request: &mut Request<'_>) -> Result<(), Failure> {
        use v1::parameters::WriteParams as Params;
        let block = block!(&self.memory, request.address(), Params)?;
        let buffer = Buffer::Virtual(field!(block, Params, buf as u64));
        let (fd, length) = (field!(block, Params, fd as i32), field!(block, Params, len as u64));
        // There is no result to put an error into.
        if let Err(e) = self.write_file(request, fd, buffer, length)? {
            self.warn(request.call, &format!("write to descriptor {fd}: {e}"));
        }
        Ok(())
    }

    pub(super) fn file_write_v2(&self, request: &mut Request<'_>) -> Result<(), Failure> {
        use v2::parameters::WriteParams as Params;
        let block = block!(&self.memory, request.address(), Params)?;
        let buffer = Buffer::Physical(field!(block, Params, buf as u64));
        let (fd, length) = (field!(block, Params, fd as i32), field!(block, Params, len as u64));
        let result = self.write_file(request, fd, buffer, length)?;
        answer!(block, &self.memory, Params, ret = count(result));
        Ok(())
    }

    pub(super) fn file_read_v1(&self, request: &mut Request<'_>) -> Result<(), Failure> {
        use v1::parameters::ReadParams as Params;
        let block = block!(&self.memory, request.address(), Params)?;
        let buffer = Buffer::Virtual(field!(block, Params, buf as u64));
        let (fd, length) = (field!(block, Params, fd as i32), field!(block, Params, len as u64));
        let result = self.read_file(request, fd, buffer, length)?;
        answer!(block, &self.memory, Params, ret = count(result));
        Ok(())
    }

    pub(super) fn file_read_v2(&self, request: &mut Request<'_>) -> Result<(), Failure> {
        use v2::parameters::ReadParams as Params;
        let block = block!(&self.memory, request.address(), Params)?;
        let buffer = Buffer::Physical(field!(block, Params, buf as u64));
        let (fd, length) = (field!(block, Params, fd as i32), field!(block, Params, len as u64));
        let result = self.read_file(request, fd, buffer, length)?;
        answer!(block, &self.memory, Params, ret = count(result));
        Ok(())
    }

    /// Writes all of a buffer, or what goes before the first error.
    fn write_file(
        &self,
        request: &mut Request<'_>,
        fd: i32,
        buffer: Buffer,
        length: u64,
    ) -> Result<Result<u64, Errno>, Failure> {
        if matches!(fd, 1 | 2) {
            return match self.write_console(request, buffer, length) {
                Ok(()) => Ok(Ok(length)),
                Err(Failure::Fault(fault)) => Ok(self.faulty(request, &fault)),
                Err(failure) => Err(failure),
            };
        }
        self.transfer(request, fd, buffer, length, |file, address, size, cancelled| {
            file.write(&self.memory, address, size, cancelled)
        })
    }

    fn read_file(
        &self,
        request: &mut Request<'_>,
        fd: i32,
        buffer: Buffer,
        length: u64,
    ) -> Result<Result<u64, Errno>, Failure> {
        if fd == 0 {
            return self.read_input(request, buffer, length);
        }
        self.transfer(request, fd, buffer, length, |file, address, size, cancelled| {
            file.read(&self.memory, address, size, cancelled)
        })
    }

    fn faulty(&self, request: &Request<'_>, fault: &GuestFault) -> Result<u64, Errno> {
        self.warn(request.call, fault);
        Err(Errno::EFAULT)
    }

    fn read_input(
        &self,
        request: &mut Request<'_>,
        buffer: Buffer,
        length: u64,
    ) -> Result<Result<u64, Errno>, Failure> {
        if let Err(fault) = buffer.check(&self.memory, request, length) {
            return Ok(self.faulty(request, &fault));
        }
        if length == 0 {
            return Ok(Ok(0));
        }
        // Whoever types an answer wants to see the question.
        self.console.flush(request.cancelled).map_err(console_failure)?;
        let (address, size) = match buffer.piece(&self.memory, request, 0, length, PIECE) {
            Ok(piece) => piece,
            Err(fault) => return Ok(self.faulty(request, &fault)),
        };
        match self.input.read(&self.memory, address, size, &self.input_turn, request.cancelled) {
            Err(Errno::EINTR) => Err(Outcome::Interrupted.into()),
            result => Ok(result.map(|size| size as u64)),
        }
    }

    /// Moves pieces until the buffer or the file is at its end. A call that had a part of its data when it was
    /// interrupted goes on from there, except that a stream gives what it has.
    fn transfer(
        &self,
        request: &mut Request<'_>,
        fd: i32,
        buffer: Buffer,
        length: u64,
        one: impl Fn(&OpenFile, u64, usize, &dyn Fn() -> bool) -> Result<usize, Errno>,
    ) -> Result<Result<u64, Errno>, Failure> {
        let is_read = request.call.kind() == super::Kind::FileRead;
        let file = match self.descriptors.get(fd) {
            Ok(file) => file,
            Err(e) => return Ok(Err(e)),
        };
        if let Err(fault) = buffer.check(&self.memory, request, length) {
            return Ok(self.faulty(request, &fault));
        }
        while *request.progress < length {
            let done = *request.progress;
            let piece = match buffer.piece(&self.memory, request, done, length, PIECE) {
                Ok(piece) => Ok(piece),
                Err(_) if done > 0 => break,
                Err(fault) => Err(self.faulty(request, &fault)),
            };
            let (address, size) = match piece {
                Ok(piece) => piece,
                Err(result) => return Ok(result),
            };
            match one(&file, address, size, request.cancelled) {
                Ok(0) => break,
                Ok(moved) => {
                    *request.progress += moved as u64;
                    if is_read && (moved < size || file.is_stream()) {
                        break;
                    }
                }
                Err(Errno::EINTR) => return Err(Outcome::Interrupted.into()),
                Err(_) if done > 0 => break,
                Err(e) => return Ok(Err(e)),
            }
            if *request.progress < length && (request.cancelled)() {
                return Err(Outcome::Interrupted.into());
            }
        }
        Ok(Ok(*request.progress))
    }
}

/// A result as the guest gets it: a count, or a negated error number.
fn count(result: Result<u64, Errno>) -> i64 {
    match result {
        Ok(count) => i64::try_from(count).expect("no buffer is larger than RAM"),
        Err(e) => -i64::from(guest_errno(e, OTHER)),
    }
}
