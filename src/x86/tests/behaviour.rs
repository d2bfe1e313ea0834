//! What the host can't be asked as an unprivileged process: faults, control flow, repeated strings, locked forms, state
//! images, and the text of instructions.

use super::Memory;
use crate::registers::{CR0_TS, CR4_OSFXSR, CR4_OSXSAVE, FpuState, RAX, RBX, RCX, RDI, RDX, RSI, RSP};
use crate::x86::{Bus as _, CpuState, Needs, Outcome, disassemble, length, needs, step, step_bytes};

const BASE: u64 = 0x10_0000;

fn machine() -> (CpuState, Memory) {
    let mut cpu = CpuState::default();
    cpu.registers.rip = 0x40_0000;
    cpu.registers.general[RSP] = BASE + 0x800;
    (cpu, Memory::new(BASE, 0x2000))
}

fn gp() -> Outcome {
    Outcome::fault_zero(13)
}

fn put(memory: &mut Memory, address: u64, bytes: &[u8]) {
    memory.write(address, bytes).unwrap();
}

fn get(memory: &mut Memory, address: u64) -> u64 {
    let mut bytes = [0; 8];
    memory.read(address, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

#[test]
fn test_step_fetches_at_rip_and_advances() {
    let (mut cpu, mut memory) = machine();
    memory.code = vec![0x48, 0xff, 0xc0];
    assert_eq!(step(&mut cpu, &mut memory), Outcome::Done);
    assert_eq!((cpu.registers.rip, cpu.registers.general[RAX]), (0x40_0003, 1));
    memory.code.clear();
    assert_eq!(step(&mut cpu, &mut memory), Outcome::Unsupported);
}

#[test]
fn test_push_call_ret_pop_move_the_stack() {
    let (mut cpu, mut memory) = machine();
    cpu.registers.general[RAX] = 0x1122_3344_5566_7788;
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0x50]), Outcome::Done);
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0xe8, 0x10, 0, 0, 0]), Outcome::Done);
    assert_eq!((cpu.registers.rip, cpu.registers.general[RSP]), (0x40_0016, BASE + 0x7f0));
    assert_eq!(get(&mut memory, BASE + 0x7f0), 0x40_0006);
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0xc2, 8, 0]), Outcome::Done);
    assert_eq!((cpu.registers.rip, cpu.registers.general[RSP]), (0x40_0006, BASE + 0x800));
    // push imm8 (sign-extended), push word, pop [rsp+8] with the incremented RSP as base
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0x6a, 0xff]), Outcome::Done);
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0x8f, 0x44, 0x24, 0x08]), Outcome::Done);
    assert_eq!(get(&mut memory, BASE + 0x808), u64::MAX);
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0x66, 0x50]), Outcome::Done);
    assert_eq!(cpu.registers.general[RSP], BASE + 0x7fe);
}

#[test]
fn test_jumps_follow_conditions_and_counters() {
    let (mut cpu, mut memory) = machine();
    cpu.registers.rflags = 0x42;
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0x74, 0xfe]), Outcome::Done);
    assert_eq!(cpu.registers.rip, 0x40_0000);
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0x0f, 0x85, 0, 1, 0, 0]), Outcome::Done);
    assert_eq!(cpu.registers.rip, 0x40_0006);
    cpu.registers.general[RCX] = 1;
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0xe2, 0x10]), Outcome::Done);
    assert_eq!((cpu.registers.rip, cpu.registers.general[RCX]), (0x40_0008, 0));
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0xe3, 0x10]), Outcome::Done);
    assert_eq!(cpu.registers.rip, 0x40_001a);
    cpu.registers.general[RAX] = 1 << 60;
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0xff, 0xe0]), gp());
    assert_eq!(cpu.registers.rip, 0x40_001a);
}

#[test]
fn test_faults_name_vector_code_and_address() {
    let (mut cpu, mut memory) = machine();
    let fault = |vector, address| Outcome::Fault { vector, error_code: Some(2), address: Some(address) };
    cpu.registers.general[RAX] = 0x5000;
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0x48, 0x89, 0x18]), fault(14, 0x5000));
    cpu.registers.general[RAX] = 1 << 63;
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0x48, 0x8b, 0x18]), gp());
    cpu.registers.general[RSP] = 1 << 63;
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0x50]), Outcome::fault_zero(12));
    // div ecx by zero; idiv with INT_MIN / -1; ud2; lock on a register
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0xf7, 0xf1]), Outcome::fault(0));
    cpu.registers.general[RDX] = 1 << 63;
    cpu.registers.general[RAX] = 0;
    cpu.registers.general[RCX] = u64::MAX;
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0x48, 0xf7, 0xf9]), Outcome::fault(0));
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0xf0, 0x48, 0x01, 0xd8]), Outcome::fault(6));
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0x66; 15]), gp());
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0xf4]), Outcome::Unsupported);
    cpu.system.cs.attributes = 0;
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0x90]), Outcome::Unsupported);
}

