//! The back end that needs no hypervisor: the software CPU of [`crate::x86`], with the interrupt controllers, timers and
//! clock of a PC around it.

//!
//! [`board`] is the devices, one file each; [`clock`] is what time goes by, [`schedule`] whose turn it is; [`machine`] holds
//! all that together, and [`vcpu`] runs a CPU in it.

pub mod apic_command;
pub mod apic_timer;
pub mod board;
pub mod clock;
pub mod cmos;
mod cpuid;
pub mod io_apic;
mod kick;
pub mod local_apic;
pub mod machine;
pub mod pic;
pub mod pit;
pub mod schedule;
pub mod vcpu;
pub mod vectors;
mod wires;

use std::sync::Arc;

use self::machine::{Shared, SoftOptions};
use super::{Backend, Capabilities, Coalesced, Int3, MachineOptions, Vcpu};
use crate::error::{Error, Result};
use crate::memory::GuestMemory;

/// The ids of local APICs that an interrupt can name without interrupt remapping, less the one for all.
const MOST_CPUS: u32 = 255;

/// What the software CPU can do for a debugger.
pub const CAPABILITIES: Capabilities = Capabilities {
    native_ring0: true,
    single_step: true,
    block_interrupts: true,
    int3: Int3::NotIntercepted,
    hardware_breakpoints: u32::MAX,
    watchpoints: true,
    any_range: true,
    exact_steps: true,
};

/// A machine of software CPUs.
pub struct SoftBackend {
    shared: Arc<Shared>,
    memory: GuestMemory,
    cpus: u32,
    random: u64,
}

impl SoftBackend {
    /// Makes the machine's devices.
    pub fn new(memory: &GuestMemory, options: &MachineOptions) -> Result<Self> {
        if options.cpus > MOST_CPUS {
            return Err(Error::Config(format!(
                "{} vCPUs asked for, the software back end has at most {MOST_CPUS}",
                options.cpus
            )));
        }
        let SoftOptions { random, .. } = options.soft;
        let shared = Arc::new(Shared::new(options.cpus.max(1), options.pit, &options.soft));
        Ok(Self { shared, memory: memory.clone(), cpus: options.cpus.max(1), random })
    }
}

impl Backend for SoftBackend {
    fn name(&self) -> &'static str {
        "soft"
    }

    fn create_vcpu(&self, number: u32) -> Result<Box<dyn Vcpu>> {
        if number >= self.cpus {
            return Err(Error::Config(format!("there is no vCPU {number} in a machine of {}", self.cpus)));
        }
        Ok(Box::new(vcpu::SoftVcpu::new(number, self.cpus, &self.shared, &self.memory, self.random)))
    }

    fn coalesced(&self) -> Option<Arc<dyn Coalesced>> {
        None
    }

    fn capabilities(&self) -> Result<Capabilities> {
        Ok(CAPABILITIES)
    }

    fn resuming(&self, runs: &dyn Fn(u32) -> bool) {
        self.shared.resume(runs);
    }
}
