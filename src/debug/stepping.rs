//! What a vCPU's thread does at breakpoints, while stepping, and at instructions that its back end can't execute.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::breakpoints::{Breakpoint, Hit, INT3, SiteKind};
use super::condition::{Context as ConditionContext, EvaluateError};
use super::engine::Owner;
use super::stop::StopReason;
use super::view::View;
use crate::backend::{DebugEvent, Exception, Exit, GuestDebug, HardwareBreakpoint, Int3, Vcpu};
use crate::error::{CrashReason, GuestFault, Result};
use crate::paging::{self, PagingMode};
use crate::registers::{RFLAGS_RF, RFLAGS_TF, RSP, RegisterId, Registers, SystemRegisters};
use crate::vcpu::{self, Flow, Seat};
use crate::x86;

/// MSR_TSC_AUX, what RDTSCP returns in ECX.
const IA32_TSC_AUX: u32 = 0xc000_0103;

/// Opcodes that a CPU does not step as it should: HLT may sleep on, and PUSHF pushes the trap flag of the step.
const HLT: u8 = 0xf4;
const PUSHF: u8 = 0x9c;
/// The vector of `int3`.
const BREAKPOINT: u64 = 3;

/// Whether the instruction is a string instruction that REP repeats: it stays where it is until its count is over.
fn is_repeated(code: &[u8]) -> bool {
    let is_prefix = |byte: &&u8| matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x4f | 0x64..=0x67 | 0xf2 | 0xf3);
    let prefixes = code.iter().take_while(is_prefix).count();
    code[..prefixes].iter().any(|byte| matches!(byte, 0xf2 | 0xf3))
        && matches!(code.get(prefixes), Some(0x6c..=0x6f | 0xa4..=0xa7 | 0xaa..=0xaf))
}

/// DR6.BS: a #DB is a trap flag's.
const DR6_SINGLE_STEP: u64 = 1 << 14;

/// How the instruction at the program counter was executed, or why not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Emulation {
    Done,
    /// One iteration of a string instruction with REP; more follow.
    Repeat,
    Fault(Exception),
    Unsupported,
}