#[test]
fn test_sse_disabled_or_misaligned_faults() {
    let (mut cpu, mut memory) = machine();
    let xorps = [0x0f, 0x57, 0x00];
    cpu.registers.general[RAX] = BASE + 8;
    assert_eq!(step_bytes(&mut cpu, &mut memory, &xorps), gp());
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0x0f, 0x10, 0x00]), Outcome::Done);
    cpu.system.cr0 |= CR0_TS;
    assert_eq!(step_bytes(&mut cpu, &mut memory, &xorps), Outcome::fault(7));
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0xd9, 0xee]), Outcome::fault(7));
    cpu.system.cr4 &= !CR4_OSFXSR;
    assert_eq!(step_bytes(&mut cpu, &mut memory, &xorps), Outcome::fault(6));
    // vaddps ymm0, ymm0, ymm0, before XCR0 enables AVX
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0xc5, 0xfc, 0x58, 0xc0]), Outcome::fault(6));
}

#[test]
fn test_unmasked_exception_is_xm_and_leaves_the_register() {
    let (mut cpu, mut memory) = machine();
    cpu.system.cr4 |= 1 << 10;
    cpu.fpu.mxcsr = 0x1f80 & !(1 << 9);
    cpu.fpu.xmm[0] = u128::from(1f64.to_bits());
    let divsd = [0xf2, 0x0f, 0x5e, 0xc1];
    assert_eq!(step_bytes(&mut cpu, &mut memory, &divsd), Outcome::fault(19));
    assert_eq!((cpu.fpu.xmm[0], cpu.fpu.mxcsr & 0x3f), (u128::from(1f64.to_bits()), 4));
    cpu.fpu.mxcsr = 0x1f80;
    assert_eq!(step_bytes(&mut cpu, &mut memory, &divsd), Outcome::Done);
    assert_eq!((cpu.fpu.xmm[0], cpu.fpu.mxcsr), (u128::from(f64::INFINITY.to_bits()), 0x1f84));
}

#[test]
fn test_rep_movs_continues_in_chunks_and_stops_before_a_fault() {
    let (mut cpu, mut memory) = machine();
    let source: Vec<u8> = (0..0x1000u32).map(|i| (i * 7) as u8).collect();
    put(&mut memory, BASE, &source);
    (cpu.registers.general[RSI], cpu.registers.general[RDI]) = (BASE, BASE + 0x1800);
    cpu.registers.general[RCX] = 0x1000;
    let movsb = [0xf3, 0xa4];
    while step_bytes(&mut cpu, &mut memory, &movsb) == Outcome::Repeat {
        assert_eq!(cpu.registers.rip, 0x40_0000);
    }
    assert_eq!((cpu.registers.general[RCX], cpu.registers.general[RDI]), (0x800, BASE + 0x2000));
    assert_eq!(memory.bytes[0x1800..], source[..0x800]);
    let fault = Outcome::Fault { vector: 14, error_code: Some(2), address: Some(BASE + 0x2000) };
    assert_eq!(step_bytes(&mut cpu, &mut memory, &movsb), fault);
}

#[test]
fn test_rep_movs_overlapping_repeats_the_pattern() {
    let (mut cpu, mut memory) = machine();
    put(&mut memory, BASE, b"abc");
    (cpu.registers.general[RSI], cpu.registers.general[RDI]) = (BASE, BASE + 3);
    cpu.registers.general[RCX] = 9;
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0xf3, 0xa4]), Outcome::Done);
    assert_eq!(&memory.bytes[..12], b"abcabcabcabc");
    assert_eq!(cpu.registers.rip, 0x40_0002);
}

