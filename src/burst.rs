//! Bursts. Exits come in runs: a message to the console is one for each byte, a search for PCI devices two for each
//! place, a program that prints makes one hypercall after another. After such an exit a software CPU goes on from the
//! vCPU's state for some thousand instructions, as long as it meets more of the same, and each of them costs it next to
//! nothing: a hypercall is answered in place. At anything else (an exception, a device, the time, an instruction that
//! changes more than registers and memory) it stops before that instruction, and KVM goes on.
//!
//! A KVM that emulates the guest's kernel leaves vector instructions unexecuted, which come in runs too, and is slower
//! than the software CPU at all others: there a burst also begins after an instruction that was emulated, and goes on
//! without ports.
//!
//! Interrupts wait until the burst is over, which is soon. [`Worth`] measures what an exit costs on this machine and what
//! it costs in a burst, and leaves bursts alone for a while where they don't pay.

use std::sync::OnceLock;

use crate::backend::Exit;
use crate::debug::burst::AfterHit;
use crate::devices::pci;
use crate::error::{Error, Result};
use crate::hypercall::{self, Kind};
use crate::registers::RDI;
use crate::stats::ExitKind;
use crate::vcpu::{Flow, PendingCall, Seat};
use crate::vm::{CONSOLE_PORT, Machine};
use crate::x86::{Cpu, CpuExit, Platform, Reply};

/// Instructions without a port access after which a burst ends.
const PORT_GAP: u64 = 2_000;
/// The most instructions of a burst: interrupts wait for so long.
const LONGEST: u64 = 200_000;
/// The vector of #NM.
pub(crate) const NOT_AVAILABLE: u8 = 7;

/// What a vCPU keeps for bursts.
#[derive(Default)]
pub(crate) struct Burst {
    pub(crate) cpu: Option<Box<Cpu>>,
    worth: Worth,
    /// Console bytes that the sink has not taken: they go before the guest does.
    text: Vec<u8>,
    /// The last burst needed the vector registers; the next one probably does.
    pub(crate) uses_vectors: bool,
    few: Few,
    /// How many it has executed in all.
    instructions: u64,
    /// After hits that stop nobody.
    pub(crate) after_hit: AfterHit,
}

/// Whether bursts pay here, by the time stamp counter: what one of them makes of an exit costs less than the exit.
#[derive(Default)]
pub(crate) struct Worth {
    /// Exits that were measured, and the shortest time of one: others were held up by something.
    exits: u64,
    exit_time: u64,
    /// Exits that bursts have saved, and the time of those bursts.
    saved: u64,
    bursts_time: u64,
    /// Judgements that may go against bursts before these pause: a thread that has to wait for its CPU is none of their faults.
    credit: u32,
    /// Exits for which no burst is tried, and how many it will be the next time.
    pause: u64,
    next_pause: u64,
}

/// How bursts of a kind are judged.
pub(crate) struct Judgement {
    /// When they have saved so many exits, or had the time for it.
    pub(crate) enough: u64,
    /// The most [`Worth::credit`] that they earn by paying.
    pub(crate) most_credit: u32,
    /// Exits of the first pause.
    pub(crate) first_pause: u64,
}

/// Whether bursts after emulated instructions or hits are long enough.
#[derive(Default)]
pub(crate) struct Few {
    pause: u32,
    next_pause: u32,
}

impl Few {
    /// Instructions below which a burst costs more than it saves.
    const LEAST: u64 = 64;
    const LONGEST_PAUSE: u32 = 256;

    pub(crate) fn may_begin(&mut self) -> bool {
        let may = self.pause == 0;
        self.pause = self.pause.saturating_sub(1);
        may
    }

    pub(crate) fn note(&mut self, instructions: u64) {
        if instructions >= Self::LEAST {
            self.next_pause = 0;
        } else {
            self.next_pause = (self.next_pause * 2 + 1).min(Self::LONGEST_PAUSE);
            self.pause = self.next_pause;
        }
    }
}

/// Exits that are measured before the first burst.
const SAMPLE: u64 = 8;
const OF_PORTS: Judgement = Judgement { enough: 256, most_credit: 0, first_pause: 256 };
const LONGEST_PAUSE: u64 = 1 << 16;

impl Worth {
    /// Notes the time of an exit, from the entry before it; whether a burst may follow.
    pub(crate) fn exit(&mut self, time: u64) -> bool {
        if self.pause > 0 {
            self.pause -= 1;
            return false;
        }
        self.exit_time = if self.exits == 0 { time } else { self.exit_time.min(time) };
        if self.exits < SAMPLE {
            self.exits += 1;
            return false;
        }
        true
    }

