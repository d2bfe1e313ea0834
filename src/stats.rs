//! Counters of a VM: exits by kind and hypercalls by kind, per vCPU. Queued port writes count for the vCPU whose
//! thread took them from the queue, and port accesses that a burst answered count like exits. [`latency`] is how long exits
//! take, by [`clock`].

pub mod clock;
pub mod latency;

use std::sync::atomic::{AtomicU64, Ordering};

use crate::hypercall::Kind;

/// Why a vCPU left the guest, for statistics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum ExitKind {
    /// Port input.
    PortRead,
    /// Port output that is no hypercall.
    PortWrite,
    /// PCI configuration read.
    PciRead,
    /// PCI configuration write.
    PciWrite,
    /// Memory-mapped read.
    MmioRead,
    /// Memory-mapped write.
    MmioWrite,
    /// HLT.
    Hlt,
    /// Breakpoint or step.
    Debug,
    /// An instruction that the hypervisor left to the emulator.
    Unemulated,
    /// Triple fault.
    Shutdown,
    /// A kick or a signal.
    Interrupted,
}

impl ExitKind {
    /// All of them, in the order of their numbers.
    pub const ALL: [(ExitKind, &'static str); 11] = [
        (Self::PortRead, "port_read"),
        (Self::PortWrite, "port_write"),
        (Self::PciRead, "pci_read"),
        (Self::PciWrite, "pci_write"),
        (Self::MmioRead, "mmio_read"),
        (Self::MmioWrite, "mmio_write"),
        (Self::Hlt, "hlt"),
        (Self::Debug, "debug"),
        (Self::Unemulated, "unemulated"),
        (Self::Shutdown, "shutdown"),
        (Self::Interrupted, "interrupted"),
    ];
}

/// One vCPU's counters, on cache lines of their own.
#[repr(align(128))]
pub(crate) struct Counters {
    exits: [AtomicU64; ExitKind::ALL.len()],
    hypercalls: [AtomicU64; Kind::ALL.len()],
}

impl Counters {
    /// Counts an exit.
    #[inline]
    pub(crate) fn count(&self, kind: ExitKind) {
        bump(&self.exits[kind as usize]);
    }
}

/// The counters of a VM.
pub struct Stats {
    vcpus: Vec<Counters>,
    /// How long its exits take.
    pub latencies: latency::Latencies,
}

impl Stats {
    /// Zeroed counters for so many vCPUs.
    pub fn new(cpus: u32, sampling: latency::Sampling) -> Self {
        let zeros = || Counters { exits: Default::default(), hypercalls: std::array::from_fn(|_| AtomicU64::new(0)) };
        let latencies = latency::Latencies::new(cpus, sampling);
        Self { vcpus: (0..cpus).map(|_| zeros()).collect(), latencies }
    }

    /// Counts an exit.
    #[inline]
    pub fn count(&self, vcpu: u32, kind: ExitKind) {
        self.counters(vcpu).count(kind);
    }

    /// The counters of one vCPU.
    #[inline]
    pub(crate) fn counters(&self, vcpu: u32) -> &Counters {
        &self.vcpus[vcpu as usize]
    }

    /// Counts a hypercall.
    #[inline]
    pub fn count_hypercall(&self, vcpu: u32, kind: Kind) {
        bump(&self.vcpus[vcpu as usize].hypercalls[kind as usize]);
    }

    /// The counters of each vCPU that aren't zero: exits, then hypercalls.
    pub fn snapshot(&self) -> Vec<VcpuStats> {
        self.vcpus
            .iter()
            .map(|c| VcpuStats {
                exits: ExitKind::ALL
                    .iter()
                    .map(|(k, name)| (*name, load(&c.exits[*k as usize])))
                    .filter(|e| e.1 > 0)
                    .collect(),
                hypercalls: Kind::ALL
                    .iter()
                    .map(|k| (k.name(), load(&c.hypercalls[*k as usize])))
                    .filter(|e| e.1 > 0)
                    .collect(),
            })
            .collect()
    }
}

#[inline]
fn bump(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

fn load(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

/// What one vCPU did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VcpuStats {
    /// Exits by kind that are no hypercalls.
    pub exits: Vec<(&'static str, u64)>,
    /// Hypercalls by kind.
    pub hypercalls: Vec<(&'static str, u64)>,
}
