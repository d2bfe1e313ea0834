//! A vCPU of the software back end: it waits for its turn, lets its CPU execute a slice, and sees to what came of it.

#[cfg(test)]
mod fuzz;

use std::sync::Arc;

use super::clock::TSC_KHZ;
use super::kick::SoftKick;
use super::machine::{Pause, Shared};
use super::schedule::Halt;
use super::wires::Wires;
use crate::backend::{Access, DebugEvent, Exception, Exit, Failure, GuestDebug, HardwareBreakpoint, Kick, Vcpu};
use crate::error::{Error, Result};
use crate::memory::GuestMemory;
use crate::registers::{
    CR0_PE, CR0_PG, CR4_PAE, EFER_LMA, EFER_LME, Extensions, FpuState, RFLAGS_IF, Registers, SystemRegisters,
    segment_attributes,
};
use crate::x86::{Cpu, CpuExit, DebugOptions, Fault, State, WatchKind, Watchpoint};

/// The vector of non-maskable interrupts.
const NMI: u8 = 2;
/// The bit of [`DebugEvent::hardware`] that stands for all behind it.
const LAST_BIT: usize = 63;

/// A vCPU.
pub struct SoftVcpu {
    cpu: Cpu,
    vcpu: usize,
    number: u32,
    cpus: u32,
    shared: Arc<Shared>,
    kick: Arc<SoftKick>,
    debug: GuestDebug,
    /// The CPU's count of instructions that the clock knows of.
    counted: u64,
    tsc_offset: u64,
    /// The last slice ended with PAUSE.
    pauses: bool,
}

impl SoftVcpu {
    pub(super) fn new(number: u32, cpus: u32, shared: &Arc<Shared>, memory: &GuestMemory, random: u64) -> Self {
        let vcpu = number as usize;
        let mut cpu = Cpu::new(memory);
        let mut state = cpu.snapshot();
        // No two vCPUs draw the same random numbers.
        state.random ^= random ^ u64::from(number) << 32;
        cpu.restore(&state);
        let kick = Arc::new(SoftKick::new(vcpu, cpu.interrupt_flag(), shared.clone()));
        shared.join(vcpu);
        let debug = GuestDebug::default();
        Self { cpu, vcpu, number, cpus, shared: shared.clone(), kick, debug, counted: 0, tsc_offset: 0, pauses: false }
    }

    /// Executes until the next exit, for the VMM or for the machine. `None`: there was a kick instead of a turn.
    fn slice(&mut self) -> Option<(CpuExit, u64)> {
        self.slice_of(u64::MAX)
    }

    /// The same with at most so many instructions.
    fn slice_of(&mut self, most: u64) -> Option<(CpuExit, u64)> {
        let mut inner = self.shared.take_turn(self.vcpu)?;
        let start = self.cpu.instructions();
        // An access that was completed between slices.
        inner.count(start.wrapping_sub(self.counted));
        if inner.board.apic(self.vcpu).has_nmi() && self.cpu.snapshot().injected.is_none() {
            inner.board.take_nmi(self.vcpu);
            self.cpu.set_halted(false);
            self.cpu.inject(Fault::plain(NMI));
        }
        let (budget, clock) = (inner.budget().min(most), inner.clock);
        drop(inner);
        let mut wires = Wires {
            shared: &self.shared,
            vcpu: self.vcpu,
            number: self.number,
            cpus: self.cpus,
            clock,
            start,
            pauses: false,
            tsc_offset: &mut self.tsc_offset,
        };
        let exit = self.cpu.run(&mut wires, budget);
        self.pauses = wires.pauses;
        self.counted = self.cpu.instructions();
        Some((exit, self.counted.wrapping_sub(start)))
    }

    /// HLT, or a CPU that is still asleep.
    fn halted(&mut self, executed: u64) -> Option<Exit> {
        if self.debug.single_step && (executed > 0 || self.debug.block_interrupts) {
            self.shared.go_outside(self.vcpu, executed);
            let pc = self.cpu.registers().rip;
            return Some(if executed > 0 {
                Exit::Debug(DebugEvent { single_step: true, ..quiet(pc) })
            } else {
                Exit::Hlt
            });
        }
        let is_maskable = self.cpu.registers().rflags & RFLAGS_IF != 0;
        self.shared.end_slice(self.vcpu, executed, Pause::Halt(Halt { is_maskable }));
        None
    }