#[test]
fn test_rep_movs_backward_and_stos_wide() {
    let (mut cpu, mut memory) = machine();
    put(&mut memory, BASE, b"abcdef");
    cpu.registers.rflags |= 1 << 10;
    (cpu.registers.general[RSI], cpu.registers.general[RDI]) = (BASE + 5, BASE + 7);
    cpu.registers.general[RCX] = 6;
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0xf3, 0xa4]), Outcome::Done);
    assert_eq!(&memory.bytes[..8], b"ababcdef");
    cpu.registers.rflags = 2;
    cpu.registers.general[RAX] = 0x0102_0304_0506_0708;
    (cpu.registers.general[RDI], cpu.registers.general[RCX]) = (BASE + 1, 100);
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0xf3, 0x48, 0xab]), Outcome::Done);
    assert_eq!(memory.bytes[1..801], 0x0102_0304_0506_0708u64.to_le_bytes().repeat(100));
}

#[test]
fn test_repne_scas_and_repe_cmps_stop_at_the_answer() {
    let (mut cpu, mut memory) = machine();
    put(&mut memory, BASE, b"hello\0");
    put(&mut memory, BASE + 64, b"help");
    (cpu.registers.general[RDI], cpu.registers.general[RCX]) = (BASE, u64::MAX);
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0xf2, 0xae]), Outcome::Done);
    assert_eq!((cpu.registers.general[RDI], cpu.registers.rflags & 0x40), (BASE + 6, 0x40));
    (cpu.registers.general[RSI], cpu.registers.general[RDI]) = (BASE, BASE + 64);
    cpu.registers.general[RCX] = 4;
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0xf3, 0xa6]), Outcome::Done);
    assert_eq!((cpu.registers.general[RCX], cpu.registers.rflags & 0x40), (0, 0));
    assert_eq!(cpu.registers.general[RSI], BASE + 4);
}

#[test]
fn test_locked_forms_exchange_atomically() {
    let (mut cpu, mut memory) = machine();
    put(&mut memory, BASE, &41u64.to_le_bytes());
    cpu.registers.general[RBX] = BASE;
    cpu.registers.general[RCX] = 1;
    // lock xadd [rbx], rcx; lock inc qword [rbx]; xchg [rbx], rcx
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0xf0, 0x48, 0x0f, 0xc1, 0x0b]), Outcome::Done);
    assert_eq!((get(&mut memory, BASE), cpu.registers.general[RCX]), (42, 41));
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0xf0, 0x48, 0xff, 0x03]), Outcome::Done);
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0x48, 0x87, 0x0b]), Outcome::Done);
    assert_eq!((get(&mut memory, BASE), cpu.registers.general[RCX]), (41, 43));
    // lock cmpxchg16b [rsi]
    cpu.registers.general[RSI] = BASE + 16;
    (cpu.registers.general[RAX], cpu.registers.general[RDX]) = (0, 0);
    let cmpxchg16b = [0xf0, 0x48, 0x0f, 0xc7, 0x0e];
    assert_eq!(step_bytes(&mut cpu, &mut memory, &cmpxchg16b), Outcome::Done);
    assert_eq!((get(&mut memory, BASE + 16), get(&mut memory, BASE + 24)), (BASE, 43));
    assert_eq!(step_bytes(&mut cpu, &mut memory, &cmpxchg16b), Outcome::Done);
    assert_eq!((cpu.registers.general[RAX], cpu.registers.rflags & 0x40), (BASE, 0));
    cpu.registers.general[RSI] = BASE + 8;
    assert_eq!(step_bytes(&mut cpu, &mut memory, &cmpxchg16b), gp());
}

/// A state in which every component is in use.
fn full_state() -> (CpuState, Memory) {
    let (mut cpu, memory) = machine();
    cpu.system.cr4 |= CR4_OSXSAVE;
    cpu.xcr0 = 7;
    cpu.fpu.xmm = std::array::from_fn(|i| 0x1111 * (i as u128 + 1));
    cpu.fpu.mxcsr = 0x7f80;
    cpu.ymm_high = std::array::from_fn(|i| 0x2222 << i);
    cpu.registers.general[RSI] = BASE + 0x400;
    cpu.registers.general[RAX] = u64::MAX;
    cpu.registers.general[RDX] = u64::MAX;
    (cpu, memory)
}

