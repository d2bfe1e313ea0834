//! Instructions that neither the back end executes nor the emulator of single ones knows: for one of them, the whole
//! software CPU takes the vCPU's state, delivers what it raises, and gives the state back.

use crate::error::Result;
use crate::vcpu::Seat;
use crate::x86::{self, Cpu, CpuExit, DebugOptions, Nothing};

/// IA32_STAR, IA32_LSTAR, IA32_FMASK and IA32_KERNEL_GS_BASE: what such instructions read and change of MSRs.
const MSRS: [u32; 4] = [0xc000_0081, 0xc000_0082, 0xc000_0084, 0xc000_0102];

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Whole {
    /// The instruction was executed, or what it raised was delivered: the program counter is in its handler.
    Done,
    /// A triple fault.
    Shutdown,
    /// It is not for this CPU, or not now: it asks for a device, or something waits to be delivered.
    Foreign,
}

impl Seat<'_> {
    /// Executes the instruction `code` at the program counter, where no byte is planted.
    pub(super) fn execute_whole(&mut self, code: &[u8]) -> Result<Whole> {
        if !x86::is_self_contained(code) {
            return Ok(Whole::Foreign);
        }
        let memory = &self.machine.memory;
        let vcpu = self.context().cpu.as_mut();
        let Some(lent) = vcpu.lend(true)? else { return Ok(Whole::Foreign) };
        let mut cpu = Cpu::new(memory);
        cpu.restore(&lent);
        let mut before = [0; MSRS.len()];
        for (index, value) in MSRS.into_iter().zip(&mut before) {
            *value = vcpu.msr(index)?;
            cpu.set_msr(index, *value);
        }
        cpu.set_debug(DebugOptions { single_step: true, ..DebugOptions::default() });
        match cpu.run(&mut Nothing, 1) {
            CpuExit::SingleStep | CpuExit::Budget => {}
            CpuExit::Shutdown => return Ok(Whole::Shutdown),
            _ => return Ok(Whole::Foreign),
        }
        let after = cpu.snapshot();
        vcpu.take_back(&lent, &after)?;
        if after.core.system != lent.core.system {
            vcpu.set_system_registers(&after.core.system)?;
        }
        for (index, value) in MSRS.into_iter().zip(before) {
            if let Some(new) = cpu.msr(index).filter(|new| *new != value) {
                vcpu.set_msr(index, new)?;
            }
        }
        Ok(Whole::Done)
    }
}
