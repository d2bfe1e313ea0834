//! Vector instructions that are taken apart once and called often, and what masked accesses do where they fault.

use std::time::Instant;

use super::Memory;
use crate::registers::{CR4_OSXSAVE, RAX, RDI};
use crate::x86::{CpuState, Destination, Outcome, Source, VectorCall, decode, features, step_bytes};

const BASE: u64 = 0x10_0000;

fn machine() -> (CpuState, Memory) {
    let mut cpu = CpuState::default();
    cpu.system.cr4 |= CR4_OSXSAVE;
    cpu.xcr0 = 7;
    cpu.registers.general[RAX] = BASE;
    cpu.registers.general[RDI] = BASE;
    (cpu, Memory::new(BASE, 0x1000))
}

fn call(code: &[u8]) -> VectorCall {
    VectorCall::new(&decode(code, 0).unwrap()).unwrap()
}

#[test]
fn test_vector_call_has_the_operands_of_its_instruction() {
    let paddd = call(&[0x66, 0x0f, 0xfe, 0xd1]);
    assert_eq!((paddd.destination, paddd.source), (Destination::Register(2), Source::Register(1)));
    let (function, to, immediate) = paddd.plain().unwrap();
    let (mut a, b) = (5u128, 7u128);
    let mut control = crate::x86::Control { mxcsr: 0x1f80, saved: 0, immediate: 0, third: 0 };
    // SAFETY: the references are valid, MXCSR masks all exceptions, every host has PADDD.
    unsafe { function(&raw mut a, &raw const b, &raw mut control) };
    assert_eq!((a, to, immediate), (12, 2, 0));
    let addps = call(&[0x0f, 0x58, 0x00]);
    assert_eq!(addps.source, Source::Memory { size: 16, is_aligned: true, is_signed: false });
    assert!(addps.plain().is_none());
}

#[test]
fn test_vector_call_costs_less_than_decoding() {
    let (mut cpu, _) = machine();
    let paddd = call(&[0x66, 0x0f, 0xfe, 0xc1]);
    let addps = call(&[0x0f, 0x58, 0xc1]);
    let rounds = 1_000_000u32;
    for (name, call) in [("paddd", paddd), ("addps", addps)] {
        let start = Instant::now();
        for _ in 0..rounds {
            call.run(&mut cpu, &[0; 2]).unwrap();
        }
        let each = start.elapsed() / rounds;
        println!("{name}: {each:?}");
        assert!(each.as_nanos() < 1000);
    }
}

#[test]
fn test_avx_clears_what_lies_above_its_result() {
    let (mut cpu, mut memory) = machine();
    cpu.ymm_high = [9; 16];
    // vpaddd xmm0, xmm1, xmm2; paddd xmm3, xmm2; vzeroupper
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0xc5, 0xf1, 0xfe, 0xc2]), Outcome::Done);
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0x66, 0x0f, 0xfe, 0xda]), Outcome::Done);
    assert_eq!(cpu.ymm_high[..4], [0, 9, 9, 9]);
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0xc5, 0xf8, 0x77]), Outcome::Done);
    assert_eq!(cpu.ymm_high, [0; 16]);
}

#[test]
fn test_avx_not_enabled_is_ud() {
    let vpaddd = [0xc5, 0xf1, 0xfe, 0xc2];
    let (mut cpu, mut memory) = machine();
    cpu.xcr0 = 3;
    assert_eq!(step_bytes(&mut cpu, &mut memory, &vpaddd), Outcome::fault(6));
    cpu.xcr0 = 7;
    cpu.system.cr4 &= !CR4_OSXSAVE;
    assert_eq!(step_bytes(&mut cpu, &mut memory, &vpaddd), Outcome::fault(6));
    let (mut cpu, mut memory) = machine();
    cpu.system.cr0 |= 8;
    assert_eq!(step_bytes(&mut cpu, &mut memory, &vpaddd), Outcome::fault(7));
}

