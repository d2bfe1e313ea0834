//! A vCPU of KVM whose state a software CPU goes on from for a while: what it needs, when it may, and the way back.

use kvm_bindings::KVM_VCPUEVENT_VALID_SHADOW;

use super::failed;
use super::vcpu::KvmVcpu;
use crate::backend::Vcpu as _;
use crate::error::Result;
use crate::registers::{
    CR0_PE, CR0_PG, CR0_TS, CR4_OSFXSR, CR4_OSXSAVE, CR4_PAE, EFER_LMA, RFLAGS_TF, SystemRegisters, segment_attributes,
};
use crate::x86::{CpuState, State};

/// CR4 bits that the software CPU knows: VME to PCE, SSE, UMIP, FSGSBASE, PCIDE, XSAVE, SMEP, SMAP.
const CR4_KNOWN: u64 = 0x1ff | CR4_OSFXSR | 1 << 10 | 1 << 11 | 1 << 16 | 1 << 17 | CR4_OSXSAVE | 1 << 20 | 1 << 21;
/// `KVM_X86_SHADOW_INT_STI`.
const SHADOW_STI: u8 = 2;
/// x87, SSE and AVX: with more, an instruction may change registers that are not lent.
const XCR0_KNOWN: u64 = 7;
const XCR0_AVX: u64 = 4;

/// Whether a software CPU has this mode.
fn is_known(system: &SystemRegisters) -> bool {
    const CR0: u64 = CR0_PE | CR0_PG;
    let is_long = system.efer & EFER_LMA != 0 && system.cs.attributes & segment_attributes::L != 0;
    is_long && system.cr0 & CR0 == CR0 && system.cr4 & CR4_PAE != 0 && system.cr4 & !CR4_KNOWN == 0
}

impl KvmVcpu {
    pub(super) fn lend_state(&mut self, vectors: bool) -> Result<Option<Box<State>>> {
        let system = self.system_registers()?;
        let registers = self.registers()?;
        if !is_known(&system) || registers.rflags & RFLAGS_TF != 0 || self.has_injected() {
            return Ok(None);
        }
        let events = self.fd().get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?;
        // KVM tells nothing of a #BP or #OF that was injected, which has_injected does.
        let (exception, interrupt, nmi, smi) = (events.exception, events.interrupt, events.nmi, events.smi);
        let waits = [exception.injected, exception.pending, interrupt.injected, nmi.injected, nmi.pending, smi.pending];
        let debug = self.fd().get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?;
        if waits != [0; 6] || smi.smm != 0 || debug.dr7 & 0xff != 0 {
            return Ok(None);
        }
        let core = CpuState { registers, system, ..CpuState::default() };
        let mut state = Box::new(State { core, interrupt_shadow: interrupt.shadow != 0, ..State::default() });
        if !vectors {
            state.core.system.cr0 |= CR0_TS;
        } else if !self.lend_vectors(&mut state.core)? {
            return Ok(None);
        }
        Ok(Some(state))
    }

    /// False if the guest has enabled registers that the software CPU has not.
    fn lend_vectors(&mut self, core: &mut CpuState) -> Result<bool> {
        core.xcr0 = self.xcr0()?;
        if core.xcr0 & !XCR0_KNOWN != 0 {
            return Ok(false);
        }
        core.fpu = self.fpu()?;
        if core.xcr0 & XCR0_AVX != 0 {
            core.ymm_high = self.ymm_high()?;
        }
        Ok(true)
    }

    pub(super) fn take_state_back(&mut self, lent: &State, state: &State) -> Result<()> {
        let (before, after) = (&lent.core, &state.core);
        if after.fpu != before.fpu {
            self.set_fpu(&after.fpu)?;
        }
        if after.ymm_high != before.ymm_high {
            self.set_ymm_high(&after.ymm_high)?;
        }
        if state.interrupt_shadow != lent.interrupt_shadow {
            let mut events = self.fd().get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?;
            events.interrupt.shadow = if state.interrupt_shadow { SHADOW_STI } else { 0 };
            events.flags |= KVM_VCPUEVENT_VALID_SHADOW;
            self.fd().set_vcpu_events(&events).map_err(failed("KVM_SET_VCPU_EVENTS"))?;
        }
        if after.registers != before.registers {
            self.set_registers(&after.registers)?;
        }
        Ok(())
    }
}
