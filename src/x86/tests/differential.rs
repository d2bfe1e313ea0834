//! The block engine against the slow executor: random instructions on random states, executed by both. Registers, flags,
//! memory, instruction count and what comes of it have to be equal. `UHYVE_FUZZ` is the number of rounds.

use super::machine::{CODE, DATA, PAGES, Rig};
use super::{Random, compare};
use crate::registers::{RFLAGS_IF, RSP};
use crate::x86::{CpuExit, State};

/// Memory that instructions work on.
const LENGTH: usize = 0x3000;

pub fn rounds(default: u64) -> u64 {
    std::env::var("UHYVE_FUZZ").ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

pub fn randomise(random: &mut Random, state: &mut State) {
    for register in &mut state.core.registers.general {
        *register = match random.below(4) {
            0 => random.value(),
            1 => DATA + 0xff0 + random.below(0x20),
            _ => DATA + random.below(0x2000),
        };
    }
    state.core.registers.general[RSP] = DATA + 0x1000 + 8 * random.below(16);
    state.core.registers.rflags = 2 | random.next() & 0xcd5 & !RFLAGS_IF;
    state.core.system.fs.base = DATA + random.below(64);
    state.core.xcr0 = 7;
    for vector in &mut state.core.fpu.xmm {
        *vector = random.vector();
    }
}

/// A place for code: the usual one, or one before the end of a page, across which it goes on.
fn place(random: &mut Random) -> u64 {
    if random.below(4) == 0 { CODE + 0x1000 - random.below(24) } else { CODE }
}

fn run(code: &[u8], state: &State, data: &[u8], is_slow: bool, budget: u64) -> (CpuExit, State, Vec<u8>) {
    let mut rig = Rig::new(&[]);
    rig.memory.write(state.core.registers.rip, code).unwrap();
    rig.memory.write(DATA, data).unwrap();
    rig.cpu.restore(state);
    rig.cpu.set_slow(is_slow);
    let exit = rig.cpu.run(&mut rig.board, budget);
    let mut after = vec![0; LENGTH];
    rig.memory.read(DATA, &mut after).unwrap();
    (exit, rig.cpu.snapshot(), after)
}

fn check(random: &mut Random, code: &[u8], budget: u64) {
    let mut state = Rig::new(code).cpu.snapshot();
    randomise(random, &mut state);
    state.core.registers.rip = place(random);
    let data: Vec<u8> = (0..LENGTH).map(|_| random.value() as u8).collect();
    let fast = run(code, &state, &data, false, budget);
    let slow = run(code, &state, &data, true, budget);
    let text = || crate::x86::disassemble(code, state.core.registers.rip);
    assert_eq!(fast.1.core.registers, slow.1.core.registers, "{code:02x?} {} before {}", text(), state.core.registers);
    assert_eq!(fast.0, slow.0, "{code:02x?} {}", text());
    assert!(fast.1 == slow.1, "{code:02x?} {}: {:?} {:?}", text(), fast.1, slow.1);
    assert!(fast.2 == slow.2, "{code:02x?} {}: memory differs", text());
}

#[test]
fn test_single_instructions_agree_with_the_slow_executor() {
    let mut random = Random(0x1234_5678_9abc_def1);
    for round in 0..rounds(20_000) {
        let map = compare::MAPS[(round % 2) as usize];
        let mut code = compare::instruction_bytes(&mut random, map, (round / 2) as u8);
        code.truncate(15);
        check(&mut random, &code, 1);
    }
}

#[test]
fn test_sequences_agree_with_the_slow_executor() {
    let mut random = Random(0x0fed_cba9_8765_4321);
    for _ in 0..rounds(5_000) {
        let mut code = Vec::new();
        for _ in 0..8 {
            let map = compare::MAPS[random.below(2) as usize];
            let opcode = random.next() as u8;
            let bytes = compare::instruction_bytes(&mut random, map, opcode);
            if let Some(length) = crate::x86::length(&bytes) {
                code.extend_from_slice(&bytes[..length]);
            }
        }
        let budget = 1 + random.below(12);
        check(&mut random, &code, budget);
    }
}

#[test]
fn test_arbitrary_bytes_and_states_do_no_harm() {
    let mut random = Random(0x7777_1234_5678_9abc);
    for _ in 0..rounds(2_000) {
        let code: Vec<u8> = (0..64).map(|_| random.next() as u8).collect();
        let mut rig = Rig::new(&code).with(|state| {
            randomise(&mut random, state);
            let system = &mut state.core.system;
            match random.below(12) {
                0 => system.cr0 ^= 1 << random.below(32),
                1 => system.cr4 ^= 1 << random.below(22),
                2 => system.efer ^= 1 << random.below(12),
                3 => system.cr3 = random.value(),
                4 => system.idt.base = random.value(),
                5 => system.gdt.limit = random.next() as u16,
                6 => system.tr.base = random.value(),
                7 => system.cs.selector |= 3,
                8 => state.core.registers.rip = random.value(),
                9 => state.debug[7] = random.next() & 0xffff_ffff,
                10 => system.cs.attributes ^= 1 << random.below(16),
                _ => {}
            }
        });
        for page in 0..8 {
            rig.map(page, PAGES + random.next() % 0x40_0000);
        }
        for _ in 0..4 {
            let before = rig.cpu.instructions();
            let _ = rig.cpu.run(&mut rig.board, 200);
            assert!(rig.cpu.instructions() - before <= 200);
            rig.cpu.set_halted(false);
        }
    }
}

/// A short instruction on two of four registers, of 4 or 8 bytes; now and then one that may stop a block.
pub fn common_instruction(random: &mut Random) -> Vec<u8> {
    let wide = 0x40 | (random.next() as u8 & 1) << 3;
    let (a, b) = (random.below(4) as u8, random.below(4) as u8);
    let both = 0xc0 | b << 3 | a;
    let number = random.next() as u8;
    match random.below(16) {
        0..=3 => vec![wide, 0x89, both],
        4..=6 => vec![wide, random.pick(&[0x01, 0x09, 0x11, 0x19, 0x21, 0x29, 0x31, 0x39, 0x85]), both],
        7 => vec![wide, 0x83, 0xc0 | (number & 0x38) | a, random.next() as u8],
        8 | 9 => vec![wide, 0xc1, 0xc0 | random.pick(&[0, 8, 0x20, 0x28, 0x38]) | a, number & 0x3f],
        10 => vec![wide, 0xd3, 0xc0 | random.pick(&[0, 8, 0x20, 0x28, 0x38]) | a],
        11 => vec![wide, 0x0f, random.pick(&[0xaf, 0xb6, 0xbf, 0x40 | number & 15, 0xa3, 0xbb]), both],
        12 => vec![wide, 0xff, 0xc0 | (number & 8) | a],
        13 if number & 1 == 0 => vec![wide, 0x8d, 0x40 | a << 3 | b, number],
        13 => vec![wide, 0x8d, 0x44 | a << 3, (number & 0xc0) | b, number],
        14 => vec![wide, random.pick(&[0x8b, 0x01, 0x03, 0x89]), 0x40 | a << 3 | 6, number],
        _ => {
            let rare = [
                [0x0f, 0x94, 0xc0 | a],
                [0x48, 0x0f, 0xc8 | a],
                [0x90, 0x90, 0x98],
                [0x90, 0x90, 0xf9],
                [0x90, 0x90, 0x9c],
            ];
            random.pick(&rare).to_vec()
        }
    }
}

#[test]
fn test_sequences_of_common_instructions_agree_with_the_slow_executor() {
    let mut random = Random(0x3141_5926_5358_9793);
    for _ in 0..rounds(5_000) {
        let mut code: Vec<u8> = (0..14).flat_map(|_| common_instruction(&mut random)).collect();
        // Over a HLT or not, by any condition.
        code.extend([0x70 | random.below(16) as u8, 1, 0xf4, 0x90, 0xf4]);
        check(&mut random, &code, 40);
    }
}

/// A shift or an address into a register, perhaps of a copy, and arithmetic that takes it.
fn pair(random: &mut Random) -> Vec<u8> {
    let wide = 0x40 | (random.next() as u8 & 1) << 3;
    let (made, other, from) = (random.below(4) as u8, random.below(4) as u8, random.below(4) as u8);
    let number = random.next() as u8;
    let first = match random.below(4) {
        0 => vec![wide, 0x8d, 0x40 | made << 3 | from, number],
        1 => vec![wide, 0x8d, 0x44 | made << 3, (number & 0xf8) | from, number],
        _ => vec![wide, 0xc1, 0xc0 | random.pick(&[0, 8, 0x20, 0x28, 0x38]) | made, number & 0x3f],
    };
    let copy = if random.below(2) == 0 { vec![wide, 0x89, 0xc0 | from << 3 | made] } else { Vec::new() };
    let second = vec![wide, random.pick(&[0x01, 0x09, 0x11, 0x21, 0x29, 0x31]), 0xc0 | made << 3 | other];
    let between = if random.below(8) == 0 { common_instruction(random) } else { Vec::new() };
    [copy, first, between, second].concat()
}

#[test]
fn test_pairs_of_instructions_agree_with_the_slow_executor() {
    let mut random = Random(0x1618_0339_8874_9894);
    for _ in 0..rounds(5_000) {
        let mut code: Vec<u8> = (0..5).flat_map(|_| pair(&mut random)).collect();
        code.extend([0x70 | random.below(16) as u8, 1, 0xf4, 0x90, 0xf4]);
        let budget = if random.below(4) == 0 { 1 + random.below(20) } else { 40 };
        check(&mut random, &code, budget);
    }
}

/// A shuffle or a sum of two vectors, or of one and memory at RBX, often with an immediate of 0.
fn vector_instruction(random: &mut Random) -> Vec<u8> {
    let register = (random.below(8) as u8) << 3;
    let mut operand = vec![0xc0 | register | random.below(8) as u8];
    if random.below(2) == 0 {
        operand = vec![0x43 | register, 16 * random.below(8) as u8];
    }
    let immediate = if random.below(2) == 0 { 0 } else { random.next() as u8 };
    let (opcode, has_immediate): (&[u8], bool) = match random.below(8) {
        0 => (&[0x66, 0x0f, 0x70], true),
        1 => (&[0xf2, 0x0f, 0x70], true),
        2 => (&[0xf3, 0x0f, 0x70], true),
        3 => (&[0x0f, 0xc6], true),
        4 => (&[0x66, 0x0f, 0xc6], true),
        5 => (&[0x66, 0x0f, 0xfe], false),
        6 => (&[0x66, 0x0f, 0x61], false),
        _ => (&[0x0f, 0x58], false),
    };
    let last = if has_immediate { vec![immediate] } else { Vec::new() };
    [opcode, &operand, &last].concat()
}

#[test]
fn test_sequences_of_vector_instructions_agree_with_the_slow_executor() {
    let mut random = Random(0x2718_2818_2845_9045);
    for _ in 0..rounds(2_000) {
        // mov ebx, DATA
        let mut code = [&[0xbb][..], &(DATA as u32).to_le_bytes()].concat();
        code.extend((0..12).flat_map(|_| vector_instruction(&mut random)));
        code.push(0xf4);
        check(&mut random, &code, 40);
    }
}
