//! Watchpoints: breakpoints on data. What the user asked for is a [`Breakpoint`] with a [`Watch`]; how the machine comes
//! to notice an access is a [`WatchKind`], chosen from what the back end can do. Where debug registers can't do it
//! (they are too few, or never fire), every vCPU executes one instruction at a time while the watchpoint is enabled.

use std::sync::{Arc, Mutex, MutexGuard};

use super::breakpoints::Breakpoint;
use crate::backend::{Access, Capabilities, DataAccess, HardwareBreakpoint};
use crate::error::{Error, Result};

/// The longest range that a watchpoint may have, in bytes.
pub const MAX_LENGTH: u64 = 1 << 16;

/// Which accesses a watchpoint is for. An instruction that reads and then writes, writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WatchAccess {
    /// Writes, whether they change the value or not.
    Write,
    /// Reads.
    Read,
    /// Both.
    ReadWrite,
}

impl WatchAccess {
    /// The name that scripts use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Write => "write",
            Self::Read => "read",
            Self::ReadWrite => "access",
        }
    }

    /// The access of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Write, Self::Read, Self::ReadWrite].into_iter().find(|a| a.name() == name)
    }

    fn is_for(self, write: bool) -> bool {
        match self {
            Self::Write => write,
            Self::Read => !write,
            Self::ReadWrite => true,
        }
    }
}

/// What makes a breakpoint a watchpoint: it watches `length` bytes from the breakpoint's address.
pub struct Watch {
    /// Bytes.
    pub length: u64,
    /// Which accesses.
    pub access: WatchAccess,
    /// What was there last, for a CPU that tells of an access when it has happened.
    seen: Mutex<Option<Vec<u8>>>,
}

impl Watch {
    /// A watch of `length` bytes at `address`.
    pub fn new(address: u64, length: u64, access: WatchAccess) -> Result<Self> {
        if length == 0 || length > MAX_LENGTH {
            let text = format!("a watchpoint can watch 1 to {MAX_LENGTH} bytes, not {length}");
            return Err(Error::Breakpoint(text));
        }
        if address.checked_add(length - 1).is_none() {
            let text = format!("{length} bytes at {address:#x} reach past the end of the address space");
            return Err(Error::Breakpoint(text));
        }
        Ok(Self { length, access, seen: Mutex::new(None) })
    }

    /// What was there when somebody last looked; the caller may replace it.
    pub(crate) fn seen(&self) -> MutexGuard<'_, Option<Vec<u8>>> {
        self.seen.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// An access to what a watchpoint watches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Touch {
    /// The first watched byte that was accessed, as far as that is known.
    pub address: u64,
    /// Whether it was a write.
    pub write: bool,
    /// All watched bytes before; empty if they were not mapped.
    pub old: Vec<u8>,
    /// All watched bytes after; empty if they are not mapped.
    pub new: Vec<u8>,
}

impl Touch {
    /// "write" or "read".
    pub fn access(&self) -> &'static str {
        if self.write { WatchAccess::Write } else { WatchAccess::Read }.name()
    }
}

/// How accesses are noticed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WatchKind {
    /// The CPU itself looks out for them.
    Hardware(Vec<HardwareBreakpoint>),
    /// Every instruction is executed by itself, and its accesses compared.
    Stepped,
}

impl WatchKind {
    /// How many places of the CPU it takes.
    pub(super) fn registers(&self) -> usize {
        match self {
            Self::Hardware(pieces) => pieces.len(),
            Self::Stepped => 0,
        }
    }
}

/// Chooses how a watchpoint is made, with `free` places of the CPU left.
pub(super) fn choose(
    breakpoint: &Breakpoint,
    watch: &Watch,
    capabilities: &Capabilities,
    free: usize,
) -> Result<WatchKind> {
    let pieces = if capabilities.any_range {
        let access = match watch.access {
            WatchAccess::Write => Access::Write,
            WatchAccess::Read => Access::Read,
            WatchAccess::ReadWrite => Access::ReadWrite,
        };
        vec![HardwareBreakpoint { address: breakpoint.address, access, length: watch.length }]
    } else {
        pieces(breakpoint.address, watch)
    };
    let most = if capabilities.any_range { free } else { free.min(MAX_PIECES) };
    if capabilities.watchpoints && pieces.len() <= most {
        return Ok(WatchKind::Hardware(pieces));
    }
    if !capabilities.single_step {
        return Err(Error::Breakpoint(
            "this hypervisor has no watchpoint left for this range, and no single-step to do without".into(),
        ));
    }
    Ok(WatchKind::Stepped)
}

/// Says once what a stepped watchpoint costs.
pub(super) fn warn_of_steps(breakpoint: &Breakpoint, capabilities: &Capabilities) {
    let reason = if capabilities.watchpoints {
        "it needs more debug registers than are free"
    } else {
        "this machine's debug registers do not notice accesses to data"
    };
    log::warn!(
        "watchpoint {} at {:#x}: {reason}, so every instruction of every vCPU is executed by itself while it is enabled; \
         this is slow",
        breakpoint.id,
        breakpoint.address
    );
}

