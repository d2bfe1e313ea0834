//! The whole machine under a hostile guest: random state, random bytes, and sequences that program every device, MSR and
//! control register with random values, in ring 0. Nothing may panic, hang, execute more than it was given, or touch the
//! host's memory outside of RAM, whose neighbours are pages that nobody may touch. `UHYVE_FUZZ` is the number of rounds.

use super::*;
use crate::backend::soft::machine::SoftOptions;
use crate::memory::Backing;
use crate::registers::{CR0_WP, CR4_OSFXSR, CR4_OSXSAVE, DescriptorTable, EFER_NXE, RSP, Segment};

const RAM: u64 = 4 << 20;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const GDT: u64 = 0x3000;
const IDT: u64 = 0x4000;
const TASK: u64 = 0x5000;
const CODE: u64 = 0x1_0000;
const STACK: u64 = 0x2_0000;
const LOCAL_APIC: u64 = 0xfee0_0000;
const IO_APIC: u64 = 0xfec0_0000;
const BUDGET: u64 = 300;
const SLICES: usize = 12;
/// Ports of PIC, PIT, CMOS, its speaker gate, and some that nobody has.
const PORTS: [u16; 14] = [0x20, 0x21, 0xa0, 0xa1, 0x40, 0x41, 0x42, 0x43, 0x61, 0x70, 0x71, 0x80, 0x92, 0x4d0];
const MSRS: [u32; 22] = [
    0x10,
    0x1b,
    0x3b,
    0x6e0,
    0x174,
    0x175,
    0x176,
    0x1a0,
    0x200,
    0x201,
    0x250,
    0x277,
    0x2ff,
    0xc000_0080,
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084,
    0xc000_0100,
    0xc000_0101,
    0xc000_0102,
    0xc000_0103,
];

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 11) % limit
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[3]
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[usize::try_from(self.below(from.len() as u64)).unwrap()]
    }

    fn value(&mut self) -> u64 {
        match self.below(5) {
            0 => self.below(256),
            1 => 1 << self.below(64),
            2 => (1u64 << self.below(64)).wrapping_sub(1),
            3 => self.next() & 0xffff_ffff,
            _ => self.next(),
        }
    }

    fn word(&mut self) -> [u8; 4] {
        let [a, b, c, d, ..] = self.value().to_le_bytes();
        [a, b, c, d]
    }

    /// A few instructions.
    fn piece(&mut self, code: &mut Vec<u8>) {
        match self.below(12) {
            0 | 1 => {
                let port =
                    if self.below(8) == 0 { [self.byte(), self.byte()] } else { self.pick(&PORTS).to_le_bytes() };
                code.extend([&[0xba][..], &port, &[0, 0, 0xb8], &self.word()].concat());
                let access: &[u8] =
                    self.pick(&[&[0xee][..], &[0xef], &[0x66, 0xef], &[0xec], &[0xed], &[0xf3, 0x6e], &[0xf3, 0x6c]]);
                code.extend(access);
            }
            2 | 3 => {
                let msr = match self.below(3) {
                    0 => self.pick(&MSRS),
                    1 => 0x800 + u32::from(self.byte() & 0x3f),
                    _ => u32::from_le_bytes(self.word()),
                };
                code.extend([&[0xb9][..], &msr.to_le_bytes(), &[0xb8], &self.word(), &[0xba], &self.word()].concat());
                code.extend(self.pick(&[[0x0f, 0x30], [0x0f, 0x30], [0x0f, 0x32]]));
            }
            4 | 5 => {
                let base = self.pick(&[LOCAL_APIC, IO_APIC, LOCAL_APIC | 0x300, IO_APIC | 0x10, RAM - 4, RAM]);
                let address = base + if self.below(4) == 0 { self.below(0x1000) } else { 0x10 * self.below(0x40) };
                code.extend([&[0x48, 0xbf][..], &address.to_le_bytes(), &[0xb8], &self.word()].concat());
                let access: &[u8] = self.pick(&[
                    &[0x89, 0x07][..],
                    &[0x89, 0x07],
                    &[0x8b, 0x07],
                    &[0x48, 0x89, 0x07],
                    &[0x88, 0x07],
                    &[0x87, 0x07],
                    &[0x0f, 0x11, 0x07],
                    &[0xf3, 0xab],
                    &[0x0f, 0xae, 0x07],
                    &[0xff, 0x07],
                    &[0xff, 0xe7],
                ]);
                code.extend(access);
            }
            6 => {
                code.extend([&[0x48, 0xb8][..], &self.value().to_le_bytes()].concat());
                // mov cr0..8, rax; mov dr0..7, rax; the other way; xsetbv; lgdt, lidt, ltr, lldt; mov ss, ax; wrfsbase.
                let register = 0xc0 | (self.byte() & 0x38);
                match self.below(8) {
                    0 | 1 => code.extend([0x0f, 0x22, register]),
                    2 => code.extend([0x44, 0x0f, 0x22, 0xc0]),
                    3 | 4 => code.extend([0x0f, 0x23, register]),
                    5 => code.extend([0x8e, register & 0xf8]),
                    6 => code.extend([0x0f, 0x00, 0xc0 | (self.byte() & 0x3f)]),
                    _ => code.extend([0x0f, 0x01, self.byte()]),
                }
            }
            7 => code.extend(self.pick(&[
                [0xfb, 0x90],
                [0xfb, 0xf4],
                [0xfa, 0x90],
                [0xcd, 0x30],
                [0xcc, 0x90],
                [0x48, 0xcf],
            ])),
            _ => {
                let length = 1 + self.below(14);
                code.extend((0..length).map(|_| self.byte()));
            }
        }
    }
}

