//! gdbstub's state machine behind a handle that survives its errors. An error of gdbstub consumes the machine and its
//! connection; a fresh one is then brought to where the old one was, and the session goes on.

use std::cell::RefCell;
use std::convert::Infallible;
use std::rc::Rc;

use gdbstub::conn::Connection;
use gdbstub::stub::state_machine::GdbStubStateMachine;
use gdbstub::stub::{DisconnectReason, GdbStub};

use super::registers::{EXPEDITED, Number};
use super::target::GdbTarget;
use super::target::Reason;

/// The longest packet, in bytes: what a client reads or writes at once.
pub const PACKET_SIZE: usize = 0x1_0000;

/// What gdbstub writes, shared with the session.
#[derive(Clone, Default)]
struct Output(Rc<RefCell<Vec<u8>>>);

impl Connection for Output {
    type Error = Infallible;

    fn write(&mut self, byte: u8) -> Result<(), Infallible> {
        self.0.borrow_mut().push(byte);
        Ok(())
    }

    fn write_all(&mut self, bytes: &[u8]) -> Result<(), Infallible> {
        self.0.borrow_mut().extend_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Infallible> {
        Ok(())
    }
}

type Machine = GdbStubStateMachine<'static, GdbTarget, Output>;

/// What a packet came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fed {
    /// It was answered, or nothing is to be said.
    Answered,
    /// gdbstub failed at it; the filter answers and primes a new stub.
    Failed,
    /// The client detaches.
    Detached,
    /// The client kills the VM.
    Killed,
}

/// The protocol half of a session.
pub struct Stub {
    machine: Option<Machine>,
    output: Output,
}

impl Stub {
    /// A stub that waits for its client's first packet.
    pub fn new(target: &mut GdbTarget) -> Self {
        let output = Output::default();
        let machine = Self::fresh(&output, target);
        Self { machine, output }
    }

    fn fresh(output: &Output, target: &mut GdbTarget) -> Option<Machine> {
        let stub = GdbStub::builder(output.clone()).packet_buffer_size(PACKET_SIZE).build().ok()?;
        stub.run_state_machine(target).ok()
    }

    /// What is to be sent, once.
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output.0.borrow_mut())
    }

    /// Gives gdbstub a whole packet.
    pub fn feed(&mut self, target: &mut GdbTarget, packet: &[u8]) -> Fed {
        let mut fed = Fed::Answered;
        for byte in packet {
            let Some(machine) = self.machine.take() else { return Fed::Failed };
            let next = match machine {
                Machine::Idle(idle) => idle.incoming_data(target, *byte),
                Machine::Running(running) => running.incoming_data(target, *byte),
                Machine::CtrlCInterrupt(interrupt) => interrupt.interrupt_handled(target, None::<Reason>),
                Machine::Disconnected(over) => Ok(over.return_to_idle()),
            };
            match next {
                Ok(Machine::Disconnected(over)) => {
                    match over.get_reason() {
                        DisconnectReason::Disconnect => fed = Fed::Detached,
                        DisconnectReason::Kill => fed = Fed::Killed,
                        _ => {}
                    }
                    self.machine = Some(over.return_to_idle());
                }
                Ok(machine) => self.machine = Some(machine),
                Err(error) => {
                    log::warn!("gdb: gdbstub gave up on a packet and is started anew: {error}");
                    self.machine = Self::fresh(&self.output, target);
                    return Fed::Failed;
                }
            }
        }
        fed
    }

    /// Brings a fresh stub to where the old one was; its answers are thrown away.
    pub fn prime(&mut self, target: &mut GdbTarget, packets: &[Vec<u8>]) {
        self.take_output();
        for packet in packets {
            self.feed(target, packet);
        }
        self.take_output();
    }

    /// Tells the client that waits for a stop of this one, with the registers that it asks for first.
    pub fn report(&mut self, target: &mut GdbTarget, reason: Reason) {
        let Some(Machine::Running(running)) = self.machine.take_if(|m| matches!(m, Machine::Running(_))) else {
            return;
        };
        let tid = match reason {
            Reason::SignalWithThread { tid, .. } | Reason::SwBreak(tid) | Reason::HwBreak(tid) => Some(tid),
            Reason::Watch { tid, .. } => Some(tid),
            Reason::CatchSyscall { tid, .. } => tid,
            _ => None,
        };
        let state = tid.and_then(|tid| target.state(tid).ok());
        let registers: Vec<(Number, Vec<u8>)> =
            state.map(|s| (0..EXPEDITED).map(|n| (Number(n), s.get(n))).collect()).unwrap_or_default();
        let mut expedited = registers.iter().map(|(number, bytes)| (*number, bytes.as_slice()));
        match running.report_stop_with_regs(target, reason, &mut expedited) {
            Ok(Machine::Disconnected(over)) => self.machine = Some(over.return_to_idle()),
            Ok(machine) => self.machine = Some(machine),
            Err(error) => {
                log::warn!("gdb: gdbstub could not report a stop and is started anew: {error}");
                self.machine = Self::fresh(&self.output, target);
            }
        }
    }
}