#[test]
fn test_xsave_forms_round_trip_through_xrstor() {
    // xsave64, xsaveopt64, xsavec64, xsave [rsi]
    let saves: [&[u8]; 4] =
        [&[0x48, 0x0f, 0xae, 0x26], &[0x48, 0x0f, 0xae, 0x36], &[0x48, 0x0f, 0xc7, 0x26], &[0x0f, 0xae, 0x26]];
    for save in saves {
        let (mut cpu, mut memory) = full_state();
        for x87 in [&[0xd9, 0xeb], &[0xd9, 0xe8]] {
            assert_eq!(step_bytes(&mut cpu, &mut memory, x87), Outcome::Done);
        }
        cpu.fpu.fip = 0;
        let saved = (cpu.fpu, cpu.ymm_high);
        assert_eq!(step_bytes(&mut cpu, &mut memory, save), Outcome::Done);
        assert_eq!(get(&mut memory, BASE + 0x600), 7);
        (cpu.fpu, cpu.ymm_high) = (FpuState::default(), [1; 16]);
        assert_eq!(step_bytes(&mut cpu, &mut memory, &[0x48, 0x0f, 0xae, 0x2e]), Outcome::Done);
        assert_eq!((cpu.fpu, cpu.ymm_high), saved, "{save:02x?}");
    }
}

#[test]
fn test_xrstor_initialises_absent_components_and_checks_the_header() {
    let (mut cpu, mut memory) = full_state();
    let xrstor = [0x48, 0x0f, 0xae, 0x2e];
    // An empty standard header: all components initial, MXCSR from memory.
    put(&mut memory, BASE + 0x400 + 24, &0x1fa0u32.to_le_bytes());
    assert_eq!(step_bytes(&mut cpu, &mut memory, &xrstor), Outcome::Done);
    assert_eq!((cpu.fpu, cpu.ymm_high), (FpuState { mxcsr: 0x1fa0, ..FpuState::default() }, [0; 16]));
    put(&mut memory, BASE + 0x600, &8u64.to_le_bytes());
    assert_eq!(step_bytes(&mut cpu, &mut memory, &xrstor), gp());
    put(&mut memory, BASE + 0x600, &0u64.to_le_bytes());
    put(&mut memory, BASE + 0x400 + 24, &0x1_1f80u32.to_le_bytes());
    assert_eq!(step_bytes(&mut cpu, &mut memory, &xrstor), gp());
    cpu.registers.general[RSI] += 16;
    assert_eq!(step_bytes(&mut cpu, &mut memory, &xrstor), gp());
    cpu.system.cr4 &= !CR4_OSXSAVE;
    assert_eq!(step_bytes(&mut cpu, &mut memory, &xrstor), Outcome::fault(6));
}

#[test]
fn test_xsave_leaves_other_components_alone() {
    let (mut cpu, mut memory) = full_state();
    memory.bytes[0x400..0x600].fill(0xaa);
    put(&mut memory, BASE + 0x600, &5u64.to_le_bytes());
    cpu.registers.general[RAX] = 2;
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0x48, 0x0f, 0xae, 0x26]), Outcome::Done);
    assert_eq!(get(&mut memory, BASE + 0x600), 7);
    assert!(memory.bytes[0x400..0x418].iter().all(|byte| *byte == 0xaa));
    assert!(memory.bytes[0x420..0x4a0].iter().all(|byte| *byte == 0xaa));
    assert_eq!(get(&mut memory, BASE + 0x400 + 160), 0x1111);
}

#[test]
fn test_fxsave_round_trips_through_fxrstor() {
    let (mut cpu, mut memory) = full_state();
    let saved = cpu.fpu;
    memory.bytes[0x400 + 416..0x600].fill(0x55);
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0x48, 0x0f, 0xae, 0x06]), Outcome::Done);
    assert_eq!(memory.bytes[0x400 + 416], 0x55);
    cpu.fpu = FpuState::default();
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0x48, 0x0f, 0xae, 0x0e]), Outcome::Done);
    assert_eq!(cpu.fpu, saved);
}

#[test]
fn test_fnsave_initialises_and_frstor_brings_back() {
    let (mut cpu, mut memory) = full_state();
    for code in [[0xd9, 0xeb], [0xd9, 0xe8], [0xd9, 0xee]] {
        assert_eq!(step_bytes(&mut cpu, &mut memory, &code), Outcome::Done);
    }
    let saved = cpu.fpu;
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0xdd, 0x36]), Outcome::Done);
    assert_eq!((cpu.fpu.ftw, cpu.fpu.fcw, cpu.fpu.fsw), (0, 0x37f, 0));
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0xdd, 0x26]), Outcome::Done);
    assert_eq!(cpu.fpu, FpuState { fop: saved.fop, ..saved });
}