    /// The exit for the VMM, if it is one.
    fn exit(&self, exit: CpuExit) -> Option<Exit> {
        Some(match exit {
            CpuExit::Budget | CpuExit::Interrupted | CpuExit::Platform | CpuExit::Halted | CpuExit::Foreign(_) => {
                return None;
            }
            CpuExit::PortOut { port, size, value } => Exit::IoOut { port, size, count: 1, value },
            CpuExit::PortIn { port, size } => Exit::IoIn { port, size, count: 1 },
            CpuExit::MmioRead { address, size } => Exit::MmioRead { address, size },
            CpuExit::MmioWrite { address, size } => Exit::MmioWrite { address, size },
            CpuExit::Missing(what) => Exit::Failed(Failure::Missing(what)),
            CpuExit::Shutdown => Exit::Shutdown,
            CpuExit::Breakpoint => {
                let pc = self.cpu.registers().rip;
                let fires = |b: &HardwareBreakpoint| b.access == Access::Execute && b.address == pc;
                Exit::Debug(DebugEvent { hardware: self.fired(fires), ..quiet(pc) })
            }
            CpuExit::Int3 => Exit::Debug(DebugEvent { software: true, ..quiet(self.cpu.registers().rip) }),
            CpuExit::SingleStep => Exit::Debug(DebugEvent { single_step: true, ..quiet(self.cpu.registers().rip) }),
            CpuExit::Watchpoint { access, .. } => {
                let fires = |b: &HardwareBreakpoint| {
                    let is_kind = match b.access {
                        Access::Execute => false,
                        Access::Write => access.write,
                        Access::Read => !access.write,
                        Access::ReadWrite => true,
                    };
                    let overlaps = access.address.wrapping_sub(b.address) < b.length
                        || b.address.wrapping_sub(access.address) < access.length;
                    is_kind && overlaps
                };
                let single_step = self.debug.single_step;
                let hardware = self.fired(fires);
                if hardware == 0 && !single_step {
                    // A read that a write follows, where only reads are watched.
                    return None;
                }
                let access = Some(access).filter(|_| hardware != 0);
                let pc = self.cpu.registers().rip;
                Exit::Debug(DebugEvent { hardware, single_step, access, ..quiet(pc) })
            }
        })
    }

    /// A bit for each place that fires.
    fn fired(&self, fires: impl Fn(&HardwareBreakpoint) -> bool) -> u64 {
        let places = self.debug.hardware.iter().enumerate().filter(|(_, place)| fires(place));
        places.fold(0, |bits, (n, _)| bits | 1 << n.min(LAST_BIT))
    }

