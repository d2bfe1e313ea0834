//! What a vCPU's thread does at breakpoints, while stepping, and at instructions that its back end can't execute.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

pub(super) use super::breakpoints::INT3;
use super::breakpoints::{Breakpoint, Hit, SiteKind};
use super::bus::GuestBus;
use super::engine::{Owner, Status};
use super::stop::{Event, StopReason};
use super::values::Values;
use super::watchpoints::Touch;
use super::whole::Whole;
use crate::backend::{Access, DebugEvent, Exception, Exit, GuestDebug, HardwareBreakpoint, Int3, Vcpu};
use crate::error::{CrashReason, Result};
use crate::paging::{self, PagingMode};
use crate::registers::{RCX, RFLAGS_RF, RFLAGS_TF, RSP, Registers};
use crate::vcpu::{self, Flow, Seat};
use crate::x86;

/// MSR_TSC_AUX, what RDTSCP returns in ECX.
const IA32_TSC_AUX: u32 = 0xc000_0103;

/// Opcodes that a CPU does not step as it should: HLT may sleep on, and PUSHF pushes the trap flag of the step.
const HLT: u8 = 0xf4;
const PUSHF: u8 = 0x9c;
/// The vector of `int3`.
const BREAKPOINT: u64 = 3;
/// DR0 to DR3.
const DEBUG_REGISTERS: usize = 4;

/// Whether the instruction is a string instruction that REP repeats: it stays where it is until its count is over.
pub(super) fn is_repeated(code: &[u8]) -> bool {
    let is_prefix = |byte: &&u8| matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x4f | 0x64..=0x67 | 0xf2 | 0xf3);
    let prefixes = code.iter().take_while(is_prefix).count();
    code[..prefixes].iter().any(|byte| matches!(byte, 0xf2 | 0xf3))
        && matches!(code.get(prefixes), Some(0x6c..=0x6f | 0xa4..=0xa7 | 0xaa..=0xaf))
}

/// DR6.BS: a #DB is a trap flag's.
const DR6_SINGLE_STEP: u64 = 1 << 14;

