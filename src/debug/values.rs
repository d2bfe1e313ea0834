//! What a compiled condition may ask about the vCPU at its breakpoint.

use super::breakpoints::Breakpoint;
use super::condition::{Context, EvaluateError};
use super::view::View;
use crate::backend::Vcpu;
use crate::error::{GuestFault, Result};
use crate::paging::PagingMode;
use crate::registers::{RegisterId, SystemRegisters};

/// A stopped vCPU's values for a condition.
pub(super) struct Values<'a> {
    cpu: &'a mut dyn Vcpu,
    view: View<'a>,
    system: Option<SystemRegisters>,
    number: u32,
    breakpoint: &'a Breakpoint,
}

impl<'a> Values<'a> {
    /// The values of vCPU `number` for a condition of `breakpoint`.
    pub fn new(cpu: &'a mut dyn Vcpu, view: View<'a>, number: u32, breakpoint: &'a Breakpoint) -> Self {
        Self { cpu, view, system: None, number, breakpoint }
    }

    fn system(&mut self) -> Result<SystemRegisters> {
        if self.system.is_none() {
            self.system = Some(self.cpu.system_registers()?);
        }
        Ok(self.system.expect("just set"))
    }
}

impl Context for Values<'_> {
    fn register(&mut self, id: RegisterId) -> Result<u64, EvaluateError> {
        let value = if id.is_general() {
            self.cpu.registers().map(|r| r.get(id).expect("a general register"))
        } else {
            self.system().map(|s| s.get(id).expect("a system register"))
        };
        value.map_err(|e| EvaluateError::Register(Box::new(e)))
    }

    fn read(&mut self, address: u64, buffer: &mut [u8]) -> Result<(), GuestFault> {
        let fault = GuestFault { address, length: buffer.len() as u64, is_virtual: true };
        let mode = PagingMode::from(&self.system().map_err(|_| fault)?);
        self.view.read(&mode, address, buffer)
    }

    fn vcpu(&self) -> u32 {
        self.number
    }

    fn hits(&self) -> u64 {
        self.breakpoint.hits()
    }

    fn reached(&self) -> u64 {
        self.breakpoint.reached()
    }
}
