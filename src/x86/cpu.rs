//! A whole x86-64 CPU in software: what a back end drives. [`Cpu::run`] executes guest code in [`GuestMemory`] until
//! something happens that the machine around it has to see; [`Platform`] answers what can be answered at once.
//!
//! All of it is deterministic: the same state, memory and answers give the same execution, to the last instruction.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::hooks::{DebugOptions, Hooks};
use super::platform::Platform;
use super::state::{Fault, State};
use super::{Bus, BusError, MAX_LENGTH, Outcome};
use crate::backend::DataAccess;
use crate::memory::GuestMemory;
use crate::paging::{self, PagingMode};
use crate::registers::{FpuState, Registers, SystemRegisters};

/// Why [`Cpu::run`] returned. RIP and the instruction count are exact at every exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CpuExit {
    /// As many instructions as the budget allowed have retired.
    Budget,
    /// The flag of [`Cpu::interrupt_flag`] was set (and is cleared).
    Interrupted,
    /// A [`Reply::Leave`](super::Reply::Leave): the instruction that caused it has retired.
    Platform,
    /// OUT or one element of OUTS; it has retired (of a repeated one, this iteration). The bytes are in
    /// [`Cpu::io_data`].
    PortOut {
        /// Port.
        port: u16,
        /// Bytes: 1, 2 or 4.
        size: u8,
        /// The value, zero-extended.
        value: u32,
    },
    /// IN or one element of INS: fill [`Cpu::io_data`] before the next [`Cpu::run`] or [`Cpu::complete_io`]. It has
    /// not retired yet.
    PortIn {
        /// Port.
        port: u16,
        /// Bytes: 1, 2 or 4.
        size: u8,
    },
    /// A read of an address that is not RAM: fill [`Cpu::io_data`]. The instruction has not retired yet.
    MmioRead {
        /// Guest-physical address.
        address: u64,
        /// Bytes, up to 8.
        size: usize,
    },
    /// A write to an address that is not RAM; the bytes are in [`Cpu::io_data`]. The instruction has retired. An
    /// instruction that makes several such writes leaves once for each.
    MmioWrite {
        /// Guest-physical address.
        address: u64,
        /// Bytes, up to 8.
        size: usize,
    },
    /// HLT has retired; [`Cpu::run`] returns this again until an interrupt is pending (and enabled).
    Halted,
    /// RIP is at one of [`DebugOptions::breakpoints`].
    Breakpoint,
    /// RIP is at an INT3, with [`DebugOptions::stop_at_int3`]. It has not executed.
    Int3,
    /// The instruction that has just retired made an access that a watchpoint reports: the `index`-th of
    /// [`DebugOptions::watchpoints`].
    Watchpoint {
        /// Which.
        index: usize,
        /// The access.
        access: DataAccess,
    },
    /// One instruction has retired (or an exception or interrupt was delivered) with [`DebugOptions::single_step`].
    SingleStep,
    /// A triple fault. The CPU executes nothing any more until its state is set anew.
    Shutdown,
}

/// A CPU: architectural state, and caches that follow from it and from memory.
pub struct Cpu {
    state: State,
    memory: GuestMemory,
    debug: DebugOptions,
    hooks: Option<Box<dyn Hooks>>,
    resume: bool,
    interrupt: Arc<AtomicBool>,
    io: [u8; 8],
    io_length: usize,
}

impl Cpu {
    /// A CPU on that memory, in the state of [`State::default`].
    pub fn new(memory: &GuestMemory) -> Self {
        Self {
            state: State::default(),
            memory: memory.clone(),
            debug: DebugOptions::default(),
            hooks: None,
            resume: false,
            interrupt: Arc::default(),
            io: [0; 8],
            io_length: 0,
        }
    }

    /// Executes until an exit, at most `budget` instructions. A read that the last exit was about is completed first.
    pub fn run(&mut self, platform: &mut dyn Platform, budget: u64) -> CpuExit {
        for _ in 0..budget {
            if self.interrupt.swap(false, Ordering::Relaxed) {
                return CpuExit::Interrupted;
            }
            let now = self.state.instructions;
            let mode = PagingMode::from(&self.state.core.system);
            let mut bus = SlowBus { memory: &self.memory, mode, platform, now };
            match super::step(&mut self.state.core, &mut bus) {
                Outcome::Done | Outcome::Repeat => self.state.instructions += 1,
                _ => return CpuExit::Shutdown,
            }
        }
        CpuExit::Budget
    }

    /// Finishes the read that the last exit was about, without executing anything else. `None` if nothing else came of
    /// it; a write to a device by the same instruction, for example, is an exit.
    pub fn complete_io(&mut self, platform: &mut dyn Platform) -> Option<CpuExit> {
        let _ = platform;
        None
    }

    /// The bytes of the last port or memory access: what the guest wrote, or the place to put what it reads.
    pub fn io_data(&mut self) -> &mut [u8] {
        &mut self.io[..self.io_length]
    }

    /// Set from any thread, it makes the current or next [`Cpu::run`] return [`CpuExit::Interrupted`] within a few
    /// thousand instructions.
    pub fn interrupt_flag(&self) -> Arc<AtomicBool> {
        self.interrupt.clone()
    }

