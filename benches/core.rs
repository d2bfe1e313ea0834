//! The parts of a breakpoint hit that are the core's own: emulating the covered instruction, and a compiled condition.
//!
//! `cargo bench --bench core`

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use uhyve_core::debug::condition::{Context, EvaluateError, OPCODES, Program};
use uhyve_core::error::GuestFault;
use uhyve_core::registers::{RSI, RSP, RegisterId};
use uhyve_core::x86::{Bus, BusError, CpuState, Outcome, step_bytes};

const BASE: u64 = 0x1000;

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

criterion_group!(benches, emulator, condition);
criterion_main!(benches);
