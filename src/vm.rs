//! A VM: from a configuration to a built machine, run to its end, closed. [`Machine`] is what the vCPU threads and the
//! front ends share. Its rooms: `config` (what it is made from), `input` (what the guest is told), `start` (how it is
//! built), `resume` (who lets it run, and what its stops come to), `sites` (breakpoints), `console` (how output comes
//! out), `places` (addresses and their names).

mod config;
mod console;
mod input;
mod places;
mod resume;
mod sites;
mod start;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::backend::{Backend, Capabilities, Coalesced};
use crate::boot::{Image, Layout};
use crate::debug::breakpoints::{Hit, Table};
use crate::debug::catch::Catch;
use crate::debug::dwarf::DebugInfo;
use crate::debug::engine::{End, Engine};
use crate::debug::symbols::SymbolTable;
use crate::debug::view::View;
use crate::devices::pci::Pci;
use crate::devices::pump::Pump;
use crate::devices::serial::Serial;
use crate::error::{Error, Result};
use crate::hypercall::Services;
use crate::isolation::landlock::FileIsolation;
use crate::memory::GuestMemory;
use crate::stats::Stats;
use crate::vcpu::{self, Context};

pub use config::{Config, DEFAULT_MEMORY, Measure, SoftConfig, ThreadWrapper};
pub(crate) use console::CONSOLE_PORT;

/// A built machine.
pub struct Machine {
    /// Guest RAM.
    pub memory: GuestMemory,
    /// Where the image lies.
    pub layout: Layout,
    /// The image.
    pub image: Arc<Image>,
    /// Hypercall services.
    pub services: Services,
    /// Console.
    pub console: Arc<Serial>,
    /// Counters.
    pub stats: Stats,
    /// PCI ports.
    pub pci: Pci,
    /// Stop-the-world engine.
    pub engine: Engine,
    /// Breakpoints.
    pub table: RwLock<Table>,
    generation: AtomicU64,
    catch: Catch,
    controller: Mutex<Option<String>>,
    resuming: Mutex<()>,
    contexts: Vec<Mutex<Option<Context>>>,
    coalesced: Option<Arc<dyn Coalesced>>,
    has_bursts: bool,
    is_native: bool,
    judges_in_software: bool,
    pump: Pump,
    backend: Mutex<Option<Arc<dyn Backend>>>,
    backend_name: &'static str,
    owner: u32,
    symbols: OnceLock<SymbolTable>,
    debug_info: OnceLock<DebugInfo>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    affinity: Vec<usize>,
    isolation: FileIsolation,
    started: Instant,
    ended: OnceLock<Duration>,
}

impl Machine {
    fn threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Whether a software CPU may take over between exits.
    #[inline]
    pub(crate) fn has_bursts(&self) -> bool {
        self.has_bursts
    }

    /// Whether ring 0 runs on the CPU itself.
    #[inline]
    pub(crate) fn is_native(&self) -> bool {
        self.is_native
    }

    /// Whether a software CPU goes on after a hit that stops nobody.
    #[inline]
    pub(crate) fn judges_in_software(&self) -> bool {
        self.judges_in_software
    }

    /// Number of vCPUs.
    pub fn cpus(&self) -> u32 {
        u32::try_from(self.contexts.len()).expect("made from a u32")
    }

