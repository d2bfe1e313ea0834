//! Breakpoints: what the user asked for ([`Breakpoint`]) and how the machine is made to leave the guest there ([`Site`]).
//! Several breakpoints may share a site. A site exists while one of its breakpoints is enabled, so that a disabled
//! breakpoint costs the guest nothing.

use std::any::Any;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};

use super::agent::AgentProgram;
use super::condition::{Context, EvaluateError, Program};
use super::watchpoints::{self, Touch, Watch, WatchKind};
use crate::backend::{Capabilities, GuestDebug, HardwareBreakpoint, Int3};
use crate::error::{Error, Result};
use crate::memory::GuestMemory;

/// The opcode of `int3`.
pub const INT3: u8 = 0xcc;

/// A callback that decides whether a hit stops the world. It runs on the vCPU's thread, with other vCPUs running.
pub trait Predicate: Send + Sync {
    /// Whether to stop; or the front end's own error value.
    fn evaluate(&self, hit: &Hit) -> Result<bool, Arc<dyn Any + Send + Sync>>;
    /// Itself, for the front end that made it.
    fn as_any(&self) -> &dyn Any;
}

/// A vCPU at a breakpoint, for the time of a callback.
#[derive(Clone)]
pub struct Hit {
    /// The VM.
    pub machine: Arc<crate::vm::Machine>,
    /// The vCPU.
    pub vcpu: u32,
    /// Where it is.
    pub pc: u64,
    /// The breakpoint.
    pub breakpoint: Arc<Breakpoint>,
    /// For a watchpoint, the access.
    pub touch: Option<Touch>,
    /// True until the callback has returned: as long, registers and memory may be used.
    pub alive: Arc<AtomicBool>,
}

/// When a breakpoint that is met stops the world; all parts must agree.
#[derive(Clone, Default)]
pub struct Condition {
    /// The source and the program of a compiled condition.
    pub compiled: Option<(String, Arc<Program>)>,
    /// gdb's conditions of all its breakpoints at this place: one that holds is enough.
    pub agent: Vec<Arc<AgentProgram>>,
    /// A callback.
    pub predicate: Option<Arc<dyn Predicate>>,
}

impl Condition {
    /// What the programs say; the callback is not asked. A program that fails does so for all: the world is to stop.
    pub fn evaluate<C: Context + ?Sized>(&self, context: &mut C) -> Result<bool, EvaluateError> {
        if let Some((_, program)) = &self.compiled
            && !program.evaluate(context)?
        {
            return Ok(false);
        }
        for program in &self.agent {
            if program.evaluate(context)? {
                return Ok(true);
            }
        }
        Ok(self.agent.is_empty())
    }

    /// Whether a program takes part in the decision.
    pub fn has_program(&self) -> bool {
        self.compiled.is_some() || !self.agent.is_empty()
    }
}

/// How a breakpoint is asked for.
#[derive(Clone, Default)]
pub struct BreakpointOptions {
    /// What the user called the place.
    pub location: String,
    /// Further addresses of the place: a source line may have code in several functions.
    pub also: Vec<u64>,
    /// Not the user's: it has no number of its own, is not listed, and its stop is a step's. It is met where the stack
    /// pointer is at least this.
    pub internal: Option<u64>,
    /// A name for messages.
    pub name: Option<String>,
    /// Hits to let pass before the conditions are asked.
    pub ignore: u64,
    /// Delete it when it has stopped the world once.
    pub temporary: bool,
    /// Only this vCPU.
    pub vcpu: Option<u32>,
    /// Starts disabled.
    pub disabled: bool,
    /// Use a debug register (it holds when the guest overwrites the code), instead of the cheapest way.
    pub hardware: bool,
}

/// A breakpoint as the user sees it.
pub struct Breakpoint {
    /// Number, from 1.
    pub id: u32,
    /// Guest-virtual address.
    pub address: u64,
    /// How it was asked for.
    pub options: BreakpointOptions,
    /// For a watchpoint, what it watches.
    pub watch: Option<Watch>,
    enabled: AtomicBool,
    deleted: AtomicBool,
    ignore: AtomicU64,
    reached: AtomicU64,
    hits: AtomicU64,
    condition: RwLock<Condition>,
}