impl Seat<'_> {
    /// Arms the CPU for the breakpoints that there are now.
    pub(crate) fn arm(&mut self) -> Result<()> {
        let machine = self.machine;
        let generation = machine.generation();
        if self.context().armed != Some(generation) {
            let debug = if generation == 0 {
                GuestDebug::default()
            } else {
                let capabilities = machine.capabilities()?;
                machine.table.read().unwrap_or_else(|e| e.into_inner()).guest_debug(&capabilities)
            };
            let context = self.context();
            context.cpu.set_guest_debug(&debug)?;
            context.debug = debug;
            context.armed = Some(generation);
        } else if self.context().debug.single_step {
            // A step is armed for one instruction only.
            let context = self.context();
            context.cpu.set_guest_debug(&context.debug)?;
        }
        Ok(())
    }

    /// A debug exit while the vCPU runs freely.
    pub(crate) fn debug_event(&mut self, event: DebugEvent) -> Result<Flow> {
        let pc = event.pc;
        if self.machine.site_at(pc).is_some() {
            if self.context().passed == Some(pc) && !event.software {
                return self.leave_site();
            }
            return self.hit(pc);
        }
        if event.software {
            return self.foreign_int3(pc);
        }
        if event.single_step && event.hardware == 0 && !self.context().debug.single_step {
            // The guest traces itself; with our breakpoints in the debug registers its #DB comes here.
            self.context().cpu.inject(Exception { vector: 1, error_code: None, address: Some(DR6_SINGLE_STEP) })?;
        }
        Ok(Flow::Continue)
    }

    /// `int3` where no breakpoint is: the guest's own, or a breakpoint that is gone since.
    fn foreign_int3(&mut self, pc: u64) -> Result<Flow> {
        let mode = self.paging_mode()?;
        let mut byte = [0];
        let raw = paging::read_virtual(&self.machine.memory, &mode, pc, &mut byte);
        if raw.is_ok() && byte[0] == INT3 {
            self.inject_int3()?;
        }
        Ok(Flow::Continue)
    }

    /// Gives the guest its own `int3`. The pushed program counter is behind it: KVM sees to that where it took the exit
    /// as a debug event, and not where it failed to emulate.
    fn inject_int3(&mut self) -> Result<()> {
        if self.machine.capabilities()?.int3 == Int3::Unemulated {
            let mut registers = self.context().cpu.registers()?;
            registers.rip = registers.rip.wrapping_add(1);
            self.context().cpu.set_registers(&registers)?;
        }
        self.context().cpu.inject(Exception { vector: 3, error_code: None, address: None })
    }

    /// The back end can't execute the instruction at the program counter.
    pub(crate) fn unemulated(&mut self) -> Result<Flow> {
        let pc = self.context().cpu.registers()?.rip;
        if self.machine.site_at(pc).is_some_and(|kind| matches!(kind, SiteKind::Planted(_))) {
            return self.hit(pc);
        }
        let code = self.code_at(pc)?;
        if code.first() == Some(&INT3) {
            return self.foreign_int3(pc);
        }
        match self.emulate(&code)? {
            Emulation::Done | Emulation::Repeat => self.after_instruction(),
            Emulation::Fault(exception) => {
                self.context().cpu.inject(exception)?;
                Ok(Flow::Continue)
            }
            Emulation::Unsupported => {
                self.crash(CrashReason::Unemulated { disassembly: x86::disassemble(&code, pc), bytes: code })
            }
        }
    }

    /// The program counter moved without the CPU: look whether it moved to a breakpoint that only stepping finds.
    fn after_instruction(&mut self) -> Result<Flow> {
        self.context().passed = None;
        self.look_for_stepped()
    }

    fn look_for_stepped(&mut self) -> Result<Flow> {
        if !self.context().debug.single_step {
            return Ok(Flow::Continue);
        }
        let pc = self.context().cpu.registers()?.rip;
        let arrived = self.context().passed != Some(pc) && self.machine.site_at(pc) == Some(SiteKind::Stepped);
        if arrived { self.hit(pc) } else { Ok(Flow::Continue) }
    }

    /// A vCPU met a site: ask the breakpoints there.
    fn hit(&mut self, pc: u64) -> Result<Flow> {
        match self.decide(pc)? {
            Some(reason) => self.stop(pc, reason),
            None => self.leave_site(),
        }
    }

    /// The decision chain of every breakpoint at `pc`. All are asked; the first that says stop names the reason, unless
    /// a callback fails: that is never swallowed. Each further failure is a stop of its own.
    pub(crate) fn decide(&mut self, pc: u64) -> Result<Option<StopReason>> {
        self.context().passed = Some(pc);
        let Some((_, breakpoints)) = self.machine.breakpoints_at(pc) else { return Ok(None) };
        let mut reason = None;
        for breakpoint in breakpoints {
            match (self.ask(&breakpoint, pc)?, &reason) {
                (Some(failure @ StopReason::Exception { .. }), Some(StopReason::Exception { .. })) => {
                    if let Some(earlier) = reason.replace(failure) {
                        self.stop(pc, earlier)?;
                    }
                }
                (Some(failure @ StopReason::Exception { .. }), _) => reason = Some(failure),
                (found, None) => reason = found,
                _ => {}
            }
        }
        Ok(reason)
    }

    fn ask(&mut self, breakpoint: &Arc<Breakpoint>, pc: u64) -> Result<Option<StopReason>> {
        if !breakpoint.arrive(self.number) {
            return Ok(None);
        }
        let condition = breakpoint.condition();
        let mut failure = None;
        if let Some((_, program)) = &condition.compiled {
            let (machine, number) = (self.machine, self.number);
            let mut values =
                Values { cpu: self.context().cpu.as_mut(), view: machine.view(), system: None, number, breakpoint };
            match program.evaluate(&mut values) {
                Ok(true) => {}
                Ok(false) => return Ok(None),
                Err(error) => failure = Some(error.to_string()),
            }
        }
        if let (Some(predicate), None) = (&condition.predicate, &failure) {
            self.settle_io()?;
            let alive = Arc::new(AtomicBool::new(true));
            let hit = Hit {
                machine: self.machine.clone(),
                vcpu: self.number,
                pc,
                breakpoint: breakpoint.clone(),
                alive: alive.clone(),
            };
            self.context().cpu.step_aside();
            let engine = &self.machine.engine;
            let verdict = self.unlocked(|| {
                engine.outside(hit.vcpu, || {
                    let _inside = vcpu::enter_callback(&alive);
                    predicate.evaluate(&hit)
                })
            });
            match verdict {
                Ok(true) => {}
                Ok(false) => return Ok(None),
                Err(error) => return Ok(Some(StopReason::Exception { breakpoint: breakpoint.clone(), error })),
            }
        }
        breakpoint.count_hit();
        Ok(Some(StopReason::Breakpoint { breakpoint: breakpoint.clone(), error: failure }))
    }

    /// Executes the instruction under a breakpoint that was asked, without letting another vCPU slip past it.
    pub(crate) fn leave_site(&mut self) -> Result<Flow> {
        let Some(pc) = self.context().passed else { return Ok(Flow::Continue) };
        if self.context().cpu.registers()?.rip != pc {
            // A callback or a front end moved the program counter.
            self.context().passed = None;
            return Ok(Flow::Continue);
        }
        let Some(kind) = self.machine.site_at(pc) else {
            self.context().passed = None;
            return Ok(Flow::Continue);
        };
        let code = self.code_at(pc)?;
        loop {
            match self.emulate(&code)? {
                Emulation::Done => return self.after_instruction(),
                // One arrival, however many iterations: they end here, or when the vCPU is asked to stop.
                Emulation::Repeat if self.machine.engine.is_requested(self.number) => return Ok(Flow::Leave),
                Emulation::Repeat => {}
                Emulation::Fault(_) | Emulation::Unsupported => return self.step_over(pc, kind),
            }
        }
    }

    /// Executes the instruction at `pc` on the CPU with its breakpoint out of the way.
    fn step_over(&mut self, pc: u64, kind: SiteKind) -> Result<Flow> {
        let SiteKind::Planted(physical) = kind else {
            return match self.step_instruction(pc)? {
                Flow::Continue => self.look_for_stepped(),
                Flow::Leave => Ok(Flow::Leave),
            };
        };
        let (machine, number) = (self.machine, self.number);
        let exclusive = self.unlocked(|| machine.engine.exclusive(Owner::Vcpu(number)));
        let Some(exclusive) = exclusive.filter(|e| !e.stopped) else { return Ok(Flow::Leave) };
        let table = || machine.table.write().unwrap_or_else(|e| e.into_inner());
        table().lift(&machine.memory, physical);
        let flow = self.step_instruction(pc);
        table().replant(&machine.memory);
        drop(exclusive);
        match flow? {
            Flow::Continue => self.look_for_stepped(),
            Flow::Leave => Ok(Flow::Leave),
        }
    }

    /// Executes one instruction on the CPU, whatever breakpoints there are.
    fn step_instruction(&mut self, pc: u64) -> Result<Flow> {
        let code = self.code_at(pc)?;
        if matches!(code.first(), Some(&(HLT | PUSHF))) && self.emulate(&code)? == Emulation::Done {
            self.context().passed = None;
            return Ok(Flow::Continue);
        }
        let block_interrupts = self.machine.capabilities().is_ok_and(|c| c.block_interrupts);
        let before = self.context().cpu.registers()?;
        let mut debug = GuestDebug { single_step: true, block_interrupts, ..self.other_sites(pc)? };
        if code.first() == Some(&INT3)
            && let Some(handler) = self.gate(BREAKPOINT)?
        {
            // Entering the handler clears the trap flag, and leaves it in the frame for the guest to find.
            debug.single_step = false;
            debug.hardware.insert(0, HardwareBreakpoint::execute(handler));
            debug.hardware.truncate(4);
        }
        self.context().armed = None;
        let mut flow = Flow::Continue;
        self.context().cpu.set_guest_debug(&debug)?;
        let mut next = None;
        loop {
            let exit = match next.take() {
                Some(exit) => exit,
                None => self.context().cpu.run()?,
            };
            match exit {
                Exit::Debug(_) => {
                    self.count(crate::stats::ExitKind::Debug);
                    break;
                }
                Exit::Interrupted => {
                    if self.context().cpu.registers()?.rip != pc {
                        break;
                    }
                    if self.machine.engine.is_requested(self.number) {
                        flow = Flow::Leave;
                        break;
                    }
                    self.context().cpu.set_guest_debug(&debug)?;
                }
                Exit::Unemulated => {
                    self.count(crate::stats::ExitKind::Unemulated);
                    // Elsewhere it is the first instruction of an exception's handler, for the next entry to see to.
                    if self.context().cpu.registers()?.rip == pc {
                        flow = self.emulate_or_crash(pc)?;
                    }
                    break;
                }
                other => {
                    if self.handle(other)? == Flow::Leave {
                        flow = Flow::Leave;
                    }
                    next = self.context().cpu.complete_io()?;
                    if next.is_none() {
                        break;
                    }
                }
            }
        }
        self.clear_trap_flag(&before, pc)?;
        self.context().armed = None;
        let moved = self.context().cpu.registers()?.rip != pc;
        if moved || flow == Flow::Continue && !is_repeated(&code) {
            self.context().passed = None;
        }
        Ok(flow)
    }

    /// Where the guest's gate for an interrupt vector leads (Intel SDM 3A, 6.14.1).
    fn gate(&mut self, vector: u64) -> Result<Option<u64>> {
        let system = self.context().cpu.system_registers()?;
        let mut gate = [0; 16];
        let address = system.idt.base.wrapping_add(vector * 16);
        if u64::from(system.idt.limit) < vector * 16 + 15
            || self.machine.view().read(&PagingMode::from(&system), address, &mut gate).is_err()
        {
            return Ok(None);
        }
        let [a, b, _, _, _, _, c, d, e, f, g, h, ..] = gate;
        Ok(Some(u64::from_le_bytes([a, b, c, d, e, f, g, h])))
    }

    /// The breakpoints elsewhere: a step that raises an exception runs into its handler.
    fn other_sites(&self, pc: u64) -> Result<GuestDebug> {
        if self.machine.generation() == 0 {
            return Ok(GuestDebug::default());
        }
        let capabilities = self.machine.capabilities()?;
        let mut debug = self.machine.table.read().unwrap_or_else(|e| e.into_inner()).guest_debug(&capabilities);
        debug.hardware.retain(|b| b.address != pc);
        Ok(debug)
    }

    fn emulate_or_crash(&mut self, pc: u64) -> Result<Flow> {
        let code = self.code_at(pc)?;
        match self.emulate(&code)? {
            Emulation::Done | Emulation::Repeat => Ok(Flow::Continue),
            Emulation::Fault(exception) => {
                self.context().cpu.inject(exception)?;
                Ok(Flow::Continue)
            }
            Emulation::Unsupported if code.first() == Some(&INT3) => self.foreign_int3(pc),
            Emulation::Unsupported => {
                self.crash(CrashReason::Unemulated { disassembly: x86::disassemble(&code, pc), bytes: code })
            }
        }
    }

    /// Disarms the step; the trap flag that it set must not stay in the guest's flags.
    fn clear_trap_flag(&mut self, before: &Registers, pc: u64) -> Result<()> {
        let cpu = &mut self.context().cpu;
        cpu.set_guest_debug(&GuestDebug::default())?;
        if before.rflags & RFLAGS_TF == 0 {
            let mut after = cpu.registers()?;
            if after.rflags & RFLAGS_TF != 0 && after.rip != pc {
                after.rflags &= !RFLAGS_TF;
                cpu.set_registers(&after)?;
            }
            self.clear_saved_trap_flag(before, &after)?;
        }
        Ok(())
    }

    /// An exception saves the trap flag of the step that raised it, and the guest's IRET would bring it to life. The
    /// frame (Intel SDM 3A, 6.14.2) lies behind an error code, perhaps, and what the handler has pushed since.
    fn clear_saved_trap_flag(&mut self, before: &Registers, after: &Registers) -> Result<()> {
        const LONGEST_INSTRUCTION: u64 = 15;
        let (old, new) = (before.general[RSP], after.general[RSP]);
        if new == old {
            return Ok(());
        }
        let mode = self.paging_mode()?;
        let view = self.machine.view();
        let mut stack = [0; 7 * 8];
        if view.read(&mode, new, &mut stack).is_err() {
            return Ok(());
        }
        let words: Vec<u64> = stack.chunks_exact(8).map(|w| u64::from_le_bytes(w.try_into().expect("8"))).collect();
        for (frame, at) in words.windows(5).zip((new..).step_by(8)) {
            let [rip, _cs, rflags, rsp, _ss] = frame else { continue };
            let changed = rflags ^ before.rflags;
            if rip.wrapping_sub(before.rip) <= LONGEST_INSTRUCTION && *rsp == old && changed & !RFLAGS_RF == RFLAGS_TF {
                view.write(&mode, at.wrapping_add(16), &(rflags & !RFLAGS_TF).to_le_bytes())?;
            }
        }
        Ok(())
    }

    /// A step that a front end asked for: one instruction, then an event.
    pub(crate) fn step_by_plan(&mut self) -> Result<()> {
        if self.resume_call()? == Flow::Leave {
            return Ok(());
        }
        let pc = self.context().cpu.registers()?.rip;
        let flow = match self.machine.site_at(pc) {
            Some(kind) => {
                if self.context().passed != Some(pc)
                    && let Some(reason) = self.decide(pc)?
                {
                    self.stop(pc, reason)?;
                    return Ok(());
                }
                self.step_over(pc, kind)?
            }
            None => self.step_instruction(pc)?,
        };
        if flow == Flow::Leave {
            return Ok(());
        }
        let pc = self.context().cpu.registers()?.rip;
        let arrived = self.machine.site_at(pc).is_some() && self.context().passed != Some(pc);
        let found = if arrived { self.decide(pc)? } else { None };
        self.stop(pc, found.unwrap_or(StopReason::Step))?;
        Ok(())
    }

    fn paging_mode(&mut self) -> Result<PagingMode> {
        Ok(PagingMode::from(&self.context().cpu.system_registers()?))
    }

    /// The guest's own code at `pc`: up to 15 bytes, as many as are mapped.
    fn code_at(&mut self, pc: u64) -> Result<Vec<u8>> {
        let mode = self.paging_mode()?;
        let view = self.machine.view();
        let mut code = [0u8; 15];
        if view.read(&mode, pc, &mut code).is_ok() {
            return Ok(code.to_vec());
        }
        let first = usize::try_from(0x1000 - (pc & 0xfff)).expect("a page").min(15);
        Ok(if view.read(&mode, pc, &mut code[..first]).is_ok() { code[..first].to_vec() } else { Vec::new() })
    }

    /// Executes the instruction `code` at the program counter in the emulator, on the vCPU's real state.
    fn emulate(&mut self, code: &[u8]) -> Result<Emulation> {
        if code.is_empty() {
            return Ok(Emulation::Unsupported);
        }
        let needs = x86::needs(code);
        let machine = self.machine;
        let cpu = self.context().cpu.as_mut();
        let registers = cpu.registers()?;
        if registers.rflags & RFLAGS_TF != 0 {
            return Ok(Emulation::Unsupported);
        }
        let mut state = x86::CpuState { registers, system: cpu.system_registers()?, ..Default::default() };
        if needs.fpu {
            fetch_fpu(cpu, &mut state)?;
        }
        let before = state;
        let mode = PagingMode::from(&state.system);
        let user = state.system.cs.selector & 3 == 3;
        if code[0] == HLT && !user {
            // A step would not do: KVM on PVM never wakes a vCPU that halted while it was stepped.
            state.registers.rip = state.registers.rip.wrapping_add(1);
            cpu.set_registers(&state.registers)?;
            cpu.halt()?;
            return Ok(Emulation::Done);
        }
        let mut bus = GuestBus { view: machine.view(), memory: &machine.memory, mode, user };
        let outcome = x86::step_bytes(&mut state, &mut bus, code);
        if state.fpu != before.fpu {
            cpu.set_fpu(&state.fpu)?;
        }
        match outcome {
            x86::Outcome::Done | x86::Outcome::Repeat => {
                let repeat = outcome == x86::Outcome::Repeat;
                cpu.set_registers(&state.registers)?;
                if state.ymm_high != before.ymm_high {
                    cpu.set_ymm_high(&state.ymm_high)?;
                }
                if needs.writes_system {
                    cpu.set_system_registers(&state.system)?;
                }
                Ok(if repeat { Emulation::Repeat } else { Emulation::Done })
            }
            x86::Outcome::Fault { vector, error_code, address } => {
                Ok(Emulation::Fault(Exception { vector, error_code, address }))
            }
            x86::Outcome::Unsupported => Ok(Emulation::Unsupported),
        }
    }
}

