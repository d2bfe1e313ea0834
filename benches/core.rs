//! The parts of the core, each by itself: dispatching a hypercall, walking page tables, decoding and executing
//! instructions, a compiled condition, and a reply to gdb.
//!
//! `cargo bench --bench core`

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use uhyve_core::debug::condition::{Context, EvaluateError, OPCODES, Program};
use uhyve_core::devices::serial::{Output, Serial};
use uhyve_core::error::GuestFault;
use uhyve_core::gdb::filter::Filter;
use uhyve_core::hypercall::{self, CommandLine, Request, Services};
use uhyve_core::isolation::{FileMap, Files, IoMode, Scratch};
use uhyve_core::memory::{Backing, GuestMemory};
use uhyve_core::paging::{PagingMode, translate, write_boot_tables};
use uhyve_core::registers::{RCX, RSI, RSP, RegisterId};
use uhyve_core::x86::{Bus, BusError, Cpu, CpuExit, CpuState, Nothing, Outcome, length, step_bytes};

const BASE: u64 = 0x1000;
const MEMORY: u64 = 16 << 20;
/// Where the boot page tables lie, and room for those below them.
const ROOT: u64 = 0x1_0000;
const POOL: std::ops::Range<u64> = ROOT + 0x1000..ROOT + 0x1_0000;
const CODE: u64 = 0x10_0000;
/// Rounds of the loop that is executed.
const ROUNDS: u64 = 10_000;
const SERIAL_BYTE: u16 = 0x1020;

struct Memory([u8; 4096]);

impl Memory {
    fn at(&mut self, address: u64, length: usize) -> Result<&mut [u8], BusError> {
        let offset = usize::try_from(address.wrapping_sub(BASE)).map_err(|_| BusError::NotRam)?;
        self.0.get_mut(offset..offset + length).ok_or(BusError::NotRam)
    }
}

impl Bus for Memory {
    fn read(&mut self, address: u64, buffer: &mut [u8]) -> Result<(), BusError> {
        let length = buffer.len();
        buffer.copy_from_slice(self.at(address, length)?);
        Ok(())
    }

    fn write(&mut self, address: u64, data: &[u8]) -> Result<(), BusError> {
        self.at(address, data.len())?.copy_from_slice(data);
        Ok(())
    }

    fn fetch(&mut self, _: u64, _: &mut [u8; 15]) -> usize {
        0
    }

    fn read_tsc(&mut self) -> u64 {
        0
    }

    fn compare_exchange(&mut self, _: u64, _: usize, _: u128, _: u128) -> Result<u128, BusError> {
        Err(BusError::NotRam)
    }
}

fn emulator(c: &mut Criterion) {
    let mut group = c.benchmark_group("emulate");
    let instructions: [(&str, &[u8]); 6] = [
        ("mov rbp, rsp", &[0x48, 0x89, 0xe5]),
        ("push rax", &[0x50]),
        ("mov rax, [rsi+8]", &[0x48, 0x8b, 0x46, 0x08]),
        ("xorps xmm0, xmm1", &[0x0f, 0x57, 0xc1]),
        ("addsd xmm0, xmm1", &[0xf2, 0x0f, 0x58, 0xc1]),
        ("fld1", &[0xd9, 0xe8]),
    ];
    for (text, code) in instructions {
        let (mut cpu, mut memory) = (CpuState::default(), Memory([0; 4096]));
        cpu.registers.general[RSI] = BASE;
        group.bench_function(text, |b| {
            b.iter(|| {
                cpu.registers.general[RSP] = BASE + 0x800;
                assert_eq!(step_bytes(&mut cpu, &mut memory, black_box(code)), Outcome::Done);
            });
        });
    }
    group.finish();
}

struct Values;

impl Context for Values {
    fn register(&mut self, _: RegisterId) -> Result<u64, EvaluateError> {
        Ok(black_box(9))
    }

    fn read(&mut self, _: u64, buffer: &mut [u8]) -> Result<(), GuestFault> {
        buffer.fill(black_box(1));
        Ok(())
    }

    fn vcpu(&self) -> u32 {
        0
    }

    fn hits(&self) -> u64 {
        0
    }

    fn reached(&self) -> u64 {
        1
    }
}

