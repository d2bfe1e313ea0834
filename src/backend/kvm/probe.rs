//! What this machine's KVM really does, found out by running tiny guests, each on a vCPU of its own in one VM. Capability
//! flags alone don't tell: the same KVM API lies over hardware, over PVM (whose ring 0 is emulated) and over nested
//! machines that lose exceptions.

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
    is_native_in(&mut None)
}

/// The same; a guest runs in that laboratory.
fn is_native_in(laboratory: &mut Option<Laboratory>) -> Result<bool> {
    static NATIVE: OnceLock<bool> = OnceLock::new();
    if let Some(known) = NATIVE.get() {
        return Ok(*known);
    }
    let found = match word_of_the_kernel() {
        Some(word) => super::open_kvm().map(|_| word)?,
        None => executes_sse(laboratory)?,
    };
    Ok(*NATIVE.get_or_init(|| found))
}

fn executes_sse(laboratory: &mut Option<Laboratory>) -> Result<bool> {
    // sqrtpd xmm0, xmm0: SSE arithmetic, which an instruction emulator in the kernel does not have.
    Ok(reached(Laboratory::run(laboratory, &[0x66, 0x0f, 0x51, 0xc0], &GuestDebug::default())?))
}

/// What the kernel says of how KVM works, if it is clear: by the processor's virtualisation and nothing else, or by PVM and
/// nothing else. A VM, made to find that out, costs a small guest's boot a tenth of its time, and its end some ticks of
/// the kernel's clock.
fn word_of_the_kernel() -> Option<bool> {
    let has = |module: &str| std::path::Path::new("/sys/module").join(module).exists();
    match (has("kvm_intel") || has("kvm_amd"), has("kvm_pvm")) {
        (true, false) => Some(true),
        (false, true) => Some(false),
        _ => None,
    }
}

fn probe() -> Result<Capabilities> {
    let kvm = super::open_kvm()?;
    let flags = u32::try_from(kvm.check_extension_raw(CAP_SET_GUEST_DEBUG2)).unwrap_or(0);
    let mut laboratory = None;
    let mut run = |code: &[u8], debug: GuestDebug| Laboratory::run(&mut laboratory, code, &debug);
    let step = run(&[0x90, 0x90], GuestDebug { single_step: true, ..Default::default() })?;
    let int3 = run(&[0xcc], GuestDebug { software_breakpoints: true, ..Default::default() })?;
    let mut hardware = 0;
    let elsewhere = HardwareBreakpoint::execute(CODE + 0x800);
    for register in 0..4 {
        let mut debug = GuestDebug { hardware: vec![elsewhere; register], ..Default::default() };
        debug.hardware.push(HardwareBreakpoint::execute(CODE + 1));
        hardware += u32::from(matches!(run(&[0x90, 0x90], debug)?, Exit::Debug(event) if event.pc == CODE + 1));
    }
    let watch = HardwareBreakpoint { address: DATA, access: Access::Write, length: 4 };
    // mov [DATA], eax
    let store = [0x89, 0x04, 0x25, 0x00, 0x90, 0x00, 0x00];
    let watched = run(&store, GuestDebug { hardware: vec![watch], ..Default::default() })?;
    Ok(Capabilities {
        native_ring0: is_native_in(&mut laboratory)?,
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

/// A VM for guests of a few instructions in 64-bit ring 0, without an IDT.
struct Laboratory {
    memory: GuestMemory,
    backend: KvmBackend,
    guests: u32,
    most: u32,
}

impl Laboratory {
    /// Guests of one VM: a new vCPU takes a fraction of a new VM's time.
    const GUESTS: u32 = 8;

    fn new() -> Result<Self> {
        let limit = super::open_kvm()?.get_max_vcpus();
        let most = u32::try_from(limit).unwrap_or(u32::MAX).min(Self::GUESTS);
        let memory = GuestMemory::new(0, 0x20_0000, Backing::default())?;
        let backend = KvmBackend::new(&memory, &MachineOptions { cpus: most, ..Default::default() })?;
        // PML4 → PDPT → PD → one 2 MiB page, present and writable.
        for (table, entry) in [(PML4, PML4 + 0x1003), (PML4 + 0x1000, PML4 + 0x2003), (PML4 + 0x2000, 0x83)] {
            memory.write_object(table, entry)?;
        }
        Ok(Self { memory, backend, guests: 0, most })
    }

    /// Runs a guest in that laboratory, or in a new one, to its first exit.
    fn run(laboratory: &mut Option<Self>, code: &[u8], debug: &GuestDebug) -> Result<Exit> {
        let mut vcpu = match laboratory {
            Some(found) if found.guests < found.most => found.guest(code)?,
            _ => laboratory.insert(Self::new()?).guest(code)?,
        };
        vcpu.set_guest_debug(debug)?;
        for _ in 0..16 {
            match vcpu.run()? {
                Exit::Interrupted => {}
                exit => return Ok(exit),
            }
        }
        Err(Error::HypervisorUnavailable("the probe guest is interrupted without end".into()))
    }

    fn guest(&mut self, code: &[u8]) -> Result<Box<dyn Vcpu>> {
        let mut vcpu = self.backend.create_vcpu(self.guests)?;
        self.guests += 1;
        self.memory.write(CODE, &[code, &MARKER, &[0xf4]].concat())?;
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
        Ok(vcpu)
    }
}

impl Drop for Laboratory {
    fn drop(&mut self) {
        super::closing::hasten(&self.backend.vm);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_word_of_the_kernel_is_what_a_guest_finds() {
        if let (Some(word), Ok(found)) = (word_of_the_kernel(), executes_sse(&mut None)) {
            assert_eq!(word, found);
        }
    }

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
