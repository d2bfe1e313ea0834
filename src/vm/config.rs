//! What a VM is made from: [`Config`], and the choices that follow from it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::backend::soft::clock::ClockKind;
use crate::backend::soft::machine::SoftOptions;
use crate::backend::{self, Choice};
use crate::boot::Image;
use crate::devices::serial::Output;
use crate::error::{Error, Result};
use crate::isolation::landlock::FileIsolation;
use crate::isolation::{IoMode, Source};
use crate::memory::Backing;
use crate::stats::latency::Sampling;

/// RAM of a VM whose user and image don't say.
pub const DEFAULT_MEMORY: u64 = 64 << 20;

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
pub(super) const SEEDED_EPOCH: u64 = 1_767_225_600;

impl SoftConfig {
    /// The back end that is chosen, and its options. `chance` gives random numbers where there is no seed.
    pub(super) fn choose(&self, backend: &str, chance: &mut dyn FnMut() -> u64) -> Result<(Choice, SoftOptions)> {
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
            random: self.seed.unwrap_or_else(chance),
            quantum: self.quantum.unwrap_or(0),
            clock: self.clock.unwrap_or_default(),
            epoch: if self.seed.is_some() { SEEDED_EPOCH } else { now.as_secs() },
        };
        Ok((choice, options))
    }
}

pub(super) fn resources(config: &Config) -> Result<(u64, u32)> {
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

/// Numbers that a seed gives (xorshift64*).
pub(super) fn seeded(seed: u64) -> impl FnMut() -> u64 {
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
pub(super) fn random() -> u64 {
    let mut bytes = [0u8; 8];
    // SAFETY: the buffer is a local of that length.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if got == 8 { u64::from_ne_bytes(bytes) } else { Instant::now().elapsed().as_nanos().try_into().unwrap_or(0) }
}