/// XCR0: the upper halves of the YMM registers are enabled.
const XCR0_AVX: u64 = 4;

/// The vector state that an SSE, x87 or XSAVE instruction works on.
fn fetch_fpu(cpu: &mut dyn Vcpu, state: &mut x86::CpuState) -> Result<()> {
    state.fpu = cpu.fpu()?;
    state.xcr0 = cpu.xcr0()?;
    state.tsc_aux = cpu.msr(IA32_TSC_AUX).unwrap_or(0);
    if state.xcr0 & XCR0_AVX != 0 {
        state.ymm_high = cpu.ymm_high()?;
    }
    Ok(())
}

/// Guest-virtual memory for the emulator, with the permissions of the guest's page tables.
struct GuestBus<'a> {
    view: View<'a>,
    memory: &'a crate::memory::GuestMemory,
    mode: PagingMode,
    user: bool,
}

/// Bits of a page fault's error code (Intel SDM 3A, 4.7).
const FAULT_PRESENT: u32 = 1;
const FAULT_WRITE: u32 = 2;
const FAULT_USER: u32 = 4;

impl GuestBus<'_> {
    fn check(&self, address: u64, length: usize, write: bool) -> Result<(), x86::BusError> {
        let mut done = 0u64;
        while done < length as u64 {
            let at = address.wrapping_add(done);
            let code = if write { FAULT_WRITE } else { 0 } | if self.user { FAULT_USER } else { 0 };
            let page = paging::translate(self.memory, &self.mode, at)
                .map_err(|_| x86::BusError::PageFault { address: at, error_code: code })?;
            let write_protect = self.user || self.mode.cr0 & crate::registers::CR0_WP != 0;
            if (write && !page.writable && write_protect) || (self.user && !page.user) {
                return Err(x86::BusError::PageFault { address: at, error_code: code | FAULT_PRESENT });
            }
            let piece = page.remaining.min(length as u64 - done);
            if !self.memory.contains(page.physical, piece) {
                return Err(x86::BusError::NotRam);
            }
            done += piece;
        }
        Ok(())
    }
}