    /// The time of an exit, as far as is known.
    pub(crate) fn exit_time(&self) -> u64 {
        self.exit_time
    }

    /// Notes the exits that a burst has saved, and its time; judges when there is enough of it. If bursts don't pay, there are
    /// none for a while, and for twice as long each further time.
    pub(crate) fn burst(&mut self, saved: u64, time: u64, judgement: &Judgement) {
        let Judgement { enough, most_credit, first_pause } = *judgement;
        self.saved += saved;
        self.bursts_time = self.bursts_time.saturating_add(time);
        if self.saved < enough && self.bursts_time < enough.saturating_mul(self.exit_time) {
            return;
        }
        let pays = self.bursts_time / self.saved.max(1) < self.exit_time;
        (self.saved, self.bursts_time) = (0, 0);
        if pays {
            self.credit = (self.credit + 1).min(most_credit);
            self.next_pause = first_pause;
        } else if self.credit > 0 {
            self.credit -= 1;
        } else {
            self.pause = self.next_pause.max(first_pause);
            self.next_pause = (self.pause * 2).min(LONGEST_PAUSE);
            // Behind the pause exits are measured anew, near in time to what they are compared with.
            (self.exits, self.exit_time) = (0, 0);
        }
    }
}

/// The ports that a burst answers itself.
struct Ports<'a> {
    machine: &'a Machine,
    number: u32,
    text: &'a mut Vec<u8>,
    accesses: u64,
    /// The guest has just made a hypercall: port, bytes, value.
    request: Option<(u16, usize, u32)>,
}

/// Whether there is a hypercall at a port, behind which the guest goes on.
fn is_hypercall(port: u16) -> bool {
    hypercall::identify(port).is_some_and(|call| call.kind() != Kind::Exit)
}

/// Whether a burst may begin after an exit for its port's sake.
#[inline]
pub(crate) fn is_of_bursts(exit: Exit) -> bool {
    if let Exit::IoOut { port, count: 1, .. } = exit {
        return pci::is_pci(port) || is_hypercall(port);
    }
    if let Exit::IoIn { port, count: 1, .. } = exit { pci::is_pci(port) } else { false }
}

/// What a burst came to.
struct Done {
    accesses: u64,
    /// Ticks in which hypercalls were answered: they take as long behind an exit.
    answering: u64,
    flow: Flow,
}

impl Platform for Ports<'_> {
    fn owns_port(&mut self, port: u16, _size: usize, is_in: bool) -> bool {
        pci::is_pci(port) || !is_in && is_hypercall(port) && !self.machine.catches(port.into())
    }

    fn port_read(&mut self, port: u16, data: &mut [u8], _now: u64) -> Reply {
        let Ok(size) = u8::try_from(data.len().min(4)) else { return Reply::Unknown };
        data.copy_from_slice(&self.machine.pci.read(port, size)[..usize::from(size)]);
        self.accesses += 1;
        self.machine.stats.count(self.number, ExitKind::PciRead);
        Reply::Done
    }

    fn port_write(&mut self, port: u16, data: &[u8], _now: u64) -> Reply {
        self.accesses += 1;
        if port == CONSOLE_PORT && data.len() == 1 {
            self.text.extend_from_slice(data);
            self.machine.stats.count_hypercall(self.number, Kind::SerialWriteByte);
            return Reply::Done;
        }
        let mut value = [0; 4];
        let length = data.len().min(4);
        value[..length].copy_from_slice(&data[..length]);
        let value = u32::from_le_bytes(value);
        if is_hypercall(port) {
            self.request = Some((port, length, value));
            return Reply::Leave;
        }
        let size = u8::try_from(length).expect("at most four");
        self.machine.pci.write(port, size, value);
        self.machine.stats.count(self.number, ExitKind::PciWrite);
        Reply::Done
    }
}