/// The aligned pieces of 8, 4, 2 or 1 bytes that debug registers watch (Intel SDM 3B, 19.2.5). No register looks out
/// for reads alone.
fn pieces(address: u64, watch: &Watch) -> Vec<HardwareBreakpoint> {
    let access = if watch.access == WatchAccess::Write { Access::Write } else { Access::ReadWrite };
    let mut pieces = Vec::new();
    let mut done = 0;
    while done < watch.length && pieces.len() <= MAX_PIECES {
        let at = address.wrapping_add(done);
        let fits = |length: &u64| at.is_multiple_of(*length) && *length <= watch.length - done;
        let length = [8, 4, 2, 1].into_iter().find(fits).expect("one byte fits");
        pieces.push(HardwareBreakpoint { address: at, access, length });
        done += length;
    }
    pieces
}

/// More than any CPU has.
const MAX_PIECES: usize = 4;

/// An instruction's accesses to what is watched, while it is executed.
#[derive(Default)]
pub(crate) struct Recorder {
    touched: Vec<Record>,
}

struct Record {
    watch: usize,
    address: u64,
    write: bool,
    old: Vec<u8>,
}

impl Recorder {
    /// Notes an access, before it happens; `read` gives the bytes of a virtual range, or none.
    pub(crate) fn note(&mut self, watches: &[Arc<Breakpoint>], access: DataAccess, read: &dyn Fn(u64, u64) -> Vec<u8>) {
        for (n, breakpoint) in watches.iter().enumerate() {
            let Some((watch, first)) =
                breakpoint.watch.as_ref().and_then(|w| Some((w, overlap(breakpoint, w, access)?)))
            else {
                continue;
            };
            match self.touched.iter_mut().find(|r| r.watch == n) {
                Some(record) if access.write && !record.write => (record.write, record.address) = (true, first),
                Some(_) => {}
                None => self.touched.push(Record {
                    watch: n,
                    address: first,
                    write: access.write,
                    old: read(breakpoint.address, watch.length),
                }),
            }
        }
    }

    /// What the instruction has done, now that it is executed. With `doubtful`, a write counts only if it shows.
    pub(crate) fn finish(
        self,
        watches: &[Arc<Breakpoint>],
        doubtful: bool,
        read: &dyn Fn(u64, u64) -> Vec<u8>,
    ) -> Vec<(Arc<Breakpoint>, Touch)> {
        let touches = self.touched.into_iter().filter_map(|Record { watch, address, write, old }| {
            let breakpoint = watches.get(watch)?;
            let watch = breakpoint.watch.as_ref()?;
            let new = read(breakpoint.address, watch.length);
            let happened = !doubtful || old != new;
            (watch.access.is_for(write) && happened).then(|| (breakpoint.clone(), Touch { address, write, old, new }))
        });
        touches.collect()
    }
}

/// The first watched byte of an access, if it has one.
pub(crate) fn overlap(breakpoint: &Breakpoint, watch: &Watch, access: DataAccess) -> Option<u64> {
    let into = access.address.wrapping_sub(breakpoint.address);
    if into < watch.length {
        return Some(access.address);
    }
    let before = breakpoint.address.wrapping_sub(access.address);
    (before < access.length).then_some(breakpoint.address)
}

/// What a CPU that tells of accesses when they have happened has noticed: the touch, if the watchpoint is for it.
/// `write` is what the CPU knows; otherwise a value that has changed was written.
pub(crate) fn noticed(breakpoint: &Breakpoint, address: u64, write: Option<bool>, new: Vec<u8>) -> Option<Touch> {
    let watch = breakpoint.watch.as_ref()?;
    let mut seen = watch.seen();
    let old = seen.replace(new.clone()).unwrap_or_else(|| new.clone());
    // What was seen may be old where the CPU looks out for reads alone: it tells what it knows.
    let write = write.unwrap_or(watch.access == WatchAccess::Write || old != new);
    watch.access.is_for(write).then_some(Touch { address, write, old, new })
}

/// What somebody else than a vCPU did to memory, if it shows in a watchpoint's bytes. `is_written` tells of the offset of
/// one of them whether it was written at all: another vCPU may have changed the others.
pub(crate) fn changed(
    breakpoint: &Breakpoint,
    old: &[u8],
    new: &[u8],
    is_written: impl Fn(usize) -> bool,
) -> Option<Touch> {
    let watch = breakpoint.watch.as_ref()?;
    if old == new {
        return None;
    }
    *watch.seen() = Some(new.to_vec());
    if !watch.access.is_for(true) {
        return None;
    }
    let differs = |n: &usize| old.get(*n) != new.get(*n) && is_written(*n);
    let first = (0..old.len().max(new.len())).find(differs)?;
    let address = breakpoint.address.wrapping_add(first as u64);
    Some(Touch { address, write: true, old: old.to_vec(), new: new.to_vec() })
}
