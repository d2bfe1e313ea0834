//! A whole x86-64 CPU in software: what a back end drives. [`Cpu::run`] executes guest code in [`GuestMemory`] until
//! something happens that the machine around it has to see; [`Platform`] answers what can be answered at once.
//!
//! All of it is deterministic: the same state, memory and answers give the same execution, to the last instruction.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::MAX_LENGTH;
use super::core::{Slow, write_exit};
use super::engine::{Engine, Stop};
use super::hooks::{DebugOptions, Hooks};
use super::mmu::Watched;
use super::platform::{Nothing, Platform};
use super::state::{DeviceAccess, Fault, State};
use crate::backend::DataAccess;
use crate::memory::GuestMemory;
use crate::registers::{FpuState, RFLAGS_IF, RFLAGS_RF, RFLAGS_TF, Registers, SystemRegisters};

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
    /// The CPU is lent ([`Cpu::lend`]), and the instruction at RIP is its owner's to execute; nothing of it is done. With
    /// the exception that it raises, if it is one that this CPU knows.
    Foreign(Option<Fault>),
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
    /// The instruction at RIP needs what this CPU has not got; nothing of it is done.
    Missing(Missing),
    /// A triple fault. The CPU executes nothing any more until its state is set anew.
    Shutdown,
}

/// What a CPU of this architecture may have and this one has not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missing {
    /// Any mode but the 64-bit one: the instruction leads there, or the CPU is there already.
    LegacyMode,
    /// Far calls and jumps through a gate.
    CallGate,
}

impl std::fmt::Display for Missing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::LegacyMode => "compatibility mode, nor any other but 64-bit mode",
            Self::CallGate => "call gates",
        })
    }
}

/// The most instructions between two looks at the flag and at interrupts.
const SLICE: u64 = 8192;
/// Exceptions in a row, without an instruction, that count as one.
const STALLED: u32 = 16;

/// What came before an instruction.
enum Event {
    Nothing,
    /// RIP is at a handler now.
    Delivered,
    Exit(CpuExit),
}

/// A CPU: architectural state, and caches that follow from it and from memory.
pub struct Cpu {
    engine: Box<Engine>,
    debug: DebugOptions,
    hooks: Option<Box<dyn Hooks>>,
    /// The instruction at RIP executes even if a breakpoint is there.
    resume: bool,
    /// Every instruction goes through the slow executor.
    is_slow: bool,
    /// Nothing but fast single steps came since [`Cpu::steps_fast`] was true. They change nothing that it asks, and whoever
    /// does takes this away.
    is_stepping: bool,
    interrupt: Arc<AtomicBool>,
    io: [u8; 8],
    io_length: usize,
    /// What the last instruction also came to; told when the VMM has heard of its writes to devices.
    after: Option<CpuExit>,
    /// The count of instructions at the last look, and how many looks have found no other.
    progress: u64,
    stalled: u32,
}

impl Cpu {
    /// A CPU on that memory, in the state of [`State::default`].
    pub fn new(memory: &GuestMemory) -> Self {
        Self {
            engine: Box::new(Engine::new(memory)),
            debug: DebugOptions::default(),
            hooks: None,
            resume: false,
            is_slow: false,
            is_stepping: false,
            interrupt: Arc::default(),
            io: [0; 8],
            io_length: 0,
            after: None,
            progress: 0,
            stalled: 0,
        }
    }

    /// Executes until an exit, at most `budget` instructions. A read that the last exit was about is completed first.
    pub fn run(&mut self, platform: &mut dyn Platform, budget: u64) -> CpuExit {
        if self.is_stepping && budget > 0 && !self.is_called(platform) && self.engine.step() {
            return CpuExit::SingleStep;
        }
        self.run_on(platform, budget)
    }

    /// Whether somebody outside wants something of the CPU.
    #[inline(always)]
    fn is_called(&self, platform: &mut dyn Platform) -> bool {
        let state = &self.engine.core.state;
        let takes_interrupts = state.core.registers.rflags & RFLAGS_IF != 0 && !self.debug.block_interrupts;
        self.interrupt.load(Ordering::Relaxed)
            || takes_interrupts && platform.pending_interrupt(state.instructions).is_some()
    }