impl x86::Bus for GuestBus<'_> {
    fn read(&mut self, address: u64, buffer: &mut [u8]) -> Result<(), x86::BusError> {
        self.check(address, buffer.len(), false)?;
        self.view.read(&self.mode, address, buffer).map_err(|_| x86::BusError::NotRam)
    }

    fn write(&mut self, address: u64, data: &[u8]) -> Result<(), x86::BusError> {
        self.check(address, data.len(), true)?;
        self.view.write(&self.mode, address, data).map_err(|_| x86::BusError::NotRam)
    }

    fn fetch(&mut self, address: u64, buffer: &mut [u8; 15]) -> usize {
        if self.view.read(&self.mode, address, buffer).is_ok() { buffer.len() } else { 0 }
    }

    fn compare_exchange(
        &mut self,
        address: u64,
        size: usize,
        expected: u128,
        new: u128,
    ) -> Result<u128, x86::BusError> {
        self.check(address, size, true)?;
        let page = paging::translate(self.memory, &self.mode, address).map_err(|_| x86::BusError::NotRam)?;
        self.memory.compare_exchange(page.physical, size, expected, new).ok_or(x86::BusError::NotRam)
    }

    fn read_tsc(&mut self) -> u64 {
        // SAFETY: RDTSC has no effect but its result.
        unsafe { std::arch::x86_64::_rdtsc() }
    }
}

