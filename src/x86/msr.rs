//! Model-specific registers: those that the CPU keeps, with the checks of WRMSR, and the way to the platform's.

use super::core::Core;
use super::cpu::CpuExit;
use super::operand::Step;
use super::platform::MsrReply;
use super::privileged::{EFER_SCE, GENERAL_PROTECTION, System};
use crate::registers::{EFER_LMA, EFER_LME, EFER_NXE, RCX};

const IA32_MTRRCAP: u32 = 0xfe;
const IA32_SYSENTER_CS: u32 = 0x174;
const IA32_SYSENTER_EIP: u32 = 0x176;
const IA32_MISC_ENABLE: u32 = 0x1a0;
const IA32_MTRR_PHYSBASE0: u32 = 0x200;
const IA32_MTRR_PHYSMASK7: u32 = 0x20f;
const IA32_MTRR_FIX64K: u32 = 0x250;
const IA32_MTRR_FIX16K: u32 = 0x258;
const IA32_MTRR_FIX16K_SECOND: u32 = 0x259;
const IA32_MTRR_FIX4K: u32 = 0x268;
const IA32_MTRR_FIX4K_LAST: u32 = 0x26f;
const IA32_PAT: u32 = 0x277;
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
const IA32_EFER: u32 = 0xc000_0080;
const IA32_STAR: u32 = 0xc000_0081;
const IA32_LSTAR: u32 = 0xc000_0082;
const IA32_CSTAR: u32 = 0xc000_0083;
const IA32_FMASK: u32 = 0xc000_0084;
const IA32_FS_BASE: u32 = 0xc000_0100;
const IA32_GS_BASE: u32 = 0xc000_0101;
const IA32_KERNEL_GS_BASE: u32 = 0xc000_0102;
const IA32_TSC_AUX: u32 = 0xc000_0103;

/// Eight variable ranges, fixed ranges, write combining.
const MTRRCAP: u64 = 0x508;

/// Position of an MSR in an array.
fn place(index: u32, first: u32) -> usize {
    usize::try_from(index - first).expect("a small number")
}

impl Core {
    /// Where a plain MSR lies.
    fn plain_msr(&mut self, index: u32) -> Option<&mut u64> {
        let (core, msrs) = (&mut self.state.core, &mut self.state.msrs);
        Some(match index {
            IA32_SYSENTER_CS..=IA32_SYSENTER_EIP => &mut msrs.sysenter[place(index, IA32_SYSENTER_CS)],
            IA32_MISC_ENABLE => &mut msrs.misc_enable,
            IA32_MTRR_PHYSBASE0..=IA32_MTRR_PHYSMASK7 => &mut msrs.mtrr_variable[place(index, IA32_MTRR_PHYSBASE0)],
            IA32_MTRR_FIX64K => &mut msrs.mtrr_fixed[0],
            IA32_MTRR_FIX16K => &mut msrs.mtrr_fixed[1],
            IA32_MTRR_FIX16K_SECOND => &mut msrs.mtrr_fixed[2],
            IA32_MTRR_FIX4K..=IA32_MTRR_FIX4K_LAST => &mut msrs.mtrr_fixed[3 + place(index, IA32_MTRR_FIX4K)],
            IA32_PAT => &mut msrs.pat,
            IA32_MTRR_DEF_TYPE => &mut msrs.mtrr_default,
            IA32_EFER => &mut core.system.efer,
            IA32_STAR => &mut msrs.star,
            IA32_LSTAR => &mut msrs.lstar,
            IA32_CSTAR => &mut msrs.cstar,
            IA32_FMASK => &mut msrs.sfmask,
            IA32_FS_BASE => &mut core.system.fs.base,
            IA32_GS_BASE => &mut core.system.gs.base,
            IA32_KERNEL_GS_BASE => &mut msrs.kernel_gs_base,
            IA32_TSC_AUX => &mut core.tsc_aux,
            _ => return None,
        })
    }

    /// An MSR that the CPU keeps.
    pub fn msr(&mut self, index: u32) -> Option<u64> {
        if index == IA32_MTRRCAP {
            return Some(MTRRCAP);
        }
        self.plain_msr(index).map(|value| *value)
    }

    /// Sets one without checks.
    pub fn set_msr(&mut self, index: u32, value: u64) -> bool {
        let Some(place) = self.plain_msr(index) else { return false };
        *place = value;
        self.mode_changed();
        true
    }

    /// Whether WRMSR accepts the value.
    fn accepts(&self, index: u32, value: u64) -> bool {
        match index {
            IA32_EFER => value & !(EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE) == 0 && value & EFER_LME != 0,
            IA32_LSTAR | IA32_CSTAR | IA32_FS_BASE | IA32_GS_BASE | IA32_KERNEL_GS_BASE => self.mmu.is_canonical(value),
            IA32_TSC_AUX | IA32_FMASK => value >> 32 == 0,
            IA32_PAT => value.to_le_bytes().iter().all(|kind| matches!(kind, 0 | 1 | 4..=7)),
            IA32_MTRR_DEF_TYPE => value & !0xcff == 0,
            _ => true,
        }
    }
}

impl System<'_> {
    /// RDMSR.
    pub fn read_msr(&mut self) -> Step {
        self.require_ring0()?;
        let index = u32::try_from(self.low(RCX)).expect("32 bits");
        let value = match self.core.msr(index) {
            Some(value) => value,
            None => match self.platform.read_msr(index, self.core.state.instructions) {
                MsrReply::Done(value) => value,
                MsrReply::Leave | MsrReply::Refused => return Err(GENERAL_PROTECTION),
            },
        };
        self.set_pair(value);
        Ok(())
    }

    /// WRMSR.
    pub fn write_msr(&mut self) -> Step {
        self.require_ring0()?;
        let (index, value) = (u32::try_from(self.low(RCX)).expect("32 bits"), self.pair());
        if self.core.plain_msr(index).is_some() {
            if !self.core.accepts(index, value) {
                return Err(GENERAL_PROTECTION);
            }
            // LMA follows LME and paging; neither changes in 64-bit mode.
            let value = if index == IA32_EFER { value | EFER_LMA } else { value };
            self.core.set_msr(index, value);
            return Ok(());
        }
        match self.platform.write_msr(index, value, self.core.state.instructions) {
            MsrReply::Done(_) => Ok(()),
            MsrReply::Leave => {
                self.core.exit = Some(CpuExit::Platform);
                Ok(())
            }
            MsrReply::Refused => Err(GENERAL_PROTECTION),
        }
    }
}
