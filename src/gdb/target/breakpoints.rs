//! `Z` and `z`: breakpoints, watchpoints, and conditions that the target evaluates; `QCatchSyscalls`: hypercalls.

use gdbstub::target::ext::breakpoints::{
    Breakpoints, HwBreakpoint, HwBreakpointOps, HwWatchpoint, HwWatchpointOps, SwBreakpoint, SwBreakpointOps, WatchKind,
};
use gdbstub::target::ext::catch_syscalls::{CatchSyscalls, SyscallNumbers};
use gdbstub::target::{TargetError, TargetResult};

use super::{GdbTarget, refused};
use crate::error::Error;
use crate::gdb::breakpoints::{Key, WatchKey};
use crate::gdb::policy::{Request, Wish};

impl GdbTarget {
    fn insert(&mut self, key: Key) -> TargetResult<bool, Self> {
        let agent = std::mem::take(&mut self.conditions);
        match self.breakpoints.renew(&self.machine, key, &agent) {
            Ok(true) => return Ok(true),
            Ok(false) => {}
            Err(error) => return self.refuse(&error),
        }
        let request = Request { key, is_conditional: !agent.is_empty() };
        let wish = match self.policy.as_ref().and_then(|policy| policy.on_insert(&request)) {
            None => Wish::default(),
            Some(Ok(wish)) => wish,
            Some(Err(failure)) => {
                self.failed(failure);
                return Err(TargetError::Errno(super::EFAULT));
            }
        };
        if let Some(reason) = &wish.refusal {
            self.refusal = Some(format!("uhyve: the policy refuses a breakpoint: {reason}"));
            return Err(TargetError::Errno(super::EFAULT));
        }
        match self.breakpoints.insert(&self.machine, key, agent, wish) {
            Ok(()) => Ok(true),
            Err(error) => self.refuse(&error),
        }
    }

    fn refuse(&mut self, error: &Error) -> TargetResult<bool, Self> {
        self.refusal = Some(format!("uhyve: {error}"));
        Err(refused(error))
    }

    fn remove(&mut self, key: Key) -> TargetResult<bool, Self> {
        if self.breakpoints.remove(key) { Ok(true) } else { Err(TargetError::Errno(super::EINVAL)) }
    }
}

impl GdbTarget {
    /// Carries out what the client has taken away, and tells the policy. False: that failed.
    pub(in crate::gdb) fn commit_breakpoints(&mut self, for_step: bool) -> bool {
        let gone = self.breakpoints.commit(&self.machine, for_step);
        self.tell_removed(&gone)
    }

    /// Takes all of the client's breakpoints away, and tells the policy.
    pub(in crate::gdb) fn clear_breakpoints(&mut self) {
        let gone = self.breakpoints.clear(&self.machine);
        self.tell_removed(&gone);
    }

    fn tell_removed(&mut self, gone: &[Request]) -> bool {
        let mut is_well = true;
        for request in gone {
            if let Some(Err(failure)) = self.policy.as_ref().and_then(|policy| policy.on_remove(request)) {
                self.failed(failure);
                is_well = false;
            }
        }
        is_well
    }
}

impl Breakpoints for GdbTarget {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for GdbTarget {
    fn add_sw_breakpoint(&mut self, addr: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.insert(Key::Software(addr))
    }

    fn remove_sw_breakpoint(&mut self, addr: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.remove(Key::Software(addr))
    }
}

impl HwBreakpoint for GdbTarget {
    fn add_hw_breakpoint(&mut self, addr: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.insert(Key::Hardware(addr))
    }

    fn remove_hw_breakpoint(&mut self, addr: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.remove(Key::Hardware(addr))
    }
}

impl HwWatchpoint for GdbTarget {
    fn add_hw_watchpoint(&mut self, addr: u64, len: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        self.insert(Key::Watch(addr, len, kind.into()))
    }

    fn remove_hw_watchpoint(&mut self, addr: u64, len: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        self.remove(Key::Watch(addr, len, kind.into()))
    }
}

impl From<WatchKind> for WatchKey {
    fn from(kind: WatchKind) -> Self {
        match kind {
            WatchKind::Write => Self::Write,
            WatchKind::Read => Self::Read,
            WatchKind::ReadWrite => Self::ReadWrite,
        }
    }
}

impl From<WatchKey> for WatchKind {
    fn from(key: WatchKey) -> Self {
        match key {
            WatchKey::Write => Self::Write,
            WatchKey::Read => Self::Read,
            WatchKey::ReadWrite => Self::ReadWrite,
        }
    }
}

impl CatchSyscalls for GdbTarget {
    fn enable_catch_syscalls(&mut self, filter: Option<SyscallNumbers<'_, u64>>) -> TargetResult<(), Self> {
        self.machine.catch_hypercalls(Some(filter.map(Iterator::collect)));
        Ok(())
    }

    fn disable_catch_syscalls(&mut self) -> TargetResult<(), Self> {
        self.machine.catch_hypercalls(None);
        Ok(())
    }
}