/// The time stamp counter.
pub(crate) fn ticks() -> u64 {
    // SAFETY: every x86-64 processor has it; where it is disabled for user programs, nothing of Linux's runs either.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// Whether this processor means by LZCNT and TZCNT what the software CPU does; older ones take them for BSR and BSF.
pub(crate) fn counts_zeros() -> bool {
    static KNOWN: OnceLock<bool> = OnceLock::new();
    *KNOWN.get_or_init(|| std::is_x86_feature_detected!("lzcnt") && std::is_x86_feature_detected!("bmi1"))
}

impl Seat<'_> {
    /// Goes on in a burst after an exit that was answered, if that may be and pays; `time` is how long it took from entry
    /// to exit.
    pub(crate) fn burst_after(&mut self, exit: Exit, time: u64) -> Result<Flow> {
        let machine = self.machine;
        let may_be = machine.generation() == 0 && self.context().calls.is_empty() && counts_zeros();
        let burst = &mut self.context().burst;
        if exit == Exit::Unemulated && may_be && burst.few.may_begin() {
            burst.uses_vectors = true;
            let before = burst.instructions;
            let (done, _) = self.burst()?;
            let burst = &mut self.context().burst;
            burst.few.note(burst.instructions.wrapping_sub(before));
            return self.end_burst(&done);
        }
        if !is_of_bursts(exit) || !may_be || !burst.worth.exit(time) {
            return Ok(Flow::Continue);
        }
        self.settle_io()?;
        let (done, time) = self.burst()?;
        self.context().burst.worth.burst(done.accesses, time, &OF_PORTS);
        self.end_burst(&done)
    }

    fn end_burst(&mut self, done: &Done) -> Result<Flow> {
        match done.flow {
            Flow::Continue => self.bring_text_out(),
            Flow::Leave => Ok(Flow::Leave),
        }
    }

    /// One burst, and its time.
    fn burst(&mut self) -> Result<(Done, u64)> {
        let start = ticks();
        let mut cpu = match self.context().burst.cpu.take() {
            Some(cpu) => cpu,
            None => Box::new(Cpu::new(&self.machine.memory)),
        };
        let vectors = self.context().burst.uses_vectors;
        let mut done = Done { accesses: 0, answering: 0, flow: Flow::Continue };
        let result = self.burst_on(&mut cpu, vectors, &mut done);
        self.context().burst.cpu = Some(cpu);
        result?;
        let time = ticks().wrapping_sub(start).saturating_sub(done.answering);
        Ok((done, time))
    }

    /// Runs the software CPU.
    fn burst_on(&mut self, cpu: &mut Cpu, vectors: bool, done: &mut Done) -> Result<()> {
        let Some(mut lent) = self.context().cpu.lend(vectors)? else { return Ok(()) };
        cpu.lend(&lent);
        let before = cpu.instructions();
        let (exit, answered) = self.execute(cpu, done);
        let executed = cpu.instructions().wrapping_sub(before);
        self.context().burst.instructions = self.context().burst.instructions.wrapping_add(executed);
        let state = cpu.snapshot();
        // Hypercalls have set them since.
        lent.core.registers = self.context().cpu.registers()?;
        self.context().cpu.take_back(&lent, &state)?;
        done.flow = answered?;
        let needs_vectors = !vectors && matches!(exit, CpuExit::Foreign(Some(fault)) if fault.vector == NOT_AVAILABLE);
        self.context().burst.uses_vectors = needs_vectors || vectors && state.core.fpu != lent.core.fpu;
        if needs_vectors { self.burst_on(cpu, true, done) } else { Ok(()) }
    }

    /// Executes until something foreign, or until nothing has come of some instructions; and what became of the last
    /// hypercall.
    fn execute(&mut self, cpu: &mut Cpu, done: &mut Done) -> (CpuExit, Result<Flow>) {
        let (machine, number) = (self.machine, self.number);
        let gap = if machine.is_native() { PORT_GAP } else { LONGEST };
        loop {
            let text = &mut self.context().burst.text;
            let mut ports = Ports { machine, number, text, accesses: 0, request: None };
            let exit = cpu.run(&mut ports, gap);
            let (accesses, request) = (ports.accesses, ports.request);
            done.accesses += accesses;
            let goes_on = if let Some(request) = request {
                let start = ticks();
                let answered = self.answer(request, cpu);
                done.answering += ticks().wrapping_sub(start);
                if !matches!(answered, Ok(Flow::Continue)) {
                    return (exit, answered);
                }
                true
            } else {
                exit == CpuExit::Budget && accesses > 0
            };
            if !goes_on || cpu.instructions() >= LONGEST || machine.engine.is_requested(number) {
                return (exit, Ok(Flow::Continue));
            }
        }
    }

    /// Answers a hypercall of the software CPU, whose general registers are the vCPU's from then on.
    fn answer(&mut self, (port, size, value): (u16, usize, u32), cpu: &mut Cpu) -> Result<Flow> {
        let Some(call) = hypercall::identify(port) else { return Ok(Flow::Continue) };
        let registers = cpu.registers();
        self.context().cpu.set_registers(&registers)?;
        self.count_hypercall(call.kind());
        let pending = PendingCall::new(call, port, size, value, registers.general[RDI]);
        // What was written before comes first.
        if self.bring_text_out()? == Flow::Leave {
            self.context().calls.push_back(pending);
            return Ok(Flow::Leave);
        }
        self.call(pending)
    }

    /// Gives the console what bursts have written. [`Flow::Leave`]: it takes no more, and the vCPU is asked to stop.
    pub(crate) fn bring_text_out(&mut self) -> Result<Flow> {
        if self.context().burst.text.is_empty() {
            return Ok(Flow::Continue);
        }
        let (machine, number) = (self.machine, self.number);
        let written = machine.console.write(&self.context().burst.text, &|| machine.engine.is_requested(number));
        match written {
            Ok(()) => self.context().burst.text.clear(),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => return Ok(Flow::Leave),
            Err(source) => {
                return Err(Error::Host { what: "a host call on behalf of the guest failed".into(), source });
            }
        }
        Ok(Flow::Continue)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STRICT: Judgement = Judgement { enough: 10, most_credit: 0, first_pause: 10 };

    /// How many exits come before the next burst may.
    fn exits_before_a_burst(worth: &mut Worth, time: u64) -> u64 {
        (0..).take_while(|_| !worth.exit(time)).count() as u64
    }

    #[test]
    fn test_bursts_begin_when_exits_are_measured_and_go_on_while_they_pay() {
        let mut worth = Worth::default();
        assert_eq!(exits_before_a_burst(&mut worth, 100), SAMPLE);
        for _ in 0..1000 {
            worth.burst(1, 99, &STRICT);
            assert!(worth.exit(100));
        }
    }

    #[test]
    fn test_bursts_that_cost_more_than_exits_pause_ever_longer_until_they_pay() {
        let mut worth = Worth::default();
        let mut pauses = Vec::new();
        for _ in 0..20 {
            pauses.push(exits_before_a_burst(&mut worth, 100) - SAMPLE);
            worth.burst(10, 1000, &STRICT);
        }
        assert_eq!(pauses[..5], [0, 10, 20, 40, 80]);
        assert_eq!(pauses.last(), Some(&LONGEST_PAUSE));

        exits_before_a_burst(&mut worth, 100);
        worth.burst(10, 990, &STRICT);
        assert!(worth.exit(100), "they pay again");
        worth.burst(10, 1000, &STRICT);
        assert_eq!(exits_before_a_burst(&mut worth, 100), 10 + SAMPLE);
    }

    #[test]
    fn test_bursts_that_save_nothing_pause_when_they_had_the_time_of_enough_exits() {
        let mut worth = Worth::default();
        exits_before_a_burst(&mut worth, 100);
        worth.burst(0, 999, &STRICT);
        assert!(worth.exit(100));
        worth.burst(0, 1, &STRICT);
        assert_eq!(exits_before_a_burst(&mut worth, 100), 10 + SAMPLE);
    }

    #[test]
    fn test_exits_that_were_held_up_make_no_burst_pay() {
        let mut worth = Worth::default();
        for time in [100, 1_000_000, 1_000_000, 1_000_000, 1_000_000, 1_000_000, 1_000_000, 1_000_000] {
            assert!(!worth.exit(time));
        }
        assert!(worth.exit(1_000_000));
        worth.burst(10, 1010, &STRICT);
        assert!(!worth.exit(100));
    }

    #[test]
    fn test_bursts_that_have_paid_may_cost_more_as_often_before_they_pause() {
        let lenient = Judgement { enough: 1, most_credit: 3, first_pause: 10 };
        let mut worth = Worth::default();
        exits_before_a_burst(&mut worth, 100);
        for _ in 0..5 {
            worth.burst(10, 100, &lenient);
        }
        for _ in 0..3 {
            worth.burst(1, 5000, &lenient);
            assert!(worth.exit(100));
        }
        worth.burst(1, 5000, &lenient);
        assert_eq!(exits_before_a_burst(&mut worth, 100), 10 + SAMPLE);
        worth.burst(1, 5000, &lenient);
        assert_eq!(exits_before_a_burst(&mut worth, 100), 20 + SAMPLE, "nothing is left");
    }

    #[test]
    fn test_short_bursts_pause_ever_longer_and_a_long_one_ends_that() {
        let mut few = Few::default();
        let mut skipped = Vec::new();
        for _ in 0..12 {
            skipped.push((0..).take_while(|_| !few.may_begin()).count());
            few.note(Few::LEAST - 1);
        }
        assert_eq!(skipped[..5], [0, 1, 3, 7, 15]);
        assert_eq!(skipped.last(), Some(&(Few::LONGEST_PAUSE as usize)));

        assert_eq!((0..).take_while(|_| !few.may_begin()).count(), Few::LONGEST_PAUSE as usize);
        few.note(Few::LEAST);
        assert!(few.may_begin());
    }
}
