//! After a hit that stops nobody, on a KVM that emulates the guest's kernel: instead of entering the guest again, whose
//! next hit would be an exit, the software CPU goes on from the vCPU's state. It looks out for the breakpoints itself, and
//! each one that it meets is judged in place, by the same chain as on KVM, and its instruction executed from the guest's own
//! bytes. A stay goes on over many hits, until something foreign comes, somebody asks for the vCPU, or it was long enough.
//!
//! The other vCPUs run meanwhile: locked instructions are the host's own or are left to KVM. Code that another vCPU
//! changes is looked at anew where a stay begins, which is no later than the next serializing instruction. Interrupts
//! wait until a stay is over; then KVM sees to the next few hits, so that none is kept out for ever.

use std::time::{Duration, Instant};

use super::stepping::is_repeated;
use crate::backend::Vcpu;
use crate::burst::{Few, NOT_AVAILABLE, counts_zeros};
use crate::error::Result;
use crate::vcpu::{Context, Flow, Seat};
use crate::x86::{Cpu, CpuExit, DebugOptions, Nothing, State};

/// Instructions between two looks at whether somebody asks for the vCPU.
const CHUNK: u64 = 10_000;
/// The most instructions of a stay.
const LONGEST: u64 = 200_000;
/// The most hits of a stay. A prime number, so that stays in a loop do not all end at the same place of it.
const MOST_HITS: u32 = 1021;
/// After a stay so many hits are KVM's; the number goes round, for the same reason.
const HITS_BETWEEN: u32 = 3;
/// The longest stay in which callables are asked, which may take their time. Within [`LONGEST`] instructions there is
/// no need to look at the clock.
const LONGEST_WITH_CALLABLES: Duration = Duration::from_millis(5);
/// Instructions that a hit within a stay is worth: it saves an exit and an entry.
const WORTH_OF_HIT: u64 = 32;

/// What a vCPU keeps for such stays.
#[derive(Default)]
pub(crate) struct AfterHit {
    /// A hit has just stopped nobody.
    is_due: bool,
    /// Hits that are KVM's before the next stay, and how many they were the last time.
    to_pass: u32,
    last_passed: u32,
    few: Few,
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

    /// Whether a stay may begin here.
    fn may_begin(&mut self) -> bool {
        if !std::mem::take(&mut self.is_due) {
            return false;
        }
        if self.to_pass > 0 {
            self.to_pass -= 1;
            return false;
        }
        self.few.may_begin()
    }

    /// Notes what a stay came to.
    fn note(&mut self, instructions: u64, hits: u32) {
        self.few.note(instructions + u64::from(hits) * WORTH_OF_HIT);
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
    hits: u32,
    begun: Instant,
    has_called: bool,
}

impl Stay {
    /// Whether somebody has set the vCPU's registers.
    fn is_outdated(&self, vcpu: &dyn Vcpu) -> bool {
        vcpu.changes() != self.changes
    }

    /// Whether it has lasted long enough.
    fn is_over(&self) -> bool {
        self.hits >= MOST_HITS || self.has_called && self.begun.elapsed() > LONGEST_WITH_CALLABLES
    }

    /// Gives the vCPU all that has changed of its state.
    fn bring_back(&mut self, vcpu: &mut dyn Vcpu) -> Result<()> {
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
    /// Goes on in the software CPU after a hit that stopped nobody, if that may be and pays.
    pub(crate) fn burst_after_hit(&mut self) -> Result<Flow> {
        if !self.context().burst.after_hit.may_begin() || !self.may_stay()? {
            return Ok(Flow::Continue);
        }
        self.settle_io()?;
        let machine = self.machine;
        let context = self.context();
        let vectors = context.burst.uses_vectors;
        let Some(known) = context.cpu.lend(vectors)? else {
            // The guest may have enabled vector registers that the software CPU has not.
            context.burst.uses_vectors = false;
            return Ok(Flow::Continue);
        };
        let mut cpu = context.burst.cpu.take().unwrap_or_else(|| Box::new(Cpu::new(&machine.memory)));
        cpu.lend(&known);
        let generation = machine.generation();
        if context.burst.after_hit.generation != generation {
            let breakpoints = machine.table.read().unwrap_or_else(|e| e.into_inner()).addresses();
            cpu.set_debug(DebugOptions { breakpoints, ..DebugOptions::default() });
            context.burst.after_hit.generation = generation;
        }
        let changes = context.cpu.changes();
        context.burst.after_hit.stay =
            Some(Stay { cpu, known, changes, hits: 0, begun: Instant::now(), has_called: false });
        let flow = self.stay()?;
        let burst = &mut self.context().burst;
        if let Some(Stay { cpu, hits, .. }) = burst.after_hit.stay.take() {
            burst.after_hit.note(cpu.instructions(), hits);
            burst.cpu = Some(cpu);
        }
        Ok(flow)
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
        loop {
            let (stay, _) = self.context().stay();
            let left = LONGEST.saturating_sub(stay.cpu.instructions());
            let next = match stay.cpu.run(&mut Nothing, left.min(CHUNK)) {
                CpuExit::Budget if left > CHUNK && !machine.engine.is_requested(number) => Next::Stay,
                CpuExit::Breakpoint => self.meet()?,
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
                    return self.leave_site();
                }
                Next::Over(flow) => return Ok(flow),
            }
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
            return self.leave_site().map(Next::Over);
        }
        if machine.generation() != generation || stay.is_over() {
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

    /// A callable is about to look at the vCPU: all of its state has to be there.
    pub(super) fn bring_state_for_callable(&mut self) -> Result<()> {
        if let Some(stay) = &mut self.context().burst.after_hit.stay {
            stay.has_called = true;
        }
        self.bring_state_back()
    }

    /// Gives the vCPU what it has not got of its state while that is in the software CPU.
    fn bring_state_back(&mut self) -> Result<()> {
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

    #[test]
    fn test_after_a_stay_the_next_one_to_three_hits_are_left_to_the_vcpu() {
        let mut after = AfterHit::default();
        let mut passed = Vec::new();
        for _ in 0..6 {
            let mut met = 0;
            loop {
                assert!(!after.may_begin(), "without a hit there is none");
                after.note_hit();
                if after.may_begin() {
                    break;
                }
                met += 1;
            }
            passed.push(met);
            after.note(100_000, 10);
        }
        assert_eq!(passed, [0, 1, 2, 3, 1, 2]);
    }
}