impl Breakpoint {
    /// All addresses that it is at.
    pub fn addresses(&self) -> impl Iterator<Item = u64> + '_ {
        std::iter::once(self.address).chain(self.options.also.iter().copied())
    }

    /// Whether it is looked at.
    pub fn is_enabled(&self) -> bool {
        self.enabled.load(Ordering::SeqCst)
    }

    /// Whether it was deleted.
    pub fn is_deleted(&self) -> bool {
        self.deleted.load(Ordering::SeqCst)
    }

    /// How many vCPU arrivals were counted.
    pub fn reached(&self) -> u64 {
        self.reached.load(Ordering::SeqCst)
    }

    /// How many arrivals its conditions let through.
    pub fn hits(&self) -> u64 {
        self.hits.load(Ordering::SeqCst)
    }

    /// Arrivals still to be let pass.
    pub fn ignore(&self) -> u64 {
        self.ignore.load(Ordering::SeqCst)
    }

    /// Sets how many arrivals to let pass from now on.
    pub fn set_ignore(&self, count: u64) {
        self.ignore.store(count, Ordering::SeqCst);
    }

    /// Its condition.
    pub fn condition(&self) -> Condition {
        self.condition.read().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Replaces its condition; the next hit is judged by it.
    pub fn set_condition(&self, condition: Condition) {
        let before = std::mem::replace(&mut *self.condition.write().unwrap_or_else(|e| e.into_inner()), condition);
        // Outside of the lock: a front end's callable may run code when it goes.
        drop(before);
    }

    /// Counts an arrival of `vcpu`. False: filtered out, or ignored.
    pub(crate) fn arrive(&self, vcpu: u32) -> bool {
        if !self.is_enabled() || self.options.vcpu.is_some_and(|only| only != vcpu) {
            return false;
        }
        self.reached.fetch_add(1, Ordering::SeqCst);
        self.ignore.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_err()
    }

    pub(crate) fn count_hit(&self) {
        self.hits.fetch_add(1, Ordering::SeqCst);
    }
}

/// How the machine leaves the guest at an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SiteKind {
    /// `int3` in place of the byte at this guest-physical address.
    Planted(u64),
    /// The CPU itself looks out for it, by a debug register.
    Hardware,
    /// Every instruction is stepped, and the program counter compared.
    Stepped,
}

struct Site {
    kind: SiteKind,
    breakpoints: Vec<Arc<Breakpoint>>,
}

/// A byte that is not what the guest put there.
#[derive(Clone, Copy)]
struct Planted {
    original: u8,
    users: u32,
    /// Away for a while: what the guest executes is there.
    lifted: bool,
}

/// Numbers of internal breakpoints begin behind this: a place's own breakpoints are asked first.
const FIRST_INTERNAL: u32 = 1 << 30;

/// All breakpoints of a VM. Changed only inside the exclusive section; read by every hit.
#[derive(Default)]
pub struct Table {
    all: BTreeMap<u32, Arc<Breakpoint>>,
    sites: HashMap<u64, Site>,
    watches: BTreeMap<u32, (Arc<Breakpoint>, WatchKind)>,
    planted: BTreeMap<u64, Planted>,
    next: u32,
    next_internal: u32,
    generation: u64,
}

impl Table {
    /// All breakpoints, by number.
    pub fn breakpoints(&self) -> Vec<Arc<Breakpoint>> {
        self.all.values().filter(|b| b.options.internal.is_none()).cloned().collect()
    }

    /// The internal ones.
    pub fn internal(&self) -> Vec<Arc<Breakpoint>> {
        self.all.values().filter(|b| b.options.internal.is_some()).cloned().collect()
    }

    /// Rises with each change of the sites.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The breakpoints at an address and how they are made; `None` without a site.
    pub fn at(&self, address: u64) -> Option<(SiteKind, Vec<Arc<Breakpoint>>)> {
        self.sites.get(&address).map(|s| (s.kind, s.breakpoints.clone()))
    }

    /// Where the sites are.
    pub fn addresses(&self) -> Vec<u64> {
        self.sites.keys().copied().collect()
    }

    /// How the site at an address is made.
    pub fn kind_at(&self, address: u64) -> Option<SiteKind> {
        self.sites.get(&address).map(|s| s.kind)
    }

    /// How a vCPU that runs freely is debugged.
    pub fn guest_debug(&self, capabilities: &Capabilities) -> GuestDebug {
        let mut debug = GuestDebug::default();
        for (address, site) in &self.sites {
            match site.kind {
                SiteKind::Planted(_) => debug.software_breakpoints = true,
                SiteKind::Hardware => debug.hardware.push(HardwareBreakpoint::execute(*address)),
                SiteKind::Stepped => {
                    debug.single_step = true;
                    debug.block_interrupts = false;
                }
            }
        }
        debug.software_breakpoints &= capabilities.int3 == Int3::DebugExit;
        for (_, kind) in self.watches.values() {
            if let WatchKind::Hardware(pieces) = kind {
                debug.hardware.extend_from_slice(pieces);
            }
        }
        debug
    }