/// Memory and a vCPU of a machine of two, of which one runs.
fn machine(random: &mut Random) -> (GuestMemory, SoftVcpu) {
    let memory = GuestMemory::new(0, RAM, Backing::default()).unwrap();
    let shared = Arc::new(Shared::new(2, true, &SoftOptions::default()));
    let vcpu = SoftVcpu::new(0, 2, &shared, &memory, random.next());
    (memory, vcpu)
}

/// Tables, a random program, and a state to begin with.
fn prepare(random: &mut Random, memory: &GuestMemory, vcpu: &mut SoftVcpu) {
    let put = |at: u64, value: u64| memory.write_object(at, value).unwrap();
    put(PML4, PDPT | 7);
    for gigabyte in 0..4 {
        put(PDPT + 8 * gigabyte, gigabyte << 30 | 0x87);
    }
    for (i, descriptor) in
        (0..).zip([0u64, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff])
    {
        put(GDT + 8 * i, descriptor);
    }
    for vector in 0..256 {
        let handler = CODE + 8 * random.below(64);
        put(IDT + 16 * vector, handler & 0xffff | 8 << 16 | 0xee00 << 32 | handler >> 16 << 48);
        put(IDT + 16 * vector + 8, 0);
    }
    put(TASK + 4, STACK);
    let mut code = Vec::new();
    while code.len() < 0x300 {
        random.piece(&mut code);
    }
    memory.write(CODE, &code).unwrap();
    let mut state = State { random: random.next(), ..State::default() };
    let system = &mut state.core.system;
    system.cs = Segment { selector: 8, base: 0, limit: u32::MAX, attributes: 0xa09b };
    system.ss = Segment { selector: 16, base: 0, limit: u32::MAX, attributes: 0xc093 };
    (system.ds, system.es) = (system.ss, system.ss);
    system.tr = Segment { selector: 0x28, base: TASK, limit: 0x67, attributes: 0x8b };
    system.gdt = DescriptorTable { base: GDT, limit: 0x37 };
    system.idt = DescriptorTable { base: IDT, limit: 0xfff };
    (system.cr0, system.cr3) = (CR0_PE | CR0_PG | CR0_WP | 0x30, PML4);
    system.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXSAVE | 1 << 10 | 1 << 16;
    system.efer = EFER_LME | EFER_LMA | EFER_NXE | 1;
    if random.below(6) == 0 {
        disturb(random, &mut state);
    }
    state.core.xcr0 = 7;
    for register in &mut state.core.registers.general {
        *register = if random.below(2) == 0 { random.below(RAM) } else { random.value() };
    }
    state.core.registers.general[RSP] = STACK - 8 * random.below(64);
    state.core.registers.rip = CODE + random.below(0x40);
    state.core.registers.rflags = 2 | random.next() & 0x4_4fd5;
    vcpu.cpu.restore(&state);
}

fn disturb(random: &mut Random, state: &mut State) {
    let system = &mut state.core.system;
    match random.below(9) {
        0 => system.cr0 ^= 1 << random.below(32),
        1 => system.cr4 ^= 1 << random.below(22),
        2 => system.cr3 = random.value(),
        3 => system.idt.base = random.value(),
        4 => system.tr.base = random.value(),
        5 => system.cs.attributes ^= 1 << random.below(16),
        6 => state.debug[7] = random.next() & 0xffff_ffff,
        7 => system.gdt.limit = u16::from_le_bytes([random.byte(), random.byte()]),
        _ => (system.cs.selector, system.cs.attributes) = (0x23, 0xa0fb),
    }
}

/// A few slices; every exit is answered as a VMM would. Instructions executed.
fn run(random: &mut Random, vcpu: &mut SoftVcpu) -> u64 {
    let start = vcpu.cpu.instructions();
    for _ in 0..SLICES {
        let (exit, executed) = vcpu.slice_of(BUDGET).unwrap();
        assert!(executed <= BUDGET, "{exit:?} after {executed}");
        vcpu.shared.end_slice(vcpu.vcpu, executed, Pause::Slice);
        match exit {
            CpuExit::Halted => vcpu.cpu.set_halted(false),
            CpuExit::Shutdown => break,
            CpuExit::PortIn { .. } | CpuExit::MmioRead { .. } => {
                vcpu.cpu.io_data().fill(random.byte());
                if random.below(2) == 0 {
                    let _ = vcpu.complete_io().unwrap();
                }
            }
            _ => {}
        }
        if random.below(64) == 0 {
            vcpu.inject(Exception { vector: random.byte() & 0x1f, error_code: Some(0), address: Some(random.value()) })
                .unwrap();
        }
    }
    vcpu.cpu.instructions() - start
}

#[test]
fn test_random_guests_of_the_whole_machine_do_no_harm() {
    let rounds = std::env::var("UHYVE_FUZZ").ok().and_then(|text| text.parse().ok()).unwrap_or(500u64);
    let mut random = Random(0x0dd_ba11_5eed);
    let mut executed = 0u128;
    for round in 0..rounds.div_ceil(500) {
        // Devices as they were left by one guest serve the next ones.
        let (memory, mut vcpu) = machine(&mut random);
        for n in 0..500.min(rounds - 500 * round) {
            prepare(&mut random, &memory, &mut vcpu);
            vcpu.cpu.set_slow(n % 2 == 0);
            let single_step = n % 7 == 0;
            vcpu.set_guest_debug(&GuestDebug { single_step, ..GuestDebug::default() }).unwrap();
            executed += u128::from(run(&mut random, &mut vcpu));
        }
    }
    println!("{rounds} guests, {executed} instructions");
    assert!(executed > 5 * u128::from(rounds));
}
