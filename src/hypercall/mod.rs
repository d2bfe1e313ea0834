//! Hypercalls: what a guest asks its hypervisor for. A vCPU that left its guest with an `out` to one of the ports of
//! [`identify`] makes a [`Request`] of it and has it answered by [`Services::dispatch`], where pointers and lengths are
//! a stranger's: everything is checked against guest RAM before it is used, and a bad one costs the guest its answer,
//! never the host its life.

mod call;
mod command_line;
mod errno;
mod files;
mod parameters;
mod serial;
mod transfer;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

pub use call::{Call, Kind, identify};
pub use command_line::CommandLine;
use parameters::{block, field};
use uhyve_interface::v1;

use crate::devices::serial::Serial;
use crate::error::GuestFault;
pub use crate::isolation::open_file::Input;
use crate::isolation::{Descriptors, Files};
use crate::memory::GuestMemory;

/// What became of a hypercall.
#[derive(Debug)]
pub enum Outcome {
    /// It is answered; the guest goes on.
    Done,
    /// The guest ends with this code.
    Exit(i32),
    /// `cancelled` became true while the host made the call wait. The guest has no answer yet: the same request, with
    /// its `progress` as it is now, is dispatched again before the guest goes on.
    Interrupted,
    /// The guest can't go on; what it did.
    Crash(String),
    /// The console's sink failed.
    HostError(std::io::Error),
}

/// Why a handler has no answer for the guest.
enum Failure {
    /// The parameters, or a buffer that no result can report, aren't in RAM.
    Fault(GuestFault),
    Outcome(Outcome),
}

impl From<GuestFault> for Failure {
    fn from(fault: GuestFault) -> Self {
        Self::Fault(fault)
    }
}

impl From<Outcome> for Failure {
    fn from(outcome: Outcome) -> Self {
        Self::Outcome(outcome)
    }
}

/// Translates a guest-virtual address: the guest-physical one, and how many bytes from there on lie in the same page.
pub type Translate<'a> = &'a mut dyn FnMut(u64) -> Option<(u64, u64)>;

/// One hypercall of one vCPU.
pub struct Request<'a> {
    /// From [`identify`].
    pub call: Call,
    /// The value of the `out`, zero-extended.
    pub data: u32,
    /// How many bytes the `out` wrote: 1, 2 or 4.
    pub size: usize,
    /// RDI, if [`Call::needs_rdi`].
    pub rdi: u64,
    /// Walks the vCPU's page tables; only version 1 passes virtual addresses.
    pub translate: Translate<'a>,
    /// Whether the vCPU was asked to stop. It is looked at after a signal and between pieces of a long transfer.
    pub cancelled: &'a dyn Fn() -> bool,
    /// How many bytes of this call's buffer are done: 0 at first, and kept from one [`Outcome::Interrupted`] to the
    /// next dispatch of the same call, so that nothing is written twice.
    pub progress: &'a mut u64,
}

impl Request<'_> {
    /// The guest-physical address of the parameters.
    fn address(&self) -> u64 {
        if self.call.needs_rdi() { self.rdi } else { u64::from(self.data) }
    }
}

/// Everything that hypercalls use; one per VM, shared by its vCPU threads.
#[derive(Debug)]
pub struct Services {
    memory: GuestMemory,
    console: Arc<Serial>,
    files: Files,
    descriptors: Descriptors,
    command_line: CommandLine,
    input: Input,
    input_turn: Mutex<()>,
    /// One bit per [`Kind`] whose misuse was warned about.
    warned: AtomicU32,
}

impl Services {
    /// Puts the parts together; the guest's standard input is the host's.
    pub fn new(memory: GuestMemory, console: Arc<Serial>, files: Files, command_line: CommandLine) -> Self {
        Self {
            memory,
            console,
            files,
            descriptors: Descriptors::default(),
            command_line,
            input: Input::Stdin,
            input_turn: Mutex::new(()),
            warned: AtomicU32::new(0),
        }
    }

