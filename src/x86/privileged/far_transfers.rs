//! Transfers to another code segment: far JMP, CALL and RET, and IRET.

use iced_x86::{Code, Mnemonic};

use super::super::exception::{RFLAGS_NT, RFLAGS_VM};
use super::super::flags::mask;
use super::super::operand::Step;
use super::{GENERAL_PROTECTION, System, selector};
use crate::registers::{RFLAGS_RF, RSP, Segment};

impl System<'_> {
    pub(super) fn iret(&mut self, size: usize) -> Step {
        if *self.flags() & RFLAGS_NT != 0 {
            return Err(GENERAL_PROTECTION);
        }
        let mut words = [0; 5];
        self.machine(|m| {
            for word in &mut words {
                *word = m.pop(size)?;
            }
            Ok(())
        })?;
        let [rip, code, flags, rsp, stack] = words;
        let level = self.core.privilege();
        let (code, stack) = self.core.return_target(selector(code), Some(selector(stack)))?;
        if !self.core.mmu.is_canonical(rip) {
            return Err(GENERAL_PROTECTION);
        }
        let keeps = *self.flags() & !mask(size);
        let new = self.popped_flags(flags, size, level) | keeps;
        *self.flags() = new & !(RFLAGS_VM | RFLAGS_RF) | flags & RFLAGS_RF & mask(size);
        self.go_out(rip, rsp, code, stack, level);
        Ok(())
    }

    /// The end of a far return.
    fn go_out(&mut self, rip: u64, rsp: u64, code: Segment, stack: Option<Segment>, from: u8) {
        let state = &mut self.core.state.core;
        state.registers.rip = rip;
        state.registers.general[RSP] = rsp;
        state.system.cs = code;
        if let Some(stack) = stack {
            state.system.ss = stack;
        }
        if self.core.privilege() > from {
            self.core.hide_inner_segments();
        }
    }

    /// JMP and CALL with a far pointer in memory; near ones belong elsewhere.
    pub(super) fn far_transfer(&mut self) -> Step<bool> {
        let size = match self.instruction.code() {
            Code::Jmp_m1616 | Code::Call_m1616 => 2,
            Code::Jmp_m1632 | Code::Call_m1632 => 4,
            Code::Jmp_m1664 | Code::Call_m1664 => 8,
            _ => return Ok(false),
        };
        let (offset, new) = self.far_pointer()?;
        let segment = self.core.far_target(new)?;
        if !self.core.mmu.is_canonical(offset) {
            return Err(GENERAL_PROTECTION);
        }
        if self.instruction.mnemonic() == Mnemonic::Call {
            let (code, back) = (self.core.state.core.system.cs.selector, self.core.state.core.registers.rip);
            let rsp = self.general()[RSP];
            self.machine(|m| {
                m.push(size, code.into())?;
                m.push(size, back).inspect_err(|_| m.cpu.registers.general[RSP] = rsp)
            })?;
        }
        let state = &mut self.core.state.core;
        state.system.cs = segment;
        state.registers.rip = offset;
        Ok(true)
    }

    pub(super) fn far_return(&mut self) -> Step {
        let size = match self.instruction.code() {
            Code::Retfw | Code::Retfw_imm16 => 2,
            Code::Retfd | Code::Retfd_imm16 => 4,
            _ => 8,
        };
        let released = if self.instruction.op_count() == 1 { u64::from(self.instruction.immediate16()) } else { 0 };
        let (rip, code) = self.machine(|m| Ok((m.pop(size)?, m.pop(size)?)))?;
        let level = self.core.privilege();
        let outer = selector(code) & 3 > level.into();
        let rsp = &mut self.general()[RSP];
        *rsp = rsp.wrapping_add(released);
        let frame = if outer { Some(self.machine(|m| Ok((m.pop(size)?, m.pop(size)?)))?) } else { None };
        let (segment, stack) = self.core.return_target(selector(code), frame.map(|(_, stack)| selector(stack)))?;
        if !self.core.mmu.is_canonical(rip) {
            return Err(GENERAL_PROTECTION);
        }
        let rsp = frame.map_or(self.general()[RSP], |(rsp, _)| rsp.wrapping_add(released));
        self.go_out(rip, rsp, segment, stack, level);
        Ok(())
    }
}
