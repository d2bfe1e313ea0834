//! Breakpoints and watchpoints of a machine: each change holds on every vCPU from the moment that it returns.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Machine;
use crate::debug::breakpoints::{Breakpoint, BreakpointOptions, Condition, SiteKind, Table};
use crate::debug::engine::Owner;
use crate::debug::watchpoints::{Watch, WatchAccess, WatchKind};
use crate::error::{Error, Result};
use crate::paging::{self, PagingMode};
use crate::vcpu;

impl Machine {
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    /// How the guest is made to stop at an address.
    pub fn site_at(&self, address: u64) -> Option<SiteKind> {
        if self.generation() == 0 {
            return None;
        }
        self.table.read().unwrap_or_else(|e| e.into_inner()).kind_at(address)
    }

    pub(crate) fn breakpoints_at(&self, address: u64) -> Option<(SiteKind, Vec<Arc<Breakpoint>>)> {
        self.table.read().unwrap_or_else(|e| e.into_inner()).at(address)
    }

    /// Changes the breakpoint table with no vCPU running, and makes the sites agree with it. If that fails, `undo` is
    /// applied and the sites are as before.
    fn change_table<T>(&self, change: impl FnOnce(&mut Table) -> T, undo: impl FnOnce(&mut Table, &T)) -> Result<T> {
        self.check_owner()?;
        let current = vcpu::current(self);
        if vcpu::is_own_thread(self) && current.is_none() {
            // Its vCPU is in the middle of an instruction, and nobody may wait for it here.
            return Err(Error::VmState("a console callback can't change breakpoints".into()));
        }
        let capabilities = self.capabilities()?;
        let owner = current.map_or(Owner::FrontEnd, Owner::Vcpu);
        let closed = || Error::VmState("the VM is closed".into());
        let exclusive = self.engine.exclusive(owner).ok_or_else(closed)?;
        let mode = {
            let mut guard = self.lock_context(current.unwrap_or(0));
            PagingMode::from(&guard.as_mut().ok_or_else(closed)?.cpu.system_registers()?)
        };
        let mut translate = |address: u64| paging::translate(&self.memory, &mode, address).ok().map(|t| t.physical);
        let mut table = self.table.write().unwrap_or_else(|e| e.into_inner());
        let value = change(&mut table);
        let result = table.sync(&self.memory, &capabilities, &mut translate);
        if result.is_err() {
            undo(&mut table, &value);
            table.sync(&self.memory, &capabilities, &mut translate)?;
        }
        self.generation.store(table.generation(), Ordering::SeqCst);
        drop(table);
        drop(exclusive);
        result.map(|()| value)
    }

    /// Sets a breakpoint. From the moment that this returns it holds on every vCPU.
    pub fn add_breakpoint(
        &self,
        address: u64,
        options: BreakpointOptions,
        condition: Condition,
    ) -> Result<Arc<Breakpoint>> {
        self.add(address, None, options, condition)
    }

    /// Sets a watchpoint on `length` bytes at guest-virtual `address`. From the moment that this returns it holds on
    /// every vCPU. Numbers are shared with breakpoints; of the options, `hardware` means nothing here.
    pub fn add_watchpoint(
        &self,
        address: u64,
        length: u64,
        access: WatchAccess,
        options: BreakpointOptions,
        condition: Condition,
    ) -> Result<Arc<Breakpoint>> {
        let breakpoint = self.add(address, Some(Watch::new(address, length, access)?), options, condition)?;
        self.refresh_watches();
        Ok(breakpoint)
    }

    fn add(
        &self,
        address: u64,
        watch: Option<Watch>,
        options: BreakpointOptions,
        condition: Condition,
    ) -> Result<Arc<Breakpoint>> {
        if options.vcpu.is_some_and(|n| n >= self.cpus()) {
            return Err(Error::Breakpoint(format!(
                "there is no vCPU {}; this VM has {}",
                options.vcpu.unwrap_or(0),
                self.cpus()
            )));
        }
        self.change_table(|t| t.add(address, watch, options, condition), |t, b| t.remove(b))
    }

    /// Enables or disables a breakpoint.
    pub fn enable_breakpoint(&self, breakpoint: &Breakpoint, enabled: bool) -> Result<()> {
        if breakpoint.is_deleted() {
            return Err(Error::Breakpoint(format!("breakpoint {} is deleted", breakpoint.id)));
        }
        let before = breakpoint.is_enabled();
        self.change_table(|t| t.set_enabled(breakpoint, enabled), |t, ()| t.set_enabled(breakpoint, before))
    }

    /// Deletes a breakpoint; the guest's code is as it was. Deleting it twice is the same as once.
    pub fn delete_breakpoint(&self, breakpoint: &Breakpoint) -> Result<()> {
        if breakpoint.is_deleted() {
            return Ok(());
        }
        self.change_table(|t| t.remove(breakpoint), |_, ()| ())
    }

    /// How an enabled watchpoint is made.
    pub fn watch_kind(&self, breakpoint: &Breakpoint) -> Option<WatchKind> {
        self.table.read().unwrap_or_else(|e| e.into_inner()).watch_kind(breakpoint).cloned()
    }

    /// The enabled watchpoints, and whether one of them needs every instruction to be executed by itself.
    pub(crate) fn watches(&self) -> (Arc<[Arc<Breakpoint>]>, bool) {
        self.table.read().unwrap_or_else(|e| e.into_inner()).watches()
    }

    /// Looks at what is watched, so that the next access is compared with what is there now.
    pub(super) fn refresh_watches(&self) {
        let (watches, _) = self.watches();
        if watches.is_empty() {
            return;
        }
        let mut guard = self.lock_context(vcpu::current(self).unwrap_or(0));
        let Some(Ok(system)) = guard.as_mut().map(|c| c.cpu.system_registers()) else { return };
        let mode = PagingMode::from(&system);
        for breakpoint in watches.iter() {
            if let Some(watch) = &breakpoint.watch {
                *watch.seen() = Some(self.view().read_vec(&mode, breakpoint.address, watch.length));
            }
        }
    }

    /// All breakpoints and watchpoints, by number.
    pub fn breakpoints(&self) -> Vec<Arc<Breakpoint>> {
        self.table.read().unwrap_or_else(|e| e.into_inner()).breakpoints()
    }
}
