//! The back end on Linux's KVM: the VM with its memory slots and interrupt controllers. [`vcpu`] runs vCPUs, [`kick`]
//! makes them leave the guest, [`cpuid`] and [`convert`] translate, [`probe`] finds out what this KVM really does.

mod closing;
mod coalesced;
pub mod convert;
pub mod cpuid;
pub mod kick;
mod lend;
pub mod probe;
pub mod vcpu;
mod xsave;

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, OnceLock};

use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_X86_DISABLE_EXITS, KVM_MEM_READONLY, KVM_PIT_SPEAKER_DUMMY,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS, kvm_enable_cap, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VmFd};

use super::{Afterwork, Backend, Capabilities, Coalesced, MachineOptions, Vcpu};
use crate::error::{Error, Result};
use crate::memory::{Backing, GuestMemory};

/// Where a PC's firmware keeps tables that kernels scan for. Without RAM there, every read of the scan would be an exit:
/// the MP-table search of Hermit 0.6 makes 17,408 of them.
use crate::devices::pci::Firmware;
/// Three pages that Intel's virtualisation needs of the guest-physical space, below the local APIC's address and outside of RAM.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// One VM of KVM.
pub struct KvmBackend {
    kvm: Arc<Kvm>,
    vm: Arc<VmFd>,
    cpus: u32,
    is_coalescing: bool,
    ring: OnceLock<Arc<coalesced::Ring>>,
    // Declared after `vm`: KVM maps both, so they go last.
    _memory: GuestMemory,
    _firmware: Vec<GuestMemory>,
}

/// Maps an errno of kvm-ioctls to ours.
pub(crate) fn failed(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |e| Error::Hypervisor { call, source: std::io::Error::from_raw_os_error(e.errno()) }
}

