//! ENTER, and LEAVE of 16 bits: frames of the stack that are more than one push or pop.

use iced_x86::Code;

use super::super::operand::{Address, Step};
use super::System;
use crate::registers::{RBP, RSP};

impl System<'_> {
    /// ENTER: a frame of `immediate16` bytes, with copies of outer frames' pointers.
    pub(super) fn enter(&mut self) -> Step {
        let size = if self.instruction.code() == Code::Enterw_imm16_imm8 { 2 } else { 8 };
        let bytes = u64::from(self.instruction.immediate16());
        let depth = self.instruction.immediate8_2nd() % 32;
        self.machine(|m| {
            m.push(size, m.cpu.registers.general[RBP])?;
            let frame = m.cpu.registers.general[RSP];
            let mut outer = m.cpu.registers.general[RBP];
            for _ in 1..depth {
                outer = outer.wrapping_sub(size as u64);
                let address = Address { linear: outer, is_stack: true };
                let value = m.load(address, size)?;
                m.push(size, value)?;
            }
            if depth > 0 {
                m.push(size, frame)?;
            }
            let top = m.cpu.registers.general[RSP].wrapping_sub(bytes);
            // The new top has to be writable.
            let address = Address { linear: top, is_stack: true };
            let value = m.load(address, size)?;
            m.store(address, size, value)?;
            m.set_general(RBP, size, frame);
            m.cpu.registers.general[RSP] = top;
            Ok(())
        })
    }

    pub(super) fn leave_word(&mut self) -> Step {
        self.machine(|m| {
            m.cpu.registers.general[RSP] = m.cpu.registers.general[RBP];
            let value = m.pop(2)?;
            m.set_general(RBP, 2, value);
            Ok(())
        })
    }
}
