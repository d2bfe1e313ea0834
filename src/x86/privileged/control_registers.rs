//! Control and debug registers, XCR0, and the machine status word, which is the low part of CR0. What a CPU refuses is
//! refused by the rules of its manual, so that a guest never reaches a mode that is not here.

use iced_x86::{OpKind, Register};

use super::super::Outcome;
use super::super::mmu::PHYSICAL_BITS;
use super::super::operand::Step;
use super::segment_loads::data_segment;
use super::{GENERAL_PROTECTION, System, UNDEFINED, selector};
use crate::registers::{CR0_PE, CR0_PG, CR0_TS, CR0_WP, CR4_LA57, CR4_OSFXSR, CR4_OSXSAVE, CR4_PAE, RCX};

const CR0_MP: u64 = 1 << 1;
const CR0_EM: u64 = 1 << 2;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_AM: u64 = 1 << 18;
const CR0_NW: u64 = 1 << 29;
const CR0_CD: u64 = 1 << 30;
const CR0_KNOWN: u64 = CR0_PE | CR0_MP | CR0_EM | CR0_TS | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_NW | CR0_CD | CR0_PG;
/// CR4: VME to PGE and PCE (bits 0 to 8), SSE, UMIP, FSGSBASE, XSAVE, SMEP, SMAP. PCIDs, VMX, LA57 are not offered.
const CR4_KNOWN: u64 = 0x1ff | CR4_OSFXSR | 1 << 10 | super::CR4_UMIP | 1 << 16 | CR4_OSXSAVE | 1 << 20 | 1 << 21;
const CR4_DE: u64 = 1 << 3;

impl System<'_> {
    pub(super) fn mov(&mut self) -> Step<bool> {
        let (to, from) = (self.instruction.op_register(0), self.instruction.op_register(1));
        let is_register = |operand| self.instruction.op_kind(operand) == OpKind::Register;
        if is_register(1) && (from.is_cr() || from.is_dr()) {
            self.require_ring0()?;
            let value = if from.is_cr() { self.control(from)? } else { self.debug_register(from)? };
            self.machine(|m| m.write(0, 8, value))?;
        } else if is_register(0) && (to.is_cr() || to.is_dr()) {
            self.require_ring0()?;
            let value = self.machine(|m| m.read(1, 8))?;
            if to.is_cr() { self.set_control(to, value)? } else { self.set_debug_register(to, value)? }
        } else if is_register(0) && to.is_segment_register() {
            let which = data_segment(to).ok_or(UNDEFINED)?;
            let value = self.machine(|m| m.read(1, 2))?;
            self.load_segment(which, selector(value))?;
        } else {
            return Ok(false);
        }
        Ok(true)
    }

    fn control(&mut self, register: Register) -> Step<u64> {
        let system = &self.core.state.core.system;
        Ok(match register {
            Register::CR0 => system.cr0,
            Register::CR2 => system.cr2,
            Register::CR3 => system.cr3,
            Register::CR4 => system.cr4,
            Register::CR8 => self.platform.task_priority().into(),
            _ => return Err(UNDEFINED),
        })
    }

    fn set_control(&mut self, register: Register, value: u64) -> Step {
        let system = &mut self.core.state.core.system;
        match register {
            Register::CR0 => {
                let is_bad = value >> 32 != 0
                    || value & (CR0_PE | CR0_PG) != CR0_PE | CR0_PG
                    || value & (CR0_NW | CR0_CD) == CR0_NW;
                if is_bad {
                    return Err(GENERAL_PROTECTION);
                }
                system.cr0 = value & CR0_KNOWN | CR0_ET;
            }
            Register::CR2 => system.cr2 = value,
            Register::CR3 => {
                if value >> PHYSICAL_BITS != 0 {
                    return Err(GENERAL_PROTECTION);
                }
                system.cr3 = value;
                self.core.mmu.flush();
            }
            Register::CR4 => {
                let known = CR4_KNOWN | system.cr4 & CR4_LA57;
                if value & !known != 0 || value & CR4_PAE == 0 || (value ^ system.cr4) & CR4_LA57 != 0 {
                    return Err(GENERAL_PROTECTION);
                }
                system.cr4 = value;
                self.core.mmu.flush();
            }
            Register::CR8 => {
                let priority = u8::try_from(value).ok().filter(|priority| *priority < 16).ok_or(GENERAL_PROTECTION)?;
                self.platform.set_task_priority(priority, self.core.state.instructions);
            }
            _ => return Err(UNDEFINED),
        }
        Ok(())
    }

    /// Where a debug register lies: 4 and 5 are 6 and 7 unless CR4.DE makes them undefined.
    fn debug_index(&self, register: Register) -> Step<usize> {
        let number = register as usize - Register::DR0 as usize;
        match number {
            4 | 5 if self.core.state.core.system.cr4 & CR4_DE != 0 => Err(UNDEFINED),
            4 | 5 => Ok(number + 2),
            0..=7 => Ok(number),
            _ => Err(UNDEFINED),
        }
    }

    fn check_general_detect(&mut self) -> Step {
        const DR7_GD: u64 = 1 << 13;
        const DR6_BD: u64 = 1 << 13;
        if self.core.state.debug[7] & DR7_GD == 0 {
            return Ok(());
        }
        Err(Outcome::Fault { vector: 1, error_code: None, address: Some(DR6_BD) })
    }

    fn debug_register(&mut self, register: Register) -> Step<u64> {
        let index = self.debug_index(register)?;
        self.check_general_detect()?;
        Ok(self.core.state.debug[index])
    }

    fn set_debug_register(&mut self, register: Register, value: u64) -> Step {
        let index = self.debug_index(register)?;
        self.check_general_detect()?;
        if index >= 6 && value >> 32 != 0 {
            return Err(GENERAL_PROTECTION);
        }
        self.core.state.debug[index] = match index {
            6 => value & 0xe00f | 0xffff_0ff0,
            7 => value & 0xffff_23ff | 0x400,
            _ => value,
        };
        Ok(())
    }

    pub(super) fn xsetbv(&mut self) -> Step {
        if self.core.state.core.system.cr4 & CR4_OSXSAVE == 0 {
            return Err(UNDEFINED);
        }
        self.require_ring0()?;
        let value = self.pair();
        let is_valid = super::super::cpuid::is_valid_xcr0(value);
        if self.low(RCX) != 0 || !is_valid {
            return Err(GENERAL_PROTECTION);
        }
        self.core.state.core.xcr0 = value;
        Ok(())
    }

    pub(super) fn store_status(&mut self) -> Step {
        self.require_no_umip()?;
        self.store_word(self.core.state.core.system.cr0)
    }

    pub(super) fn load_status(&mut self) -> Step {
        self.require_ring0()?;
        let new = self.machine(|m| m.read(0, 2))?;
        // PE can be set, not cleared.
        let cr0 = &mut self.core.state.core.system.cr0;
        *cr0 = *cr0 & !0xe | new & 0xf;
        Ok(())
    }
}
