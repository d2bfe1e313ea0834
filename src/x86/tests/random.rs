//! Bytes that are no sensible program: nothing panics, and nothing changes unless the outcome says so.

use super::{Memory, Random};
use crate::registers::{CR0_TS, CR4_OSXSAVE};
use crate::x86::{CpuState, Outcome, disassemble, length, needs, step_bytes};

const BASE: u64 = 0x10_0000;

fn state(random: &mut Random) -> CpuState {
    let mut cpu = CpuState::default();
    for register in &mut cpu.registers.general {
        *register = if random.below(2) == 0 { BASE + random.below(4096) } else { random.value() };
    }
    cpu.registers.rip = random.value();
    cpu.registers.rflags = 2 | random.next() & 0xcd5;
    cpu.system.cr4 |= CR4_OSXSAVE | 1 << 16 | 1 << 10;
    cpu.system.cr0 |= if random.below(16) == 0 { CR0_TS } else { 0 };
    cpu.system.fs.base = BASE;
    cpu.xcr0 = 7;
    cpu.fpu.mxcsr = random.next() as u32;
    cpu.fpu.fcw = random.next() as u16;
    cpu.fpu.fsw = random.next() as u16;
    cpu.fpu.ftw = random.next() as u8;
    for vector in &mut cpu.fpu.xmm {
        *vector = random.vector();
    }
    cpu
}

fn check(random: &mut Random, code: &[u8]) -> Outcome {
    let mut cpu = state(random);
    let mut memory = Memory::new(BASE, 4096);
    let (before, initial) = (cpu, memory.clone());
    let outcome = step_bytes(&mut cpu, &mut memory, code);
    // A gather keeps the elements before the one that faults.
    let is_gather = matches!(outcome, Outcome::Fault { .. }) && disassemble(code, 0).contains("gather");
    if !matches!(outcome, Outcome::Done | Outcome::Repeat) && !is_gather {
        if outcome == Outcome::fault(19) {
            cpu.fpu.mxcsr = before.fpu.mxcsr;
        }
        assert_eq!(cpu, before, "{code:02x?} {outcome:?}");
        assert!(memory == initial, "{code:02x?} {outcome:?}");
    }
    if !needs(code).writes_system {
        assert_eq!(cpu.system, before.system);
    }
    if outcome == Outcome::Done && !needs(code).fpu {
        assert_eq!(cpu.fpu, before.fpu, "{code:02x?}");
    }
    assert_eq!(length(code).is_none(), disassemble(code, 0) == "(bad)");
    outcome
}

#[test]
fn test_random_bytes_never_panic_or_half_execute() {
    let mut random = Random(0x1234_5678);
    let mut done = 0;
    for _ in 0..300_000 {
        let mut code: [u8; 15] = std::array::from_fn(|_| random.next() as u8);
        if random.below(3) == 0 {
            code[0] = 0x0f;
        }
        let length = random.below(16) as usize;
        done += u32::from(check(&mut random, &code[..length]) == Outcome::Done);
    }
    assert!(done > 50_000, "{done}");
}

#[test]
fn test_random_fpu_and_sse_bytes_never_panic_or_half_execute() {
    let mut random = Random(0x8765_4321);
    let mut unmasked = 0;
    for _ in 0..200_000 {
        let mut code: [u8; 15] = std::array::from_fn(|_| random.next() as u8);
        match random.below(3) {
            0 => code[0] = 0xd8 | code[0] & 7,
            1 => code = [&[0x0f, 0x50 | code[1] & 0xf], &code[2..]].concat().try_into().unwrap(),
            _ => code[..2].copy_from_slice(&[random.pick(&[0x66, 0xf2, 0xf3]), 0x0f]),
        }
        unmasked += u32::from(check(&mut random, &code) == Outcome::fault(19));
    }
    assert!(unmasked > 100, "{unmasked}");
}

#[test]
fn test_random_avx_bytes_never_panic_or_half_execute() {
    let mut random = Random(0xa5a5);
    let mut done = 0;
    for _ in 0..300_000 {
        let mut code: [u8; 15] = std::array::from_fn(|_| random.next() as u8);
        code[0] = 0xc4;
        code[1] = code[1] & 0xe0 | (1 + random.below(3) as u8);
        done += u32::from(check(&mut random, &code) == Outcome::Done);
    }
    assert!(done > 5_000, "{done}");
}
