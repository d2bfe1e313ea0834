//! The floor under all exits: the cost of leaving the guest and entering it again, in a loop that does nothing else. On
//! KVM that is the bare ioctl on a VM of its own, on the software back end a bare loop around the CPU. The guest executes
//! the same three instructions as the cases that are compared with it.

use std::os::fd::AsRawFd;

use hdrhistogram::Histogram;
use kvm_bindings::{
    KVM_EXIT_IO, KVM_EXIT_MMIO, KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use crate::backend::kvm::{create_vm, failed, open_kvm};
use crate::backend::{Backend, Exit, MachineOptions, Vcpu, soft};
use crate::error::{Error, Result};
use crate::memory::{Backing, GuestMemory};
use crate::registers::{RAX, RCX, RDX, RSI, Segment, segment_attributes};
use crate::stats::clock;
use crate::stats::latency::Recorded;

/// KVM_RUN = _IO(KVMIO, 0x80).
pub(super) const KVM_RUN: libc::c_ulong = 0xae80;
/// Where page tables and code lie.
pub(super) const TABLES: [(u64, u64); 3] = [(0x1000, 0x2003), (0x2000, 0x3003), (0x3000, 0x83)];
const ROOT: u64 = 0x1000;
pub(super) const CODE: u64 = 0x8000;
/// A port that nothing answers, and an address that is not RAM (the table maps 2 MiB, the VM has less).
const PORT: u64 = 0x99;
pub(super) const MEMORY: u64 = 1 << 20;
const OUTSIDE: u64 = MEMORY + 0x1000;
/// Longer than this no exit takes, in ticks.
const LONGEST: u64 = 3600 * 4_000_000_000;

/// What the guest of the loop does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `out dx, al`.
    PortOut,
    /// `in al, dx`.
    PortIn,
    /// `out dx, eax`, as a hypercall does.
    Hypercall,
    /// A load of a byte.
    MmioRead,
    /// A store of a byte.
    MmioWrite,
}

impl Kind {
    /// All of them, with their names.
    pub const ALL: [(Kind, &'static str); 5] = [
        (Self::PortOut, "port_out"),
        (Self::PortIn, "port_in"),
        (Self::Hypercall, "hypercall"),
        (Self::MmioRead, "mmio_read"),
        (Self::MmioWrite, "mmio_write"),
    ];

    /// The kind of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, known)| *known == name).map(|(kind, _)| *kind)
    }

    /// The instruction that leaves, `dec rcx`, and a jump back to the first.
    fn program(self) -> Vec<u8> {
        let leaving: &[u8] = match self {
            Self::PortOut => &[0xee],
            Self::PortIn => &[0xec],
            Self::Hypercall => &[0xef],
            Self::MmioRead => &[0x8a, 0x06],
            Self::MmioWrite => &[0x88, 0x06],
        };
        let back = u8::try_from(leaving.len() + 5).expect("short").wrapping_neg();
        [leaving, &[0x48, 0xff, 0xc9, 0x75, back]].concat()
    }

    fn is_exit(self, reason: u32) -> bool {
        let expected = if matches!(self, Self::MmioRead | Self::MmioWrite) { KVM_EXIT_MMIO } else { KVM_EXIT_IO };
        reason == expected
    }
}

/// Times `count` exits behind `skip` that are not timed, on the calling thread.
pub fn measure(backend: &str, kind: Kind, count: u64, skip: u64) -> Result<Recorded> {
    let memory = GuestMemory::new(0, MEMORY, Backing::default())?;
    for (table, entry) in TABLES {
        memory.write_object(table, entry)?;
    }
    memory.write(CODE, &kind.program())?;
    let mut histogram = Histogram::new_with_max(LONGEST, 3).expect("these are valid bounds");
    if backend == "soft" {
        soft_loop(&memory, count, skip, &mut histogram)?;
    } else {
        kvm_loop(&memory, kind, count, skip, &mut histogram)?;
    }
    Ok(Recorded::new(histogram))
}

fn kvm_loop(memory: &GuestMemory, kind: Kind, count: u64, skip: u64, histogram: &mut Histogram<u32>) -> Result<()> {
    let kvm = open_kvm()?;
    // SAFETY: the caller's memory outlives this function, which drops the VM.
    let vm = unsafe { bare_vm(&kvm, memory) }?;
    let mut vcpu = kvm_vcpu(&kvm, &vm, 0)?;
    let fd = vcpu.as_raw_fd();
    let page: *const kvm_bindings::kvm_run = vcpu.get_kvm_run();
    let mut n = 0;
    while n < skip + count {
        let before = clock::now();
        // SAFETY: a vCPU fd that is open, and a request without argument; what the guest does stays in its memory.
        let result = unsafe { libc::ioctl(fd, KVM_RUN, 0) };
        let took = clock::now().saturating_sub(before);
        if result != 0 && std::io::Error::last_os_error().kind() == std::io::ErrorKind::Interrupted {
            // A signal of the process: it was suspended, say.
            continue;
        }
        // SAFETY: the page is mapped as long as `vcpu` lives; the kernel writes it in KVM_RUN alone.
        let reason = unsafe { (&raw const (*page).exit_reason).read_volatile() };
        if result != 0 || !kind.is_exit(reason) {
            return Err(unexpected(&format!("KVM_RUN gave {result}, exit reason {reason}")));
        }
        if n >= skip {
            histogram.saturating_record(took);
        }
        n += 1;
    }
    Ok(())
}

