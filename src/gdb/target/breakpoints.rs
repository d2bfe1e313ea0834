//! `Z` and `z`: breakpoints, watchpoints, and conditions that the target evaluates; `QCatchSyscalls`: hypercalls.

use gdbstub::target::ext::breakpoints::{
    Breakpoints, HwBreakpoint, HwBreakpointOps, HwWatchpoint, HwWatchpointOps, SwBreakpoint, SwBreakpointOps, WatchKind,
};
use gdbstub::target::ext::catch_syscalls::{CatchSyscalls, SyscallNumbers};
use gdbstub::target::{TargetError, TargetResult};

use super::{GdbTarget, refused};
use crate::debug::breakpoints::Condition;
use crate::gdb::breakpoints::{Key, WatchKey};

impl GdbTarget {
    fn insert(&mut self, key: Key) -> TargetResult<bool, Self> {
        let condition = Condition { agent: std::mem::take(&mut self.conditions), ..Condition::default() };
        match self.breakpoints.insert(&self.machine, key, condition) {
            Ok(()) => Ok(true),
            Err(error) => {
                self.say(&format!("uhyve: {error}"));
                Err(refused(&error))
            }
        }
    }

    fn remove(&mut self, key: Key) -> TargetResult<bool, Self> {
        if self.breakpoints.remove(key) { Ok(true) } else { Err(TargetError::Errno(super::EINVAL)) }
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
