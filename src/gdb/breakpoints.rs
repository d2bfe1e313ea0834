//! The breakpoints and watchpoints of one client. gdb takes all of them away at each stop and sets them again before it
//! goes on; what is taken away stays in place until the guest runs, so that such a round costs nothing, keeps the
//! statistics, and loses no hit that waits to be reported.

use std::collections::HashMap;
use std::sync::Arc;

use crate::debug::breakpoints::{Breakpoint, BreakpointOptions, Condition};
use crate::debug::watchpoints::WatchAccess;
use crate::error::Result;
use crate::vm::Machine;

/// What a client calls a breakpoint: its kind and place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Key {
    /// `Z0`: any way of breaking will do.
    Software(u64),
    /// `Z1`: it holds though the guest overwrites the code.
    Hardware(u64),
    /// `Z2` to `Z4`: address and length.
    Watch(u64, u64, WatchKey),
}

/// [`WatchAccess`] as a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WatchKey {
    /// Writes.
    Write,
    /// Reads.
    Read,
    /// Both.
    ReadWrite,
}

impl From<WatchKey> for WatchAccess {
    fn from(key: WatchKey) -> Self {
        match key {
            WatchKey::Write => Self::Write,
            WatchKey::Read => Self::Read,
            WatchKey::ReadWrite => Self::ReadWrite,
        }
    }
}

struct Entry {
    breakpoint: Arc<Breakpoint>,
    is_doomed: bool,
}

/// The table of one client.
#[derive(Default)]
pub struct Breakpoints {
    entries: HashMap<Key, Entry>,
}

impl Breakpoints {
    /// Sets a breakpoint, or gives one that is there this condition.
    pub fn insert(&mut self, machine: &Machine, key: Key, condition: Condition) -> Result<()> {
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.breakpoint.set_condition(condition);
            entry.is_doomed = false;
            return Ok(());
        }
        let options = |address: u64, hardware| BreakpointOptions {
            location: format!("{address:#x}"),
            name: Some("gdb".into()),
            hardware,
            ..BreakpointOptions::default()
        };
        let breakpoint = match key {
            Key::Software(address) => machine.add_breakpoint(address, options(address, false), condition)?,
            Key::Hardware(address) => machine.add_breakpoint(address, options(address, true), condition)?,
            Key::Watch(address, length, access) => {
                machine.add_watchpoint(address, length, access.into(), options(address, false), condition)?
            }
        };
        self.entries.insert(key, Entry { breakpoint, is_doomed: false });
        Ok(())
    }

    /// Takes a breakpoint away, when the guest next runs. False if there is none.
    pub fn remove(&mut self, key: Key) -> bool {
        match self.entries.get_mut(&key) {
            Some(entry) if !entry.is_doomed => {
                entry.is_doomed = true;
                true
            }
            _ => false,
        }
    }

    /// Carries out what was asked, before the guest runs.
    pub fn commit(&mut self, machine: &Machine) {
        self.entries.retain(|_, entry| {
            if entry.is_doomed
                && let Err(error) = machine.delete_breakpoint(&entry.breakpoint)
            {
                log::warn!("gdb's breakpoint at {:#x}: {error}", entry.breakpoint.address);
            }
            !entry.is_doomed
        });
    }

    /// Takes all away, now: the client is gone.
    pub fn clear(&mut self, machine: &Machine) {
        self.entries.values_mut().for_each(|entry| entry.is_doomed = true);
        self.commit(machine);
    }

    /// Whether the client has a breakpoint at this address.
    pub fn is_at(&self, address: u64) -> bool {
        let places = [Key::Software(address), Key::Hardware(address)];
        places.iter().any(|key| self.entries.get(key).is_some_and(|entry| !entry.is_doomed))
    }

    /// What the client calls this breakpoint; `None` for somebody else's.
    pub fn key_of(&self, breakpoint: &Breakpoint) -> Option<Key> {
        self.entries.iter().find(|(_, entry)| entry.breakpoint.id == breakpoint.id).map(|(key, _)| *key)
    }
}
