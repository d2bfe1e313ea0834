//! How a client lets the guest run: a plan for each vCPU, carried out by the engine; and what a stop is to a client.

use std::convert::Infallible;

use gdbstub::common::{Signal, Tid};
use gdbstub::stub::MultiThreadStopReason;
use gdbstub::target::ext::base::multithread::{
    MultiThreadRangeStepping, MultiThreadRangeSteppingOps, MultiThreadResume, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::catch_syscalls::CatchSyscallPosition;

use super::GdbTarget;
use crate::debug::engine::Plan;
use crate::debug::stop::{Stop, StopReason};
use crate::error::{Error, Result};
use crate::gdb::breakpoints::Key;
use crate::gdb::policy::Failure;

/// How a stop reads on the wire.
pub type Reason = MultiThreadStopReason<u64>;

impl GdbTarget {
    fn plan(&mut self, tid: Tid, plan: Plan) {
        // A task that is not running has no vCPU to step: the one that it would run on goes on.
        if let Some(thread) = self.thread(tid) {
            let plan = if thread.saved.is_empty() { plan } else { Plan::Run };
            self.actions.insert(thread.vcpu, plan);
        }
    }

    /// Lets the guest run by these plans.
    pub(in crate::gdb) fn run(&mut self, plan: Vec<Plan>) -> Result<()> {
        let is_step = plan.iter().all(|plan| matches!(plan, Plan::Step | Plan::Hold));
        if !self.commit_breakpoints(is_step) {
            self.last_plan = plan;
            return Err(Error::VmState("the guest stays stopped: the policy has failed".into()));
        }
        let result = self.machine.resume_chosen(|n| plan.get(n as usize).copied().unwrap_or(Plan::Run));
        self.last_plan = plan;
        result
    }

    /// What the engine said to the resume that a packet asked for, once.
    pub(in crate::gdb) fn take_resumed(&mut self) -> Option<Result<()>> {
        self.resumed.take()
    }

    /// A stop in the client's words. What it has no words for is said on its console.
    pub(in crate::gdb) fn reason_of(&mut self, stop: &Stop) -> Reason {
        let tid = self.tid_of(stop.vcpu);
        let signal = |signal| Reason::SignalWithThread { tid, signal };
        match &stop.reason {
            StopReason::Breakpoint { breakpoint, error } => {
                if let Some(error) = error {
                    self.say(&format!("uhyve: the condition of breakpoint {} has no value: {error}", breakpoint.id));
                }
                let all = || std::iter::once(breakpoint).chain(stop.others.iter().filter_map(StopReason::breakpoint));
                let Some(foreign) = all().find(|b| self.breakpoints.key_of(b).is_none()).cloned() else {
                    return match self.breakpoints.key_of(breakpoint) {
                        Some(Key::Hardware(_)) => Reason::HwBreak(tid),
                        _ => Reason::SwBreak(tid),
                    };
                };
                // gdb takes a `swbreak` that it does not know for one that it has just removed, and goes on; and SIGTRAP
                // at a breakpoint of its own for that one's, which it judges by its own condition, thread and count.
                let name = foreign.options.name.as_deref().unwrap_or(&foreign.options.location);
                self.say(&format!("uhyve: breakpoint {} ({name}) on vCPU {}", foreign.id, stop.vcpu));
                signal(if self.breakpoints.is_at(stop.pc) { Signal::SIGINT } else { Signal::SIGTRAP })
            }
            StopReason::Watchpoint { breakpoint, touch, error } => {
                if let Some(error) = error {
                    self.say(&format!("uhyve: the condition of watchpoint {} has no value: {error}", breakpoint.id));
                }
                if let Some(Key::Watch(addr, _, kind)) = self.breakpoints.key_of(breakpoint) {
                    return Reason::Watch { tid, kind: kind.into(), addr };
                }
                let access = if touch.write { "written" } else { "read" };
                self.say(&format!("uhyve: watchpoint {}: {:#x} was {access}", breakpoint.id, touch.address));
                signal(Signal::SIGTRAP)
            }
            StopReason::Hypercall { number, entry } => Reason::CatchSyscall {
                tid: Some(tid),
                number: *number,
                position: if *entry { CatchSyscallPosition::Entry } else { CatchSyscallPosition::Return },
            },
            StopReason::Entry | StopReason::Step => signal(Signal::SIGTRAP),
            StopReason::Interrupt | StopReason::Timeout => signal(Signal::SIGINT),
            StopReason::Exit { code } => {
                let [byte, ..] = code.to_le_bytes();
                if i32::from(byte) != *code {
                    self.say(&format!("uhyve: the guest's exit code is {code}"));
                }
                Reason::Exited(byte)
            }
            StopReason::Crash(crash) => {
                self.say(&format!("uhyve: {crash}"));
                signal(Signal::SIGSEGV)
            }
            StopReason::Exception { breakpoint, error } => {
                let text = self.policy().and_then(|policy| policy.describe(error));
                let text = text.unwrap_or_else(|| "an exception".into());
                self.say(&format!("uhyve: the callback of breakpoint {} has raised {text}", breakpoint.id));
                if let Some(policy) = self.policy() {
                    policy.keep_of_stop(Failure { text, error: error.clone() }, stop.number);
                }
                signal(Signal::SIGTRAP)
            }
        }
    }

    /// What a client is told when the guest can't go on.
    pub(in crate::gdb) fn reason_of_refusal(&mut self, error: &Error) -> Reason {
        match self.stop().map(|stop| stop.reason) {
            Some(StopReason::Crash(_)) => Reason::Terminated(Signal::SIGSEGV),
            Some(StopReason::Exit { code }) => Reason::Exited(code.to_le_bytes()[0]),
            Some(_) => {
                self.say(&format!("uhyve: {error}"));
                Reason::SignalWithThread { tid: self.tid_of(0), signal: Signal::SIGTRAP }
            }
            None => Reason::Terminated(Signal::SIGKILL),
        }
    }
}

impl MultiThreadResume for GdbTarget {
    fn resume(&mut self) -> std::result::Result<(), Infallible> {
        let default = if self.is_locked { Plan::Hold } else { Plan::Run };
        let plan = (0..self.machine.cpus()).map(|n| self.actions.get(&n).copied().unwrap_or(default)).collect();
        self.resumed = Some(self.run(plan));
        Ok(())
    }

    fn clear_resume_actions(&mut self) -> std::result::Result<(), Infallible> {
        self.actions.clear();
        self.is_locked = false;
        Ok(())
    }

    fn set_resume_action_continue(&mut self, tid: Tid, _signal: Option<Signal>) -> std::result::Result<(), Infallible> {
        self.plan(tid, Plan::Run);
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_range_step(&mut self) -> Option<MultiThreadRangeSteppingOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSingleStep for GdbTarget {
    fn set_resume_action_step(&mut self, tid: Tid, _signal: Option<Signal>) -> std::result::Result<(), Infallible> {
        self.plan(tid, Plan::Step);
        Ok(())
    }
}

impl MultiThreadRangeStepping for GdbTarget {
    fn set_resume_action_range_step(&mut self, tid: Tid, start: u64, end: u64) -> std::result::Result<(), Infallible> {
        self.plan(tid, Plan::StepRange { start, end });
        Ok(())
    }
}

impl MultiThreadSchedulerLocking for GdbTarget {
    fn set_resume_action_scheduler_lock(&mut self) -> std::result::Result<(), Infallible> {
        self.is_locked = true;
        Ok(())
    }
}