    /// Name of the back end.
    pub fn backend_name(&self) -> &'static str {
        self.backend_name
    }

    /// What the back end can do for a debugger.
    pub fn capabilities(&self) -> Result<Capabilities> {
        let backend = self.backend.lock().unwrap_or_else(|e| e.into_inner()).clone();
        backend.ok_or_else(|| Error::VmState("the VM is closed".into()))?.capabilities()
    }

    /// Fails in a forked child: it has a copy of this value, but not the VM's threads, and KVM refuses it the VM.
    pub fn check_owner(&self) -> Result<()> {
        if self.owner == std::process::id() {
            return Ok(());
        }
        Err(Error::VmState(
            "this VM belongs to the parent process; a forked child can't use it: make a new VM here".into(),
        ))
    }

    pub(crate) fn lock_context(&self, vcpu: u32) -> MutexGuard<'_, Option<Context>> {
        self.contexts[vcpu as usize].lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Uses a vCPU while the world is stopped. Never waits.
    pub fn with_vcpu<T>(&self, vcpu: u32, f: impl FnOnce(&mut Context) -> Result<T>) -> Result<T> {
        self.check_owner()?;
        let slot = self.contexts.get(vcpu as usize).ok_or_else(|| {
            Error::VmState(format!("there is no vCPU {vcpu}; this VM has {} (numbered from 0)", self.contexts.len()))
        })?;
        let mut guard = loop {
            self.engine.check_stopped()?;
            match slot.try_lock() {
                Ok(guard) => break guard,
                Err(std::sync::TryLockError::Poisoned(e)) => break e.into_inner(),
                // Another thread reads it just now, or has resumed the world meanwhile.
                Err(std::sync::TryLockError::WouldBlock) => std::thread::yield_now(),
            }
        };
        // A vCPU that got hold of its context before us is running; one that comes after us waits for the guard.
        self.engine.check_stopped()?;
        f(guard.as_mut().ok_or_else(|| Error::VmState("the VM is closed".into()))?)
    }

    /// Uses a vCPU inside its own callback.
    pub fn with_hit<T>(&self, hit: &Hit, f: impl FnOnce(&mut Context) -> Result<T>) -> Result<T> {
        let check = || {
            let text = "this hit is over: a Hit can be used only inside the callback that got it";
            if hit.alive.load(Ordering::SeqCst) { Ok(()) } else { Err(Error::VmState(text.into())) }
        };
        let mut guard = loop {
            check()?;
            match self.contexts[hit.vcpu as usize].try_lock() {
                Ok(guard) => break guard,
                Err(std::sync::TryLockError::Poisoned(e)) => break e.into_inner(),
                // Another thread reads it just now, or the callback has returned and the vCPU runs.
                Err(std::sync::TryLockError::WouldBlock) => std::thread::yield_now(),
            }
        };
        check()?;
        f(guard.as_mut().ok_or_else(|| Error::VmState("the VM is closed".into()))?)
    }

    /// Guest memory without planted bytes.
    pub fn view(&self) -> View<'_> {
        View::new(&self.memory, &self.table)
    }

    /// Time from the start to now, or to the end.
    pub fn elapsed(&self) -> Duration {
        self.ended.get().copied().unwrap_or_else(|| self.started.elapsed())
    }

    /// Ends the VM, whatever it does, and waits for nothing.
    pub fn kill(&self) {
        self.engine.end(End::Killed);
        self.console.hurry(console::LAST_WORDS);
    }

    /// Ends the VM, whatever it does, and waits for its threads, unless it is called by one of them. May be called more
    /// than once.
    pub fn close(&self) {
        self.kill();
        self.join();
    }

    /// Waits for the vCPU threads of a VM that has ended.
    pub fn join(&self) {
        self.pump.end();
        if vcpu::is_own_thread(self) {
            return;
        }
        // Held meanwhile, so that another caller waits, too.
        let mut threads = self.threads();
        for thread in threads.drain(..) {
            while !thread.is_finished() {
                self.engine.kick_late();
                std::thread::park_timeout(Duration::from_micros(200));
            }
            if thread.join().is_err() {
                log::error!("a thread of the VM has panicked");
            }
        }
        drop(threads);
        self.ended.get_or_init(|| self.started.elapsed());
        let _ = self.drain(0, &|| true);
        let _ = self.console.flush(&|| !self.console.is_callback());
        for context in &self.contexts {
            drop(context.lock().unwrap_or_else(|e| e.into_inner()).take());
        }
        // Whoever still holds the VM, holds no more than its counters and its output.
        drop(self.backend.lock().unwrap_or_else(|e| e.into_inner()).take());
        self.memory.release();
        self.services.files().remove_scratch();
    }
}