/// A stopped vCPU's values for a condition.
struct Values<'a> {
    cpu: &'a mut dyn Vcpu,
    view: View<'a>,
    system: Option<SystemRegisters>,
    number: u32,
    breakpoint: &'a Breakpoint,
}

impl Values<'_> {
    fn system(&mut self) -> Result<SystemRegisters> {
        if self.system.is_none() {
            self.system = Some(self.cpu.system_registers()?);
        }
        Ok(self.system.expect("just set"))
    }
}

impl ConditionContext for Values<'_> {
    fn register(&mut self, id: RegisterId) -> Result<u64, EvaluateError> {
        let value = if id.is_general() {
            self.cpu.registers().map(|r| r.get(id).expect("a general register"))
        } else {
            self.system().map(|s| s.get(id).expect("a system register"))
        };
        value.map_err(|e| EvaluateError::Register(Box::new(e)))
    }

    fn read(&mut self, address: u64, buffer: &mut [u8]) -> Result<(), GuestFault> {
        let fault = GuestFault { address, length: buffer.len() as u64, is_virtual: true };
        let mode = PagingMode::from(&self.system().map_err(|_| fault)?);
        self.view.read(&mode, address, buffer)
    }

    fn vcpu(&self) -> u32 {
        self.number
    }

    fn hits(&self) -> u64 {
        self.breakpoint.hits()
    }

    fn reached(&self) -> u64 {
        self.breakpoint.reached()
    }
}