    /// Another standard input.
    pub fn with_input(mut self, input: Input) -> Self {
        self.input = input;
        self
    }

    /// The guest's file system.
    pub fn files(&self) -> &Files {
        &self.files
    }

    /// The guest's console.
    pub fn console(&self) -> &Arc<Serial> {
        &self.console
    }

    /// Answers a hypercall. It may wait for a host file, with no lock held; a kick ends that (see
    /// [`crate::isolation::wait`]).
    pub fn dispatch(&self, request: &mut Request<'_>) -> Outcome {
        match self.answer(request) {
            Ok(()) => Outcome::Done,
            Err(Failure::Outcome(outcome)) => outcome,
            Err(Failure::Fault(fault)) => {
                self.warn(request.call, &fault);
                Outcome::Done
            }
        }
    }

    /// Says once per kind of call, in the log, what a guest does wrong.
    fn warn(&self, call: Call, what: &dyn std::fmt::Display) {
        let bit = 1 << (call.kind() as u32);
        let level =
            if self.warned.fetch_or(bit, Ordering::Relaxed) & bit == 0 { log::Level::Warn } else { log::Level::Debug };
        log::log!(level, "hypercall {call:?}: {what}");
    }

    fn answer(&self, request: &mut Request<'_>) -> Result<(), Failure> {
        match request.call {
            Call::V1(Kind::SerialWriteByte) => self.write_byte(request, request.data.to_le_bytes()[0]),
            Call::V2(Kind::SerialWriteByte) => self.write_byte(request, request.rdi.to_le_bytes()[0]),
            Call::V1(Kind::SerialWriteBuffer) => self.write_buffer_v1(request),
            Call::V2(Kind::SerialWriteBuffer) => self.write_buffer_v2(request),
            Call::V2(Kind::SerialReadBuffer) => self.read_buffer(request),
            Call::V1(Kind::Exit) => Err(self.exit(request.address()).into()),
            Call::V2(Kind::Exit) => {
                let [a, b, c, d, ..] = request.rdi.to_le_bytes();
                Err(Outcome::Exit(i32::from_le_bytes([a, b, c, d])).into())
            }
            Call::V1(Kind::Cmdsize) => Ok(self.command_line.write_sizes(&self.memory, request.address())?),
            Call::V1(Kind::Cmdval) => Ok(self.command_line.write_values(&self.memory, request.address())?),
            Call::V1(Kind::FileWrite) => self.file_write_v1(request),
            Call::V2(Kind::FileWrite) => self.file_write_v2(request),
            Call::V1(Kind::FileRead) => self.file_read_v1(request),
            Call::V2(Kind::FileRead) => self.file_read_v2(request),
            Call::V1(Kind::FileLseek) => self.file_lseek_v1(request),
            Call::V2(Kind::FileLseek) => self.file_lseek_v2(request),
            // The structs of these three are the same in both versions.
            Call::V1(Kind::FileOpen) | Call::V2(Kind::FileOpen) => self.file_open(request),
            Call::V1(Kind::FileClose) | Call::V2(Kind::FileClose) => self.file_close(request),
            Call::V1(Kind::FileUnlink) | Call::V2(Kind::FileUnlink) => self.file_unlink(request),
            Call::V2(Kind::Getdents) => self.getdents(request),
            Call::V2(Kind::FileStat) => self.file_stat(request),
            Call::V2(Kind::FileFstat) => self.file_fstat(request),
            Call::V2(Kind::Mkdir) => self.mkdir(request),
            call => {
                self.warn(call, &"not supported, ignored");
                Ok(())
            }
        }
    }

    fn exit(&self, address: u64) -> Outcome {
        match block!(&self.memory, address, v1::parameters::ExitParams) {
            Ok(block) => Outcome::Exit(field!(block, v1::parameters::ExitParams, arg as i32)),
            Err(fault) => Outcome::Crash(format!("Exit with a bad pointer to its code: {fault}")),
        }
    }
}

#[cfg(test)]
mod tests;
