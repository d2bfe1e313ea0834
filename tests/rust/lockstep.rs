//! KVM and the software CPU side by side: the same image, stepped on both, with all registers compared after every
//! instruction, what it wrote to memory as well, and all of RAM at the end. What depends on the machine and not on the CPU
//! (time, APIC registers, MSRs, ports, random numbers) is read from KVM and given to ours; CPUID is ours on both, so that
//! the guest takes the paths that the software CPU advertises.
//!
//! `UHYVE_LOCKSTEP_IMAGE` names an image (without it, the demo guest runs), `UHYVE_LOCKSTEP_LIMIT` is the most
//! instructions. The longest runs are done in the box:
//! `tools/kvmbox -- env UHYVE_LOCKSTEP_IMAGE=… target/debug/deps/lockstep-… --nocapture`.

// Helpers of tests unwrap as the tests do.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register, RflagsBits};
use uhyve_core::backend::{DataAccess, Exit, GuestDebug, HardwareBreakpoint, Vcpu};
use uhyve_core::boot::Image;
use uhyve_core::devices::serial::Output;
use uhyve_core::error::{Error, Result};
use uhyve_core::hypercall::{self, Outcome, Request};
use uhyve_core::isolation::landlock::FileIsolation;
use uhyve_core::memory::{Backing, GuestMemory};
use uhyve_core::paging::{self, PagingMode};
use uhyve_core::registers::{FpuState, RAX, RBX, RCX, RDI, RDX, RFLAGS_TF, RSP, Registers, SystemRegisters};
use uhyve_core::vm::{Config, Machine};
use uhyve_core::{demo, x86};

/// Instructions of a run that nobody limits.
const LIMIT: u64 = 1_000_000;
/// System registers are compared at least this often.
const SYSTEM_EVERY: u64 = 4096;
/// The most steps of one side until it is where the other one is.
const CATCH_UP: usize = 4;
/// A repeated instruction with more iterations runs to a breakpoint behind it.
const ITERATIONS: u64 = 16;
/// TF, and RF, which a hypervisor may leave.
const RFLAGS_OF_STEPS: u64 = 1 << 8 | 1 << 16;
/// What an exception pushes, with an error code.
const FRAME: u64 = 48;
const CR4_MCE: u64 = 1 << 6;
/// XSTATE_BV in an XSAVE area.
const XSTATE_BV: u64 = 512;
const RFLAGS_IOPL: u64 = 3 << 12;
/// Accessed and dirty, in an entry of a page table.
const ACCESSED_DIRTY: u64 = 3 << 5;
const XCR0_AVX: u64 = 4;
/// IA32_TSC_DEADLINE, and the initial count of the x2APIC's timer.
const TIMERS: [u64; 2] = [0x6e0, 0x838];

fn start(image: &Arc<Image>, backend: &str) -> Result<Arc<Machine>> {
    let machine = Machine::start(Config {
        image: image.clone(),
        memory: None,
        cpus: Some(1),
        kernel_args: None,
        args: None,
        environment: Vec::new(),
        files: Vec::new(),
        output: Output::Discard,
        backend: backend.into(),
        aslr: false,
        backing: Backing::default(),
        pit: false,
        cpu_pm: false,
        affinity: Vec::new(),
        tempdir: None,
        isolation: FileIsolation::None,
        io_mode: Default::default(),
        soft: Default::default(),
        debugging: true,
        wrapper: None,
        measure: Default::default(),
    })?;
    machine.wait(Some(Instant::now() + Duration::from_secs(30)), &mut || Ok::<(), Error>(()))?;
    Ok(machine)
}

/// How a step ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Stepped,
    Unemulated,
    Guest(i32),
}

/// One of the two.
struct Side<'a> {
    machine: &'a Machine,
    cpu: &'a mut dyn Vcpu,
}