/// How the instruction at the program counter was executed, or why not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Emulation {
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
        let is_guests = event.single_step && !self.context().debug.single_step;
        if is_guests {
            // The guest traces itself; with our breakpoints in the debug registers its #DB comes here.
            self.context().cpu.inject(Exception { vector: 1, error_code: None, address: Some(DR6_SINGLE_STEP) })?;
        }
        if self.note_hardware(&event)? {
            // What it was doing is done; a breakpoint where it is now is met at the next entry.
            return self.after_instruction();
        }
        if is_guests {
            // A breakpoint where it is now is met when the guest's handler has returned.
            return Ok(Flow::Continue);
        }
        if self.machine.site_at(pc).is_some() {
            if self.context().passed == Some(pc) && !event.software {
                return self.leave_site();
            }
            return self.hit(pc);
        }
        if event.software { self.foreign_int3(pc) } else { Ok(Flow::Continue) }
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
            Emulation::Unsupported => match self.execute_whole(&code)? {
                Whole::Done => self.after_instruction(),
                Whole::Shutdown => self.crash(CrashReason::TripleFault { registers_lost: false }),
                Whole::Foreign => {
                    self.crash(CrashReason::Unemulated { disassembly: x86::disassemble(&code, pc), bytes: code })
                }
            },
        }
    }

    /// The software CPU has not got what the instruction at the program counter needs.
    pub(crate) fn missing(&mut self, what: x86::Missing) -> Result<Flow> {
        let pc = self.context().cpu.registers()?.rip;
        let bytes = self.code_at(pc)?;
        self.crash(CrashReason::Missing { what, disassembly: x86::disassemble(&bytes, pc), bytes })
    }

    /// The program counter moved without the CPU: look whether it moved to a breakpoint that only stepping finds.
    pub(super) fn after_instruction(&mut self) -> Result<Flow> {
        self.context().passed = None;
        self.look_for_stepped()
    }

    pub(super) fn look_for_stepped(&mut self) -> Result<Flow> {
        if !self.context().debug.single_step {
            return Ok(Flow::Continue);
        }
        let pc = self.context().cpu.registers()?.rip;
        let arrived = self.context().passed != Some(pc) && self.machine.site_at(pc) == Some(SiteKind::Stepped);
        if arrived { self.hit(pc) } else { Ok(Flow::Continue) }
    }

    /// A vCPU met a site: ask the breakpoints there.
    pub(super) fn hit(&mut self, pc: u64) -> Result<Flow> {
        let reasons = self.decide(pc)?;
        if !reasons.is_empty() {
            return self.stop_for(pc, reasons);
        }
        self.context().burst.after_hit.note_hit();
        self.leave_site()
    }

    /// A vCPU that is asked to its safe point, and has just come to a breakpoint, meets it first: gdb takes a thread that
    /// stands at a breakpoint for one that has reported it, and steps over it unasked. Where something waits to be
    /// delivered, or an interrupt to end HLT, it has not come there yet.
    pub(crate) fn meet_before_safe_point(&mut self) -> Result<()> {
        let machine = self.machine;
        if machine.generation() == 0 || matches!(machine.engine.status(), Status::Ended(_)) {
            return Ok(());
        }
        self.settle_io()?;
        let context = self.context();
        let is_between = context.calls.is_empty() && context.watching.touches.is_empty();
        let pc = context.cpu.registers()?.rip;
        let has_come = context.passed != Some(pc) && machine.site_at(pc).is_some();
        if is_between && has_come && context.cpu.is_at_instruction()? {
            self.hit(pc)?;
        }
        Ok(())
    }

    /// The decision chain of every breakpoint at `pc`; what those say that stop. All are asked.
    pub(crate) fn decide(&mut self, pc: u64) -> Result<Vec<StopReason>> {
        self.context().passed = Some(pc);
        let is_same = self.context().asks_newer_at.take() == Some(pc);
        let asked = if is_same { self.context().asked } else { 0 };
        let Some((_, breakpoints)) = self.machine.breakpoints_at(pc) else { return Ok(Vec::new()) };
        let of_users = breakpoints.iter().filter(|b| b.options.internal.is_none());
        self.context().asked = of_users.map(|b| b.id).max().unwrap_or(asked);
        let mut reasons = Vec::new();
        for breakpoint in breakpoints.into_iter().filter(|b| b.id > asked) {
            reasons.extend(self.ask(&breakpoint, pc, None)?);
        }
        Ok(reasons)
    }

    /// One stop for what several breakpoints said. A callback that failed is never swallowed: the first names the
    /// stop, and each further failure is a stop of its own.
    pub(super) fn stop_for(&mut self, pc: u64, reasons: Vec<StopReason>) -> Result<Flow> {
        let is_failure = |reason: &StopReason| matches!(reason, StopReason::Exception { .. });
        let (failures, mut others): (Vec<_>, Vec<_>) = reasons.into_iter().partition(is_failure);
        if failures.is_empty() && !others.is_empty() {
            let reason = others.remove(0);
            self.machine.engine.stop(Event { vcpu: self.number, pc, reason, others });
        }
        for failure in failures {
            self.stop(pc, failure)?;
        }
        Ok(Flow::Leave)
    }

    /// The decision chain of one breakpoint, or of a watchpoint that was touched.
    pub(super) fn ask(
        &mut self,
        breakpoint: &Arc<Breakpoint>,
        pc: u64,
        touch: Option<Touch>,
    ) -> Result<Option<StopReason>> {
        if !breakpoint.arrive(self.number) {
            return Ok(None);
        }
        if let Some(stack) = breakpoint.options.internal {
            let is_there = self.context().cpu.registers()?.general[RSP] >= stack;
            return Ok(is_there.then_some(StopReason::Step));
        }
        let condition = breakpoint.condition();
        let mut failure = None;
        if condition.has_program() {
            let (machine, number) = (self.machine, self.number);
            let mut values = Values::new(self.context().cpu.as_mut(), machine.view(), number, breakpoint);
            match condition.evaluate(&mut values) {
                Ok(true) => {}
                Ok(false) => return Ok(None),
                Err(error) => failure = Some(error.to_string()),
            }
        }
        if let (Some(predicate), None) = (&condition.predicate, &failure) {
            self.settle_io()?;
            self.bring_state_back()?;
            let alive = Arc::new(AtomicBool::new(true));
            let hit = Hit {
                machine: self.machine.clone(),
                vcpu: self.number,
                pc,
                breakpoint: breakpoint.clone(),
                touch: touch.clone(),
                alive: alive.clone(),
            };
            self.context().cpu.step_aside();
            let engine = &self.machine.engine;
            let since = self.sampler.begin();
            let verdict = self.unlocked(|| {
                engine.outside(hit.vcpu, || {
                    let _inside = vcpu::enter_callback(&alive);
                    predicate.evaluate(&hit)
                })
            });
            self.sampler.called(since);
            match verdict {
                Ok(true) => {}
                Ok(false) => return Ok(None),
                Err(error) => return Ok(Some(StopReason::Exception { breakpoint: breakpoint.clone(), error })),
            }
        }
        breakpoint.count_hit();
        let (breakpoint, error) = (breakpoint.clone(), failure);
        Ok(Some(match touch {
            Some(touch) => StopReason::Watchpoint { breakpoint, touch, error },
            None => StopReason::Breakpoint { breakpoint, error },
        }))
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
                Emulation::Repeat => {}
                Emulation::Fault(_) | Emulation::Unsupported => {
                    let flow = self.step_over(pc, kind)?;
                    if flow == Flow::Leave || self.context().passed != Some(pc) {
                        return Ok(flow);
                    }
                }
            }
            // One arrival, however many iterations: they end here, or when the vCPU is asked to stop.
            if self.judge()? == Flow::Leave || self.machine.engine.is_requested(self.number) {
                return Ok(Flow::Leave);
            }
        }
    }

    /// Executes the instruction at `pc` on the CPU with its breakpoint out of the way.
    pub(super) fn step_over(&mut self, pc: u64, kind: SiteKind) -> Result<Flow> {
        let SiteKind::Planted(physical) = kind else {
            return match self.step_instruction(pc, true)? {
                Flow::Continue => self.look_for_stepped(),
                Flow::Leave => Ok(Flow::Leave),
            };
        };
        let (machine, number) = (self.machine, self.number);
        let exclusive = self.unlocked(|| machine.engine.exclusive(Owner::Vcpu(number)));
        let Some(exclusive) = exclusive.filter(|e| !e.stopped) else { return Ok(Flow::Leave) };
        let table = || machine.table.write().unwrap_or_else(|e| e.into_inner());
        table().lift(&machine.memory, physical);
        let flow = self.step_instruction(pc, true);
        table().replant(&machine.memory);
        drop(exclusive);
        match flow? {
            Flow::Continue => self.look_for_stepped(),
            Flow::Leave => Ok(Flow::Leave),
        }
    }

    /// Executes one instruction on the CPU, whatever breakpoints there are. Without `hold_interrupts`, one that waits is
    /// taken.
    pub(super) fn step_instruction(&mut self, pc: u64, hold_interrupts: bool) -> Result<Flow> {
        let code = self.code_at(pc)?;
        if let Some(flow) = self.step_by_emulation(&code, hold_interrupts)? {
            return Ok(flow);
        }
        let block_interrupts = hold_interrupts && self.machine.capabilities().is_ok_and(|c| c.block_interrupts);
        let before = self.context().cpu.registers()?;
        let expected = self.expect(&code)?;
        let mut debug = GuestDebug { single_step: true, block_interrupts, ..self.other_sites(pc)? };
        self.look_out(&mut debug, &code, &before)?;
        let keeps_trap_flag = self.restores_trap_flag(&code, &before)?;
        self.context().armed = None;
        let (mut flow, mut is_trapped, mut is_raised) = (Flow::Continue, false, false);
        self.context().cpu.set_guest_debug(&debug)?;
        let mut next = None;
        loop {
            let exit = match next.take() {
                Some(exit) => exit,
                None => self.context().cpu.run()?,
            };
            match exit {
                Exit::Debug(event) => {
                    self.count(crate::stats::ExitKind::Debug);
                    is_trapped = event.single_step;
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
                    if is_raised || self.context().cpu.registers()?.rip != pc {
                        break;
                    }
                    let handler;
                    (flow, handler) = self.emulate_or_crash(pc)?;
                    let Some(handler) = handler else { break };
                    // The exception is given: the step ends in its handler.
                    is_raised = true;
                    debug.hardware.insert(0, HardwareBreakpoint::execute(handler));
                    debug.hardware.truncate(DEBUG_REGISTERS);
                    self.context().cpu.set_guest_debug(&debug)?;
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
        self.clear_trap_flag(&before, pc, keeps_trap_flag)?;
        self.clear_flag_of_syscall(&code, &before)?;
        if is_trapped && before.rflags & RFLAGS_TF != 0 {
            self.give_trap(&code, &before)?;
        }
        self.context().armed = None;
        let mut after = self.context().cpu.registers()?;
        if after.rip == pc && is_repeated(&code) && before.general[RCX] != 0 && after.general[RCX] == 0 {
            // Some CPUs find out only in another step that nothing is left.
            after.rip = pc.wrapping_add(x86::length(&code).unwrap_or(0) as u64);
            // Set between iterations, it would hide a debug register's breakpoint at the next instruction.
            after.rflags &= !RFLAGS_RF;
            self.context().cpu.set_registers(&after)?;
        }
        let moved = after.rip != pc;
        if let Some(expected) = expected.filter(|_| moved || flow == Flow::Continue) {
            self.note_expected(expected, &code)?;
        }
        if moved || flow == Flow::Continue && !is_repeated(&code) {
            self.context().passed = None;
        }
        Ok(flow)
    }

    /// What a step by the trap flag would not show as it is: HLT, whose sleep it ends, PUSHF, which pushes the flag; and
    /// on a KVM that emulates the guest's kernel what registers and memory are all of, since it makes iterations of a
    /// repeated instruction one, and does not trap after each (RDFSBASE, RDRAND, SWAPGS).
    fn step_by_emulation(&mut self, code: &[u8], hold_interrupts: bool) -> Result<Option<Flow>> {
        let capabilities = self.machine.capabilities()?;
        let is_inexact = !capabilities.native_ring0 && !capabilities.exact_steps;
        let is_iterated = is_repeated(code) && is_inexact;
        let is_shown_wrongly = matches!(code.first(), Some(&(HLT | PUSHF)));
        let is_emulated = is_iterated || is_shown_wrongly || is_inexact && hold_interrupts;
        if !is_emulated {
            return Ok(None);
        }
        match self.emulate_part(code, is_iterated)? {
            Emulation::Done => self.context().passed = None,
            Emulation::Repeat => {}
            Emulation::Unsupported if is_inexact && x86::is_swapgs(code) => match self.execute_whole(code)? {
                Whole::Done => self.context().passed = None,
                Whole::Shutdown | Whole::Foreign => return Ok(None),
            },
            Emulation::Fault(_) | Emulation::Unsupported => return Ok(None),
        }
        Ok(Some(Flow::Continue))
    }

    /// Where the guest's gate for an interrupt vector leads (Intel SDM 3A, 6.14.1).
    pub(super) fn gate(&mut self, vector: u64) -> Result<Option<u64>> {
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
        debug.hardware.retain(|b| b.access != Access::Execute || b.address != pc);
        Ok(debug)
    }

    /// Emulates the instruction of a step; with the handler of what it raises, if that has one.
    fn emulate_or_crash(&mut self, pc: u64) -> Result<(Flow, Option<u64>)> {
        let code = self.code_at(pc)?;
        match self.emulate(&code)? {
            Emulation::Done | Emulation::Repeat => Ok((Flow::Continue, None)),
            Emulation::Fault(exception) => {
                self.context().cpu.inject(exception)?;
                Ok((Flow::Continue, self.gate(exception.vector.into())?))
            }
            Emulation::Unsupported if code.first() == Some(&INT3) => {
                let handler = self.gate(BREAKPOINT)?;
                Ok((self.foreign_int3(pc)?, handler))
            }
            Emulation::Unsupported => {
                let crash = match self.execute_whole(&code)? {
                    Whole::Done => return Ok((Flow::Continue, None)),
                    Whole::Shutdown => CrashReason::TripleFault { registers_lost: false },
                    Whole::Foreign => CrashReason::Unemulated { disassembly: x86::disassemble(&code, pc), bytes: code },
                };
                Ok((self.crash(crash)?, None))
            }
        }
    }

    /// Disarms the step; the trap flag that it set must not stay in the guest's flags, and one that the guest has set
    /// itself must.
    fn clear_trap_flag(&mut self, before: &Registers, pc: u64, keeps: bool) -> Result<()> {
        let is_exact = self.machine.capabilities()?.exact_steps;
        let cpu = &mut self.context().cpu;
        cpu.set_guest_debug(&GuestDebug::default())?;
        if before.rflags & RFLAGS_TF == 0 && !is_exact {
            let mut after = cpu.registers()?;
            let flag = if keeps { RFLAGS_TF } else { 0 };
            if after.rflags & RFLAGS_TF != flag && after.rip != pc {
                after.rflags = after.rflags & !RFLAGS_TF | flag;
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

    /// A step that a front end asked for: one instruction, or as many as leave a range of addresses; then an event.
    pub(crate) fn step_by_plan(&mut self, range: Range<u64>) -> Result<()> {
        if self.resume_call()? == Flow::Leave {
            return Ok(());
        }
        let mut pc = self.context().cpu.registers()?.rip;
        if self.machine.site_at(pc).is_some() && self.context().passed != Some(pc) {
            let reasons = self.decide(pc)?;
            if !reasons.is_empty() {
                self.stop_for(pc, reasons)?;
                return Ok(());
            }
        }
        loop {
            let flow = match self.machine.site_at(pc) {
                Some(kind) => self.step_over(pc, kind)?,
                None => self.step_instruction(pc, true)?,
            };
            self.settle_io()?;
            if self.judge()? == Flow::Leave || flow == Flow::Leave {
                return Ok(());
            }
            pc = self.context().cpu.registers()?.rip;
            let arrived = self.machine.site_at(pc).is_some() && self.context().passed != Some(pc);
            let reasons = if arrived { self.decide(pc)? } else { Vec::new() };
            if !reasons.is_empty() {
                self.stop_for(pc, reasons)?;
                return Ok(());
            }
            if !range.contains(&pc) {
                self.stop(pc, StopReason::Step)?;
                return Ok(());
            }
            if self.machine.engine.is_requested(self.number) {
                return Ok(());
            }
        }
    }

    pub(super) fn paging_mode(&mut self) -> Result<PagingMode> {
        Ok(PagingMode::from(&self.context().cpu.system_registers()?))
    }

    /// The guest's own code at `pc`: up to 15 bytes, as many as are mapped.
    pub(super) fn code_at(&mut self, pc: u64) -> Result<Vec<u8>> {
        let mode = self.paging_mode()?;
        let view = self.machine.view();
        let mut code = [0u8; 15];
        if view.read(&mode, pc, &mut code).is_ok() {
            return Ok(code.to_vec());
        }
        let first = usize::try_from(0x1000 - (pc & 0xfff)).expect("a page").min(15);
        Ok(if view.read(&mode, pc, &mut code[..first]).is_ok() { code[..first].to_vec() } else { Vec::new() })
    }

    /// The state that an instruction works on.
    pub(super) fn emulator_state(&mut self, code: &[u8]) -> Result<x86::CpuState> {
        let cpu = self.context().cpu.as_mut();
        let (registers, system) = (cpu.registers()?, cpu.system_registers()?);
        let mut state = x86::CpuState { registers, system, ..Default::default() };
        if x86::needs(code).fpu {
            fetch_fpu(cpu, &mut state)?;
        }
        Ok(state)
    }

    /// Executes the instruction `code` at the program counter in the emulator, on the vCPU's real state.
    pub(super) fn emulate(&mut self, code: &[u8]) -> Result<Emulation> {
        self.emulate_part(code, false)
    }

    /// The same; of a repeated string instruction one iteration, if so chosen.
    fn emulate_part(&mut self, code: &[u8], one_iteration: bool) -> Result<Emulation> {
        if code.is_empty() || self.context().cpu.registers()?.rflags & RFLAGS_TF != 0 {
            return Ok(Emulation::Unsupported);
        }
        let needs = x86::needs(code);
        let watches = self.watched();
        let machine = self.machine;
        let mut state = self.emulator_state(code)?;
        let cpu = self.context().cpu.as_mut();
        let before = state;
        let mode = PagingMode::from(&state.system);
        let user = state.system.cs.selector & 3 == 3;
        if code[0] == HLT && !user {
            // A step would not do: KVM on PVM never wakes a vCPU that halted while it was stepped.
            state.registers.rip = state.registers.rip.wrapping_add(1);
            cpu.set_registers(&state.registers)?;
            cpu.halt()?;
            // It sleeps where the CPU is entered.
            self.context().watching.enter_next();
            return Ok(Emulation::Done);
        }
        let (view, memory) = (machine.view(), &machine.memory);
        let recorder = Default::default();
        let watches = &watches;
        let mut bus = GuestBus { view, memory, mode, user, watches, recorder, one_iteration, is_trial: false };
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
                let touches = bus.touches();
                self.context().watching.touches.extend(touches);
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