/// `rsi > 8`, in bytecode.
fn condition(c: &mut Criterion) {
    let opcode = |name: &str| OPCODES.iter().find(|(known, _)| *known == name).expect("a known opcode").1;
    let rsi = RegisterId::from_name("rsi").expect("a register").index();
    let code = [opcode("REGISTER"), rsi, opcode("CONSTANT"), 0, 0, opcode("GREATER")];
    let Ok(program) = Program::verify(&code, &[8]) else { panic!("the bench's own program is valid") };
    c.bench_function("condition rsi > 8", |b| b.iter(|| program.evaluate(&mut Values).expect("it has a value")));
}

/// RAM that is mapped to itself by the boot page tables, in 2 MiB pages.
fn memory() -> (GuestMemory, PagingMode) {
    let memory = GuestMemory::new(0, MEMORY, Backing::default()).expect("16 MiB are there");
    write_boot_tables(&memory, ROOT, POOL, 0..MEMORY).expect("the pool is large enough");
    (memory, PagingMode { cr0: 0x8000_0031, cr3: ROOT, cr4: 0x20, efer: 0x500 })
}

/// A console byte, from its port to the console's buffer, which discards it.
fn dispatch(c: &mut Criterion) {
    let files = Files::new(FileMap::default(), Scratch::new(None).expect("a scratch directory"), IoMode::default());
    let command_line = CommandLine::new(Path::new("/app"), &[], &[]).expect("an empty one is valid");
    let console = Arc::new(Serial::new(Output::Discard).expect("nothing is opened for it"));
    let services = Services::new(memory().0, console, files, command_line);
    c.bench_function("dispatch of a console byte", |b| {
        b.iter(|| {
            let call = hypercall::identify(black_box(SERIAL_BYTE)).expect("a port of the interface");
            let mut progress = 0;
            let mut request = Request {
                call,
                data: 0,
                size: 4,
                rdi: u64::from(b'.'),
                translate: &mut |address| Some((address, 1)),
                cancelled: &|| false,
                progress: &mut progress,
            };
            services.dispatch(&mut request)
        });
    });
}

fn page_walk(c: &mut Criterion) {
    let (memory, mode) = memory();
    c.bench_function("page walk, 2 MiB page", |b| {
        b.iter(|| translate(&memory, &mode, black_box(CODE)).expect("it is mapped"));
    });
}

fn decode(c: &mut Criterion) {
    let mut group = c.benchmark_group("decode");
    for (text, code) in
        [("mov rax, [rsi+8]", &[0x48u8, 0x8b, 0x46, 0x08][..]), ("addsd xmm0, xmm1", &[0xf2, 0x0f, 0x58, 0xc1])]
    {
        group.bench_function(text, |b| b.iter(|| length(black_box(code)).expect("it is valid")));
    }
    group.finish();
}

/// `again: add rax, rcx; dec rcx; jnz again; hlt` on the software CPU, as it runs guests.
fn execute(c: &mut Criterion) {
    let (memory, _) = memory();
    memory.write(CODE, &[0x48, 0x01, 0xc8, 0x48, 0xff, 0xc9, 0x75, 0xf8, 0xf4]).expect("in RAM");
    let mut cpu = Cpu::new(&memory);
    let mut state = cpu.snapshot();
    state.core.system.cr3 = ROOT;
    cpu.restore(&state);
    let mut group = c.benchmark_group("execute");
    group.throughput(Throughput::Elements(3 * ROUNDS));
    group.bench_function("add, dec, jnz", |b| {
        b.iter(|| {
            cpu.set_halted(false);
            let mut registers = cpu.registers();
            registers.rip = CODE;
            registers.general[RCX] = ROUNDS;
            cpu.set_registers(&registers);
            assert_eq!(cpu.run(&mut Nothing, u64::MAX), CpuExit::Halted);
        });
    });
    group.finish();
}

/// A reply to `g`, from the stub's bytes to the client's.
fn reply(c: &mut Criterion) {
    let payload: String = (0..560u32).map(|n| format!("{:02x}", n & 0xff)).collect();
    let sum = payload.bytes().fold(0u8, u8::wrapping_add);
    let frame = format!("${payload}#{sum:02x}");
    c.bench_function("reply to g", |b| {
        b.iter(|| {
            let mut filter = Filter::new(0x4000);
            filter.outgoing(black_box(frame.as_bytes()));
            filter.output()
        });
    });
}

criterion_group!(benches, dispatch, page_walk, decode, emulator, execute, condition, reply);
criterion_main!(benches);
