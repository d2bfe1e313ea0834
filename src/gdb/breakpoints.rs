//! The breakpoints and watchpoints of one client. gdb takes all of them away at each stop and sets them again before it
//! goes on; what is taken away stays in place until the guest runs, so that such a round costs nothing, keeps the
//! statistics, and loses no hit that waits to be reported. While gdb steps a vCPU over one it is only disabled.

use std::collections::HashMap;
use std::sync::Arc;

use super::policy::{Request, Wish};
use crate::debug::agent::AgentProgram;
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
    /// Disabled for a step, not by a user.
    is_suspended: bool,
}

/// The table of one client.
#[derive(Default)]
pub struct Breakpoints {
    entries: HashMap<Key, Entry>,
}

impl Breakpoints {
    /// Gives a breakpoint that is still there these conditions of the client's. False: there is none.
    pub fn renew(&mut self, machine: &Machine, key: Key, agent: &[Arc<AgentProgram>]) -> Result<bool> {
        // Another front end may have deleted it meanwhile.
        let Some(entry) = self.entries.get_mut(&key).filter(|entry| !entry.breakpoint.is_deleted()) else {
            self.entries.remove(&key);
            return Ok(false);
        };
        // What a policy or `monitor` has put beside the client's conditions stays.
        let kept = entry.breakpoint.condition();
        entry.breakpoint.set_condition(Condition { agent: agent.to_vec(), ..kept });
        if entry.is_suspended {
            machine.enable_breakpoint(&entry.breakpoint, true)?;
        }
        entry.is_doomed = false;
        entry.is_suspended = false;
        Ok(true)
    }

    /// Sets a breakpoint with a client's conditions, and with what a policy wants besides.
    pub fn insert(&mut self, machine: &Machine, key: Key, agent: Vec<Arc<AgentProgram>>, wish: Wish) -> Result<()> {
        let condition = Condition { compiled: wish.compiled, agent, predicate: wish.predicate };
        let options = |address: u64, hardware| BreakpointOptions {
            location: format!("{address:#x}"),
            name: Some(wish.name.unwrap_or_else(|| "gdb".into())),
            ignore: wish.ignore,
            vcpu: wish.vcpu,
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
        self.entries.insert(key, Entry { breakpoint, is_doomed: false, is_suspended: false });
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

    /// Carries out what was asked, before the guest runs; gives what is gone. Before a step, `for_step`, after which
    /// the client sets most of them again, they are disabled.
    pub fn commit(&mut self, machine: &Machine, for_step: bool) -> Vec<Request> {
        let mut gone = Vec::new();
        self.entries.retain(|key, entry| {
            if !entry.is_doomed {
                return true;
            }
            let result = if for_step {
                let was_enabled = !entry.is_suspended && entry.breakpoint.is_enabled();
                entry.is_suspended |= was_enabled;
                if was_enabled { machine.enable_breakpoint(&entry.breakpoint, false) } else { Ok(()) }
            } else {
                let is_conditional = !entry.breakpoint.condition().agent.is_empty();
                gone.push(Request { key: *key, is_conditional });
                machine.delete_breakpoint(&entry.breakpoint)
            };
            if let Err(error) = result {
                log::warn!("gdb's breakpoint at {:#x}: {error}", entry.breakpoint.address);
            }
            for_step
        });
        gone
    }

    /// Takes all away, now: the client is gone. Gives what there was.
    pub fn clear(&mut self, machine: &Machine) -> Vec<Request> {
        self.entries.values_mut().for_each(|entry| entry.is_doomed = true);
        self.commit(machine, false)
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