    /// Whether there is nothing to look at before a single step but the instruction, and who calls.
    fn steps_fast(&self) -> bool {
        self.debug.single_step
            && self.debug.breakpoints.is_empty()
            && self.is_undisturbed()
            && !self.goes_slowly()
            && self.engine.core.state.pending_read.is_none()
    }

    /// Somebody changes what single steps depend on.
    fn disturb(&mut self) {
        self.is_stepping = false;
    }

    #[inline(never)]
    fn run_on(&mut self, platform: &mut dyn Platform, budget: u64) -> CpuExit {
        self.is_stepping = self.steps_fast();
        if self.is_stepping && budget > 0 && !self.is_called(platform) {
            self.engine.load();
            if self.engine.step() {
                return CpuExit::SingleStep;
            }
        }
        self.disturb();
        let target = self.engine.core.state.instructions.saturating_add(budget);
        if let Some(exit) = self.finish_read(platform) {
            return exit;
        }
        loop {
            match self.event(platform) {
                Event::Nothing => {}
                Event::Delivered if self.debug.single_step => return CpuExit::SingleStep,
                Event::Delivered => continue,
                Event::Exit(exit) => return exit,
            }
            let left = target.saturating_sub(self.engine.core.state.instructions);
            if left == 0 {
                return CpuExit::Budget;
            }
            let exit = if self.goes_slowly() { self.step(platform) } else { self.blocks(platform, left) };
            if let Some(exit) = exit {
                return exit;
            }
            self.note_progress();
        }
    }

    /// Exceptions whose handlers begin with an exception may go on for ever without an instruction. They count, a few as
    /// one, so that time goes by and a turn ends.
    fn note_progress(&mut self) {
        let instructions = &mut self.engine.core.state.instructions;
        self.stalled = if *instructions == self.progress { self.stalled + 1 } else { 0 };
        if self.stalled == STALLED {
            self.stalled = 0;
            *instructions += 1;
        }
        self.progress = *instructions;
    }

    /// Finishes the access that the last exit was about, without executing another instruction. `None` if nothing else
    /// came of it; a further access of the same instruction, a watchpoint or a single step is an exit.
    pub fn complete_io(&mut self, platform: &mut dyn Platform) -> Option<CpuExit> {
        self.disturb();
        self.finish_read(platform).or_else(|| self.left_over())
    }

    /// Executes the instruction again whose read the VMM has answered.
    fn finish_read(&mut self, platform: &mut dyn Platform) -> Option<CpuExit> {
        let access = self.engine.core.state.pending_read.take()?;
        let data = &self.io[..usize::from(access.size.min(8))];
        let answer = DeviceAccess::new(access.address, access.is_port, data);
        self.engine.core.state.answers.push(answer);
        self.execute_one(platform)
    }

    /// What the last instruction came to and the VMM has not been told.
    fn left_over(&mut self) -> Option<CpuExit> {
        if let Some(access) = self.engine.core.state.pending_writes.pop_front() {
            self.io = access.data;
            self.io_length = access.bytes().len();
            return Some(write_exit(&access));
        }
        self.after.take()
    }

    /// What comes before an instruction: exits that wait, exceptions, interrupts, the end.
    fn event(&mut self, platform: &mut dyn Platform) -> Event {
        if self.is_undisturbed() && self.engine.core.state.core.registers.rflags & RFLAGS_IF == 0 {
            return Event::Nothing;
        }
        if let Some(exit) = self.left_over() {
            return Event::Exit(exit);
        }
        if self.interrupt.load(Ordering::Relaxed) {
            self.interrupt.store(false, Ordering::Relaxed);
            return Event::Exit(CpuExit::Interrupted);
        }
        if self.engine.core.state.shut_down {
            return Event::Exit(CpuExit::Shutdown);
        }
        let is_held = |fault: &Fault| fault.vector == 1 && self.engine.core.state.trap_shadow;
        let is_alive = if let Some(fault) = self.engine.core.state.injected.take_if(|fault| !is_held(fault)) {
            self.engine.settle();
            let is_trap = matches!(fault.vector, 1 | 3 | 4);
            let flags = self.engine.core.state.core.registers.rflags | if is_trap { 0 } else { RFLAGS_RF };
            self.engine.core.deliver_exception(fault, flags)
        } else if let Some(vector) = self.interrupt_to_take(platform) {
            self.engine.settle();
            platform.acknowledge_interrupt(vector, self.engine.core.state.instructions);
            self.engine.core.deliver_interrupt(vector)
        } else if self.engine.core.state.halted {
            return Event::Exit(CpuExit::Halted);
        } else {
            return Event::Nothing;
        };
        if is_alive { Event::Delivered } else { Event::Exit(CpuExit::Shutdown) }
    }

