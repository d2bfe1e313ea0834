//! A CPU that goes on in another's place: what it leaves alone, and that it sees what the other has changed.

use super::machine::*;
use crate::registers::{CR0_TS, RAX, RBX, RFLAGS_IF};
use crate::x86::{CpuExit, DebugOptions, Fault, State};

fn lent(code: &[u8], change: impl FnOnce(&mut State)) -> Rig {
    let mut rig = Rig::new(code).with(change);
    let state = rig.cpu.snapshot();
    rig.cpu.lend(&state);
    rig
}

#[test]
fn test_lent_cpu_leaves_foreign_instructions_before_anything_of_them_is_done() {
    let foreign: [&[u8]; 14] = [
        &[0x0f, 0x31],             // rdtsc
        &[0x0f, 0xa2],             // cpuid
        &[0x0f, 0x30],             // wrmsr
        &[0x0f, 0xc7, 0xf0],       // rdrand eax
        &[0x0f, 0x01, 0xd0],       // xgetbv
        &[0xf4],                   // hlt
        &[0x0f, 0x20, 0xc0],       // mov rax, cr0
        &[0x8e, 0xd8],             // mov ds, eax
        &[0xcc],                   // int3
        &[0x0f, 0x01, 0x3b],       // invlpg [rbx]
        &[0x48, 0x89, 0x03],       // mov [rbx], rax: a device
        &[0x48, 0x8b, 0x03],       // mov rax, [rbx]
        &[0xf0, 0x48, 0x01, 0x03], // lock add [rbx], rax
        &[0x66, 0xba, 0, 8, 0xee], // mov dx, 0x800; out dx, al: not its port
    ];
    for code in foreign {
        let mut rig = lent(&[&[0xff, 0xc1], code].concat(), |state| state.core.registers.general[RBX] = DEVICE);
        let exit = rig.run();
        let skipped = if code.len() == 5 { 6 } else { 2 };
        assert_eq!((exit, rig.rip()), (CpuExit::Foreign(None), CODE + skipped), "{code:x?}");
        assert_eq!((rig.register(RAX), rig.board.outs.len(), rig.board.msrs.len()), (0, 0, 0), "{code:x?}");
    }
}

#[test]
fn test_lent_cpu_names_exceptions_and_delivers_none() {
    // mov rax, [0x300000]
    let mut rig = lent(&[0x48, 0x8b, 0x04, 0x25, 0, 0, 0x30, 0], |_| ());
    rig.map(0x100, 0);
    let fault = Fault { vector: 14, error_code: Some(0), address: Some(0x30_0000) };
    assert_eq!((rig.run(), rig.rip()), (CpuExit::Foreign(Some(fault)), CODE));
    // sqrtpd xmm0, xmm0
    let mut rig = lent(&[0x66, 0x0f, 0x51, 0xc0], |state| state.core.system.cr0 |= CR0_TS);
    assert_eq!((rig.run(), rig.rip()), (CpuExit::Foreign(Some(Fault::plain(7))), CODE));
}

#[test]
fn test_lent_cpu_uses_its_own_ports_and_takes_no_trap() {
    // out 0x99, al; sti; in al, 0x99; pushfq; or dword [rsp], 0x100; popfq; nop
    let code = [0xe6, 0x99, 0xfb, 0xe4, 0x99, 0x9c, 0x81, 0x0c, 0x24, 0, 1, 0, 0, 0x9d, 0x90];
    let mut rig = lent(&code, |_| ());
    assert_eq!(rig.run(), CpuExit::Foreign(None));
    assert_eq!((rig.board.outs.len(), rig.register(RAX), rig.rip()), (1, 0x5a, CODE + 14));
    assert_ne!(rig.cpu.registers().rflags & RFLAGS_IF, 0);
}

#[test]
fn test_lent_cpu_executes_code_as_its_owner_has_left_it() {
    // 1: inc eax; dec ecx; jnz 1b; hlt
    let mut rig = lent(&[0xff, 0xc0, 0xff, 0xc9, 0x75, 0xfa, 0xf4], |state| state.core.registers.general[1] = 100);
    let state = rig.cpu.snapshot();
    assert_eq!((rig.run(), rig.register(RAX)), (CpuExit::Foreign(None), 100));
    // The owner makes it `dec eax`, unseen by what watches the writes of this process.
    // SAFETY: within RAM.
    unsafe { rig.memory.host_pointer().add(CODE as usize + 1).write(0xc8) };
    rig.cpu.lend(&state);
    assert_eq!((rig.run(), rig.register(RAX)), (CpuExit::Foreign(None), u64::from(100u32.wrapping_neg())));
}

#[test]
fn test_lent_cpu_leaves_a_lock_that_it_can_not_take_to_its_owner() {
    for code in [&[0xf0u8, 0x48, 0x01, 0x03][..], &[0x48, 0x87, 0x03], &[0xf0, 0x66, 0xff, 0x03]] {
        let mut rig = lent(&[code, &[0xf4]].concat(), |state| state.core.registers.general[RBX] = DATA + 61);
        assert_eq!((rig.run(), rig.rip()), (CpuExit::Foreign(None), CODE), "{code:x?}");
        let mut aligned = rig.cpu.snapshot();
        aligned.core.registers.general[RBX] = DATA + 64;
        rig.cpu.lend(&aligned);
        assert_eq!((rig.run(), rig.rip()), (CpuExit::Foreign(None), CODE + code.len() as u64), "{code:x?}");
    }
}

#[test]
fn test_lent_cpu_meets_a_breakpoint_and_executes_what_it_covers() {
    // int3, where `inc eax` was; dec ecx; jnz to the int3; hlt
    let mut rig = lent(&[0xcc, 0xc0, 0xff, 0xc9, 0x75, 0xfa, 0xf4], |state| state.core.registers.general[1] = 100);
    rig.cpu.set_debug(DebugOptions { breakpoints: vec![CODE], ..DebugOptions::default() });
    let mut hits = 0;
    while rig.run() == CpuExit::Breakpoint {
        assert_eq!(rig.rip(), CODE);
        assert_eq!(rig.cpu.execute_covered(&[0xff, 0xc0, 0xff, 0xc9, 0x75]), None);
        hits += 1;
    }
    assert_eq!((hits, rig.register(RAX), rig.rip()), (100, 100, CODE + 6));
    // Every instruction counts once: 100 times three.
    assert_eq!(rig.cpu.instructions(), 300);
}

#[test]
fn test_lent_cpu_leaves_a_covered_instruction_that_faults_or_is_foreign() {
    let mut rig = lent(&[0xcc], |_| ());
    rig.map(0x100, 0);
    assert_eq!(rig.cpu.execute_covered(&[0x0f, 0xa2]), Some(CpuExit::Foreign(None)));
    let fault = Fault { vector: 14, error_code: Some(0), address: Some(0x30_0000) };
    let load = [0x48, 0x8b, 0x04, 0x25, 0, 0, 0x30, 0];
    assert_eq!(rig.cpu.execute_covered(&load), Some(CpuExit::Foreign(Some(fault))));
    assert_eq!(rig.rip(), CODE);
}