    /// The enabled watchpoints, by number, and whether one of them needs every instruction to be executed by itself.
    pub fn watches(&self) -> (Arc<[Arc<Breakpoint>]>, bool) {
        let stepped = self.watches.values().any(|(_, kind)| *kind == WatchKind::Stepped);
        (self.watches.values().map(|(breakpoint, _)| breakpoint.clone()).collect(), stepped)
    }

    /// How an enabled watchpoint is made.
    pub fn watch_kind(&self, breakpoint: &Breakpoint) -> Option<&WatchKind> {
        self.watches.get(&breakpoint.id).map(|(_, kind)| kind)
    }

    /// Adds a breakpoint, without its site: [`Table::sync`] follows.
    pub fn add(
        &mut self,
        address: u64,
        watch: Option<Watch>,
        options: BreakpointOptions,
        condition: Condition,
    ) -> Arc<Breakpoint> {
        let last = if options.internal.is_some() { &mut self.next_internal } else { &mut self.next };
        *last += 1;
        let id = if options.internal.is_some() { FIRST_INTERNAL + *last } else { *last };
        let breakpoint = Arc::new(Breakpoint {
            id,
            address,
            enabled: AtomicBool::new(!options.disabled),
            deleted: AtomicBool::new(false),
            ignore: AtomicU64::new(options.ignore),
            reached: AtomicU64::new(0),
            hits: AtomicU64::new(0),
            condition: RwLock::new(condition),
            options,
            watch,
        });
        self.all.insert(id, breakpoint.clone());
        breakpoint
    }

    /// Enables or disables a breakpoint; [`Table::sync`] follows.
    pub fn set_enabled(&mut self, breakpoint: &Breakpoint, enabled: bool) {
        breakpoint.enabled.store(enabled, Ordering::SeqCst);
    }

    /// Deletes a breakpoint; [`Table::sync`] follows.
    pub fn remove(&mut self, breakpoint: &Breakpoint) {
        breakpoint.enabled.store(false, Ordering::SeqCst);
        breakpoint.deleted.store(true, Ordering::SeqCst);
        self.all.remove(&breakpoint.id);
    }

    /// Makes the sites agree with the enabled breakpoints. `translate` gives the physical address of a virtual one.
    pub fn sync(
        &mut self,
        memory: &GuestMemory,
        capabilities: &Capabilities,
        translate: &mut dyn FnMut(u64) -> Option<u64>,
    ) -> Result<()> {
        let mut wanted: BTreeMap<u64, Vec<Arc<Breakpoint>>> = BTreeMap::new();
        for breakpoint in self.all.values().filter(|b| b.is_enabled() && b.watch.is_none()) {
            for address in breakpoint.addresses() {
                wanted.entry(address).or_default().push(breakpoint.clone());
            }
        }
        let gone: Vec<u64> = self.sites.keys().filter(|a| !wanted.contains_key(a)).copied().collect();
        for address in gone {
            if let Some(Site { kind: SiteKind::Planted(physical), .. }) = self.sites.remove(&address) {
                self.unplant(memory, physical);
            }
        }
        self.generation += 1;
        for (address, breakpoints) in wanted {
            let kind = match self.sites.get(&address) {
                Some(site) => site.kind,
                None => self.choose(memory, capabilities, address, &breakpoints, translate)?,
            };
            self.sites.insert(address, Site { kind, breakpoints });
        }
        self.sync_watches(capabilities)
    }

    /// Makes the watches agree with the enabled watchpoints; one that is stepped gets what the CPU has free by now.
    fn sync_watches(&mut self, capabilities: &Capabilities) -> Result<()> {
        let (_, mut warned) = self.watches();
        self.watches.clear();
        let places = usize::try_from(capabilities.hardware_breakpoints).unwrap_or(usize::MAX);
        let mut free = places.saturating_sub(self.sites.values().filter(|s| s.kind == SiteKind::Hardware).count());
        for breakpoint in self.all.values().filter(|b| b.is_enabled()) {
            let Some(watch) = &breakpoint.watch else { continue };
            let kind = watchpoints::choose(breakpoint, watch, capabilities, free)?;
            if kind == WatchKind::Stepped && !std::mem::replace(&mut warned, true) {
                watchpoints::warn_of_steps(breakpoint, capabilities);
            }
            free -= kind.registers();
            self.watches.insert(breakpoint.id, (breakpoint.clone(), kind));
        }
        Ok(())
    }