    /// Whether nothing but an interrupt can come before the next instruction.
    fn is_undisturbed(&self) -> bool {
        let state = &self.engine.core.state;
        state.injected.is_none()
            && !state.halted
            && !state.shut_down
            && self.after.is_none()
            && state.pending_writes.as_slice().is_empty()
            && !self.interrupt.load(Ordering::Relaxed)
    }

    fn interrupt_to_take(&mut self, platform: &mut dyn Platform) -> Option<u8> {
        let state = &self.engine.core.state;
        let is_held_off = self.debug.single_step && self.debug.block_interrupts;
        if state.core.registers.rflags & RFLAGS_IF == 0 || state.interrupt_shadow || is_held_off {
            return None;
        }
        platform.pending_interrupt(state.instructions)
    }

    /// Whether each instruction has to be looked at: hooks, traps, a shadow, or a mode that blocks do not know.
    fn goes_slowly(&self) -> bool {
        let state = &self.engine.core.state;
        self.resume
            || self.is_slow
            || self.hooks.is_some()
            || state.interrupt_shadow
            || state.core.registers.rflags & (RFLAGS_TF | RFLAGS_RF) != 0
            || state.debug[7] & 0xff != 0
            || !self.engine.core.is_in_long_mode()
            || super::checks_alignment(&state.core)
    }

    /// Blocks of instructions, up to a slice of the budget, and the instruction that needs more than that.
    fn blocks(&mut self, platform: &mut dyn Platform, left: u64) -> Option<CpuExit> {
        let budget = if self.debug.single_step { 1 } else { left.min(SLICE) };
        match self.engine.run(budget) {
            Stop::Breakpoint => Some(CpuExit::Breakpoint),
            Stop::Budget => self.stepped(),
            _ => {
                let before = self.engine.core.state.debug[7];
                let exit = self.step(platform);
                if before != self.engine.core.state.debug[7] {
                    self.update_watchpoints();
                }
                exit
            }
        }
    }

    /// One instruction, with all that may be looked out for before it.
    fn step(&mut self, platform: &mut dyn Platform) -> Option<CpuExit> {
        self.engine.settle();
        let rip = self.engine.core.state.core.registers.rip;
        if !std::mem::take(&mut self.resume) && self.engine.has_breakpoint(rip) {
            return Some(CpuExit::Breakpoint);
        }
        if !self.engine.core.state.trap_shadow
            && let Some(reason) = self.engine.core.guest_breakpoint()
        {
            let fault = Fault { vector: 1, error_code: None, address: Some(reason) };
            let flags = self.engine.core.state.core.registers.rflags | RFLAGS_RF;
            let is_alive = self.engine.core.deliver_exception(fault, flags);
            return if is_alive { self.stepped() } else { Some(CpuExit::Shutdown) };
        }
        self.execute_one(platform)
    }

    /// One instruction by the slow executor.
    fn execute_one(&mut self, platform: &mut dyn Platform) -> Option<CpuExit> {
        self.engine.settle();
        let core = &self.engine.core;
        if !core.is_in_long_mode() && !core.is_lent {
            return Some(CpuExit::Missing(Missing::LegacyMode));
        }
        self.engine.core.mmu.watched = None;
        let slow = if self.hooks.is_some() { self.traced_step(platform) } else { self.engine.core.slow_step(platform) };
        match slow {
            Slow::Exit(exit) => {
                if let Some(access) = self.engine.core.state.pending_read {
                    (self.io, self.io_length) = ([0; 8], access.bytes().len());
                }
                return Some(exit);
            }
            Slow::Delivered => return self.stepped(),
            Slow::Retired => {}
        }
        self.after = self.engine.core.exit.take();
        if let Some(watched) = self.engine.core.mmu.watched.take() {
            self.note_watched(&watched);
        }
        let is_shadowed = self.engine.core.state.trap_shadow;
        if self.debug.single_step && !is_shadowed && !matches!(self.after, Some(CpuExit::Watchpoint { .. })) {
            self.after = Some(CpuExit::SingleStep);
        }
        self.left_over()
    }