impl Side<'_> {
    fn registers(&mut self) -> Registers {
        self.cpu.registers().unwrap()
    }

    fn memory(&self) -> &GuestMemory {
        &self.machine.memory
    }

    /// Executes one instruction, or runs to one of `places`.
    fn step(&mut self, single_step: bool, places: &[u64]) -> End {
        let hardware = places.iter().copied().map(HardwareBreakpoint::execute).collect();
        let debug = GuestDebug { single_step, block_interrupts: false, software_breakpoints: false, hardware };
        self.cpu.set_guest_debug(&debug).unwrap();
        let mut exit = self.cpu.run().unwrap();
        loop {
            match exit {
                Exit::Debug(_) => return End::Stepped,
                Exit::Interrupted => exit = self.cpu.run().unwrap(),
                Exit::Unemulated => return End::Unemulated,
                Exit::IoOut { port, size, value, count } => {
                    if let Some(code) = self.port_write(port, size, value, count) {
                        return End::Guest(code);
                    }
                    exit = match self.completed(single_step) {
                        Some(exit) => exit,
                        None => return End::Stepped,
                    };
                }
                Exit::IoIn { port, size, .. } => {
                    let answer = self.machine.pci.read(port, size);
                    for element in self.cpu.io_data().chunks_mut(usize::from(size)) {
                        element.copy_from_slice(&answer[..element.len()]);
                    }
                    exit = match self.completed(single_step) {
                        Some(exit) => exit,
                        None => return End::Stepped,
                    };
                }
                Exit::MmioRead { .. } | Exit::MmioWrite { .. } => {
                    if matches!(exit, Exit::MmioRead { .. }) {
                        self.cpu.io_data().fill(0);
                    }
                    exit = match self.completed(single_step) {
                        Some(exit) => exit,
                        None => return End::Stepped,
                    };
                }
                other => panic!("{}: {other:?} at {:#x}", self.machine.backend_name(), self.registers().rip),
            }
        }
    }

    /// What comes after an access: the end of a step, unless the instruction makes another one.
    fn completed(&mut self, single_step: bool) -> Option<Exit> {
        match self.cpu.complete_io().unwrap() {
            None if !single_step => Some(self.cpu.run().unwrap()),
            exit => exit,
        }
    }

    fn port_write(&mut self, port: u16, size: u8, value: u32, count: u32) -> Option<i32> {
        let machine = self.machine;
        if count != 1 || machine.pci.write(port, size, value) {
            return None;
        }
        let call = hypercall::identify(port)?;
        let mode = self.mode();
        let mut translate = |address: u64| {
            paging::translate(&machine.memory, &mode, address).ok().map(|found| (found.physical, found.remaining))
        };
        let rdi = self.registers().general[RDI];
        let mut request = Request {
            call,
            data: value,
            size: usize::from(size),
            rdi,
            translate: &mut translate,
            cancelled: &|| false,
            progress: &mut 0,
        };
        match machine.services.dispatch(&mut request) {
            Outcome::Exit(code) => Some(code),
            Outcome::Done => None,
            other => panic!("{}: a hypercall at port {port:#x}: {other:?}", machine.backend_name()),
        }
    }

    fn mode(&mut self) -> PagingMode {
        PagingMode::from(&self.cpu.system_registers().unwrap())
    }

    fn read(&mut self, address: u64, length: usize) -> Option<Vec<u8>> {
        let mode = self.mode();
        let mut bytes = vec![0; length];
        paging::read_virtual(&self.machine.memory, &mode, address, &mut bytes).ok().map(|()| bytes)
    }

    /// Whether the address leads to RAM.
    fn is_ram(&mut self, address: u64) -> bool {
        let mode = self.mode();
        paging::translate(&self.machine.memory, &mode, address)
            .is_ok_and(|found| self.machine.memory.contains(found.physical, 1))
    }
}

/// What was counted.
#[derive(Default)]
struct Counts {
    compared: u64,
    /// Values that KVM gave, by mnemonic.
    given: BTreeMap<String, u64>,
    /// Instructions that KVM does not execute: ours gave their results.
    unemulated: u64,
    exceptions: u64,
    /// Timers that were armed by the guest and stopped by this test.
    disarmed: u64,
    repeated: u64,
    /// Steps of KVM that were several instructions.
    doubled: u64,
    writes: u64,
    vectors: u64,
    system: u64,
}

struct Lockstep<'a> {
    kvm: Side<'a>,
    soft: Side<'a>,
    counts: Counts,
    /// KVM executes ring 0 on a CPU.
    is_native: bool,
}

/// Why a run is over.
#[derive(Debug, PartialEq, Eq)]
enum Over {
    Exit(i32),
    Limit,
    Halt,
}