    /// Uses the wires outside of a slice.
    fn with_wires<T>(&mut self, f: impl FnOnce(&mut Cpu, &mut Wires<'_>) -> T) -> T {
        let clock = self.shared.lock().clock;
        let mut wires = Wires {
            shared: &self.shared,
            vcpu: self.vcpu,
            number: self.number,
            cpus: self.cpus,
            clock,
            start: self.counted,
            pauses: false,
            tsc_offset: &mut self.tsc_offset,
        };
        f(&mut self.cpu, &mut wires)
    }
}

/// A debug event about nothing yet.
fn quiet(pc: u64) -> DebugEvent {
    DebugEvent { software: false, single_step: false, hardware: 0, access: None, pc }
}

/// What the CPU is to look out for.
fn options(debug: &GuestDebug) -> DebugOptions {
    let executed = debug.hardware.iter().filter(|b| b.access == Access::Execute);
    let watched = debug.hardware.iter().filter_map(|b| {
        let kind = match b.access {
            Access::Execute => return None,
            Access::Write => WatchKind::Write,
            Access::Read => WatchKind::Read,
            Access::ReadWrite => WatchKind::ReadWrite,
        };
        Some(Watchpoint { address: b.address, length: b.length.max(1), kind })
    });
    DebugOptions {
        breakpoints: executed.map(|b| b.address).collect(),
        watchpoints: watched.collect(),
        single_step: debug.single_step,
        // Breakpoints are the CPU's own: `int3` is always the guest's.
        stop_at_int3: false,
        block_interrupts: debug.single_step && debug.block_interrupts,
    }
}

fn refused(call: &'static str, index: u32) -> Error {
    let text = format!("the software CPU has no MSR {index:#x}, or not with that value");
    Error::Hypervisor { call, source: std::io::Error::other(text) }
}

fn is_canonical(address: u64) -> bool {
    matches!(address >> 47, 0 | 0x1_ffff)
}

/// Whether a CPU can have these control registers (Intel SDM 3A, 2.5, and EFER's bits in 2.2.1).
fn is_valid(registers: &SystemRegisters) -> bool {
    /// VME to SMXE, PCIDE, OSXSAVE, SMEP, SMAP, PKE.
    const CR4: u64 = 0x0077_7fff;
    /// SCE, LME, LMA, NXE.
    const EFER: u64 = 0xd01;
    let SystemRegisters { cr0, cr4, efer, .. } = *registers;
    let (is_paging, is_long) = (cr0 & CR0_PG != 0, efer & EFER_LMA != 0);
    let is_consistent = if is_paging && efer & EFER_LME != 0 {
        is_long && cr4 & CR4_PAE != 0
    } else {
        !is_long && registers.cs.attributes & segment_attributes::L == 0
    };
    let has_reserved = cr0 >> 32 != 0 || cr4 & !CR4 != 0 || efer & !EFER != 0;
    is_consistent && !has_reserved && (!is_paging || cr0 & CR0_PE != 0)
}

/// IA32_LSTAR, IA32_CSTAR, the bases of FS and GS, and what SWAPGS exchanges: addresses.
fn holds_address(index: u32) -> bool {
    matches!(index, 0xc000_0082 | 0xc000_0083 | 0xc000_0100..=0xc000_0102)
}

impl Drop for SoftVcpu {
    fn drop(&mut self) {
        self.unbind();
    }
}

impl Vcpu for SoftVcpu {
    fn bind_to_current_thread(&mut self) -> Result<()> {
        self.kick.bind()
    }

    fn unbind(&mut self) {
        self.kick.unbind();
        self.shared.leave(self.vcpu);
    }

    fn park(&mut self) {
        self.shared.leave(self.vcpu);
    }

    fn step_aside(&mut self) {
        self.shared.step_aside(self.vcpu);
    }

    fn run(&mut self) -> Result<Exit> {
        loop {
            let Some((exit, executed)) = self.slice() else { return Ok(Exit::Interrupted) };
            match exit {
                CpuExit::Halted => {
                    if let Some(exit) = self.halted(executed) {
                        return Ok(exit);
                    }
                }
                CpuExit::Platform if self.pauses => self.shared.end_slice(self.vcpu, executed, Pause::Turn),
                CpuExit::SingleStep if self.pauses => {
                    // Who steps through a wait for another vCPU gets to its end.
                    self.shared.end_slice(self.vcpu, executed, Pause::Turn);
                    return Ok(Exit::Debug(DebugEvent { single_step: true, ..quiet(self.cpu.registers().rip) }));
                }
                CpuExit::Budget | CpuExit::Platform => self.shared.end_slice(self.vcpu, executed, Pause::Slice),
                CpuExit::Interrupted => {
                    self.shared.go_outside(self.vcpu, executed);
                    if self.shared.take_kick(self.vcpu) {
                        return Ok(Exit::Interrupted);
                    }
                }
                other => {
                    self.shared.go_outside(self.vcpu, executed);
                    if let Some(exit) = self.exit(other) {
                        return Ok(exit);
                    }
                }
            }
        }
    }

    fn complete_io(&mut self) -> Result<Option<Exit>> {
        let exit = self.with_wires(|cpu, wires| cpu.complete_io(wires));
        Ok(exit.and_then(|exit| self.exit(exit)))
    }