    /// Executes the instruction that `code` starts with as if it stood at RIP, where a debugger's byte covers it in
    /// memory, on a CPU that is lent. `None`: it has retired, or one part of a repeated instruction that stays at RIP.
    pub fn execute_covered(&mut self, code: &[u8]) -> Option<CpuExit> {
        self.disturb();
        self.engine.settle();
        let mut bytes = [0; MAX_LENGTH];
        let available = code.len().min(MAX_LENGTH);
        bytes[..available].copy_from_slice(&code[..available]);
        let core = &mut self.engine.core;
        let decoded = match core.decode_bytes(bytes, available) {
            Ok(decoded) => decoded,
            Err(fault) => return Some(CpuExit::Foreign(Some(fault))),
        };
        match core.slow_execute(&decoded, &mut Nothing) {
            Slow::Retired => core.exit.take(),
            Slow::Delivered => self.stepped(),
            Slow::Exit(exit) => Some(exit),
        }
    }

    fn stepped(&self) -> Option<CpuExit> {
        self.debug.single_step.then_some(CpuExit::SingleStep)
    }

    /// An instruction with hooks: they hear of it first, then of its accesses.
    fn traced_step(&mut self, platform: &mut dyn Platform) -> Slow {
        let decoded = match self.engine.core.decode() {
            Ok(decoded) => decoded,
            Err(fault) => return self.engine.core.raise(fault),
        };
        let hooks = self.hooks.as_mut().expect("the caller has looked");
        let instruction = &decoded.instruction;
        hooks.instruction(instruction.ip(), &decoded.code[..instruction.len()]);
        self.engine.core.trace = Some(Vec::new());
        let slow = self.engine.core.slow_execute(&decoded, platform);
        for Watched { address, length, is_write, .. } in self.engine.core.trace.take().unwrap_or_default() {
            hooks.access(DataAccess { address, length, write: is_write });
        }
        slow
    }

    /// An access that a watchpoint of the debugger or of the guest reports.
    fn note_watched(&mut self, watched: &Watched) {
        let Watched { index, address, length, is_write } = *watched;
        match index.checked_sub(self.debug.watchpoints.len()) {
            None => {
                let access = DataAccess { address, length, write: is_write };
                self.after = Some(CpuExit::Watchpoint { index, access });
            }
            Some(guest) => {
                let reason = self.engine.core.guest_watch_reason(guest);
                self.engine.core.debug_trap(reason);
            }
        }
    }

    /// Hands the MMU the debugger's watchpoints and the guest's.
    fn update_watchpoints(&mut self) {
        let mut all = self.debug.watchpoints.clone();
        all.extend(self.engine.core.guest_watchpoints());
        if all != self.engine.core.mmu.watchpoints {
            self.engine.core.mmu.watchpoints = all;
            self.engine.core.mmu.flush_data();
        }
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
        self.disturb();
        self.engine.core.stop_at_int3 = options.stop_at_int3;
        self.engine.core.is_stepped = options.single_step;
        self.engine.set_breakpoints(&options.breakpoints);
        self.debug = options;
        self.update_watchpoints();
    }

    /// What is looked out for.
    pub fn debug(&self) -> &DebugOptions {
        &self.debug
    }

    /// The next [`Cpu::run`] executes the instruction at RIP even if a breakpoint is there (once).
    pub fn resume_from_breakpoint(&mut self) {
        self.disturb();
        self.resume = true;
    }

    /// Executes every instruction by the slow executor, whose results blocks have to have: for tests and for doubts.
    pub fn set_slow(&mut self, is_slow: bool) {
        self.disturb();
        self.is_slow = is_slow;
    }

    /// Sets or removes the hooks.
    pub fn set_hooks(&mut self, hooks: Option<Box<dyn Hooks>>) {
        self.disturb();
        self.engine.core.mmu.is_traced = hooks.is_some();
        self.engine.core.mmu.flush_data();
        self.hooks = hooks;
    }