/// Bits of RFLAGS that the instruction leaves undefined.
fn undefined(instruction: &Instruction) -> u64 {
    use Mnemonic as M;
    const FLAGS: [(u32, u64); 6] = [
        (RflagsBits::CF, 1),
        (RflagsBits::PF, 4),
        (RflagsBits::AF, 0x10),
        (RflagsBits::ZF, 0x40),
        (RflagsBits::SF, 0x80),
        (RflagsBits::OF, 0x800),
    ];
    let named: u64 =
        FLAGS.iter().filter(|(bit, _)| instruction.rflags_undefined() & bit != 0).map(|(_, flag)| *flag).sum();
    // With a count in CL nothing says whether OF, CF and AF are defined.
    let is_shift = matches!(
        instruction.mnemonic(),
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    );
    named | if is_shift { 0x811 } else { 0 }
}

/// Whether the result is the machine's and not the CPU's.
fn is_given(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    // In CR4 SVM shows the host's MCE.
    let is_register = instruction.op_count() == 2 && instruction.op_kind(1) == OpKind::Register;
    let is_control = is_register && matches!(instruction.op_register(1), Register::CR8 | Register::CR4);
    let is_machines = matches!(
        instruction.mnemonic(),
        M::Rdtsc | M::Rdtscp | M::Rdmsr | M::In | M::Rdrand | M::Rdseed | M::Rdpmc | M::Rdpid | M::Insb | M::Insd
    );
    is_control || is_machines
}

/// Whether it changes more than general registers, vectors and memory.
fn touches_system(instruction: &Instruction) -> bool {
    let is_system = |register: Register| register.is_cr() || register.is_segment_register() || register.is_dr();
    instruction.is_privileged()
        || instruction.is_stack_instruction() && instruction.mnemonic() == Mnemonic::Iretq
        || (0..instruction.op_count())
            .any(|n| instruction.op_kind(n) == OpKind::Register && is_system(instruction.op_register(n)))
        || matches!(instruction.mnemonic(), Mnemonic::Wrfsbase | Mnemonic::Wrgsbase | Mnemonic::Swapgs)
}

/// The registers of the vector unit without what QEMU's CPU does not keep: the last x87 instruction and its operand.
fn comparable(mut fpu: FpuState) -> FpuState {
    (fpu.fip, fpu.fdp, fpu.fop) = (0, 0, 0);
    // Of an empty register the contents mean nothing.
    let top = usize::from(fpu.fsw >> 11 & 7);
    for (i, register) in fpu.st.iter_mut().enumerate() {
        if fpu.ftw >> ((top + i) % 8) & 1 == 0 {
            *register = [0; 16];
        }
    }
    fpu
}

/// System registers without what is the APIC's, and without attributes that mean nothing in 64-bit mode.
fn essential(s: &SystemRegisters) -> impl PartialEq + std::fmt::Debug + use<> {
    let selectors = [s.cs, s.ds, s.es, s.fs, s.gs, s.ss, s.tr, s.ldt].map(|segment| segment.selector);
    let tables = (s.gdt.base, s.gdt.limit, s.idt.base, s.idt.limit);
    let bases = (s.fs.base, s.gs.base, s.tr.base);
    // CR0.ET is fixed.
    (selectors, tables, bases, s.cr0 | 1 << 4, s.cr2, s.cr3, s.cr4 & !CR4_MCE, s.efer)
}

impl<'a> Lockstep<'a> {
    /// Both from KVM's state, with one memory.
    fn new(kvm: Side<'a>, soft: Side<'a>) -> Self {
        let range = kvm.memory().range();
        assert_eq!(range, soft.memory().range());
        let mut piece = vec![0; 1 << 20];
        for at in range.step_by(piece.len()) {
            kvm.memory().read(at, &mut piece).unwrap();
            soft.memory().write(at, &piece).unwrap();
        }
        let system = kvm.cpu.system_registers().unwrap();
        soft.cpu.set_system_registers(&system).unwrap();
        soft.cpu.set_registers(&kvm.cpu.registers().unwrap()).unwrap();
        let is_native = kvm.machine.capabilities().unwrap().native_ring0;
        Self { kvm, soft, counts: Counts::default(), is_native }
    }

