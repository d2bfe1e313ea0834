//! A VM: from a configuration to a built machine, run to its end, closed. [`Machine`] is what the vCPU threads and the
//! front ends share.

mod input;

use std::cell::RefCell;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use self::input::GuestInput;
use crate::backend::soft::clock::ClockKind;
use crate::backend::soft::machine::SoftOptions;
use crate::backend::{self, Backend, Capabilities, Choice, Coalesced, MachineOptions, Vcpu};
use crate::boot::{self, BootState, Image, Layout};
use crate::debug::backtrace::{self, Frame};
use crate::debug::breakpoints::{Breakpoint, BreakpointOptions, Condition, SiteKind, Table};
use crate::debug::catch::Catch;
use crate::debug::dwarf::{DebugInfo, SourceLine};
use crate::debug::engine::{self, End, Engine, Owner, Plan, Status};
use crate::debug::stop::{Event, Stop, StopReason};
use crate::debug::symbols::SymbolTable;
use crate::debug::view::View;
use crate::debug::watchpoints::{Watch, WatchAccess, WatchKind};
use crate::devices::pci::{self, Pci};
use crate::devices::pump::Pump;
use crate::devices::serial::{Output, Serial};
use crate::error::{Error, Result};
use crate::hypercall::{Kind, Services};
use crate::isolation::landlock::{self, FileIsolation};
use crate::isolation::{Files, IoMode, Scratch, Source};
use crate::memory::{Backing, GuestMemory};
use crate::paging::{self, PagingMode};
use crate::registers::{RSI, SystemRegisters};
use crate::stats::latency::Sampling;
use crate::stats::{ExitKind, Stats};
use crate::vcpu::{self, Context};

/// RAM of a VM whose user and image don't say.
pub const DEFAULT_MEMORY: u64 = 64 << 20;
/// How long a line of console output without its end waits for more.
const FLUSH_AFTER: Duration = Duration::from_millis(50);

/// The console's byte port of interface 1: most exits of a booting kernel are its messages, byte by byte.
const CONSOLE_PORT: u16 = uhyve_interface::v1::HypercallAddress::Uart as u16;
/// How often queued port writes are looked for while no exit takes them.
const DRAIN_EVERY: Duration = Duration::from_millis(20);

/// Wraps the body of each vCPU thread: a front end's chance to prepare the thread for its callbacks.
pub type ThreadWrapper = Arc<dyn Fn(&mut dyn FnMut()) + Send + Sync>;

/// Everything that a VM is made from.
pub struct Config {
    /// The image.
    pub image: Arc<Image>,
    /// Bytes of RAM; the image's wish, or [`DEFAULT_MEMORY`], if not given.
    pub memory: Option<u64>,
    /// vCPUs; the image's wish, or 1, if not given.
    pub cpus: Option<u32>,
    /// Arguments of the kernel; the image's if not given.
    pub kernel_args: Option<Vec<String>>,
    /// Arguments of the application; the image's if not given.
    pub args: Option<Vec<String>>,
    /// Environment; it is added to the image's and wins over it.
    pub environment: Vec<(String, String)>,
    /// Guest path and what lies there.
    pub files: Vec<(String, Source)>,
    /// Where console output goes.
    pub output: Output,
    /// Name of the back end.
    pub backend: String,
    /// Random load address for relocatable images.
    pub aslr: bool,
    /// How the host backs RAM.
    pub backing: Backing,
    /// Interval timer.
    pub pit: bool,
    /// Leave idling to the guest.
    pub cpu_pm: bool,
    /// Host CPU of each vCPU.
    pub affinity: Vec<usize>,
    /// Parent of the scratch directory.
    pub tempdir: Option<PathBuf>,
    /// Landlock on the vCPU threads.
    pub isolation: FileIsolation,
    /// Flags for host files.
    pub io_mode: IoMode,
    /// What only the software back end can do; asking for any of it asks for that back end.
    pub soft: SoftConfig,
    /// Begin with a stop, and let the guest's end be one.
    pub debugging: bool,
    /// Wraps vCPU threads.
    pub wrapper: Option<ThreadWrapper>,
    /// What is measured.
    pub measure: Measure,
}