    fn io_data(&mut self) -> &mut [u8] {
        self.cpu.io_data()
    }

    fn registers(&mut self) -> Result<Registers> {
        Ok(self.cpu.registers())
    }

    fn set_registers(&mut self, registers: &Registers) -> Result<()> {
        self.cpu.set_registers(registers);
        Ok(())
    }

    fn system_registers(&mut self) -> Result<SystemRegisters> {
        let inner = self.shared.lock();
        let apic = inner.board.apic(self.vcpu);
        Ok(SystemRegisters { cr8: apic.cr8(), apic_base: apic.base(), ..*self.cpu.system_registers() })
    }

    fn set_system_registers(&mut self, registers: &SystemRegisters) -> Result<()> {
        if !is_valid(registers) {
            let text = "the CPU refuses these system registers";
            return Err(Error::Hypervisor { call: "set_system_registers", source: std::io::Error::other(text) });
        }
        let mut inner = self.shared.lock();
        let apic = inner.board.apic_mut(self.vcpu);
        apic.set_cr8(registers.cr8);
        apic.set_base(registers.apic_base);
        self.cpu.set_system_registers(registers);
        Ok(())
    }

    fn fpu(&mut self) -> Result<FpuState> {
        Ok(*self.cpu.fpu())
    }

    fn set_fpu(&mut self, fpu: &FpuState) -> Result<()> {
        self.cpu.set_fpu(fpu);
        Ok(())
    }

    fn ymm_high(&mut self) -> Result<[u128; 16]> {
        Ok(*self.cpu.ymm_high())
    }

    fn set_ymm_high(&mut self, high: &[u128; 16]) -> Result<()> {
        self.cpu.set_ymm_high(high);
        Ok(())
    }

    fn msr(&mut self, index: u32) -> Result<u64> {
        let own = self.cpu.msr(index);
        let value = own.or_else(|| self.with_wires(|_, wires| wires.msr(index, wires.moment_now())));
        value.ok_or_else(|| refused("RDMSR", index))
    }

    fn set_msr(&mut self, index: u32, value: u64) -> Result<()> {
        let is_allowed = !holds_address(index) || is_canonical(value);
        let is_set = is_allowed
            && (self.cpu.set_msr(index, value)
                || self.with_wires(|_, wires| wires.set_msr(index, value, wires.moment_now())));
        if is_set { Ok(()) } else { Err(refused("WRMSR", index)) }
    }

    fn extensions(&self) -> Extensions {
        Extensions { avx: true, ..Default::default() }
    }

    fn xcr0(&mut self) -> Result<u64> {
        Ok(self.cpu.xcr0())
    }

    fn instructions(&mut self) -> Option<u64> {
        Some(self.cpu.instructions())
    }

    fn tsc_khz(&self) -> Option<u32> {
        Some(TSC_KHZ)
    }

    fn set_guest_debug(&mut self, debug: &GuestDebug) -> Result<()> {
        if *debug != self.debug {
            self.debug.clone_from(debug);
            self.cpu.set_debug(options(debug));
        }
        Ok(())
    }

    fn inject(&mut self, exception: Exception) -> Result<()> {
        let Exception { vector, error_code, address } = exception;
        self.cpu.set_halted(false);
        self.cpu.inject(Fault { vector, error_code, address });
        Ok(())
    }

    fn is_halted(&mut self) -> Result<bool> {
        Ok(self.cpu.is_halted())
    }

    fn is_at_instruction(&mut self) -> Result<bool> {
        let state = self.cpu.snapshot();
        let is_awake = !state.halted && !state.shut_down;
        Ok(is_awake && state.injected.is_none() && state.pending_read.is_none())
    }

    fn halt(&mut self) -> Result<()> {
        // HLT is behind the instruction whose interrupts STI holds off; a shadow that stays would keep it asleep.
        let state = State { halted: true, interrupt_shadow: false, ..self.cpu.snapshot() };
        self.cpu.restore(&state);
        Ok(())
    }

    fn kick_handle(&self) -> Arc<dyn Kick> {
        self.kick.clone()
    }
}