    fn run(&mut self, limit: u64) -> Over {
        while self.counts.compared < limit {
            if let Some(over) = self.advance() {
                return over;
            }
        }
        Over::Limit
    }

    /// One instruction on both.
    fn advance(&mut self) -> Option<Over> {
        let before = self.soft.registers();
        let (code, instruction) = self.decode(before.rip);
        if instruction.mnemonic() == Mnemonic::Hlt {
            return Some(Over::Halt);
        }
        let system = self.soft.cpu.system_registers().unwrap();
        let accesses = x86::accesses(&code, &before, &system);
        let is_device = accesses.memory.iter().any(|access| !access.write && !self.soft.is_ram(access.address));
        let is_long = instruction.has_rep_prefix() | instruction.has_repne_prefix()
            && instruction.is_string_instruction()
            && before.general[RCX] > 0;
        let disarmed = self.disarm(&instruction, &before);
        let count = self.soft.cpu.instructions();
        if is_long {
            self.counts.repeated += 1;
            self.repeat(&before, instruction.next_ip());
        } else {
            match self.soft.step(true, &[]) {
                End::Stepped => {}
                End::Guest(code) => {
                    assert_eq!(self.kvm.step(true, &[]), End::Guest(code));
                    return Some(Over::Exit(code));
                }
                End::Unemulated => unreachable!("the software CPU has no such exit"),
            }
            let is_exception = count == self.soft.cpu.instructions();
            self.counts.exceptions += u64::from(is_exception);
            let mut written = accesses.memory.clone();
            if is_exception {
                let address = self.soft.registers().general[RSP];
                written.push(DataAccess { address, length: FRAME, write: true });
            }
            self.follow(&before, &written, &code);
            if is_exception {
                self.clear_saved_trap_flag();
                self.keep_stack_segment();
            }
        }
        self.give(&instruction, is_device);
        if let Some(value) = disarmed {
            self.set_pair(value);
        }
        self.compare(&before, &code, &instruction);
        self.compare_memory(&accesses.memory, &instruction);
        if x86::needs(&code).fpu {
            self.compare_vectors(&instruction);
        }
        self.counts.compared += 1;
        if touches_system(&instruction) || self.counts.compared.is_multiple_of(SYSTEM_EVERY) {
            self.compare_system(&instruction);
        }
        None
    }

    fn decode(&mut self, rip: u64) -> (Vec<u8>, Instruction) {
        let whole = self.soft.read(rip, x86::MAX_LENGTH);
        let code = whole.or_else(|| {
            let rest = usize::try_from(0x1000 - rip % 0x1000).unwrap();
            self.soft.read(rip, rest.min(x86::MAX_LENGTH))
        });
        let code = code.unwrap_or_default();
        let instruction = Decoder::with_ip(64, &code, rip, DecoderOptions::NONE).decode();
        (code, instruction)
    }

    /// A repeated instruction as a whole, on both.
    fn repeat(&mut self, before: &Registers, next: u64) {
        for side in [&mut self.soft, &mut self.kvm] {
            if before.general[RCX] > ITERATIONS {
                side.step(false, &[next]);
            }
            for _ in 0..ITERATIONS + 2 {
                if side.registers().rip != before.rip {
                    break;
                }
                side.step(true, &[]);
            }
        }
    }

    /// KVM goes where ours has gone.
    fn follow(&mut self, before: &Registers, accesses: &[DataAccess], code: &[u8]) {
        let target = self.soft.registers().rip;
        // What leads into a handler or out of one is not what a trap flag follows.
        let leads_away = !(0..=15).contains(&target.wrapping_sub(before.rip));
        // A stepped CPU pushes the trap flag.
        let shows_flag = matches!(code, [0x9c, ..] | [0x66, 0x9c, ..]);
        let mut ends = Vec::new();
        for _ in 0..CATCH_UP {
            match self.kvm.step(!shows_flag, if leads_away || shows_flag { std::slice::from_ref(&target) } else { &[] })
            {
                End::Stepped => {}
                End::Guest(code) => panic!("only KVM's guest ends, with {code}"),
                End::Unemulated => {
                    self.counts.unemulated += 1;
                    self.lend(accesses);
                }
            }
            if self.kvm.registers().rip == target {
                return;
            }
            ends.push(self.kvm.registers().rip);
            let is_behind = before.rip + x86::length(code).unwrap_or(0) as u64 == ends[0];
            if !self.is_native && !is_behind && self.overtake(ends[0]) {
                return;
            }
        }
        let (kvm, soft) = (self.kvm.registers(), self.soft.registers());
        let text = x86::disassemble(code, before.rip);
        panic!("{text} at {:#x}: KVM comes to {ends:x?}, ours to {target:#x}\n{kvm}\n{soft}", before.rip);
    }