    /// Chooses what to look out for from the next [`Cpu::run`] on.
    pub fn set_debug(&mut self, options: DebugOptions) {
        self.debug = options;
    }

    /// What is looked out for.
    pub fn debug(&self) -> &DebugOptions {
        &self.debug
    }

    /// The next [`Cpu::run`] executes the instruction at RIP even if a breakpoint is there (once).
    pub fn resume_from_breakpoint(&mut self) {
        self.resume = true;
    }

    /// Sets or removes the hooks.
    pub fn set_hooks(&mut self, hooks: Option<Box<dyn Hooks>>) {
        self.hooks = hooks;
    }

    /// General registers, RIP, RFLAGS.
    pub fn registers(&self) -> Registers {
        self.state.core.registers
    }

    /// Sets general registers, RIP, RFLAGS. A read that waits for its answer is given up.
    pub fn set_registers(&mut self, registers: &Registers) {
        self.state.core.registers = *registers;
    }

    /// Segment and control registers.
    pub fn system_registers(&self) -> &SystemRegisters {
        &self.state.core.system
    }

    /// Sets segment and control registers; cached translations are dropped as needed.
    pub fn set_system_registers(&mut self, registers: &SystemRegisters) {
        self.state.core.system = *registers;
    }

    /// x87 and SSE registers.
    pub fn fpu(&self) -> &FpuState {
        &self.state.core.fpu
    }

    /// Sets x87 and SSE registers.
    pub fn set_fpu(&mut self, fpu: &FpuState) {
        self.state.core.fpu = *fpu;
    }

    /// Upper halves of the YMM registers.
    pub fn ymm_high(&self) -> &[u128; 16] {
        &self.state.core.ymm_high
    }

    /// Sets the upper halves of the YMM registers.
    pub fn set_ymm_high(&mut self, high: &[u128; 16]) {
        self.state.core.ymm_high = *high;
    }

    /// XCR0.
    pub fn xcr0(&self) -> u64 {
        self.state.core.xcr0
    }

    /// Instructions that have retired.
    pub fn instructions(&self) -> u64 {
        self.state.instructions
    }

    /// Whether HLT was executed and no interrupt has come since.
    pub fn is_halted(&self) -> bool {
        self.state.halted
    }

    /// Halts the CPU as HLT does, or wakes it.
    pub fn set_halted(&mut self, halted: bool) {
        self.state.halted = halted;
    }

    /// Delivers an exception before the next instruction.
    pub fn inject(&mut self, fault: Fault) {
        self.state.injected = Some(fault);
    }

    /// An MSR that the CPU keeps, the ones that system registers hold included; `None` for one of the platform's.
    pub fn msr(&self, index: u32) -> Option<u64> {
        let _ = index;
        None
    }

    /// Sets an MSR that the CPU keeps, without the checks of WRMSR; false for one of the platform's.
    pub fn set_msr(&mut self, index: u32, value: u64) -> bool {
        let _ = (index, value);
        false
    }

    /// A copy of all architectural state.
    pub fn snapshot(&self) -> State {
        self.state
    }

    /// Sets all architectural state.
    pub fn restore(&mut self, state: &State) {
        self.state = *state;
    }
}

/// Memory by page walks.
struct SlowBus<'a> {
    memory: &'a GuestMemory,
    mode: PagingMode,
    platform: &'a mut dyn Platform,
    now: u64,
}

impl SlowBus<'_> {
    fn each(
        &self,
        address: u64,
        length: usize,
        mut piece: impl FnMut(u64, std::ops::Range<usize>),
    ) -> Result<(), BusError> {
        let mut done = 0;
        while done < length {
            let at = address.wrapping_add(done as u64);
            let page = paging::translate(self.memory, &self.mode, at)
                .map_err(|_| BusError::PageFault { address: at, error_code: 0 })?;
            let end = length.min(done.saturating_add(usize::try_from(page.remaining).unwrap_or(usize::MAX)));
            if !self.memory.contains(page.physical, (end - done) as u64) {
                return Err(BusError::NotRam);
            }
            piece(page.physical, done..end);
            done = end;
        }
        Ok(())
    }
}

impl Bus for SlowBus<'_> {
    fn read(&mut self, address: u64, buffer: &mut [u8]) -> Result<(), BusError> {
        let memory = self.memory;
        self.each(address, buffer.len(), |at, range| {
            let _ = memory.read(at, &mut buffer[range]);
        })
    }

    fn write(&mut self, address: u64, data: &[u8]) -> Result<(), BusError> {
        let memory = self.memory;
        self.each(address, data.len(), |_, _| {})?;
        self.each(address, data.len(), |at, range| {
            let _ = memory.write(at, &data[range]);
        })
    }

    fn fetch(&mut self, address: u64, buffer: &mut [u8; MAX_LENGTH]) -> usize {
        if self.read(address, buffer).is_ok() { buffer.len() } else { 0 }
    }

    fn read_tsc(&mut self) -> u64 {
        self.platform.tsc(self.now)
    }

    fn compare_exchange(&mut self, address: u64, size: usize, expected: u128, new: u128) -> Result<u128, BusError> {
        let page = paging::translate(self.memory, &self.mode, address)
            .map_err(|_| BusError::PageFault { address, error_code: 2 })?;
        self.memory.compare_exchange(page.physical, size, expected, new).ok_or(BusError::NotRam)
    }
}
