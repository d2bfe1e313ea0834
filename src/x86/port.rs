//! Ports: IN, OUT and their string forms, with the checks of IOPL and the task's permission bitmap.

use iced_x86::{Mnemonic, OpKind};

use super::Outcome;
use super::cpu::CpuExit;
use super::flags::{DF, mask};
use super::operand::{Address, Step};
use super::privileged::{GENERAL_PROTECTION, System};
use super::state::DeviceAccess;
use crate::registers::{RAX, RCX, RDI, RDX, RSI};

impl System<'_> {
    /// IN and OUT.
    pub fn port(&mut self) -> Step {
        let is_in = self.instruction.mnemonic() == Mnemonic::In;
        let (port_operand, data_operand) = if is_in { (1, 0) } else { (0, 1) };
        let size = self.machine(|m| match m.instruction.op_kind(data_operand) {
            OpKind::Register => m.size(data_operand),
            _ => Err(Outcome::Unsupported),
        })?;
        let port = match self.instruction.op_kind(port_operand) {
            OpKind::Register => self.general()[RDX] & 0xffff,
            _ => self.instruction.immediate8().into(),
        };
        self.check_port(port, size)?;
        if self.core.is_lent && !u16::try_from(port).is_ok_and(|port| self.platform.owns_port(port, size, is_in)) {
            self.core.exit = Some(CpuExit::Foreign(None));
            return Err(Outcome::Unsupported);
        }
        if is_in {
            let value = self.read_port(port, size)?;
            return self.machine(|m| m.write(0, size, value));
        }
        let value = self.general()[RAX] & mask(size);
        self.write_port(port, size, value)
    }

    /// Reads a port, from the answer that the VMM has given or from the platform.
    fn read_port(&mut self, port: u64, size: usize) -> Step<u64> {
        let mut data = [0; 8];
        let bytes = data.get_mut(..size).ok_or(Outcome::Unsupported)?;
        let (_, mut bus) = self.core.bus(Some(self.platform));
        let outside = bus.outside.as_mut().expect("a platform was passed");
        outside.read(port, true, bytes)?;
        Ok(u64::from_le_bytes(data))
    }

    fn write_port(&mut self, port: u64, size: usize, value: u64) -> Step {
        let access = DeviceAccess::new(port, true, &value.to_le_bytes()[..size]);
        if self.core.devices.writes.push(access) { Ok(()) } else { Err(Outcome::Unsupported) }
    }

    /// #GP unless the level or the task's bitmap allows the ports.
    fn check_port(&mut self, port: u64, size: usize) -> Step {
        if self.core.privilege() <= self.io_level() {
            return Ok(());
        }
        let task = self.core.state.core.system.tr;
        let limit = u64::from(task.limit);
        if limit < 0x67 {
            return Err(GENERAL_PROTECTION);
        }
        let mut bytes = [0; 2];
        self.core.read_as(task.base.wrapping_add(0x66), &mut bytes, false, 0)?;
        let at = u64::from(u16::from_le_bytes(bytes)) + port / 8;
        if at + 1 > limit {
            return Err(GENERAL_PROTECTION);
        }
        self.core.read_as(task.base.wrapping_add(at), &mut bytes, false, 0)?;
        let wanted = ((1u16 << size) - 1) << (port % 8);
        if u16::from_le_bytes(bytes) & wanted == 0 { Ok(()) } else { Err(GENERAL_PROTECTION) }
    }

    /// INS and OUTS, one element at a time; with REP, the instruction is executed again for the next.
    pub fn port_string(&mut self) -> Step {
        use Mnemonic as M;
        let (size, is_in) = match self.instruction.mnemonic() {
            M::Insb => (1, true),
            M::Insw => (2, true),
            M::Insd => (4, true),
            M::Outsb => (1, false),
            M::Outsw => (2, false),
            _ => (4, false),
        };
        let port = self.general()[RDX] & 0xffff;
        self.check_port(port, size)?;
        let is_short = (0..self.instruction.op_count())
            .any(|n| matches!(self.instruction.op_kind(n), OpKind::MemorySegESI | OpKind::MemoryESEDI));
        let width = if is_short { 4 } else { 8 };
        let is_repeated = self.instruction.has_rep_prefix() || self.instruction.has_repne_prefix();
        let left = self.general()[RCX] & mask(width);
        if is_repeated && left == 0 {
            return Ok(());
        }
        if is_in {
            self.in_element(port, size, width)?
        } else {
            self.out_element(port, size, width)?
        }
        let pointer = if is_in { RDI } else { RSI };
        let back = *self.flags() & DF != 0;
        self.machine(|m| {
            let delta = if back { (size as u64).wrapping_neg() } else { size as u64 };
            m.set_general(pointer, width, m.general(pointer, width).wrapping_add(delta));
            if is_repeated {
                m.set_general(RCX, width, left - 1);
            }
            Ok(())
        })?;
        if is_repeated && left > 1 {
            self.core.state.core.registers.rip = self.instruction.ip();
            return Err(Outcome::Repeat);
        }
        Ok(())
    }

    fn in_element(&mut self, port: u64, size: usize, width: usize) -> Step {
        let to = Address { linear: self.general()[RDI] & mask(width), is_stack: false };
        // A fault comes before the port is read: the destination's own bytes are written back first.
        self.machine(|m| {
            let old = m.load(to, size)?;
            m.store(to, size, old)
        })?;
        let value = self.read_port(port, size)?;
        self.machine(|m| m.store(to, size, value))
    }

    fn out_element(&mut self, port: u64, size: usize, width: usize) -> Step {
        let value = self.machine(|m| {
            let linear = m.general(RSI, width).wrapping_add(m.segment_base());
            m.load(Address { linear, is_stack: false }, size)
        })?;
        self.write_port(port, size, value)
    }
}