    /// What was entered is a handler, and a CPU that is stepped has saved the trap flag.
    fn clear_saved_trap_flag(&mut self) {
        let at = self.kvm.registers().general[RSP];
        for word in [at + 16, at + 24] {
            let [kvm, soft] = [&mut self.kvm, &mut self.soft].map(|side| side.read(word, 8).unwrap());
            let [kvm, soft] = [kvm, soft].map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap()));
            if kvm ^ soft == RFLAGS_TF {
                let mode = self.kvm.mode();
                self.kvm.machine.view().write(&mode, word, &soft.to_le_bytes()).unwrap();
            }
        }
    }

    /// QEMU's CPU, in the box, loads a null SS where the interrupt stack table gives the stack; CPUs do where the
    /// privilege level changes (Intel SDM 2A, INT n, INTRA-PRIVILEGE-LEVEL-INTERRUPT).
    fn keep_stack_segment(&mut self) {
        let (mut kvm, soft) = (self.kvm.cpu.system_registers().unwrap(), self.soft.cpu.system_registers().unwrap());
        if kvm.ss.selector == 0 && soft.ss.selector != 0 && kvm.cs.selector == soft.cs.selector {
            kvm.ss = soft.ss;
            self.kvm.cpu.set_system_registers(&kvm).unwrap();
            *self.counts.given.entry("SS".into()).or_default() += 1;
        }
    }

    /// PVM, which executes two instructions in a step now and then, is ahead: ours goes there.
    fn overtake(&mut self, target: u64) -> bool {
        for _ in 0..CATCH_UP {
            if self.soft.step(true, &[]) != End::Stepped {
                return false;
            }
            if self.soft.registers().rip == target {
                self.counts.doubled += 1;
                return true;
            }
        }
        false
    }

    /// KVM does not know the instruction: it gets our result.
    fn lend(&mut self, accesses: &[DataAccess]) {
        for access in accesses.iter().filter(|access| access.write) {
            let length = usize::try_from(access.length).unwrap();
            let Some(bytes) = self.soft.read(access.address, length) else { continue };
            let mode = self.kvm.mode();
            self.kvm.machine.view().write(&mode, access.address, &bytes).unwrap();
        }
        let (fpu, high) = (self.soft.cpu.fpu().unwrap(), self.soft.cpu.ymm_high().unwrap());
        self.kvm.cpu.set_fpu(&fpu).unwrap();
        if self.soft.cpu.xcr0().unwrap() & self.kvm.cpu.xcr0().unwrap() & XCR0_AVX != 0 {
            self.kvm.cpu.set_ymm_high(&high).unwrap();
        }
        let ours = self.soft.cpu.system_registers().unwrap();
        let theirs = self.kvm.cpu.system_registers().unwrap();
        let system = SystemRegisters { cr8: theirs.cr8, apic_base: theirs.apic_base, ..ours };
        self.kvm.cpu.set_system_registers(&system).unwrap();
        self.kvm.cpu.set_registers(&self.soft.cpu.registers().unwrap()).unwrap();
    }

    /// What the machines know better than the CPUs.
    fn give(&mut self, instruction: &Instruction, is_device: bool) {
        let (mut kvm, mut soft) = (self.kvm.registers(), self.soft.registers());
        if instruction.mnemonic() == Mnemonic::Cpuid {
            for register in [RAX, RBX, RCX, RDX] {
                kvm.general[register] = soft.general[register];
            }
            self.kvm.cpu.set_registers(&kvm).unwrap();
        } else if is_device || is_given(instruction) {
            assert_eq!(kvm.rip, soft.rip, "{instruction}");
            assert_eq!(kvm.general[RSP], soft.general[RSP]);
            if instruction.op_count() == 2 && instruction.op_register(1) == Register::CR4 {
                let differing = kvm.general.iter().zip(&soft.general).fold(0, |bits, (a, b)| bits | (a ^ b));
                assert_eq!(differing & !CR4_MCE, 0, "{instruction}");
            }
            (soft.general, soft.rflags) = (kvm.general, kvm.rflags & !RFLAGS_OF_STEPS);
            self.soft.cpu.set_registers(&soft).unwrap();
        } else {
            return;
        }
        *self.counts.given.entry(format!("{:?}", instruction.mnemonic())).or_default() += 1;
    }

    /// A timer that the guest is about to arm gets no time: its interrupt would come to the two at different
    /// instructions. What was asked for stands in RAX and RDX, and is put back afterwards.
    fn disarm(&mut self, instruction: &Instruction, before: &Registers) -> Option<(u64, u64)> {
        let is_timer = TIMERS.contains(&(before.general[RCX] & 0xffff_ffff));
        if instruction.mnemonic() != Mnemonic::Wrmsr || !is_timer {
            return None;
        }
        self.counts.disarmed += 1;
        self.set_pair((0, 0));
        Some((before.general[RAX], before.general[RDX]))
    }

    fn set_pair(&mut self, (low, high): (u64, u64)) {
        for side in [&mut self.kvm, &mut self.soft] {
            let mut registers = side.registers();
            (registers.general[RAX], registers.general[RDX]) = (low, high);
            side.cpu.set_registers(&registers).unwrap();
        }
    }

    fn compare(&mut self, before: &Registers, code: &[u8], instruction: &Instruction) {
        let (mut kvm, mut soft) = (self.kvm.registers(), self.soft.registers());
        kvm.rflags &= !RFLAGS_OF_STEPS;
        if instruction.mnemonic() == Mnemonic::Iretq && !self.is_native && (kvm.rflags ^ soft.rflags) & RFLAGS_IOPL != 0
        {
            // PVM's IRET keeps no privilege level for ports.
            kvm.rflags = kvm.rflags & !RFLAGS_IOPL | soft.rflags & RFLAGS_IOPL;
            self.kvm.cpu.set_registers(&kvm).unwrap();
        }
        let undefined = undefined(instruction);
        let differing = (kvm.rflags ^ soft.rflags) & undefined & !RFLAGS_OF_STEPS;
        if differing != 0 {
            soft.rflags ^= differing;
            self.soft.cpu.set_registers(&soft).unwrap();
        }
        soft.rflags &= !RFLAGS_OF_STEPS;
        assert!(
            kvm == soft,
            "after {} instructions, {} differs ({:02x?})\nbefore\n{before}\nKVM\n{kvm}\nours\n{soft}",
            self.counts.compared,
            x86::disassemble(code, before.rip),
            &code[..instruction.len()],
        );
    }

    /// What was written is the same on both.
    fn compare_memory(&mut self, accesses: &[DataAccess], instruction: &Instruction) {
        for access in accesses.iter().filter(|access| access.write) {
            let length = usize::try_from(access.length).unwrap();
            let pair = (self.kvm.read(access.address, length), self.soft.read(access.address, length));
            if let (Some(kvm), Some(mut soft)) = pair {
                if access.length > XSTATE_BV && kvm[XSTATE_BV as usize] != soft[XSTATE_BV as usize] {
                    // Which components are in use is the CPU's own affair (Intel SDM 1, 13.6), where all are zero.
                    soft[XSTATE_BV as usize] = kvm[XSTATE_BV as usize];
                    let mode = self.soft.mode();
                    self.soft.machine.view().write(&mode, access.address, &soft).unwrap();
                    *self.counts.given.entry("XSTATE_BV".into()).or_default() += 1;
                }
                assert_eq!(kvm, soft, "after {} instructions, {instruction} wrote", self.counts.compared);
                self.counts.writes += 1;
            }
        }
    }

    fn compare_vectors(&mut self, instruction: &Instruction) {
        let (kvm, soft) = (self.kvm.cpu.fpu().unwrap(), self.soft.cpu.fpu().unwrap());
        let compared = self.counts.compared;
        assert_eq!(comparable(kvm), comparable(soft), "after {compared} instructions, {instruction}");
        if self.soft.cpu.xcr0().unwrap() & self.kvm.cpu.xcr0().unwrap() & XCR0_AVX != 0 {
            let pair = (self.kvm.cpu.ymm_high().unwrap(), self.soft.cpu.ymm_high().unwrap());
            assert_eq!(pair.0, pair.1, "after {compared} instructions, {instruction}");
        }
        self.counts.vectors += 1;
    }

    fn compare_system(&mut self, instruction: &Instruction) {
        let (kvm, soft) = (self.kvm.cpu.system_registers().unwrap(), self.soft.cpu.system_registers().unwrap());
        let compared = self.counts.compared;
        let (kvm, soft) = (essential(&kvm), essential(&soft));
        assert_eq!(kvm, soft, "after {compared} instructions, {instruction}");
        self.counts.system += 1;
    }

    /// All of RAM; words that differ by accessed and dirty bits alone are counted.
    fn compare_ram(&self) -> u64 {
        let (mut a, mut b) = (vec![0u8; 1 << 20], vec![0u8; 1 << 20]);
        let mut marks = 0;
        for at in self.kvm.memory().range().step_by(a.len()) {
            self.kvm.memory().read(at, &mut a).unwrap();
            self.soft.memory().read(at, &mut b).unwrap();
            if a == b {
                continue;
            }
            for (i, (left, right)) in a.chunks_exact(8).zip(b.chunks_exact(8)).enumerate() {
                let [left, right] = [left, right].map(|word| u64::from_le_bytes(word.try_into().unwrap()));
                let is_entry = left & right & 1 != 0 && (left ^ right) & !ACCESSED_DIRTY == 0;
                assert!(left == right || is_entry, "RAM at {:#x}: {left:#x} {right:#x}", at + 8 * i as u64);
                marks += u64::from(left != right);
            }
        }
        marks
    }
}