/// What a VM tells of its own speed, and what it does so that there is something to measure.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Measure {
    /// Which exits are timed.
    pub sampling: Sampling,
    /// Accesses to the firmware area leave the guest, as those to a device's memory do.
    pub firmware_exits: bool,
}

/// What a user chooses of the software back end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SoftConfig {
    /// All that is left to chance follows from it: the interleaving of the vCPUs, random numbers, the load address, the
    /// time of day. The same seed gives the same execution.
    pub seed: Option<u64>,
    /// Instructions of a vCPU's turn, on average.
    pub quantum: Option<u64>,
    /// What time goes by; virtual time if not given.
    pub clock: Option<ClockKind>,
}

/// The time at which a machine with a seed boots: 1 January 2026, in seconds since 1970.
const SEEDED_EPOCH: u64 = 1_767_225_600;

impl SoftConfig {
    /// The back end that is chosen, and its options. `chance` gives random numbers where there is no seed.
    fn choose(&self, backend: &str, chance: &mut dyn FnMut() -> u64) -> Result<(Choice, SoftOptions)> {
        let is_asked_for = *self != Self::default();
        let is_soft = is_asked_for && backend == "auto";
        let choice = backend::choose(if is_soft { "soft" } else { backend })?;
        if is_asked_for && choice.name != "soft" {
            let text = format!("seed, quantum and clock are for backend \"soft\", not for {:?}", choice.name);
            return Err(Error::Config(text));
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let options = SoftOptions {
            seed: self.seed.unwrap_or(0),
            random: self.seed.unwrap_or_else(|| if choice.name == "soft" { chance() } else { 0 }),
            quantum: self.quantum.unwrap_or(0),
            clock: self.clock.unwrap_or_default(),
            epoch: if self.seed.is_some() { SEEDED_EPOCH } else { now.as_secs() },
        };
        Ok((choice, options))
    }
}

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
    /// Builds a machine, loads its image, and starts its vCPU threads.
    pub fn start(config: Config) -> Result<Arc<Self>> {
        let started = Instant::now();
        let (memory_size, cpus) = resources(&config)?;
        let Config { image, debugging, affinity, isolation, wrapper, .. } = &config;
        let (image, affinity, isolation, wrapper) = (image.clone(), affinity.clone(), *isolation, wrapper.clone());
        let debugging = *debugging;
        let console =
            Serial::new(config.output).map_err(|source| Error::Host { what: "console output".into(), source })?;
        let console = Arc::new(console);
        let mut guest = GuestInput::new(&image, config.kernel_args, config.args, config.environment, config.files)?;
        let (choice, soft) = config.soft.choose(&config.backend, &mut random)?;
        log::info!("back end {}: {}", choice.name, choice.reason);
        let mut chance: Box<dyn FnMut() -> u64> = Box::new(random);
        if let Some(seed) = config.soft.seed {
            guest.boot_at(SEEDED_EPOCH);
            chance = Box::new(seeded(seed));
        }
        let mut parameters = guest.parameters(cpus);
        let tree = boot::device_tree_size(&parameters)?;
        let layout = Layout::plan(&image, memory_size, tree, config.aslr, &mut chance)?;
        let memory = GuestMemory::new(layout.guest_address, memory_size, config.backing)?;
        let coalesced_ports = vec![(CONSOLE_PORT, 1), (pci::ADDRESS, 4)];
        let firmware_exits = config.measure.firmware_exits;
        let options =
            MachineOptions { cpus, pit: config.pit, cpu_pm: config.cpu_pm, coalesced_ports, firmware_exits, soft };
        let backend = backend::open(choice.name, &memory, &options)?;
        let mut vcpus = (0..cpus).map(|n| backend.create_vcpu(n)).collect::<Result<Vec<_>>>()?;
        parameters.tsc_khz = vcpus.first().and_then(|v| v.tsc_khz()).unwrap_or(0);
        enter_image(&boot::load(&image, &layout, &memory, &parameters)?, &mut vcpus)?;
        let command_line = guest.command_line(&image)?;
        let files = Files::new(guest.files, Scratch::new(config.tempdir.as_deref())?, config.io_mode);
        let services = Services::new(memory.clone(), console.clone(), files, command_line);
        let machine = Arc::new(Self {
            memory,
            layout,
            services,
            console,
            stats: Stats::new(cpus, config.measure.sampling),
            pci: Pci::default(),
            engine: Engine::new(cpus, debugging),
            table: RwLock::new(Table::default()),
            generation: AtomicU64::new(0),
            catch: Catch::default(),
            controller: Mutex::new(None),
            resuming: Mutex::new(()),
            coalesced: backend.coalesced(),
            pump: Pump::default(),
            contexts: vcpus.into_iter().map(|cpu| Mutex::new(Some(Context::new(cpu)))).collect(),
            backend_name: backend.name(),
            backend: Mutex::new(Some(backend)),
            owner: std::process::id(),
            symbols: OnceLock::new(),
            debug_info: OnceLock::new(),
            threads: Mutex::new(Vec::new()),
            affinity,
            isolation,
            image,
            started,
            ended: OnceLock::new(),
        });
        machine.spawn(cpus, wrapper)?;
        Ok(machine)
    }