    fn choose(
        &mut self,
        memory: &GuestMemory,
        capabilities: &Capabilities,
        address: u64,
        breakpoints: &[Arc<Breakpoint>],
        translate: &mut dyn FnMut(u64) -> Option<u64>,
    ) -> Result<SiteKind> {
        let hardware = breakpoints.iter().any(|b| b.options.hardware);
        if capabilities.int3 != Int3::NotIntercepted && !hardware {
            let physical = translate(address).ok_or_else(|| {
                Error::Breakpoint(format!(
                    "address {address:#x} is not mapped in the guest now; set the breakpoint later, or with hardware=True"
                ))
            })?;
            self.plant(memory, physical)?;
            return Ok(SiteKind::Planted(physical));
        }
        let used = self.sites.values().filter(|s| s.kind == SiteKind::Hardware).count();
        // Watchpoints get what is left.
        if used < usize::try_from(capabilities.hardware_breakpoints).unwrap_or(usize::MAX) {
            return Ok(SiteKind::Hardware);
        }
        if !capabilities.single_step {
            return Err(Error::Breakpoint(format!(
                "all {} debug registers are in use, and this hypervisor has neither software breakpoints nor single-step",
                capabilities.hardware_breakpoints
            )));
        }
        log::warn!(
            "breakpoint at {address:#x}: all {} debug registers are in use, so the guest is single-stepped; this is slow",
            capabilities.hardware_breakpoints
        );
        Ok(SiteKind::Stepped)
    }

    fn plant(&mut self, memory: &GuestMemory, physical: u64) -> Result<()> {
        if let Some(planted) = self.planted.get_mut(&physical) {
            planted.users += 1;
            return Ok(());
        }
        let mut byte = [0];
        memory
            .read(physical, &mut byte)
            .map_err(|e| Error::Breakpoint(format!("no breakpoint outside of RAM: {e}")))?;
        memory.write(physical, &[INT3])?;
        self.planted.insert(physical, Planted { original: byte[0], users: 1, lifted: false });
        Ok(())
    }

    fn unplant(&mut self, memory: &GuestMemory, physical: u64) {
        let Some(planted) = self.planted.get_mut(&physical) else { return };
        planted.users -= 1;
        if planted.users == 0 {
            let original = planted.original;
            self.planted.remove(&physical);
            self.restore(memory, physical, original);
        }
    }

    /// Puts a byte back, unless the guest has written there since.
    fn restore(&self, memory: &GuestMemory, physical: u64, original: u8) {
        let mut byte = [0];
        if memory.read(physical, &mut byte).is_ok() && byte[0] == INT3 {
            memory.write(physical, &[original]).expect("the address was just read");
        }
    }

    /// Adopts what the guest wrote over planted bytes, and plants them again.
    pub fn replant(&mut self, memory: &GuestMemory) {
        for (physical, planted) in &mut self.planted {
            planted.lifted = false;
            let mut byte = [0];
            if memory.read(*physical, &mut byte).is_ok() && byte[0] != INT3 {
                planted.original = byte[0];
                memory.write(*physical, &[INT3]).expect("the address was just read");
            }
        }
    }

    /// Takes the planted byte away for a while; inside the exclusive section only.
    pub fn lift(&mut self, memory: &GuestMemory, physical: u64) {
        if let Some(planted) = self.planted.get_mut(&physical) {
            planted.lifted = true;
            let original = planted.original;
            self.restore(memory, physical, original);
        }
    }

    /// Whether any byte is planted.
    pub fn has_planted(&self) -> bool {
        !self.planted.is_empty()
    }

    /// Replaces planted bytes in what was read from guest-physical `address` by the guest's own.
    pub fn hide(&self, address: u64, data: &mut [u8]) {
        let end = address.saturating_add(data.len() as u64);
        for (physical, planted) in self.planted.range(address..end) {
            let offset = usize::try_from(physical - address).expect("lies within the data");
            if data[offset] == INT3 {
                data[offset] = planted.original;
            }
        }
    }