/// Runs an image on both and returns why it was over, and what was counted; `None` without KVM.
fn lockstep(image: Image, limit: u64) -> Option<(Over, Counts)> {
    let image = Arc::new(image);
    let kvm = match start(&image, "kvm") {
        Ok(machine) => machine,
        Err(Error::HypervisorUnavailable(text) | Error::Config(text)) => {
            println!("skipped: {text}");
            return None;
        }
        Err(error) => panic!("{error}"),
    };
    let soft = start(&image, "soft").unwrap();
    let began = Instant::now();
    let result = kvm
        .with_vcpu(0, |theirs| {
            soft.with_vcpu(0, |ours| {
                let kvm = Side { machine: &kvm, cpu: theirs.cpu.as_mut() };
                let soft = Side { machine: &soft, cpu: ours.cpu.as_mut() };
                let mut lockstep = Lockstep::new(kvm, soft);
                let over = lockstep.run(limit);
                let marks = lockstep.compare_ram();
                let counts = lockstep.counts;
                println!(
                    "{}: {over:?} after {} instructions in {:.1} s; equal: registers each time, {} writes, vector \
                     registers {} times, system registers {} times, all of RAM at the end ({marks} entries of page \
                     tables differ by accessed and dirty bits)\nhandlers entered {}, timers stopped {}, repeated {}, steps of two {}, not emulated by this KVM {}, \
                     given by KVM: {:?}",
                    image.name(),
                    counts.compared,
                    began.elapsed().as_secs_f64(),
                    counts.writes,
                    counts.vectors,
                    counts.system,
                    counts.exceptions,
                    counts.disarmed,
                    counts.repeated,
                    counts.doubled,
                    counts.unemulated,
                    counts.given,
                );
                Ok((over, counts))
            })
        })
        .unwrap();
    kvm.close();
    soft.close();
    Some(result)
}

#[test]
fn test_image_in_lockstep_has_equal_registers_after_every_instruction() {
    let limit = std::env::var("UHYVE_LOCKSTEP_LIMIT").ok().and_then(|text| text.parse().ok()).unwrap_or(LIMIT);
    let image = match std::env::var_os("UHYVE_LOCKSTEP_IMAGE") {
        Some(path) => Image::open(path.as_ref()).unwrap(),
        None => Image::from_bytes("demo", demo::IMAGE.to_vec()).unwrap(),
    };
    let is_demo = image.name() == "demo";
    let Some((over, counts)) = lockstep(image, limit) else { return };
    assert!(counts.compared > 100);
    if is_demo {
        assert_eq!(over, Over::Exit(0));
    }
}
