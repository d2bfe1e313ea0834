//! The flags that only the system may change, or not at every privilege level: IF, IOPL, AC.

use iced_x86::Mnemonic;

use super::super::exception::RFLAGS_NT;
use super::super::flags::{ARITHMETIC, DF, flag, mask};
use super::super::operand::Step;
use super::{GENERAL_PROTECTION, System, UNDEFINED};
use crate::registers::{RFLAGS_IF, RFLAGS_RF, RFLAGS_TF};

/// I/O privilege level.
const RFLAGS_IOPL: u64 = 3 << 12;
/// Alignment check, or access to user pages under SMAP.
const RFLAGS_AC: u64 = 1 << 18;
const RFLAGS_ID: u64 = 1 << 21;
/// What POPF and IRET may change at ring 0.
pub(super) const POPPABLE: u64 =
    ARITHMETIC | DF | RFLAGS_TF | RFLAGS_IF | RFLAGS_IOPL | RFLAGS_NT | RFLAGS_AC | RFLAGS_ID;
/// Bit 1, which is always set.
pub(super) const RFLAGS_FIXED: u64 = 2;

impl System<'_> {
    /// The I/O privilege level.
    pub fn io_level(&mut self) -> u8 {
        let [_, high, ..] = (*self.flags() & RFLAGS_IOPL).to_le_bytes();
        high >> 4
    }

    pub(super) fn set_interrupts(&mut self, enable: bool) -> Step {
        if self.core.privilege() > self.io_level() {
            return Err(GENERAL_PROTECTION);
        }
        let was = *self.flags() & RFLAGS_IF != 0;
        *self.flags() = *self.flags() & !RFLAGS_IF | flag(enable, RFLAGS_IF);
        self.core.state.interrupt_shadow = enable && !was;
        Ok(())
    }

    /// RFLAGS after POPF or IRET of `size` bytes.
    pub(super) fn popped_flags(&mut self, new: u64, size: usize, level: u8) -> u64 {
        let mut which = POPPABLE & mask(size);
        if level != 0 {
            which &= !RFLAGS_IOPL;
        }
        if level > self.io_level() {
            which &= !RFLAGS_IF;
        }
        *self.flags() & !which | new & which | RFLAGS_FIXED
    }

    pub(super) fn pop_flags(&mut self, size: usize) -> Step {
        let new = self.machine(|m| m.pop(size))?;
        let level = self.core.privilege();
        let flags = self.popped_flags(new, size, level) & !RFLAGS_RF;
        *self.flags() = flags;
        Ok(())
    }

    pub(super) fn set_access(&mut self) -> Step {
        if self.core.privilege() != 0 {
            return Err(UNDEFINED);
        }
        let allowed = self.instruction.mnemonic() == Mnemonic::Stac;
        *self.flags() = *self.flags() & !RFLAGS_AC | flag(allowed, RFLAGS_AC);
        Ok(())
    }
}