/// A VM with that memory and nothing else but interrupt controllers.
///
/// # Safety
/// The memory is kept longer than the VM and its vCPUs.
pub(super) unsafe fn bare_vm(kvm: &Kvm, memory: &GuestMemory) -> Result<VmFd> {
    let vm = create_vm(kvm)?;
    vm.set_tss_address(0xfffb_d000).map_err(failed("KVM_SET_TSS_ADDR"))?;
    let region = kvm_userspace_memory_region {
        memory_size: memory.size(),
        userspace_addr: memory.host_pointer() as u64,
        ..Default::default()
    };
    // SAFETY: the caller keeps `memory` longer than the VM.
    unsafe { vm.set_user_memory_region(region) }.map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
    vm.create_irq_chip().map_err(failed("KVM_CREATE_IRQCHIP"))?;
    Ok(vm)
}

pub(super) fn kvm_vcpu(kvm: &Kvm, vm: &VmFd, number: u32) -> Result<VcpuFd> {
    let vcpu = vm.create_vcpu(number.into()).map_err(failed("KVM_CREATE_VCPU"))?;
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
    vcpu.set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))?;
    vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }).map_err(failed("KVM_SET_MP_STATE"))?;
    let mut sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8000_0031, ROOT, 0x20, 0x500);
    (sregs.cs.base, sregs.cs.selector, sregs.cs.l, sregs.cs.db, sregs.cs.type_, sregs.cs.g) = (0, 8, 1, 0, 11, 1);
    (sregs.cs.limit, sregs.ss.limit, sregs.ss.g, sregs.ss.type_) = (u32::MAX, u32::MAX, 1, 3);
    vcpu.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
    let mut regs = vcpu.get_regs().map_err(failed("KVM_GET_REGS"))?;
    (regs.rip, regs.rcx, regs.rdx, regs.rsi) = (CODE, u64::MAX, PORT, OUTSIDE);
    (regs.rflags, regs.rsp) = (2, 0x7000);
    vcpu.set_regs(&regs).map_err(failed("KVM_SET_REGS"))?;
    Ok(vcpu)
}

fn soft_loop(memory: &GuestMemory, count: u64, skip: u64, histogram: &mut Histogram<u32>) -> Result<()> {
    let backend = soft::SoftBackend::new(memory, &MachineOptions { cpus: 1, ..Default::default() })?;
    let mut vcpu = backend.create_vcpu(0)?;
    vcpu.bind_to_current_thread()?;
    enter_long_mode(vcpu.as_mut())?;
    for n in 0..skip + count {
        let before = clock::now();
        let exit = vcpu.run()?;
        let took = clock::now().saturating_sub(before);
        if !matches!(exit, Exit::IoOut { .. } | Exit::IoIn { .. } | Exit::MmioRead { .. } | Exit::MmioWrite { .. }) {
            return Err(unexpected(&format!("{exit:?}")));
        }
        if n >= skip {
            histogram.saturating_record(took);
        }
    }
    vcpu.unbind();
    Ok(())
}

fn enter_long_mode(vcpu: &mut dyn Vcpu) -> Result<()> {
    let mut system = vcpu.system_registers()?;
    (system.cr0, system.cr3, system.cr4, system.efer) = (0x8000_0031, ROOT, 0x20, 0x500);
    // Code, readable, accessed.
    let attributes = 0xb | segment_attributes::S | segment_attributes::P | segment_attributes::L | 1 << 15;
    system.cs = Segment { base: 0, limit: u32::MAX, selector: 8, attributes };
    vcpu.set_system_registers(&system)?;
    let mut registers = vcpu.registers()?;
    registers.rip = CODE;
    registers.rflags = 2;
    registers.general[RAX] = 0;
    registers.general[RCX] = u64::MAX;
    registers.general[RDX] = PORT;
    registers.general[RSI] = OUTSIDE;
    vcpu.set_registers(&registers)
}

fn unexpected(what: &str) -> Error {
    Error::VmState(format!("the bare loop for the floor has met something else than its exit: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_floor_of_each_kind_on_the_software_cpu_times_each_exit() {
        for (kind, name) in Kind::ALL {
            let found = measure("soft", kind, 50, 5).unwrap();
            assert_eq!(found.count(), 50, "{name}");
            assert!(found.percentile(50.0) > 0.0, "{name}");
        }
    }

    #[test]
    fn test_floor_of_each_kind_on_kvm_times_each_exit() {
        if open_kvm().is_err() {
            return;
        }
        for (kind, name) in Kind::ALL {
            assert_eq!(measure("kvm", kind, 20, 5).unwrap().count(), 20, "{name}");
        }
    }
}
