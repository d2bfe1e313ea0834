//! After a hit that stops nobody: instead of entering the guest again, whose next hit would be an exit, the software CPU
//! goes on from the vCPU's state. It looks out for the breakpoints itself, and each one that it meets is judged in place, by
//! the same chain as on KVM, and its instruction executed from the guest's own bytes. A stay goes on over many hits, until
//! something foreign comes, somebody asks for the vCPU, or it was long enough.
//!
//! A KVM that emulates the guest's kernel is slower than the software CPU at all instructions. Where the kernel runs on
//! the processor, the time from hit to hit decides: [`Worth`] compares it with and without a stay, and a stay ends
//! where the next hit is further away than it is on KVM.
//!
//! The other vCPUs run meanwhile: locked instructions are the host's own or are left to KVM. Code that another vCPU
//! changes is looked at anew where a stay begins, which is no later than the next serializing instruction. Interrupts
//! wait until a stay is over; then KVM sees to the next few hits, so that none is kept out for ever.

use super::stepping::is_repeated;
use crate::backend::{Exit, Vcpu};
use crate::burst::{Few, Judgement, NOT_AVAILABLE, Worth, counts_zeros, ticks};
use crate::error::Result;
use crate::vcpu::{Context, Flow, Seat};
use crate::x86::{Cpu, CpuExit, DebugOptions, Nothing, State};

/// Instructions between two looks at whether somebody asks for the vCPU, and at the time.
const CHUNK: u64 = 10_000;
/// The same, where the next hit may be too far away.
const CHUNK_OF_NATIVE: u64 = 1_000;
/// The most instructions of a stay.
const LONGEST: u64 = 200_000;
/// The most hits of a stay. A prime number, so that stays in a loop do not all end at the same place of it.
const MOST_HITS: u32 = 1021;
/// After a stay so many hits are KVM's; the number goes round, for the same reason.
const HITS_BETWEEN: u32 = 3;
/// The longest stay, in milliseconds: callables may take their time, and the software CPU itself may be slow.
const LONGEST_TIME: u64 = 5;
/// The frequency of the time stamp counter, in kHz, where KVM does not tell it.
const SLOW_TSC: u32 = 1_000_000;
/// Instructions that a hit within a stay is worth: it saves an exit and an entry.
const WORTH_OF_HIT: u64 = 32;
/// Where stays may not pay, each is judged by itself.
const OF_STAYS: Judgement = Judgement { enough: 1, most_credit: 8, first_pause: 8 };

/// What a vCPU keeps for such stays.
#[derive(Default)]
pub(crate) struct AfterHit {
    /// A hit has just stopped nobody.
    is_due: bool,
    /// When the hit before it had, if nothing but hits and steps has left the guest since.
    last: Option<u64>,
    /// Hits that are KVM's before the next stay, and how many they were the last time.
    to_pass: u32,
    last_passed: u32,
    few: Few,
    /// By the time from hit to hit.
    worth: Worth,
    /// The most ticks of the time stamp counter that a stay may last.
    longest: Option<u64>,
    /// The generation of the breakpoint table that the software CPU looks out for.
    generation: u64,
    /// The one that there is.
    stay: Option<Stay>,
}

impl AfterHit {
    /// A hit stopped nobody.
    pub(super) fn note_hit(&mut self) {
        self.is_due = true;
    }

    /// Exits that were no hits have been answered.
    pub(crate) fn note_other(&mut self) {
        self.last = None;
    }

    /// Whether an exit was a hit that stopped nobody; else, whether it was a step.
    fn take_hit(&mut self, is_step: bool) -> bool {
        let is_due = std::mem::take(&mut self.is_due);
        if !is_due && !is_step {
            self.last = None;
        }
        is_due
    }

    /// Whether a stay may begin after such a hit. On a KVM that runs the guest's kernel on the processor, only where it pays.
    fn may_begin(&mut self, is_native: bool, now: u64) -> bool {
        let before = self.last.replace(now);
        let pays = !is_native || before.is_some_and(|before| self.worth.exit(now.wrapping_sub(before)));
        if self.to_pass > 0 {
            self.to_pass -= 1;
            return false;
        }
        pays && self.few.may_begin()
    }

