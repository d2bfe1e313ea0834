//! An instruction that begins in one page and ends in the next: decoded once, and anew when either page changes.

use super::machine::{PAGES, Rig, TABLE};
use crate::registers::{RAX, RBX, RCX, RDI, RDX, RSI};
use crate::x86::{CpuExit, DebugOptions};

/// Where `mov eax, 1; ret` stands: two bytes of it before the end of a page.
const FUNCTION: u64 = PAGES + 0xffe;
/// The page where it goes on.
const NEXT: u64 = PAGES + 0x1000;

/// `code`, which calls the function by RSI.
fn calling(code: &[u8], rdi: u64, rdx: u64) -> Rig {
    let rig = Rig::new(code).with(|state| {
        let general = &mut state.core.registers.general;
        (general[RSI], general[RDI], general[RDX], general[RBX]) = (FUNCTION, rdi, rdx, NEXT);
    });
    rig.memory.write(FUNCTION, &[0xb8, 1, 0, 0, 0, 0xc3]).unwrap();
    rig
}

fn stopping_at(addresses: &[u64]) -> DebugOptions {
    DebugOptions { breakpoints: addresses.to_vec(), ..DebugOptions::default() }
}

#[test]
fn test_instruction_across_pages_executes_as_often_as_it_is_called() {
    // again: call rsi; add rcx, rax; dec edx; jnz again; hlt
    let mut rig = calling(&[0xff, 0xd6, 0x48, 0x01, 0xc1, 0xff, 0xca, 0x75, 0xf7, 0xf4], 0, 500);
    assert_eq!(rig.run(), CpuExit::Halted);
    assert_eq!((rig.register(RCX), rig.cpu.instructions()), (500, 500 * 6 + 1));
}

#[test]
fn test_write_to_the_second_page_changes_the_instruction() {
    // call rsi; mov ecx, eax; mov [rdi], dl; call rsi; hlt
    let mut rig = calling(&[0xff, 0xd6, 0x89, 0xc1, 0x88, 0x17, 0xff, 0xd6, 0xf4], NEXT, 2);
    assert_eq!(rig.run(), CpuExit::Halted);
    assert_eq!((rig.register(RCX), rig.register(RAX)), (1, 0x201));
}

#[test]
fn test_write_to_the_first_page_changes_the_instruction() {
    let mut rig = calling(&[0xff, 0xd6, 0x89, 0xc1, 0x88, 0x17, 0xff, 0xd6, 0xf4], FUNCTION + 1, 2);
    assert_eq!(rig.run(), CpuExit::Halted);
    assert_eq!((rig.register(RCX), rig.register(RAX)), (1, 2));
}

#[test]
fn test_invlpg_of_the_second_page_changes_the_instruction() {
    // call rsi; mov ecx, eax; mov [rdi], rdx; invlpg [rbx]; call rsi; hlt
    let code = [0xff, 0xd6, 0x89, 0xc1, 0x48, 0x89, 0x17, 0x0f, 0x01, 0x3b, 0xff, 0xd6, 0xf4];
    let mut rig = calling(&code, TABLE + 8, (PAGES + 0x2000) | 7);
    rig.memory.write(PAGES + 0x2000, &[3, 0, 0, 0xc3]).unwrap();
    assert_eq!(rig.run(), CpuExit::Halted);
    assert_eq!((rig.register(RCX), rig.register(RAX)), (1, 0x301));
}

#[test]
fn test_missing_second_page_faults_at_its_address() {
    let mut rig = calling(&[0xff, 0xd6, 0xf4], 0, 0);
    rig.map(1, 0);
    assert_eq!(rig.run(), CpuExit::Halted);
    assert_eq!((rig.vector(), rig.pushed(1), rig.cpu.snapshot().core.system.cr2), (14, FUNCTION, NEXT));
}

#[test]
fn test_breakpoint_in_the_second_page_is_no_part_of_the_instruction() {
    let mut rig = calling(&[0xff, 0xd6, 0xff, 0xd6, 0xf4], 0, 0);
    rig.cpu.set_debug(stopping_at(&[NEXT + 3]));
    assert_eq!(rig.run(), CpuExit::Breakpoint);
    assert_eq!((rig.rip(), rig.register(RAX)), (NEXT + 3, 1));
    rig.cpu.set_debug(stopping_at(&[FUNCTION]));
    assert_eq!(rig.run(), CpuExit::Breakpoint);
    assert_eq!(rig.rip(), FUNCTION);
    rig.cpu.set_debug(stopping_at(&[]));
    assert_eq!(rig.run(), CpuExit::Halted);
}
