//! Who lets the guest run, and what its stops come to: resume, wait, detach.

use std::time::Instant;

use super::Machine;
use crate::debug::engine::{End, Plan, Status};
use crate::debug::stop::{Event, Stop, StopReason};
use crate::error::{Error, Result};
use crate::vcpu;

impl Machine {
    /// Resumes by a plan, unless something that was found before and not reported still holds: that is the next stop.
    pub fn resume(&self, plan: impl Fn(u32) -> Plan) -> Result<()> {
        self.resume_by(plan, false)
    }

    /// The same for a client that takes its breakpoints away while it steps one vCPU: what others that hold have found
    /// waits until they may go on.
    pub(crate) fn resume_chosen(&self, plan: impl Fn(u32) -> Plan) -> Result<()> {
        self.resume_by(plan, true)
    }

    fn resume_by(&self, plan: impl Fn(u32) -> Plan, keeps_held: bool) -> Result<()> {
        self.check_owner()?;
        if vcpu::is_own_thread(self) {
            return Err(Error::VmState(
                "a callback can't resume the guest: return False (or None) to let it run on, True to stop it".into(),
            ));
        }
        // One at a time: nobody starts the world while another one looks whether it should.
        let _turn = self.resuming.lock().unwrap_or_else(|e| e.into_inner());
        if !keeps_held && let Some(client) = self.controller() {
            return Err(Error::VmState(format!(
                "a gdb client ({client}) controls the guest: let it go on there, or detach it; interrupt() and wait() work here"
            )));
        }
        let stop = self.engine.check_stopped()?;
        self.finish_stop(&stop);
        self.table.write().unwrap_or_else(|e| e.into_inner()).replant(&self.memory);
        let holds = |vcpu| keeps_held && plan(vcpu) == Plan::Hold;
        if self.engine.report_pending(holds, |event| self.still_holds(event))?.is_some() {
            return Ok(());
        }
        self.refresh_watches();
        self.announce(&|n| plan(n) != Plan::Hold);
        self.engine.resume(plan)?;
        self.pump.wake();
        Ok(())
    }

    /// Tells the back end which vCPUs are about to run.
    fn announce(&self, runs: &dyn Fn(u32) -> bool) {
        if let Some(backend) = self.backend.lock().unwrap_or_else(|e| e.into_inner()).as_ref() {
            backend.resuming(runs);
        }
    }

    /// Whether an event that waited is still true: its vCPU stands where it stood, and a breakpoint that it is about is
    /// there; an access to what is watched stays true. Its reason becomes the first that is.
    fn still_holds(&self, event: &mut Event) -> bool {
        let mut guard = self.lock_context(event.vcpu);
        let at_pc = guard.as_mut().is_some_and(|c| c.cpu.registers().is_ok_and(|r| r.rip == event.pc));
        let holds = |reason: &StopReason| match reason {
            StopReason::Breakpoint { breakpoint, .. } => breakpoint.is_enabled() && at_pc,
            StopReason::Watchpoint { breakpoint, .. } => breakpoint.is_enabled(),
            StopReason::Exit { .. }
            | StopReason::Crash(_)
            | StopReason::Exception { .. }
            | StopReason::Hypercall { .. } => true,
            _ => false,
        };
        let mut true_still: Vec<_> =
            std::iter::once(&event.reason).chain(&event.others).filter(|reason| holds(reason)).cloned().collect();
        if let (true, Some(context), true) = (true_still.is_empty(), guard.as_mut(), at_pc)
            && self
                .breakpoints_at(event.pc)
                .is_some_and(|(_, breakpoints)| breakpoints.iter().any(|b| b.id > context.asked))
        {
            // A client takes its breakpoints away and sets them again: those that are there now have not been asked.
            context.passed = None;
            context.asks_newer_at = Some(event.pc);
        }
        if true_still.is_empty() {
            return false;
        }
        event.reason = true_still.remove(0);
        event.others = true_still;
        true
    }

