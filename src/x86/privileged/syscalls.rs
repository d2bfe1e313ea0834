//! System calls, by SYSCALL and by software interrupts, and SWAPGS, which their handlers begin with.

use iced_x86::Mnemonic;

use super::super::Outcome;
use super::super::cpu::{CpuExit, Missing};
use super::super::exception::Cause;
use super::super::operand::Step;
use super::system_flags::{POPPABLE, RFLAGS_FIXED};
use super::{EFER_SCE, GENERAL_PROTECTION, System, UNDEFINED, selector};
use crate::registers::{RCX, RFLAGS_RF, Segment, segment_attributes};

impl System<'_> {
    pub(super) fn syscall(&mut self) -> Step {
        let state = &mut self.core.state;
        if state.core.system.efer & EFER_SCE == 0 {
            return Err(UNDEFINED);
        }
        let registers = &mut state.core.registers;
        registers.general[RCX] = registers.rip;
        registers.general[11] = registers.rflags & !RFLAGS_RF;
        registers.rip = state.msrs.lstar;
        registers.rflags = registers.rflags & !(state.msrs.sfmask | RFLAGS_RF) | RFLAGS_FIXED;
        let base = selector(state.msrs.star >> 32) & !3;
        state.core.system.cs = flat_code(base, 0);
        state.core.system.ss = flat_data(base.wrapping_add(8), 0);
        Ok(())
    }

    pub(super) fn sysret(&mut self) -> Step {
        if self.core.state.core.system.efer & EFER_SCE == 0 {
            return Err(UNDEFINED);
        }
        self.require_ring0()?;
        if self.instruction.mnemonic() == Mnemonic::Sysret {
            return Err(self.core.lack(Missing::LegacyMode));
        }
        let target = self.general()[RCX];
        if !self.core.mmu.is_canonical(target) {
            return Err(GENERAL_PROTECTION);
        }
        let state = &mut self.core.state;
        let registers = &mut state.core.registers;
        registers.rip = target;
        registers.rflags = registers.general[11] & POPPABLE | RFLAGS_FIXED;
        let base = selector(state.msrs.star >> 48);
        state.core.system.cs = flat_code(base.wrapping_add(16) | 3, 3);
        state.core.system.ss = flat_data(base.wrapping_add(8) | 3, 3);
        Ok(())
    }

    pub(super) fn swapgs(&mut self) -> Step {
        self.require_ring0()?;
        let state = &mut self.core.state;
        std::mem::swap(&mut state.core.system.gs.base, &mut state.msrs.kernel_gs_base);
        Ok(())
    }

    pub(super) fn software_interrupt(&mut self, vector: u8) -> Step {
        self.deliver(vector, Cause::Software)
    }

    pub(super) fn breakpoint(&mut self) -> Step {
        if self.core.stop_at_int3 {
            self.core.exit = Some(CpuExit::Int3);
            return Err(Outcome::Unsupported);
        }
        self.software_interrupt(3)
    }
}

/// CS as SYSCALL and SYSRET set it.
fn flat_code(selector: u16, level: u16) -> Segment {
    use segment_attributes as a;
    let attributes = a::P | a::S | 0xb | level << a::DPL_SHIFT | a::L | a::G;
    Segment { selector, base: 0, limit: u32::MAX, attributes }
}

/// SS as SYSCALL and SYSRET set it.
fn flat_data(selector: u16, level: u16) -> Segment {
    use segment_attributes as a;
    let attributes = a::P | a::S | 3 | level << a::DPL_SHIFT | a::DB | a::G;
    Segment { selector, base: 0, limit: u32::MAX, attributes }
}