#[test]
fn test_pending_x87_exception_is_mf() {
    let (mut cpu, mut memory) = machine();
    cpu.system.cr0 |= 1 << 5;
    cpu.fpu.fsw = 4;
    cpu.registers.general[RSI] = BASE;
    // fldcw unmasks the divide error that the status word holds.
    put(&mut memory, BASE, &0x37bu16.to_le_bytes());
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0xd9, 0x2e]), Outcome::Done);
    assert_eq!(cpu.fpu.fsw, 0x8084);
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0xd9, 0xe8]), Outcome::fault(16));
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0x9b]), Outcome::fault(16));
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0xdb, 0xe2]), Outcome::Done);
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0xd9, 0xe8]), Outcome::Done);
}

#[test]
fn test_system_readers_answer_from_the_state() {
    let (mut cpu, mut memory) = full_state();
    cpu.registers.general[RCX] = 0;
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0x0f, 0x01, 0xd0]), Outcome::Done);
    assert_eq!((cpu.registers.general[RAX], cpu.registers.general[RDX]), (7, 0));
    cpu.registers.general[RCX] = 5;
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0x0f, 0x01, 0xd0]), gp());
    cpu.tsc_aux = 9;
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0x0f, 0x01, 0xf9]), Outcome::Done);
    assert_eq!(cpu.registers.general[RAX..=RDX], [0x9abc_def0, 9, 0x1234_5678]);
    // wrfsbase rax, then mov rcx, fs:[0]
    cpu.system.cr4 |= 1 << 16;
    cpu.registers.general[RAX] = BASE;
    put(&mut memory, BASE, &77u64.to_le_bytes());
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0xf3, 0x48, 0x0f, 0xae, 0xd0]), Outcome::Done);
    let load = [0x64, 0x48, 0x8b, 0x0c, 0x25, 0, 0, 0, 0];
    assert_eq!(step_bytes(&mut cpu, &mut memory, &load), Outcome::Done);
    assert_eq!(cpu.registers.general[RCX], 77);
}

#[test]
fn test_address_size_and_rip_relative() {
    let (mut cpu, mut memory) = machine();
    cpu.registers.general[RBX] = 0xffff_ffff_0000_0000 | BASE;
    put(&mut memory, BASE, &5u64.to_le_bytes());
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0x67, 0x48, 0x8b, 0x03]), Outcome::Done);
    assert_eq!(cpu.registers.general[RAX], 5);
    cpu.registers.rip = BASE - 0x17;
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0x8b, 0x0d, 0x11, 0, 0, 0]), Outcome::Done);
    assert_eq!(cpu.registers.general[RCX], 5);
    // mov eax, moffs with and without the address-size prefix
    let moffs = [0xa1, 0, 0, 0x10, 0, 0, 0, 0, 0];
    assert_eq!(step_bytes(&mut cpu, &mut memory, &moffs), Outcome::Done);
    assert_eq!(step_bytes(&mut cpu, &mut memory, &[0x67, 0xa1, 0, 0, 0x10, 0]), Outcome::Done);
    assert_eq!(cpu.registers.general[RAX], 5);
}

#[test]
fn test_needs_and_text_of_instructions() {
    assert_eq!(needs(&[0x50]), Needs::default());
    assert_eq!(needs(&[0x48, 0x89, 0xe5]), Needs::default());
    assert_eq!(needs(&[0x0f, 0x57, 0xc0]), Needs { fpu: true, system: true, writes_system: false });
    assert_eq!(needs(&[0xf3, 0x0f, 0xb8, 0xc0]), Needs::default());
    assert!(needs(&[0xd9, 0xe8]).fpu && needs(&[0x0f, 0xae, 0x26]).fpu);
    assert!(needs(&[0x64, 0x8b, 0x00]).system && needs(&[0x0f, 0x01, 0xd0]).system);
    assert!(needs(&[0xf3, 0x48, 0x0f, 0xae, 0xd0]).writes_system);
    assert_eq!(disassemble(&[0x48, 0x8b, 0x05, 0x10, 0, 0, 0], 0x1000), "mov rax, [0x1017]");
    assert_eq!(disassemble(&[0xeb, 0xfe], 0x1000), "jmp short 0x1000");
    assert_eq!(disassemble(&[0x06], 0), "(bad)");
    assert_eq!((length(&[0x48, 0x89, 0xe5, 0x90]), length(&[0x48])), (Some(3), None));
}