    /// What a front end does about a stop that it has found without waiting: [`Machine::wait`] does it by itself.
    pub(crate) fn after_stop(&self, stop: &Stop) {
        let flushed = self.drain(0, &|| true).map(|_| self.console.flush(&|| true));
        if let Err(error) = flushed {
            log::warn!("console output: {error}");
        }
        self.finish_stop(stop);
    }

    /// Who else decides when the guest runs: a client of the server for gdb.
    pub fn controller(&self) -> Option<String> {
        self.controller.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Names who decides when the guest runs.
    pub(crate) fn set_controller(&self, client: Option<String>) {
        // A resume that has looked is over before.
        let _turn = self.resuming.lock().unwrap_or_else(|e| e.into_inner());
        *self.controller.lock().unwrap_or_else(|e| e.into_inner()) = client;
    }

    /// Stops at these hypercalls; `Some(None)` at all, `None` at none.
    pub fn catch_hypercalls(&self, wanted: Option<Option<std::collections::HashSet<u64>>>) {
        self.catch.set(wanted);
    }

    /// Whether a hypercall stops the world.
    #[inline]
    pub(crate) fn catches(&self, number: u64) -> bool {
        self.catch.wants(number)
    }

    /// Waits for the next stop or the end. `check` is called when a signal arrives. `Ok(None)`: the deadline passed.
    pub fn wait<E: From<Error>>(
        &self,
        deadline: Option<Instant>,
        check: &mut dyn FnMut() -> Result<(), E>,
    ) -> Result<Option<Status>, E> {
        if vcpu::is_own_thread(self) {
            return Err(Error::VmState("a callback can't wait for the guest: return a decision instead".into()).into());
        }
        let mut status = self.engine.wait_for_stop(deadline, check)?;
        if let Some(found) = &status {
            self.flush(is_last(found), check)?;
            if self.console.callback_has_failed() {
                // The console's thread ends the VM by it, now or in a moment.
                let failure = std::io::Error::other("the console's callback has failed");
                self.engine.end(End::Failed(Error::Host { what: "console output".into(), source: failure }));
                status = Some(self.engine.status());
            }
        }
        if let Some(Status::Stopped(stop)) = &status {
            self.finish_stop(stop);
        }
        Ok(status)
    }

    /// A temporary breakpoint is gone once it has stopped the world.
    pub(super) fn finish_stop(&self, stop: &Stop) {
        if let StopReason::Breakpoint { breakpoint, .. } | StopReason::Watchpoint { breakpoint, .. } = &stop.reason
            && breakpoint.options.temporary
            && let Err(error) = self.delete_breakpoint(breakpoint)
        {
            log::warn!("temporary breakpoint {}: {error}", breakpoint.id);
        }
    }

    /// The current stop, with its program counter as it is now.
    pub fn describe(&self, mut stop: Stop) -> Stop {
        if stop.pc == 0
            && let Ok(pc) = self.with_vcpu(stop.vcpu, |c| Ok(c.cpu.registers()?.rip))
        {
            stop.pc = pc;
        }
        stop
    }

    /// Lets go of every breakpoint and runs on. The guest's end is the VM's from now on.
    pub fn detach(&self) -> Result<()> {
        if let Some(client) = self.controller() {
            let text = format!("a gdb client ({client}) controls the guest: detach it there first");
            return Err(Error::VmState(text));
        }
        let internal = self.table.read().unwrap_or_else(|e| e.into_inner()).internal();
        for breakpoint in self.breakpoints().into_iter().chain(internal) {
            self.delete_breakpoint(&breakpoint)?;
        }
        self.announce(&|_| true);
        self.engine.detach()?;
        self.pump.wake();
        Ok(())
    }
}

/// Whether the guest does nothing after this.
fn is_last(status: &Status) -> bool {
    match status {
        Status::Running => false,
        Status::Stopped(stop) => stop.reason.is_final(),
        Status::Ended(_) => true,
    }
}