    /// Writes to guest-physical memory as a debugger does: beneath planted bytes.
    pub fn write_beneath(
        &mut self,
        memory: &GuestMemory,
        address: u64,
        data: &[u8],
    ) -> Result<(), crate::error::GuestFault> {
        let end = address.saturating_add(data.len() as u64);
        let mut data = data.to_vec();
        if memory.contains(address, data.len() as u64) {
            for (physical, planted) in self.planted.range_mut(address..end) {
                let offset = usize::try_from(physical - address).expect("lies within the data");
                let byte = if planted.lifted { data[offset] } else { INT3 };
                planted.original = std::mem::replace(&mut data[offset], byte);
            }
        }
        memory.write(address, &data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Backing;

    const KVM: Capabilities = Capabilities {
        native_ring0: true,
        single_step: true,
        block_interrupts: true,
        int3: Int3::DebugExit,
        hardware_breakpoints: 4,
        watchpoints: true,
        any_range: false,
        exact_steps: false,
    };

    fn setup() -> (GuestMemory, Table) {
        let memory = GuestMemory::new(0, 0x10000, Backing::default()).unwrap();
        memory.write(0x1000, &[0x55, 0x48, 0x89, 0xe5]).unwrap();
        (memory, Table::default())
    }

    fn add(table: &mut Table, memory: &GuestMemory, address: u64, capabilities: &Capabilities) -> Arc<Breakpoint> {
        let b = table.add(address, None, BreakpointOptions::default(), Condition::default());
        table.sync(memory, capabilities, &mut |va| Some(va & 0xffff)).unwrap();
        b
    }

    fn byte(memory: &GuestMemory, address: u64) -> u8 {
        memory.read_object(address).unwrap()
    }

    #[test]
    fn test_two_addresses_of_one_physical_byte_share_the_plant() {
        let (memory, mut table) = setup();
        let a = add(&mut table, &memory, 0x1000, &KVM);
        let b = add(&mut table, &memory, 0x7_1000, &KVM);
        assert_eq!(byte(&memory, 0x1000), INT3);
        table.remove(&a);
        table.sync(&memory, &KVM, &mut |va| Some(va & 0xffff)).unwrap();
        assert_eq!(byte(&memory, 0x1000), INT3, "the other one still needs it");
        table.remove(&b);
        table.sync(&memory, &KVM, &mut |_| None).unwrap();
        assert_eq!(byte(&memory, 0x1000), 0x55);
    }

    #[test]
    fn test_debugger_never_sees_a_planted_byte_and_writes_go_beneath() {
        let (memory, mut table) = setup();
        let b = add(&mut table, &memory, 0x1001, &KVM);
        let mut seen = [0; 4];
        memory.read(0x1000, &mut seen).unwrap();
        assert_eq!(seen[1], INT3);
        table.hide(0x1000, &mut seen);
        assert_eq!(seen, [0x55, 0x48, 0x89, 0xe5]);
        table.write_beneath(&memory, 0x1000, &[1, 2, 3]).unwrap();
        assert_eq!(byte(&memory, 0x1001), INT3);
        table.remove(&b);
        table.sync(&memory, &KVM, &mut |_| None).unwrap();
        memory.read(0x1000, &mut seen).unwrap();
        assert_eq!(seen, [1, 2, 3, 0xe5]);
    }

    #[test]
    fn test_code_that_the_guest_patched_is_planted_again_and_restored_as_patched() {
        let (memory, mut table) = setup();
        let b = add(&mut table, &memory, 0x1000, &KVM);
        memory.write(0x1000, &[0x90]).unwrap();
        table.replant(&memory);
        assert_eq!(byte(&memory, 0x1000), INT3);
        table.remove(&b);
        table.sync(&memory, &KVM, &mut |_| None).unwrap();
        assert_eq!(byte(&memory, 0x1000), 0x90);
    }

    #[test]
    fn test_fifth_breakpoint_without_int3_is_stepped() {
        let (memory, mut table) = setup();
        let no_int3 = Capabilities { int3: Int3::NotIntercepted, ..KVM };
        for i in 0..5 {
            add(&mut table, &memory, 0x1000 + i, &no_int3);
        }
        let debug = table.guest_debug(&no_int3);
        assert!(debug.hardware.len() == 4 && debug.single_step && !debug.software_breakpoints);
        assert_eq!(byte(&memory, 0x1000), 0x55);
    }

    #[test]
    fn test_unmapped_address_is_refused_and_a_disabled_breakpoint_has_no_site() {
        let (memory, mut table) = setup();
        let b = table.add(0x5000, None, BreakpointOptions::default(), Condition::default());
        let error = table.sync(&memory, &KVM, &mut |_| None).unwrap_err();
        assert!(error.to_string().contains("not mapped"), "{error}");
        table.set_enabled(&b, false);
        table.sync(&memory, &KVM, &mut |_| None).unwrap();
        assert!(table.at(0x5000).is_none());
    }

    #[test]
    fn test_arrivals_are_filtered_then_ignored_then_let_through() {
        let mut table = Table::default();
        let options = BreakpointOptions { ignore: 2, vcpu: Some(1), ..Default::default() };
        let b = table.add(0, None, options, Condition::default());
        assert!(!b.arrive(0));
        assert_eq!(b.reached(), 0);
        assert!(!b.arrive(1) && !b.arrive(1) && b.arrive(1));
        assert_eq!((b.reached(), b.ignore()), (3, 0));
    }
}