    /// Notes what a stay came to.
    fn note(&mut self, instructions: u64, hits: u32, time: u64) {
        self.few.note(instructions + u64::from(hits) * WORTH_OF_HIT);
        self.worth.burst(hits.into(), time, &OF_STAYS);
        self.last = None;
        self.last_passed = self.last_passed % HITS_BETWEEN + 1;
        self.to_pass = self.last_passed;
    }
}

/// A stay in the software CPU.
struct Stay {
    cpu: Box<Cpu>,
    /// What the vCPU has of its state: what differs from it is to be taken back.
    known: Box<State>,
    /// [`Vcpu::changes`] since: with another count, somebody has set the vCPU's registers, and those are the true ones.
    changes: u64,
    /// Whether it has vector registers: without them, they stay as they are.
    has_vectors: bool,
    hits: u32,
    begun: u64,
    longest: u64,
    /// When the last hit was judged, and how much later the next one may come.
    last: u64,
    patience: u64,
}

impl Stay {
    /// Whether somebody has set the vCPU's registers.
    fn is_outdated(&self, vcpu: &dyn Vcpu) -> bool {
        vcpu.changes() != self.changes
    }

    /// Whether it has lasted long enough.
    fn is_over(&self, now: u64) -> bool {
        self.hits >= MOST_HITS || now.wrapping_sub(self.begun) > self.longest
    }

    /// Whether it goes on without a hit.
    fn is_patient(&self, now: u64) -> bool {
        self.cpu.instructions() < LONGEST && !self.is_over(now) && now.wrapping_sub(self.last) <= self.patience
    }

    /// Gives the vCPU all that has changed of its state.
    fn bring_back(&mut self, vcpu: &mut dyn Vcpu) -> Result<()> {
        if !self.has_vectors && self.cpu.interrupt_shadow() == self.known.interrupt_shadow {
            return self.bring_registers_back(vcpu);
        }
        let state = Box::new(self.cpu.snapshot());
        vcpu.take_back(&self.known, &state)?;
        (self.known, self.changes) = (state, vcpu.changes());
        Ok(())
    }

    /// Gives it the general registers alone, which cost next to nothing.
    fn bring_registers_back(&mut self, vcpu: &mut dyn Vcpu) -> Result<()> {
        self.known.core.registers = self.cpu.registers();
        vcpu.set_registers(&self.known.core.registers)?;
        self.changes = vcpu.changes();
        Ok(())
    }
}

/// How a hit within a stay went on.
enum Next {
    /// The stay goes on.
    Stay,
    /// It is over. Where breakpoints have been asked, their instruction is the vCPU's.
    Leave,
    /// It is over, and all of the state is the vCPU's.
    Over(Flow),
}

impl Context {
    /// The stay, and the vCPU that it is of.
    fn stay(&mut self) -> (&mut Stay, &mut dyn Vcpu) {
        (self.burst.after_hit.stay.as_mut().expect("a stay has begun"), self.cpu.as_mut())
    }
}