    /// General registers, RIP, RFLAGS.
    pub fn registers(&self) -> Registers {
        self.engine.registers()
    }

    /// Sets general registers, RIP, RFLAGS. With another RIP, a read that waits for its answer is given up.
    pub fn set_registers(&mut self, registers: &Registers) {
        self.disturb();
        self.engine.settle();
        if registers.rip != self.engine.core.state.core.registers.rip {
            self.engine.core.state.pending_read = None;
            self.engine.core.state.answers = Default::default();
        }
        self.engine.core.state.core.registers = *registers;
        self.engine.core.mode_changed();
    }

    /// Segment and control registers.
    pub fn system_registers(&self) -> &SystemRegisters {
        &self.engine.core.state.core.system
    }

    /// Sets segment and control registers; cached translations are dropped as needed.
    pub fn set_system_registers(&mut self, registers: &SystemRegisters) {
        self.disturb();
        self.engine.settle();
        self.engine.core.state.core.system = *registers;
        self.engine.core.mode_changed();
    }

    /// x87 and SSE registers.
    pub fn fpu(&self) -> &FpuState {
        &self.engine.core.state.core.fpu
    }

    /// Sets x87 and SSE registers.
    pub fn set_fpu(&mut self, fpu: &FpuState) {
        self.engine.core.state.core.fpu = *fpu;
    }

    /// Upper halves of the YMM registers.
    pub fn ymm_high(&self) -> &[u128; 16] {
        &self.engine.core.state.core.ymm_high
    }

    /// Sets the upper halves of the YMM registers.
    pub fn set_ymm_high(&mut self, high: &[u128; 16]) {
        self.engine.core.state.core.ymm_high = *high;
    }

    /// XCR0.
    pub fn xcr0(&self) -> u64 {
        self.engine.core.state.core.xcr0
    }

    /// Instructions that have retired.
    pub fn instructions(&self) -> u64 {
        self.engine.core.state.instructions
    }

    /// Whether HLT was executed and no interrupt has come since.
    pub fn is_halted(&self) -> bool {
        self.engine.core.state.halted
    }

    /// Halts the CPU as HLT does, or wakes it.
    pub fn set_halted(&mut self, halted: bool) {
        self.disturb();
        self.engine.core.state.halted = halted;
    }

    /// Delivers an exception before the next instruction.
    pub fn inject(&mut self, fault: Fault) {
        self.disturb();
        self.engine.core.state.injected = Some(fault);
    }

    /// An MSR that the CPU keeps, the ones that system registers hold included; `None` for one of the platform's.
    pub fn msr(&mut self, index: u32) -> Option<u64> {
        self.engine.core.msr(index)
    }

    /// Sets an MSR that the CPU keeps, without the checks of WRMSR; false for one of the platform's.
    pub fn set_msr(&mut self, index: u32, value: u64) -> bool {
        self.disturb();
        self.engine.settle();
        self.engine.core.set_msr(index, value)
    }

    /// Goes on from the state of another CPU that uses the same memory, until [`CpuExit::Foreign`]: at an exception, at a
    /// device in memory or a port that the platform does not own, and at every instruction that changes or shows more
    /// than general registers, flags, memory, and x87 and vector registers. Code is looked at anew, since the other CPU may
    /// have changed it, and translations too.
    pub fn lend(&mut self, state: &State) {
        self.disturb();
        self.engine.core.is_lent = true;
        self.restore(state);
    }

    /// Whether interrupts are held off until after the next instruction.
    pub fn interrupt_shadow(&self) -> bool {
        self.engine.core.state.interrupt_shadow
    }

    /// A copy of all architectural state.
    pub fn snapshot(&self) -> State {
        let mut state = self.engine.core.state;
        state.core.registers = self.engine.registers();
        state
    }

    /// Sets all architectural state.
    pub fn restore(&mut self, state: &State) {
        self.disturb();
        self.engine.settle();
        self.engine.core.state = *state;
        self.engine.core.mode_renewed();
        self.update_watchpoints();
        self.after = None;
        if let Some(access) = state.pending_read {
            self.io_length = access.bytes().len();
        }
    }
}
