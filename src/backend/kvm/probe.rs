//! What this machine's KVM really does, found out by running six tiny guests. Capability flags alone don't tell: the
//! same KVM API lies over hardware, over PVM (whose ring 0 is emulated) and over nested machines that lose exceptions.

use std::sync::OnceLock;

use super::KvmBackend;
use crate::backend::{
    Access, Backend as _, Capabilities, Exit, GuestDebug, HardwareBreakpoint, Int3, MachineOptions, Vcpu,
};
use crate::error::{Error, Result};
use crate::memory::{Backing, GuestMemory};
use crate::registers::{
    CR0_PE, CR0_PG, CR4_OSFXSR, CR4_PAE, EFER_LMA, EFER_LME, EFER_NXE, RAX, RSP, Registers, Segment,
};

const CODE: u64 = 0x8000;
const DATA: u64 = 0x9000;
const STACK: u64 = 0x7000;
const PML4: u64 = 0x1000;
/// `out 0xe0, al`: the guest got this far.
const MARKER: [u8; 2] = [0xe6, 0xe0];
const MARKER_PORT: u16 = 0xe0;
/// `KVM_CAP_SET_GUEST_DEBUG2`: the KVM_GUESTDBG_* bits that KVM takes.
const CAP_SET_GUEST_DEBUG2: libc::c_ulong = 195;

/// The capabilities of this machine's KVM; probed once in a process.
pub fn capabilities() -> Result<Capabilities> {
    static PROBED: OnceLock<Capabilities> = OnceLock::new();
    if let Some(known) = PROBED.get() {
        return Ok(*known);
    }
    let found = probe()?;
    Ok(*PROBED.get_or_init(|| found))
}

/// Whether ring-0 code runs on the CPU itself, by the kernel's word or by one small guest; probed once in a process.
pub fn is_native() -> Result<bool> {
    static PROBED: OnceLock<bool> = OnceLock::new();
    if let Some(known) = PROBED.get() {
        return Ok(*known);
    }
    if has_hardware_module() {
        super::open_kvm()?;
        return Ok(*PROBED.get_or_init(|| true));
    }
    // sqrtpd xmm0, xmm0: SSE arithmetic, which an instruction emulator in the kernel does not have.
    let found = reached(Guest::start(&[0x66, 0x0f, 0x51, 0xc0])?.run(&GuestDebug::default())?);
    Ok(*PROBED.get_or_init(|| found))
}

/// Whether the kernel says that KVM works by the processor's virtualisation, and by nothing else: a VM, made to find
/// that out, would cost a small guest's boot a tenth of its time.
fn has_hardware_module() -> bool {
    let has = |module: &str| std::path::Path::new("/sys/module").join(module).exists();
    (has("kvm_intel") || has("kvm_amd")) && !has("kvm_pvm")
}

fn probe() -> Result<Capabilities> {
    let kvm = super::open_kvm()?;
    let flags = u32::try_from(kvm.check_extension_raw(CAP_SET_GUEST_DEBUG2)).unwrap_or(0);
    let step = Guest::start(&[0x90, 0x90])?.run(&GuestDebug { single_step: true, ..Default::default() })?;
    let int3 = Guest::start(&[0xcc])?.run(&GuestDebug { software_breakpoints: true, ..Default::default() })?;
    let mut hardware = 0;
    let elsewhere = HardwareBreakpoint::execute(CODE + 0x800);
    for register in 0..4 {
        let mut debug = GuestDebug { hardware: vec![elsewhere; register], ..Default::default() };
        debug.hardware.push(HardwareBreakpoint::execute(CODE + 1));
        hardware +=
            u32::from(matches!(Guest::start(&[0x90, 0x90])?.run(&debug)?, Exit::Debug(event) if event.pc == CODE + 1));
    }
    let watch = GuestDebug {
        hardware: vec![HardwareBreakpoint { address: DATA, access: Access::Write, length: 4 }],
        ..Default::default()
    };
    // mov [DATA], eax
    let watched = Guest::start(&[0x89, 0x04, 0x25, 0x00, 0x90, 0x00, 0x00])?.run(&watch)?;
    Ok(Capabilities {
        native_ring0: is_native()?,
        single_step: matches!(step, Exit::Debug(event) if event.pc == CODE + 1),
        block_interrupts: flags & kvm_bindings::KVM_GUESTDBG_BLOCKIRQ != 0,
        int3: match int3 {
            Exit::Debug(event) if event.software => Int3::DebugExit,
            Exit::Unemulated => Int3::Unemulated,
            _ => Int3::NotIntercepted,
        },
        hardware_breakpoints: hardware,
        watchpoints: matches!(watched, Exit::Debug(event) if event.hardware & 1 != 0),
        any_range: false,
        exact_steps: false,
    })
}

fn reached(exit: Exit) -> bool {
    matches!(exit, Exit::IoOut { port: MARKER_PORT, .. })
}

/// A guest of a few instructions in 64-bit ring 0, without an IDT.
struct Guest {
    vcpu: Box<dyn Vcpu>,
    _backend: KvmBackend,
}

impl Guest {
    fn start(code: &[u8]) -> Result<Self> {
        let memory = GuestMemory::new(0, 0x20_0000, Backing::default())?;
        let backend = KvmBackend::new(&memory, &MachineOptions { cpus: 1, ..Default::default() })?;
        let mut vcpu = backend.create_vcpu(0)?;
        // PML4 → PDPT → PD → one 2 MiB page, present and writable.
        for (table, entry) in [(PML4, PML4 + 0x1003), (PML4 + 0x1000, PML4 + 0x2003), (PML4 + 0x2000, 0x83)] {
            memory.write_object(table, entry)?;
        }
        let program = [code, &MARKER, &[0xf4]].concat();
        memory.write(CODE, &program)?;
        let mut system = vcpu.system_registers()?;
        let data = Segment { selector: 0x10, base: 0, limit: u32::MAX, attributes: 0xc093 };
        system.cs = Segment { selector: 8, base: 0, limit: u32::MAX, attributes: 0xa09b };
        (system.ds, system.es, system.fs, system.gs, system.ss) = (data, data, data, data, data);
        (system.cr0, system.cr3, system.cr4) = (CR0_PE | CR0_PG | 0x30, PML4, CR4_PAE | CR4_OSFXSR);
        system.efer = EFER_LME | EFER_LMA | EFER_NXE;
        vcpu.set_system_registers(&system)?;
        let mut registers = Registers { rip: CODE, rflags: 2, ..Default::default() };
        registers.general[RSP] = STACK;
        registers.general[RAX] = 1;
        vcpu.set_registers(&registers)?;
        Ok(Self { vcpu, _backend: backend })
    }

    fn run(&mut self, debug: &GuestDebug) -> Result<Exit> {
        self.vcpu.set_guest_debug(debug)?;
        for _ in 0..16 {
            match self.vcpu.run()? {
                Exit::Interrupted => {}
                exit => return Ok(exit),
            }
        }
        Err(Error::HypervisorUnavailable("the probe guest is interrupted without end".into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_probe_of_this_machine_finds_single_step_or_says_why_not() {
        match capabilities() {
            Ok(found) => assert!(found.single_step, "{found:?}"),
            Err(Error::HypervisorUnavailable(text)) => {
                assert!(text.contains("/dev/kvm") || text.contains("KVM"), "{text}")
            }
            Err(other) => panic!("{other}"),
        }
    }
}