#[test]
fn test_avx_alignment_matters_to_aligned_moves_alone() {
    let (mut cpu, mut memory) = machine();
    cpu.registers.general[RAX] = BASE + 16;
    // vmovaps ymm0, [rax]; vmovups ymm0, [rax]; vaddps ymm0, ymm0, [rax]; vmovaps xmm0, [rax]
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0xc5, 0xfc, 0x28, 0x00]), Outcome::fault_zero(13));
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0xc5, 0xfc, 0x10, 0x00]), Outcome::Done);
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0xc5, 0xfc, 0x58, 0x00]), Outcome::Done);
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0xc5, 0xf8, 0x28, 0x00]), Outcome::Done);
}

#[test]
fn test_masked_elements_that_are_not_selected_do_not_fault() {
    let (mut cpu, mut memory) = machine();
    cpu.registers.general[RAX] = BASE + 0xff8;
    cpu.fpu.xmm[1] = 0x8000_0000_8000_0000;
    cpu.fpu.xmm[2] = 0x4444_4444_3333_3333_2222_2222_1111_1111;
    // vmaskmovps [rax], xmm1, xmm2; vmaskmovps xmm3, xmm1, [rax]
    let store = [0xc4, 0xe2, 0x71, 0x2e, 0x10];
    assert_eq!(step_bytes(&mut cpu, &mut memory, &store), Outcome::Done);
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0xc4, 0xe2, 0x71, 0x2c, 0x18]), Outcome::Done);
    assert_eq!(cpu.fpu.xmm[3], 0x2222_2222_1111_1111);
    memory.bytes[0xff8..].fill(0);
    cpu.fpu.xmm[1] |= 1 << 127;
    assert!(matches!(step_bytes(&mut cpu, &mut memory, &store), Outcome::Fault { vector: 14, .. }));
    assert_eq!(memory.bytes[0xff8..], [0; 8]);
}

#[test]
fn test_gather_that_faults_keeps_what_it_has_and_goes_on_later() {
    let (mut cpu, mut memory) = machine();
    memory.bytes[0xffc..].copy_from_slice(&7u32.to_le_bytes());
    cpu.fpu.xmm[1] = 0x3ff | 0x400 << 32;
    cpu.fpu.xmm[2] = 0x8000_0000_8000_0000;
    // vpgatherdd xmm0, [rax+xmm1*4], xmm2
    let gather = [0xc4, 0xe2, 0x69, 0x90, 0x04, 0x88];
    assert!(matches!(step_bytes(&mut cpu, &mut memory, &gather), Outcome::Fault { vector: 14, .. }));
    assert_eq!((cpu.fpu.xmm[0], cpu.fpu.xmm[2]), (7, 0x8000_0000_0000_0000));
    cpu.fpu.xmm[1] = 0x3ff << 32;
    assert_eq!(step_bytes(&mut cpu, &mut memory, &gather), Outcome::Done);
    assert_eq!((cpu.fpu.xmm[0], cpu.fpu.xmm[2]), (7 | 7 << 32, 0));
}

#[test]
fn test_unmasked_x87_exception_is_mf_at_the_next_instruction_that_waits() {
    let (mut cpu, mut memory) = machine();
    cpu.fpu.fcw = 0x37b;
    // fld1; fldz; fdivp: a division by zero, which the guest has not masked.
    for code in [[0xd9, 0xe8], [0xd9, 0xee], [0xde, 0xf9]] {
        assert_eq!(step_bytes(&mut cpu, &mut memory, &code), Outcome::Done);
    }
    assert_eq!(cpu.fpu.fsw & 0x8084, 0x8084);
    // fnstsw ax does not wait; fld1 and fwait do.
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0xdf, 0xe0]), Outcome::Done);
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0xd9, 0xe8]), Outcome::fault(16));
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0x9b]), Outcome::fault(16));
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0x0f, 0x77]), Outcome::fault(16));
}

#[test]
fn test_features_follow_the_host() {
    let features = features();
    assert_eq!(features.structured_ebx >> 5 & 1 != 0, std::is_x86_feature_detected!("avx2"));
    assert_eq!(features.components, if std::is_x86_feature_detected!("avx") { 7 } else { 3 });
}