    fn spawn(self: &Arc<Self>, cpus: u32, wrapper: Option<ThreadWrapper>) -> Result<()> {
        // Signals of the process go to threads that can do something about them: ours begin with all of them blocked.
        let _mask = crate::isolation::wait::Mask::block_all()
            .map_err(|e| Error::Host { what: "can't block signals".into(), source: e.into() })?;
        self.spawn_pump()?;
        for number in 0..cpus {
            let (machine, wrapper) = (self.clone(), wrapper.clone());
            let body = move || match wrapper {
                Some(wrapper) => wrapper(&mut || vcpu::main(&machine, number)),
                None => vcpu::main(&machine, number),
            };
            let thread = std::thread::Builder::new().name(format!("uhyve-vcpu{number}")).spawn(body);
            match thread {
                Ok(handle) => self.threads().push(handle),
                Err(source) => {
                    self.close();
                    return Err(Error::Host { what: "can't start a vCPU thread".into(), source });
                }
            }
        }
        Ok(())
    }

    fn threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Prepares a vCPU's thread: its host CPU, and what of the file system it may reach.
    pub(crate) fn prepare_thread(&self, number: u32) -> Result<()> {
        if let Some(cpu) = self.affinity.get(number as usize) {
            let mut set = nix::sched::CpuSet::new();
            set.set(*cpu)
                .and_then(|()| nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set))
                .map_err(|e| Error::Config(format!("affinity: vCPU {number} can't run on host CPU {cpu}: {e}")))?;
        }
        landlock::restrict_thread(self.isolation, &self.services.files().allowed())
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
    pub fn with_hit<T>(
        &self,
        hit: &crate::debug::breakpoints::Hit,
        f: impl FnOnce(&mut Context) -> Result<T>,
    ) -> Result<T> {
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

    /// The symbols of the image at their addresses in this VM.
    pub fn symbols(&self) -> &SymbolTable {
        self.symbols.get_or_init(|| SymbolTable::from_elf(self.image.kernel(), self.layout.load_bias()))
    }

    /// The debug information of the image. Its addresses are the image's, without the load bias.
    pub fn debug_info(&self) -> &DebugInfo {
        self.debug_info.get_or_init(|| DebugInfo::new(self.image.kernel()))
    }

    /// The source line of an address.
    pub fn source_line(&self, address: u64) -> Option<SourceLine> {
        self.debug_info().line(address.wrapping_sub(self.layout.load_bias()))
    }

    /// The addresses of a place: `file.c:123`, or what [`SymbolTable::resolve`] takes, which has one.
    pub fn resolve(&self, place: &str) -> Result<Vec<u64>> {
        let Some((file, line)) = source_place(place) else { return Ok(vec![self.symbols().resolve(place)?]) };
        let (found, addresses) = self.debug_info().addresses(file, line);
        if addresses.is_empty() {
            let text = if self.debug_info().is_empty() {
                format!("no code for {place}: the image has no debug information (build it with -g)")
            } else {
                format!("no code for {place}: the debug information knows no such file, or no line from there on")
            };
            return Err(Error::Breakpoint(text));
        }
        if found != line {
            log::info!("{place} has no code; the next line that has is {found}");
        }
        Ok(addresses.into_iter().map(|address| address.wrapping_add(self.layout.load_bias())).collect())
    }

    /// The frames of a stopped vCPU, the innermost first, at most `limit`.
    pub fn backtrace(&self, vcpu: u32, limit: usize) -> Result<Vec<Frame>> {
        self.with_vcpu(vcpu, |context| {
            let mode = PagingMode::from(&context.cpu.system_registers()?);
            Ok(backtrace::backtrace(self, &mode, &context.cpu.registers()?, limit))
        })
    }

    /// The canonical frame address of a stopped vCPU's innermost frame, and where it returns to.
    pub fn caller(&self, vcpu: u32) -> Result<Option<(u64, u64)>> {
        self.with_vcpu(vcpu, |context| {
            let mode = PagingMode::from(&context.cpu.system_registers()?);
            Ok(backtrace::caller(self, &mode, &context.cpu.registers()?))
        })
    }

    /// The addresses around one that belong to the same source line.
    pub fn line_range(&self, address: u64) -> Option<std::ops::Range<u64>> {
        let bias = self.layout.load_bias();
        let range = self.debug_info().line_range(address.wrapping_sub(bias))?;
        Some(range.start.wrapping_add(bias)..range.end.wrapping_add(bias))
    }

    /// Makes `vcpu` stop, as after a step, where it comes to one of these addresses with a stack pointer of at least
    /// `stack`: a frame that is returned to, and not one of a recursion below it. The caller deletes what it gets.
    pub fn stop_at(&self, vcpu: u32, addresses: &[u64], stack: u64) -> Result<Arc<Breakpoint>> {
        let Some((&address, also)) = addresses.split_first() else {
            return Err(Error::Breakpoint("there is no address to run to".into()));
        };
        let options = BreakpointOptions {
            also: also.to_vec(),
            internal: Some(stack),
            vcpu: Some(vcpu),
            location: format!("{address:#x}"),
            ..Default::default()
        };
        self.add_breakpoint(address, options, Condition::default())
    }

    /// `name+offset` of an address.
    pub fn symbol_at(&self, address: u64) -> Option<String> {
        let (symbol, offset) = self.symbols().symbolize(address)?;
        Some(if offset == 0 { symbol.name } else { format!("{}+{offset:#x}", symbol.name) })
    }

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
    fn refresh_watches(&self) {
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
        let found = std::iter::once(&event.reason).chain(&event.others).find(|reason| holds(reason)).cloned();
        let known =
            std::iter::once(&event.reason).chain(&event.others).filter_map(|r| r.breakpoint().map(|b| b.id)).max();
        let is_newer = |b: &Arc<Breakpoint>| Some(b.id) > known;
        if let (None, Some(context), true) = (&found, guard.as_mut(), at_pc)
            && self.breakpoints_at(event.pc).is_some_and(|(_, breakpoints)| breakpoints.iter().any(is_newer))
        {
            // A client takes its breakpoints away and sets them again: what is there now has not been asked.
            context.passed = None;
        }
        found.map(|reason| event.reason = reason).is_some()
    }

    /// What a front end does about a stop that it has found without waiting: [`Machine::wait`] does it by itself.
    pub(crate) fn after_stop(&self, stop: &Stop) {
        let flushed = self.drain(0, &|| true).map(|()| self.console.flush(&|| true));
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
        let waiter = engine::waiter()?;
        let mut status = self.engine.wait_for_stop(deadline, check, &waiter)?;
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

    /// Gives the console all output, waiting for it if need be; a signal whose `check` fails ends that. What a callback
    /// on another thread is at is waited for when no more output follows.
    fn flush<E: From<Error>>(&self, is_last: bool, check: &mut dyn FnMut() -> Result<(), E>) -> Result<(), E> {
        self.drain(0, &|| false)?;
        let failure = RefCell::new(None);
        let check = RefCell::new(check);
        let cancelled = || match (check.borrow_mut())() {
            Ok(()) => false,
            Err(error) => {
                *failure.borrow_mut() = Some(error);
                true
            }
        };
        let flushed = if is_last { self.console.settle(&cancelled) } else { self.console.flush(&cancelled) };
        if let Some(error) = failure.into_inner() {
            return Err(error);
        }
        match flushed {
            Err(source) if source.kind() != std::io::ErrorKind::Interrupted => {
                Err(Error::Host { what: "console output".into(), source }.into())
            }
            _ => Ok(()),
        }
    }

    /// Takes the port writes that wait in the queue; what is counted, is for `vcpu`. While the queue is locked nothing
    /// waits and nobody is called: complete lines go to the sink afterwards.
    pub(crate) fn drain(&self, vcpu: u32, cancelled: &dyn Fn() -> bool) -> Result<()> {
        let Some(queue) = self.coalesced.as_ref().filter(|q| !q.is_empty()) else { return Ok(()) };
        queue.drain(&mut |port, data| {
            if port != CONSOLE_PORT {
                let mut value = [0; 4];
                let length = data.len().min(value.len());
                value[..length].copy_from_slice(&data[..length]);
                self.pci.write(port, u8::try_from(length).expect("at most four"), u32::from_le_bytes(value));
                self.stats.count(vcpu, ExitKind::PciWrite);
                return true;
            }
            let taken = self.console.push(&data[..1]);
            if taken {
                self.stats.count_hypercall(vcpu, Kind::SerialWriteByte);
            }
            taken
        });
        if self.console.is_callback() { Ok(()) } else { self.deliver(cancelled) }
    }

    fn deliver(&self, cancelled: &dyn Fn() -> bool) -> Result<()> {
        match self.console.deliver(cancelled) {
            Err(source) if source.kind() != std::io::ErrorKind::Interrupted => {
                Err(Error::Host { what: "console output".into(), source })
            }
            _ => Ok(()),
        }
    }

    /// Starts the thread that brings console output out while nobody else does: queued bytes of a guest that makes no
    /// exits, and the beginning of a line that does not end.
    fn spawn_pump(self: &Arc<Self>) -> Result<()> {
        let machine = self.clone();
        let every = self.coalesced.is_some().then_some(DRAIN_EVERY);
        if every.is_none() || self.console.is_callback() {
            let pump = self.pump.clone();
            self.console.set_notifier(Box::new(move || pump.wake()));
        }
        let body = move || {
            vcpu::enter_thread(&machine, None);
            // While the world stands still, nothing comes into the queue.
            while machine.pump.sleep(every.filter(|_| matches!(machine.engine.status(), Status::Running))) {
                if let Err(error) = machine.pump_console() {
                    machine.engine.end(End::Failed(error));
                }
            }
        };
        let thread = std::thread::Builder::new().name("uhyve-console".into()).spawn(body);
        let handle = thread.map_err(|source| Error::Host { what: "can't start the console thread".into(), source })?;
        self.threads().push(handle);
        Ok(())
    }

    /// One round of the console's thread.
    fn pump_console(&self) -> Result<()> {
        // A callback gets everything; another sink takes what it can when the VM is over.
        let over = || self.pump.is_over() && !self.console.is_callback();
        self.drain(0, &over)?;
        self.deliver(&over)?;
        if !self.console.has_unflushed() || !self.pump.linger(FLUSH_AFTER) {
            return Ok(());
        }
        match self.console.flush(&|| true) {
            // What the sink does not take now, it takes later.
            Err(source) if source.kind() != std::io::ErrorKind::Interrupted => {
                Err(Error::Host { what: "console output".into(), source })
            }
            _ => Ok(()),
        }
    }

    /// A temporary breakpoint is gone once it has stopped the world.
    fn finish_stop(&self, stop: &Stop) {
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

    /// Time from the start to now, or to the end.
    pub fn elapsed(&self) -> Duration {
        self.ended.get().copied().unwrap_or_else(|| self.started.elapsed())
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

    /// Ends the VM, whatever it does, and waits for its threads, unless it is called by one of them. May be called more
    /// than once.
    pub fn close(&self) {
        self.engine.end(End::Killed);
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

/// The file and the line of `file.c:123`; a path of Rust, `a::b`, is none.
fn source_place(place: &str) -> Option<(&str, u32)> {
    let (file, line) = place.trim().rsplit_once(':')?;
    let is_file = !file.is_empty() && !file.ends_with(':');
    line.parse().ok().filter(|line| is_file && *line > 0).map(|line| (file, line))
}

/// Whether the guest does nothing after this.
fn is_last(status: &Status) -> bool {
    match status {
        Status::Running => false,
        Status::Stopped(stop) => stop.reason.is_final(),
        Status::Ended(_) => true,
    }
}

fn resources(config: &Config) -> Result<(u64, u32)> {
    let wish = config.image.config();
    let needed = wish.and_then(|w| w.memory).unwrap_or(0);
    let memory = config.memory.unwrap_or_else(|| DEFAULT_MEMORY.max(needed.next_multiple_of(2 << 20)));
    if memory < needed {
        return Err(Error::Config(format!(
            "the image's hermit.toml needs {} MiB of memory, {} MiB were given",
            needed.div_ceil(1 << 20),
            memory >> 20
        )));
    }
    let wanted = wish.map_or(0, |w| w.cpus);
    let cpus = config.cpus.unwrap_or(wanted.max(1));
    if cpus == 0 {
        return Err(Error::Config("a VM needs at least one vCPU".into()));
    }
    if cpus < wanted {
        return Err(Error::Config(format!("the image's hermit.toml needs {wanted} vCPUs, {cpus} were given")));
    }
    if !config.affinity.is_empty() && config.affinity.len() != cpus as usize {
        return Err(Error::Config(format!("affinity names {} host CPUs for {cpus} vCPUs", config.affinity.len())));
    }
    Ok((memory, cpus))
}

/// Sets every vCPU to the image's entry.
fn enter_image(state: &BootState, vcpus: &mut [Box<dyn Vcpu>]) -> Result<()> {
    for (number, vcpu) in (0u64..).zip(vcpus) {
        let mut system = vcpu.system_registers()?;
        enter(&mut system, &state.system);
        vcpu.set_system_registers(&system)?;
        let mut registers = state.registers;
        registers.general[RSI] = number;
        vcpu.set_registers(&registers)?;
    }
    Ok(())
}

/// Takes what the boot protocol fixes over the reset state; task register, LDT and APIC base stay.
fn enter(system: &mut SystemRegisters, boot: &SystemRegisters) {
    (system.cs, system.ds, system.es, system.ss) = (boot.cs, boot.ds, boot.es, boot.ss);
    (system.gdt, system.cr0, system.cr3, system.cr4, system.efer) = (boot.gdt, boot.cr0, boot.cr3, boot.cr4, boot.efer);
}

/// Numbers that a seed gives (xorshift64*).
fn seeded(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed ^ 0x9e37_79b9_7f4a_7c15;
    move || {
        state = if state == 0 { 1 } else { state };
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

/// 64 random bits of the kernel.
fn random() -> u64 {
    let mut bytes = [0u8; 8];
    // SAFETY: the buffer is a local of that length.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if got == 8 { u64::from_ne_bytes(bytes) } else { Instant::now().elapsed().as_nanos().try_into().unwrap_or(0) }
}