/// Opens /dev/kvm, and says in words what to do if that fails.
pub fn open_kvm() -> Result<Kvm> {
    let kvm = Kvm::new().map_err(|e| {
        let text = match e.errno() {
            libc::ENOENT => "/dev/kvm does not exist: load the kernel module (modprobe kvm_intel or kvm_amd), turn virtualisation on in the firmware, or give the container the device (--device /dev/kvm)".to_owned(),
            libc::EACCES | libc::EPERM => "no permission for /dev/kvm: add yourself to its group (sudo usermod -aG kvm $USER, then log in again)".to_owned(),
            libc::ENODEV | libc::ENXIO => "/dev/kvm exists but no KVM is behind it: load kvm_intel or kvm_amd, or turn virtualisation on in the firmware".to_owned(),
            _ => format!("can't open /dev/kvm: {}", std::io::Error::from_raw_os_error(e.errno())),
        };
        Error::HypervisorUnavailable(text)
    })?;
    let version = kvm.get_api_version();
    if u32::try_from(version) != Ok(KVM_API_VERSION) {
        return Err(Error::HypervisorUnavailable(format!(
            "KVM has API version {version}, {KVM_API_VERSION} is needed"
        )));
    }
    for (cap, name) in [
        (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
        (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
        (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
        (Cap::SyncRegs, "KVM_CAP_SYNC_REGS"),
        (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    ] {
        if !kvm.check_extension(cap) {
            return Err(Error::HypervisorUnavailable(format!(
                "this KVM lacks {name}: use a Linux kernel 4.17 or newer"
            )));
        }
    }
    Ok(kvm)
}

/// Makes a VM. The kernel gives up on that when a signal comes, such as a kick.
pub(crate) fn create_vm(kvm: &Kvm) -> Result<VmFd> {
    loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            made => return made.map_err(failed("KVM_CREATE_VM")),
        }
    }
}

impl KvmBackend {
    /// Makes the VM: memory slots, interrupt controllers, x2APIC.
    pub fn new(memory: &GuestMemory, options: &MachineOptions) -> Result<Self> {
        let kvm = open_kvm()?;
        let limit = kvm.get_max_vcpus();
        if options.cpus as usize > limit {
            return Err(Error::Config(format!("{} vCPUs asked for, this KVM has at most {limit}", options.cpus)));
        }
        let vm = Arc::new(create_vm(&kvm)?);
        vm.set_tss_address(TSS_ADDRESS).map_err(failed("KVM_SET_TSS_ADDR"))?;
        vm.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(failed("KVM_SET_IDENTITY_MAP_ADDR"))?;
        let mut backend = Self {
            kvm: Arc::new(kvm),
            vm,
            cpus: options.cpus,
            is_coalescing: false,
            ring: OnceLock::new(),
            _memory: memory.clone(),
            _firmware: Vec::new(),
        };
        backend.map(0, memory, 0)?;
        if !options.firmware_exits {
            backend.map_firmware(memory)?;
        }
        // Behind the memory slots: the controllers' ports begin a grace period of the kernel, which a slot would wait for.
        backend.vm.create_irq_chip().map_err(failed("KVM_CREATE_IRQCHIP"))?;
        backend.enable(
            Cap::X2ApicApi as u32,
            u64::from(KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK),
            "32-bit x2APIC ids",
        );
        backend.coalesce(&options.coalesced_ports);
        if options.cpu_pm {
            let available =
                u64::try_from(backend.kvm.check_extension_raw(KVM_CAP_X86_DISABLE_EXITS.into())).unwrap_or(0);
            backend.enable(KVM_CAP_X86_DISABLE_EXITS, available, "leaving HLT, MWAIT and PAUSE to the guest");
        }
        if options.pit {
            let config = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
            backend.vm.create_pit2(config).map_err(failed("KVM_CREATE_PIT2"))?;
        }
        Ok(backend)
    }

    /// Lets KVM queue writes to these ports, if it can.
    fn coalesce(&mut self, ports: &[(u16, u32)]) {
        if ports.is_empty() || !self.vm.check_extension(Cap::CoalescedPio) {
            return;
        }
        self.is_coalescing = ports
            .iter()
            .all(|(port, size)| self.vm.register_coalesced_mmio(IoEventAddress::Pio((*port).into()), *size).is_ok());
    }

    fn map(&self, slot: u32, memory: &GuestMemory, flags: u32) -> Result<()> {
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: memory.range().start,
            memory_size: memory.size(),
            userspace_addr: memory.host_pointer() as u64,
        };
        // SAFETY: the range is a whole mapping of its own that `self` keeps alive until after the VM is gone.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(failed("KVM_SET_USER_MEMORY_REGION"))
    }

    /// Read-only zero pages where a guest looks for firmware tables and has no RAM.
    fn map_firmware(&mut self, memory: &GuestMemory) -> Result<()> {
        if !self.vm.check_extension(Cap::ReadonlyMem) {
            return Ok(());
        }
        for (range, slot) in Firmware::RANGES.into_iter().zip(1..) {
            if range.start < memory.range().end && memory.range().start < range.end {
                continue;
            }
            let pages = GuestMemory::new(range.start, range.end - range.start, Backing::default())?;
            self.map(slot, &pages, KVM_MEM_READONLY)?;
            self._firmware.push(pages);
        }
        Ok(())
    }

    fn enable(&self, cap: u32, argument: u64, what: &str) {
        let mut request = kvm_enable_cap { cap, ..Default::default() };
        request.args[0] = argument;
        if let Err(e) = self.vm.enable_cap(&request) {
            log::info!("{what}: this KVM refuses ({e})");
        }
    }
}

impl Backend for KvmBackend {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn create_vcpu(&self, number: u32) -> Result<Box<dyn Vcpu>> {
        let fd = self.vm.create_vcpu(u64::from(number)).map_err(failed("KVM_CREATE_VCPU"))?;
        let cpuid = cpuid::for_vcpu(&self.kvm, number, self.cpus)?;
        fd.set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))?;
        if self.is_coalescing && self.ring.get().is_none() {
            // SAFETY: the fd is open for the whole statement.
            let ring = coalesced::Ring::map(unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) })?;
            self.ring.get_or_init(|| Arc::new(ring));
        }
        let layout = xsave::Layout::new(cpuid.as_slice());
        Ok(Box::new(vcpu::KvmVcpu::new(fd, layout)?))
    }

    fn coalesced(&self) -> Option<Arc<dyn Coalesced>> {
        self.ring.get().map(|ring| ring.clone() as Arc<dyn Coalesced>)
    }

    fn afterwork(&self) -> Option<Afterwork> {
        let vm = self.vm.clone();
        Some(Box::new(move || closing::hasten(&vm)))
    }

    fn capabilities(&self) -> Result<Capabilities> {
        probe::capabilities()
    }
}
