//! Console hypercalls. Output is copied out of guest RAM in small pieces, so that no length makes the host allocate.

use std::io::ErrorKind;

use uhyve_interface::{v1, v2};

use super::parameters::{answer, block, field};
use super::transfer::Buffer;
use super::{Failure, Outcome, Request, Services};
use crate::error::GuestFault;

/// How much of a buffer is copied at a time.
const PIECE: usize = 4096;

impl Services {
    pub(super) fn write_byte(&self, request: &Request<'_>, byte: u8) -> Result<(), Failure> {
        self.console.write(&[byte], request.cancelled).map_err(console_failure)
    }

    pub(super) fn write_buffer_v1(&self, request: &mut Request<'_>) -> Result<(), Failure> {
        use v1::parameters::SerialWriteBufferParams as Params;
        let block = block!(&self.memory, request.address(), Params)?;
        let (address, length) = (field!(block, Params, buf as u64), field!(block, Params, len as u64));
        self.write_console(request, Buffer::Physical(address), length)
    }

    pub(super) fn write_buffer_v2(&self, request: &mut Request<'_>) -> Result<(), Failure> {
        use v2::parameters::SerialWriteBufferParams as Params;
        let block = block!(&self.memory, request.address(), Params)?;
        let (address, length) = (field!(block, Params, buf as u64), field!(block, Params, len as u64));
        self.write_console(request, Buffer::Physical(address), length)
    }

    /// Writes a buffer to the console; all of it, or nothing if it leaves RAM.
    pub(super) fn write_console(&self, request: &mut Request<'_>, buffer: Buffer, length: u64) -> Result<(), Failure> {
        buffer.check(&self.memory, request, length)?;
        let mut bytes = [0; PIECE];
        while *request.progress < length {
            let (address, size) = buffer.piece(&self.memory, request, *request.progress, length, PIECE)?;
            self.memory.read(address, &mut bytes[..size])?;
            self.console.write(&bytes[..size], request.cancelled).map_err(console_failure)?;
            *request.progress += size as u64;
        }
        Ok(())
    }

    /// Reads what standard input has now, without waiting.
    pub(super) fn read_buffer(&self, request: &mut Request<'_>) -> Result<(), Failure> {
        use v2::parameters::SerialReadBufferParams as Params;
        let block = block!(&self.memory, request.address(), Params)?;
        let (address, limit) = (field!(block, Params, buf as u64), field!(block, Params, maxlen as u64));
        let fault = GuestFault { address, length: limit, is_virtual: false };
        let mut length = 0;
        if limit > 0 {
            let size = usize::try_from(limit).ok().filter(|_| self.memory.contains(address, limit));
            match size.map(|size| self.input.try_read(&self.memory, address, size, &self.input_turn)) {
                Some(Ok(read)) => length = read.unwrap_or(0),
                Some(Err(e)) => self.warn(request.call, &e),
                None => self.warn(request.call, &fault),
            }
        }
        answer!(block, &self.memory, Params, len = (length as u64));
        Ok(())
    }
}

/// What a console error means for a call.
pub(super) fn console_failure(error: std::io::Error) -> Failure {
    Failure::Outcome(if error.kind() == ErrorKind::Interrupted {
        Outcome::Interrupted
    } else {
        Outcome::HostError(error)
    })
}
