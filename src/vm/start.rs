//! From a configuration to a machine whose threads run.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, OnceLock, RwLock};
use std::time::Instant;

use super::config::{SEEDED_EPOCH, random, resources, seeded};
use super::console::CONSOLE_PORT;
use super::input::GuestInput;
use super::{Config, Machine, ThreadWrapper};
use crate::backend::{self, Afterwork, MachineOptions, Vcpu};
use crate::boot::{self, BootState, Layout};
use crate::debug::breakpoints::Table;
use crate::debug::catch::Catch;
use crate::debug::engine::Engine;
use crate::devices::pci::{self, Pci};
use crate::devices::pump::Pump;
use crate::devices::serial::Serial;
use crate::error::{Error, Result};
use crate::hypercall::Services;
use crate::isolation::landlock;
use crate::isolation::{Files, Scratch};
use crate::memory::GuestMemory;
use crate::registers::{RSI, SystemRegisters};
use crate::stats::Stats;
use crate::vcpu::{self, Context};

impl Machine {
    /// Builds a machine, loads its image, and starts its vCPU threads.
    pub fn start(config: Config) -> Result<Arc<Self>> {
        Self::start_at(config, None)
    }

    /// The same, with RAM where it was in an earlier machine of the same configuration: a debugger that starts its
    /// guest again finds everything where it was.
    pub fn start_at(config: Config, guest_address: Option<u64>) -> Result<Arc<Self>> {
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
        if let Some(address) = guest_address {
            let again = Layout::chance_of(&image, address);
            chance = Box::new(move || again);
        }
        let mut parameters = guest.parameters(cpus);
        let tree = boot::device_tree_size(&parameters)?;
        let layout = Layout::plan(&image, memory_size, tree, config.aslr, &mut chance)?;
        let memory = GuestMemory::new(layout.guest_address, memory_size, config.backing)?;
        // Bursts are for one vCPU, whose memory no other changes meanwhile, and leave hits and steps to KVM. They need an
        // exit to begin with, where the queue makes none. Who times each exit wants to see it.
        // A vCPU's thread may not be allowed to open /dev/kvm, so what it will ask is found out here.
        let is_native = choice.name == "kvm" && backend::kvm::probe::is_native()?;
        let is_timed = config.measure.sampling.every == 1;
        let has_bursts = choice.name == "kvm" && cpus == 1 && !debugging && !is_timed;
        let mut coalesced_ports = vec![(pci::ADDRESS, 4)];
        if !has_bursts {
            coalesced_ports.push((CONSOLE_PORT, 1));
        }
        let firmware_exits = config.measure.firmware_exits;
        let options =
            MachineOptions { cpus, pit: config.pit, cpu_pm: config.cpu_pm, coalesced_ports, firmware_exits, soft };
        let backend = match backend::open(choice.name, &memory, &options) {
            Err(error) if config.backend == "auto" && choice.name == "kvm" => {
                log::info!("back end soft: KVM is there, and fails: {error}");
                backend::open("soft", &memory, &options)?
            }
            opened => opened?,
        };
        if debugging {
            // Probed once in a process, and here: by a vCPU's thread, kicks would disturb it, and rights may be gone.
            backend.capabilities()?;
        }
        let mut vcpus = (0..cpus).map(|n| backend.create_vcpu(n)).collect::<Result<Vec<_>>>()?;
        parameters.tsc_khz = vcpus.first().and_then(|v| v.tsc_khz()).unwrap_or(0);
        enter_image(&boot::load(&image, &layout, &memory, &parameters)?, &mut vcpus)?;
        let afterwork = backend.afterwork();
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
            has_bursts: has_bursts && backend.name() == "kvm",
            is_native,
            judges_in_software: backend.name() == "kvm" && !is_timed,
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
        machine.spawn(cpus, wrapper, afterwork)?;
        Ok(machine)
    }

    fn spawn(self: &Arc<Self>, cpus: u32, wrapper: Option<ThreadWrapper>, afterwork: Option<Afterwork>) -> Result<()> {
        // Signals of the process go to threads that can do something about them: ours begin with all of them blocked.
        let _mask = crate::isolation::wait::Mask::block_all()
            .map_err(|e| Error::Host { what: "can't block signals".into(), source: e.into() })?;
        self.spawn_pump(afterwork)?;
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
