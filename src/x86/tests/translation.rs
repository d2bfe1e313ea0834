//! Cached translations: what INVLPG has to drop, whatever has been done with the page before.

use super::machine::{PAGES, Rig, TABLE};
use crate::registers::{RAX, RBX, RCX, RDI, RDX, RSI};
use crate::x86::CpuExit;
use crate::x86::mmu::ENTRIES;

/// Page-table entry: present, writable, user.
const ALL: u64 = 7;
/// The entry of the page directory that leads to [`TABLE`].
const DIRECTORY_ENTRY: u64 = 0x3008;

/// `code` with RSI at the first page, which `mov [rdi], rdx` maps anew.
fn remapping(code: &[u8], entry_at: u64, entry: u64) -> Rig {
    Rig::new(code).with(|state| {
        let general = &mut state.core.registers.general;
        (general[RSI], general[RDI], general[RDX]) = (PAGES, entry_at, entry);
    })
}

#[test]
fn test_invlpg_drops_the_translation_of_data() {
    let code = [0x48, 0x8b, 0x06, 0x48, 0x89, 0x17, 0x0f, 0x01, 0x3e, 0x48, 0x8b, 0x1e, 0xf4];
    let mut rig = remapping(&code, TABLE, (PAGES + 0x1000) | ALL);
    rig.memory.write_object(PAGES, 1u64).unwrap();
    rig.memory.write_object(PAGES + 0x1000, 2u64).unwrap();
    assert_eq!(rig.run(), CpuExit::Halted);
    assert_eq!((rig.register(RAX), rig.register(RBX)), (1, 2));
}

#[test]
fn test_invlpg_drops_the_translation_of_code_and_what_was_decoded_there() {
    // call rsi; mov ecx, eax; mov [rdi], rdx; invlpg [rsi]; call rsi; hlt
    let code = [0xff, 0xd6, 0x89, 0xc1, 0x48, 0x89, 0x17, 0x0f, 0x01, 0x3e, 0xff, 0xd6, 0xf4];
    let mut rig = remapping(&code, TABLE, (PAGES + 0x1000) | ALL);
    rig.memory.write(PAGES, &[0xb8, 1, 0, 0, 0, 0xc3]).unwrap();
    rig.memory.write(PAGES + 0x1000, &[0xb8, 2, 0, 0, 0, 0xc3]).unwrap();
    assert_eq!(rig.run(), CpuExit::Halted);
    assert_eq!((rig.register(RCX), rig.register(RAX)), (1, 2));
}

#[test]
fn test_invlpg_drops_all_of_a_large_page() {
    // mov rax, [rsi + 0x5000]; mov [rdi], rdx; invlpg [rsi]; mov rbx, [rsi + 0x5000]; hlt
    let load = [0x50, 0, 0];
    let code =
        [&[0x48, 0x8b, 0x86, 0][..], &load, &[0x48, 0x89, 0x17, 0x0f, 0x01, 0x3e, 0x48, 0x8b, 0x9e, 0], &load, &[0xf4]];
    let mut rig = remapping(&code.concat(), DIRECTORY_ENTRY, TABLE | ALL);
    rig.memory.write_object(DIRECTORY_ENTRY, PAGES | ALL | 1 << 7).unwrap();
    rig.map(5, (PAGES + 0x6000) | ALL);
    rig.memory.write_object(PAGES + 0x5000, 1u64).unwrap();
    rig.memory.write_object(PAGES + 0x6000, 2u64).unwrap();
    assert_eq!(rig.run(), CpuExit::Halted);
    assert_eq!((rig.register(RAX), rig.register(RBX)), (1, 2));
}

#[test]
fn test_pause_lets_the_machine_give_the_turn_away() {
    let mut rig = Rig::new(&[0xf3, 0x90, 0xf4]);
    let start = rig.rip();
    rig.board.leave = true;
    assert_eq!(rig.run(), CpuExit::Platform);
    assert_eq!((rig.rip(), rig.cpu.instructions()), (start + 2, 1));
    assert_eq!(rig.run(), CpuExit::Halted);
}

/// A page whose number has the same low bits as that of [`PAGES`], at another physical page.
fn twin(rig: &Rig) -> u64 {
    let (twin, table) = (PAGES + (ENTRIES as u64) * 0x1000, 0xc000);
    rig.memory.write_object(DIRECTORY_ENTRY + 8 * (twin - PAGES) / (2 << 20), table | ALL).unwrap();
    rig.memory.write_object(table, (PAGES + 0x2000) | ALL).unwrap();
    twin
}

#[test]
fn test_invlpg_drops_a_translation_that_another_has_displaced() {
    // mov rax, [rsi]; mov rcx, [rbx]; mov [rdi], rdx; invlpg [rsi]; mov rbx, [rsi]; hlt
    let code = [0x48, 0x8b, 0x06, 0x48, 0x8b, 0x0b, 0x48, 0x89, 0x17, 0x0f, 0x01, 0x3e, 0x48, 0x8b, 0x1e, 0xf4];
    let rig = remapping(&code, TABLE, (PAGES + 0x1000) | ALL);
    let twin = twin(&rig);
    let mut rig = rig.with(|state| state.core.registers.general[RBX] = twin);
    for page in 0..3u64 {
        rig.memory.write_object(PAGES + 0x1000 * page, page + 1).unwrap();
    }
    assert_eq!(rig.run(), CpuExit::Halted);
    assert_eq!((rig.register(RAX), rig.register(RCX), rig.register(RBX)), (1, 3, 2));
}

#[test]
fn test_pages_that_displace_each_other_keep_what_they_may() {
    // mov [rsi], rax; mov rcx, [rbx]; call rsi; mov rcx, [rbx]; mov [rsi], rdx; call rsi; hlt
    let code = [0x48, 0x89, 0x06, 0x48, 0x8b, 0x0b, 0xff, 0xd6, 0x48, 0x8b, 0x0b, 0x48, 0x89, 0x16, 0xff, 0xd6, 0xf4];
    let returning = |value: u8| u64::from_le_bytes([0xb8, value, 0, 0, 0, 0xc3, 0, 0]);
    let rig = remapping(&code, TABLE, returning(2));
    let twin = twin(&rig);
    let mut rig = rig.with(|state| {
        (state.core.registers.general[RBX], state.core.registers.general[RAX]) = (twin, returning(1));
    });
    assert_eq!(rig.run(), CpuExit::Halted);
    assert_eq!(rig.register(RAX), 2);
}
