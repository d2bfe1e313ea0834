//! Exits that are answered on the spot: a port or an address behind which there is nothing, a search for PCI devices. They
//! come by the thousand, and after an exit the CPU has forgotten much of what it knew of this program's memory: so the
//! loop around them touches as few pages as it can, of data and of code (which has a section of its own, together with the
//! back end's).

use std::sync::atomic::Ordering;

use super::Seat;
use crate::backend::{Exit, Vcpu};
use crate::burst::{is_of_bursts, ticks};
use crate::devices::pci::{self, Firmware};
use crate::error::Result;
use crate::hypercall;
use crate::stats::ExitKind;
use crate::vm::Machine;

/// Answers an exit for which nothing else must be known: its kind. `None`: it is none of these.
#[inline]
pub(super) fn answer(machine: &Machine, cpu: &mut dyn Vcpu, exit: Exit) -> Option<ExitKind> {
    let Exit::IoOut { port, size, count: 1, value } = exit else { return answer_other(machine, cpu, exit) };
    if machine.pci.write(port, size, value) {
        return Some(ExitKind::PciWrite);
    }
    hypercall::identify(port).is_none().then_some(ExitKind::PortWrite)
}

/// By itself: a `match` of all of them would be a table on one more page.
#[unsafe(link_section = "exit_path")]
#[inline(never)]
fn answer_other(machine: &Machine, cpu: &mut dyn Vcpu, exit: Exit) -> Option<ExitKind> {
    match exit {
        Exit::IoIn { port, size, .. } => {
            let answer = machine.pci.read(port, size);
            for element in cpu.io_data().chunks_mut(usize::from(size).max(1)) {
                element.iter_mut().zip(answer).for_each(|(byte, from)| *byte = from);
            }
            Some(if pci::is_pci(port) { ExitKind::PciRead } else { ExitKind::PortRead })
        }
        Exit::MmioRead { address, .. } => Firmware::contains(address).then(|| {
            cpu.io_data().fill(0);
            ExitKind::MmioRead
        }),
        Exit::MmioWrite { address, .. } => Firmware::contains(address).then_some(ExitKind::MmioWrite),
        _ => None,
    }
}

impl Seat<'_> {
    /// Runs the guest until an exit that needs more, and when the guest was entered for it if bursts want to know.
    /// `None`: somebody asks for this vCPU, or it is to be armed anew.
    #[unsafe(link_section = "exit_path")]
    #[inline(never)]
    pub(super) fn next_exit(&mut self) -> Result<Option<(Exit, u64)>> {
        let (machine, number) = (self.machine, self.number);
        let requested = machine.engine.request_flag(number);
        let counters = machine.stats.counters(number);
        let queue = machine.queue();
        let has_bursts = machine.has_bursts();
        let context = self.guard.as_mut().and_then(|g| g.as_mut()).expect("locked by this thread");
        // A step is armed for one instruction only.
        let is_stepping = context.debug.single_step;
        let sampler = &mut self.sampler;
        let mut is_first = true;
        loop {
            let entered = if has_bursts { ticks() } else { 0 };
            sampler.enter();
            let exit = context.cpu.run()?;
            sampler.leave();
            // What waits in the queue came before this exit.
            let waits =
                queue.is_some_and(|(first, last)| first.load(Ordering::Acquire) != last.load(Ordering::Acquire));
            let kind = if waits || has_bursts && is_of_bursts(exit) {
                None
            } else {
                answer(machine, context.cpu.as_mut(), exit)
            };
            let Some(kind) = kind else { return Ok(Some((exit, entered))) };
            sampler.exit(kind);
            counters.count(kind);
            sampler.finish(&machine.stats.latencies, number);
            if is_first {
                context.burst.after_hit.note_other();
                is_first = false;
            }
            if is_stepping || requested.load(Ordering::SeqCst) {
                return Ok(None);
            }
        }
    }
}