impl Seat<'_> {
    /// Goes on in the software CPU after an exit that was a hit which stopped nobody, if that may be and pays.
    pub(crate) fn burst_after_hit(&mut self, exit: Exit) -> Result<Flow> {
        let is_step = matches!(exit, Exit::Debug(_));
        if !self.context().burst.after_hit.take_hit(is_step) {
            return Ok(Flow::Continue);
        }
        let (is_native, begun) = (self.machine.is_native(), ticks());
        if !self.context().burst.after_hit.may_begin(is_native, begun) || !self.may_stay()? {
            return Ok(Flow::Continue);
        }
        self.settle_io()?;
        let Some(stay) = self.begin_stay(begun)? else {
            self.context().burst.after_hit.note(0, 0, ticks().wrapping_sub(begun));
            return Ok(Flow::Continue);
        };
        self.context().burst.after_hit.stay = Some(stay);
        let flow = self.stay()?;
        let burst = &mut self.context().burst;
        if let Some(Stay { cpu, hits, .. }) = burst.after_hit.stay.take() {
            burst.after_hit.note(cpu.instructions(), hits, ticks().wrapping_sub(begun));
            burst.cpu = Some(cpu);
        }
        Ok(flow)
    }

    /// Lends the vCPU's state to the software CPU, which looks out for the breakpoints that there are.
    fn begin_stay(&mut self, begun: u64) -> Result<Option<Stay>> {
        let machine = self.machine;
        let context = self.context();
        let has_vectors = context.burst.uses_vectors;
        let Some(known) = context.cpu.lend(has_vectors)? else {
            // The guest may have enabled vector registers that the software CPU has not.
            context.burst.uses_vectors = false;
            return Ok(None);
        };
        let mut cpu = context.burst.cpu.take().unwrap_or_else(|| Box::new(Cpu::new(&machine.memory)));
        cpu.lend(&known);
        let generation = machine.generation();
        let after_hit = &mut context.burst.after_hit;
        if after_hit.generation != generation {
            let breakpoints = machine.table.read().unwrap_or_else(|e| e.into_inner()).addresses();
            cpu.set_debug(DebugOptions { breakpoints, ..DebugOptions::default() });
            after_hit.generation = generation;
        }
        let khz = || context.cpu.tsc_khz().unwrap_or(SLOW_TSC);
        let longest = *after_hit.longest.get_or_insert_with(|| LONGEST_TIME * u64::from(khz()));
        let patience = if machine.is_native() { after_hit.worth.exit_time() } else { u64::MAX };
        let (last, changes) = (ticks(), context.cpu.changes());
        Ok(Some(Stay { cpu, known, changes, has_vectors, hits: 0, begun, longest, last, patience }))
    }

    /// Whether nothing speaks against a stay: ring 3 runs on the host's own CPU, watchpoints want each access seen.
    fn may_stay(&mut self) -> Result<bool> {
        let (machine, number) = (self.machine, self.number);
        let is_free = counts_zeros() && !machine.engine.is_requested(number) && self.watched().is_empty();
        let context = self.context();
        let is_between = context.passed.is_none() && context.calls.is_empty() && context.watching.touches.is_empty();
        Ok(is_free && is_between && context.cpu.system_registers()?.cs.selector & 3 == 0)
    }

    fn stay(&mut self) -> Result<Flow> {
        let (machine, number) = (self.machine, self.number);
        let chunk = if machine.is_native() { CHUNK_OF_NATIVE } else { CHUNK };
        loop {
            let (stay, _) = self.context().stay();
            let left = LONGEST.saturating_sub(stay.cpu.instructions());
            let next = match stay.cpu.run(&mut Nothing, left.min(chunk)) {
                CpuExit::Budget if stay.is_patient(ticks()) && !machine.engine.is_requested(number) => Next::Stay,
                CpuExit::Breakpoint => self.meet()?,
                // A vCPU is not left at a breakpoint that it has not met.
                CpuExit::Budget if machine.site_at(stay.cpu.registers().rip).is_some() => self.meet()?,
                CpuExit::Foreign(Some(fault)) if fault.vector == NOT_AVAILABLE => {
                    self.context().burst.uses_vectors = true;
                    Next::Leave
                }
                _ => Next::Leave,
            };
            match next {
                Next::Stay => {}
                Next::Leave => {
                    self.bring_state_back()?;
                    return self.leave_stay();
                }
                Next::Over(flow) => return Ok(flow),
            }
        }
    }

    /// The vCPU goes on from where the stay has ended: at a breakpoint that was asked, or at one that only steps find.
    fn leave_stay(&mut self) -> Result<Flow> {
        match self.leave_site()? {
            Flow::Continue => self.look_for_stepped(),
            Flow::Leave => Ok(Flow::Leave),
        }
    }

    /// Judges a hit where it is, and executes the instruction there if it stops nobody.
    fn meet(&mut self) -> Result<Next> {
        let (machine, number) = (self.machine, self.number);
        let generation = machine.generation();
        let (stay, vcpu) = self.context().stay();
        stay.hits += 1;
        stay.bring_registers_back(vcpu)?;
        let pc = stay.known.core.registers.rip;
        let reasons = self.decide(pc)?;
        if !reasons.is_empty() {
            self.bring_state_back()?;
            return self.stop_for(pc, reasons).map(Next::Over);
        }
        let (stay, vcpu) = self.context().stay();
        if stay.is_outdated(vcpu) {
            return self.leave_stay().map(Next::Over);
        }
        stay.last = ticks();
        if machine.generation() != generation || stay.is_over(stay.last) {
            return Ok(Next::Leave);
        }
        let code = self.code_at(pc)?;
        loop {
            let (stay, _) = self.context().stay();
            if machine.engine.is_requested(number) || stay.cpu.execute_covered(&code).is_some() {
                return Ok(Next::Leave);
            }
            if stay.cpu.registers().rip != pc || !is_repeated(&code) {
                break;
            }
        }
        self.context().passed = None;
        Ok(Next::Stay)
    }

    /// Gives the vCPU what it has not got of its state while that is in the software CPU.
    pub(super) fn bring_state_back(&mut self) -> Result<()> {
        let context = self.context();
        match &mut context.burst.after_hit.stay {
            Some(stay) if !stay.is_outdated(context.cpu.as_ref()) => stay.bring_back(context.cpu.as_mut()),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A hit at a time; whether a stay may begin.
    fn hit(after: &mut AfterHit, is_native: bool, now: u64) -> bool {
        after.note_hit();
        assert!(after.take_hit(true));
        after.may_begin(is_native, now)
    }

    /// Hits that are KVM's before the next stay, of a guest that has one each `period`.
    fn hits_before_a_stay(after: &mut AfterHit, now: &mut u64, period: u64) -> usize {
        let mut step = || {
            *now += period;
            !hit(after, true, *now)
        };
        (0..100_000).take_while(|_| step()).count()
    }

    #[test]
    fn test_after_a_stay_the_next_one_to_three_hits_are_left_to_the_vcpu() {
        let mut after = AfterHit::default();
        let mut passed = Vec::new();
        for _ in 0..6 {
            assert!(!after.take_hit(true), "without a hit there is none");
            passed.push((0..9).take_while(|_| !hit(&mut after, false, 0)).count());
            after.note(100_000, 10, 1_000_000);
        }
        assert_eq!(passed, [0, 1, 2, 3, 1, 2]);
    }

    #[test]
    fn test_stays_on_a_native_kvm_go_on_where_they_take_less_time_from_hit_to_hit() {
        let (mut after, mut now) = (AfterHit::default(), 0);
        assert_eq!(hits_before_a_stay(&mut after, &mut now, 100), 9, "as long as exits are measured");
        let mut passed = Vec::new();
        for _ in 0..100 {
            after.note(10_000, 50, 50 * 99);
            passed.push(hits_before_a_stay(&mut after, &mut now, 100));
        }
        assert!(passed.iter().all(|&hits| hits <= HITS_BETWEEN as usize), "{passed:?}");
    }

    #[test]
    fn test_stays_on_a_native_kvm_are_few_where_they_take_more_time() {
        let (mut after, mut now) = (AfterHit::default(), 0);
        let mut passed = Vec::new();
        for _ in 0..8 {
            passed.push(hits_before_a_stay(&mut after, &mut now, 100));
            after.note(10_000, 50, 50 * 101);
        }
        assert!(passed.windows(2).all(|pair| pair[0] < pair[1]), "{passed:?}");
        assert!(passed[7] > 500, "{passed:?}");
    }

    #[test]
    fn test_stay_that_meets_no_hit_pays_nowhere() {
        let (mut after, mut now) = (AfterHit::default(), 0);
        let mut stays = 0;
        for _ in 0..1000 {
            now += 1_000_000;
            if hit(&mut after, true, now) {
                stays += 1;
                after.note(LONGEST, 0, 1_000_000);
            }
        }
        assert!(stays <= 7, "{stays}");
    }

    #[test]
    fn test_time_between_hits_with_another_exit_or_a_stay_between_is_not_measured() {
        let mut after = AfterHit::default();
        for now in 0..100 {
            assert!(!hit(&mut after, true, now));
            assert!(!after.take_hit(false), "a port, say");
        }
        let mut now = 100;
        assert_eq!(hits_before_a_stay(&mut after, &mut now, 7), 9);
        assert_eq!(after.worth.exit_time(), 7);
        after.note(100, 50, 50);
        assert!(!hit(&mut after, true, now + 1));
        assert_eq!(after.worth.exit_time(), 7);
        assert!(!after.take_hit(true) && after.last.is_some(), "a step is part of the way");
    }
}
