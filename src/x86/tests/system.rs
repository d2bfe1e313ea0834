//! The whole CPU on small programs: exceptions and their frames, interrupts, rings, devices, code that changes, and what
//! a debugger looks out for.

use super::machine::*;
use crate::registers::{RAX, RBX, RCX, RDI, RDX, RFLAGS_IF, RSP};
use crate::x86::{CpuExit, DebugOptions, Fault, Missing, WatchKind, Watchpoint};

#[test]
fn test_program_runs_to_hlt_with_an_exact_count() {
    // mov ecx, 10; xor eax, eax; 1: add eax, ecx; dec ecx; jnz 1b; hlt
    let mut rig = Rig::new(&[0xb9, 10, 0, 0, 0, 0x31, 0xc0, 0x01, 0xc8, 0xff, 0xc9, 0x75, 0xfa, 0xf4]);
    assert_eq!(rig.run(), CpuExit::Halted);
    assert_eq!((rig.register(RAX), rig.cpu.instructions()), (55, 2 + 3 * 10 + 1));
    assert_eq!(rig.run(), CpuExit::Halted);
    assert_eq!(rig.cpu.instructions(), 33);
}

#[test]
fn test_budget_is_exact_to_the_instruction() {
    for budget in 1..33 {
        let mut rig = Rig::new(&[0xb9, 10, 0, 0, 0, 0x31, 0xc0, 0x01, 0xc8, 0xff, 0xc9, 0x75, 0xfa, 0xf4]);
        assert_eq!(rig.cpu.run(&mut rig.board, budget), CpuExit::Budget);
        assert_eq!(rig.cpu.instructions(), budget);
        let rest = rig.cpu.run(&mut rig.board, 100);
        assert_eq!((rest, rig.register(RAX), rig.cpu.instructions()), (CpuExit::Halted, 55, 33));
    }
}

#[test]
fn test_page_fault_pushes_code_and_sets_cr2() {
    // mov rax, [0x300000 + rbx]
    let mut rig = Rig::new(&[0x48, 0x8b, 0x83, 0, 0, 0x30, 0, 0xf4]);
    rig.map(0x100, 0);
    assert_eq!(rig.run(), CpuExit::Halted);
    assert_eq!((rig.vector(), rig.cpu.system_registers().cr2), (14, 0x30_0000));
    let frame = [0, 1, 2, 3, 4, 5].map(|i| rig.pushed(i));
    assert_eq!(frame[..3], [0, CODE, CODE0.into()]);
    assert_eq!(frame[4..], [STACK, DATA0.into()]);
    assert_eq!(rig.cpu.instructions(), 1);
}

#[test]
fn test_page_permissions_give_the_manuals_error_codes() {
    // The page, the instruction (at rbx = the page), ring 3?, the error code.
    let read: &[u8] = &[0x48, 0x8b, 0x03];
    let write: &[u8] = &[0x48, 0x89, 0x03];
    let jump: &[u8] = &[0xff, 0xe3];
    let present = 0x30_0000 | 1;
    let cases = [
        (0, read, false, 0),
        (0, write, false, 2),
        (0, jump, false, 0x10),
        (present, write, false, 3),
        (present | 2, read, true, 5),
        (present | 4, write, true, 7),
        (present | 6 | 1 << 63, jump, true, 0x15),
        (present | 1 << 50, read, false, 9),
    ];
    for (entry, code, ring3, error) in cases {
        let mut rig = Rig::new(code).with(|state| state.core.registers.general[RBX] = 0x30_0000);
        if ring3 {
            rig = rig.in_ring3();
        }
        rig.map(0x100, entry);
        assert_eq!(rig.run(), CpuExit::Halted);
        assert_eq!((rig.vector(), rig.pushed(0)), (14, error), "{entry:#x} {code:02x?} {ring3}");
    }
}

#[test]
fn test_accessed_and_dirty_bits_are_set() {
    let mut rig = Rig::new(&[0x48, 0x8b, 0x03, 0x48, 0x89, 0x83, 0, 0x10, 0, 0, 0xf4])
        .with(|state| state.core.registers.general[RBX] = 0x30_0000);
    assert_eq!(rig.run(), CpuExit::Halted);
    assert_eq!([0x100, 0x101].map(|page| rig.word(TABLE + 8 * page) >> 5 & 3), [1, 3]);
    assert_eq!(rig.word(0x3008) >> 5 & 3, 1);
}

#[test]
fn test_interrupt_waits_for_the_flag_and_the_shadow() {
    // sti; nop; nop; hlt
    let mut rig = Rig::new(&[0xfb, 0x90, 0x90, 0xf4]);
    rig.board.pending = Some(0x40);
    assert_eq!(rig.run(), CpuExit::Halted);
    assert_eq!((rig.vector(), rig.pushed(0), rig.board.acknowledged.clone()), (0x40, CODE + 2, vec![0x40]));
    assert_eq!(rig.pushed(2) & RFLAGS_IF, RFLAGS_IF);
    assert_eq!(rig.cpu.registers().rflags & RFLAGS_IF, 0);
}

#[test]
fn test_interrupt_wakes_from_hlt() {
    let mut rig = Rig::new(&[0xfb, 0xf4, 0x90]);
    assert_eq!(rig.run(), CpuExit::Halted);
    assert!(rig.cpu.is_halted());
    rig.board.pending = Some(0x41);
    assert_eq!(rig.run(), CpuExit::Halted);
    assert_eq!((rig.vector(), rig.pushed(0)), (0x41, CODE + 2));
}

#[test]
fn test_syscall_sysret_and_interrupts_change_rings() {
    // ring 3: syscall; int 0x80
    let mut rig = Rig::new(&[0x0f, 0x05, 0xcd, 0x80]).in_ring3().with(|state| {
        state.msrs.star = 0x0010_0008 << 32;
        state.msrs.lstar = CODE + 0x100;
        state.msrs.sfmask = RFLAGS_IF;
    });
    // lstar: swapgs; sysretq
    rig.memory.write(CODE + 0x100, &[0x0f, 0x01, 0xf8, 0x48, 0x0f, 0x07]).unwrap();
    assert_eq!(rig.run(), CpuExit::Halted);
    assert_eq!(rig.vector(), 0x80);
    assert_eq!([0, 1, 3, 4].map(|i| rig.pushed(i)), [CODE + 4, CODE3.into(), STACK, DATA3.into()]);
    assert_eq!(rig.register(RSP), 0x9_0000 - 40);
    assert_eq!(rig.register(RCX), CODE + 2);
}

#[test]
fn test_privileged_instructions_fault_in_ring_3() {
    let cases: [&[u8]; 9] = [
        &[0xf4],
        &[0xfa],
        &[0x0f, 0x30],
        &[0x0f, 0x22, 0xd8],
        &[0x0f, 0x01, 0xf8],
        &[0x0f, 0x06],
        &[0xe6, 0x80],
        &[0x0f, 0x09],
        &[0x0f, 0x01, 0x3b],
    ];
    for code in cases {
        let mut rig = Rig::new(code).in_ring3();
        assert_eq!(rig.run(), CpuExit::Halted);
        assert_eq!((rig.vector(), rig.pushed(0), rig.pushed(1)), (13, 0, CODE), "{code:02x?}");
    }
}

#[test]
fn test_iret_restores_what_the_interrupt_saved() {
    // int 0x80; hlt, with a handler that returns
    let mut rig = Rig::new(&[0xcd, 0x80, 0x90, 0xf4]);
    rig.memory.write(HANDLERS + 0x80 * 16, &[0x48, 0xff, 0xc0, 0x48, 0xcf]).unwrap();
    assert_eq!(rig.run(), CpuExit::Halted);
    assert_eq!((rig.rip(), rig.register(RAX), rig.register(RSP)), (CODE + 4, 1, STACK));
}

#[test]
fn test_fault_in_delivery_is_a_double_fault_and_then_a_shutdown() {
    let ud2 = [0x0f, 0x0b];
    let mut rig = Rig::new(&[0x48, 0x8b, 0x03]).with(|state| {
        state.core.registers.general[RBX] = 0x30_0000;
        state.core.registers.general[RSP] = 0x30_1000;
    });
    rig.map(0x100, 0);
    assert_eq!(rig.run(), CpuExit::Shutdown);
    assert_eq!(rig.run(), CpuExit::Shutdown);
    let mut rig = Rig::new(&ud2).with(|state| state.core.system.idt.limit = 0);
    assert_eq!(rig.run(), CpuExit::Shutdown);
    // With a stack of its own, the double fault is delivered.
    let mut rig = Rig::new(&ud2);
    rig.memory.write(0x6000 + 6 * 16 + 5, &[0]).unwrap();
    rig.memory.write(0x6000 + 13 * 16 + 5, &[0]).unwrap();
    assert_eq!(rig.run(), CpuExit::Halted);
    assert_eq!((rig.vector(), rig.pushed(0)), (8, 0));
}

#[test]
fn test_handler_that_begins_with_its_own_exception_does_not_keep_the_turn_for_ever() {
    // ud2, and ud2 in the handler of #UD.
    let mut rig = Rig::new(&[0x0f, 0x0b]);
    rig.memory.write(HANDLERS + 16 * 6, &[0x0f, 0x0b]).unwrap();
    assert_eq!(rig.cpu.run(&mut rig.board, 5), CpuExit::Budget);
    assert_eq!((rig.cpu.instructions(), rig.rip()), (5, HANDLERS + 16 * 6));
}

#[test]
fn test_ports_answered_by_the_platform_or_by_the_vmm() {
    // in al, 0x60; out 0x80, al; mov edx, 0x500; out dx, eax; in ax, dx; hlt
    let code = [0xe4, 0x60, 0xe6, 0x80, 0xba, 0, 5, 0, 0, 0xef, 0x66, 0xed, 0xf4];
    let mut rig = Rig::new(&code).with(|state| state.core.registers.general[RAX] = 0x1234_5600);
    assert_eq!(rig.run(), CpuExit::PortOut { port: 0x500, size: 4, value: 0x1234_565a });
    assert_eq!((rig.board.outs.clone(), rig.rip(), rig.cpu.instructions()), (vec![(0x80, vec![0x5a])], CODE + 10, 4));
    assert_eq!(rig.run(), CpuExit::PortIn { port: 0x500, size: 2 });
    assert_eq!((rig.rip(), rig.cpu.instructions()), (CODE + 10, 4));
    rig.cpu.io_data().copy_from_slice(&[0xcd, 0xab]);
    assert_eq!(rig.cpu.complete_io(&mut rig.board), None);
    assert_eq!((rig.register(RAX), rig.rip(), rig.cpu.instructions()), (0x1234_abcd, CODE + 12, 5));
    assert_eq!(rig.run(), CpuExit::Halted);
}

#[test]
fn test_string_output_leaves_once_for_each_element() {
    // rep outsb
    let mut rig = Rig::new(&[0xf3, 0x6e, 0xf4]).with(|state| {
        state.core.registers.general[RCX] = 3;
        state.core.registers.general[RDX] = 0x3f8 + 0x100;
        state.core.registers.general[6] = DATA;
    });
    rig.memory.write(DATA, b"abc").unwrap();
    let mut text = Vec::new();
    while let CpuExit::PortOut { value, .. } = rig.run() {
        text.push(value as u8);
    }
    assert_eq!((text, rig.register(RCX), rig.rip()), (b"abc".to_vec(), 0, CODE + 3));
}

#[test]
fn test_device_memory_is_read_and_written_by_exits() {
    // mov rdi, DEVICE; add dword ptr [rdi], 5; hlt
    let code = [0x48, 0xc7, 0xc7, 0, 0, 0x50, 0, 0x83, 0x07, 5, 0xf4];
    let mut rig = Rig::new(&code);
    assert_eq!(rig.run(), CpuExit::MmioRead { address: DEVICE, size: 4 });
    assert_eq!(rig.rip(), CODE + 7);
    rig.cpu.io_data().copy_from_slice(&37u32.to_le_bytes());
    assert_eq!(rig.run(), CpuExit::MmioWrite { address: DEVICE, size: 4 });
    assert_eq!(rig.cpu.io_data(), 42u32.to_le_bytes());
    assert_eq!((rig.rip(), rig.cpu.instructions()), (CODE + 10, 2));
    assert_eq!(rig.run(), CpuExit::Halted);
}

#[test]
fn test_changed_code_executes_as_it_is_now() {
    // mov ecx, 2; 1: mov eax, 1 (immediate changed by the next); mov dword ptr [rip-9+...], 7; dec ecx; jnz 1b; hlt
    let code = [
        0xb9, 2, 0, 0, 0, 0xb8, 1, 0, 0, 0, 0xc7, 0x05, 0xf2, 0xff, 0xff, 0xff, 7, 0, 0, 0, 0xff, 0xc9, 0x75, 0xed,
        0xf4,
    ];
    let mut rig = Rig::new(&code);
    assert_eq!(rig.run(), CpuExit::Halted);
    assert_eq!(rig.register(RAX), 7);
    // By the host, in between.
    let mut rig = Rig::new(&[0xb8, 1, 0, 0, 0, 0xf4, 0xeb, 0xf8]);
    assert_eq!(rig.run(), CpuExit::Halted);
    rig.memory.write(CODE + 1, &[9]).unwrap();
    rig.cpu.set_halted(false);
    assert_eq!((rig.run(), rig.register(RAX)), (CpuExit::Halted, 9));
}

#[test]
fn test_breakpoints_stop_before_the_instruction_until_resumed() {
    let mut rig = Rig::new(&[0xb9, 3, 0, 0, 0, 0x90, 0xff, 0xc9, 0x75, 0xfb, 0xf4]);
    rig.cpu.set_debug(DebugOptions { breakpoints: vec![CODE + 6], ..DebugOptions::default() });
    for left in (1..=3).rev() {
        assert_eq!(rig.run(), CpuExit::Breakpoint);
        assert_eq!((rig.rip(), rig.register(RCX)), (CODE + 6, left));
        assert_eq!(rig.run(), CpuExit::Breakpoint);
        rig.cpu.resume_from_breakpoint();
    }
    assert_eq!(rig.run(), CpuExit::Halted);
    assert_eq!(rig.cpu.instructions(), 1 + 3 * 3 + 1);
    // Removed, it stops no more.
    rig.cpu.set_debug(DebugOptions::default());
    let mut registers = rig.cpu.registers();
    registers.rip = CODE;
    rig.cpu.set_registers(&registers);
    rig.cpu.set_halted(false);
    assert_eq!(rig.run(), CpuExit::Halted);
}

#[test]
fn test_watchpoints_report_the_access_after_the_instruction() {
    // mov [rdi+3], eax; mov al, [rdi]; add word ptr [rdi], 1; hlt
    let code = [0x89, 0x47, 0x03, 0x8a, 0x07, 0x66, 0x83, 0x07, 0x01, 0xf4];
    let watch = |address, length, kind| Watchpoint { address, length, kind };
    let mut rig = Rig::new(&code).with(|state| state.core.registers.general[RDI] = DATA);
    rig.cpu.set_debug(DebugOptions {
        watchpoints: vec![watch(DATA + 5, 1, WatchKind::Write), watch(DATA, 2, WatchKind::Read)],
        ..DebugOptions::default()
    });
    let mut hits = Vec::new();
    while let CpuExit::Watchpoint { index, access } = rig.run() {
        hits.push((index, access.address, access.length, access.write, rig.rip() - CODE));
    }
    // What is read and then written is one access, a write.
    assert_eq!(hits, [(0, DATA + 3, 4, true, 3), (1, DATA, 1, false, 5), (1, DATA, 2, true, 9)]);
}

#[test]
fn test_single_step_counts_instructions_and_deliveries() {
    let mut rig = Rig::new(&[0x90, 0x0f, 0x0b]);
    rig.cpu.set_debug(DebugOptions { single_step: true, ..DebugOptions::default() });
    assert_eq!((rig.run(), rig.rip()), (CpuExit::SingleStep, CODE + 1));
    assert_eq!((rig.run(), rig.rip()), (CpuExit::SingleStep, HANDLERS + 6 * 16));
    assert_eq!((rig.run(), rig.rip()), (CpuExit::SingleStep, HANDLERS + 6 * 16 + 1));
    assert_eq!(rig.run(), CpuExit::Halted);
}

#[test]
fn test_trap_flag_gives_the_guest_a_debug_exception() {
    // pushfq; or dword ptr [rsp], 0x100; popfq; nop; nop
    let mut rig = Rig::new(&[0x9c, 0x81, 0x0c, 0x24, 0, 1, 0, 0, 0x9d, 0x90, 0x90, 0xf4]);
    assert_eq!(rig.run(), CpuExit::Halted);
    assert_eq!((rig.vector(), rig.pushed(0)), (1, CODE + 10));
    assert_eq!(rig.cpu.snapshot().debug[6] & 1 << 14, 1 << 14);
}

#[test]
fn test_guest_debug_registers_raise_debug_exceptions() {
    // nop; mov [rdi], al; nop; hlt, with DR0 = the last nop (execute), DR1 = DATA (write, 4 bytes)
    let code = [0x90, 0x88, 0x07, 0x90, 0xf4];
    let mut rig = Rig::new(&code).with(|state| {
        state.core.registers.general[RDI] = DATA + 3;
        state.debug[0] = CODE + 3;
        state.debug[1] = DATA;
        state.debug[7] = 0x400 | 1 | 4 | 0b1101 << 20;
    });
    assert_eq!(rig.run(), CpuExit::Halted);
    assert_eq!((rig.vector(), rig.pushed(0), rig.cpu.snapshot().debug[6] & 0xf), (1, CODE + 3, 2));
    // The handler returns by hand: the execution breakpoint comes next, as a fault.
    let mut registers = rig.cpu.registers();
    (registers.rip, registers.general[RSP]) = (CODE + 3, STACK);
    rig.cpu.set_registers(&registers);
    rig.cpu.set_halted(false);
    assert_eq!(rig.run(), CpuExit::Halted);
    assert_eq!((rig.vector(), rig.pushed(0), rig.cpu.snapshot().debug[6] & 0xf), (1, CODE + 3, 3));
}

#[test]
fn test_int3_goes_to_the_guest_or_to_the_debugger() {
    let mut rig = Rig::new(&[0xcc]);
    rig.cpu.set_debug(DebugOptions { stop_at_int3: true, ..DebugOptions::default() });
    assert_eq!((rig.run(), rig.rip()), (CpuExit::Int3, CODE));
    rig.cpu.set_debug(DebugOptions::default());
    assert_eq!(rig.run(), CpuExit::Halted);
    assert_eq!((rig.vector(), rig.pushed(0)), (3, CODE + 1));
}

#[test]
fn test_injected_exception_is_delivered_first() {
    let mut rig = Rig::new(&[0x90, 0xf4]);
    rig.cpu.inject(Fault { vector: 14, error_code: Some(4), address: Some(0x1234) });
    assert_eq!(rig.run(), CpuExit::Halted);
    assert_eq!((rig.vector(), rig.pushed(0), rig.pushed(1)), (14, 4, CODE));
    assert_eq!(rig.cpu.system_registers().cr2, 0x1234);
}

#[test]
fn test_platform_that_wants_control_gets_it_after_the_instruction() {
    // out 0x80, al; mov ecx, 0x6e0; wrmsr
    let mut rig = Rig::new(&[0xe6, 0x80, 0xb9, 0xe0, 6, 0, 0, 0x0f, 0x30, 0xf4]);
    rig.board.leave = true;
    assert_eq!((rig.run(), rig.rip()), (CpuExit::Platform, CODE + 2));
    assert_eq!((rig.run(), rig.rip()), (CpuExit::Platform, CODE + 9));
    assert_eq!(rig.board.msrs, [(0x6e0, 0)]);
    assert_eq!(rig.run(), CpuExit::Halted);
}

#[test]
fn test_interrupt_flag_of_another_thread_stops_a_loop() {
    let mut rig = Rig::new(&[0xeb, 0xfe]);
    let flag = rig.cpu.interrupt_flag();
    let thread = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(20));
        flag.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    assert_eq!(rig.cpu.run(&mut rig.board, u64::MAX), CpuExit::Interrupted);
    thread.join().unwrap();
    assert_eq!(rig.cpu.run(&mut rig.board, 10), CpuExit::Budget);
}

#[test]
fn test_hooks_hear_of_instructions_and_accesses() {
    use crate::backend::DataAccess;
    use std::sync::{Arc, Mutex};
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<(u64, usize)>>>, Arc<Mutex<Vec<DataAccess>>>);
    impl crate::x86::Hooks for Log {
        fn instruction(&mut self, address: u64, code: &[u8]) {
            self.0.lock().unwrap().push((address, code.len()));
        }
        fn access(&mut self, access: DataAccess) {
            self.1.lock().unwrap().push(access);
        }
    }
    // push rax; mov cl, [rdi]; hlt
    let mut rig = Rig::new(&[0x50, 0x8a, 0x0f, 0xf4]).with(|state| state.core.registers.general[RDI] = DATA);
    let log = Log::default();
    rig.cpu.set_hooks(Some(Box::new(log.clone())));
    assert_eq!(rig.run(), CpuExit::Halted);
    assert_eq!(*log.0.lock().unwrap(), [(CODE, 1), (CODE + 1, 2), (CODE + 3, 1)]);
    let access = |address, length, write| DataAccess { address, length, write };
    assert_eq!(*log.1.lock().unwrap(), [access(STACK - 8, 8, true), access(DATA, 1, false)]);
}

#[test]
fn test_exceptions_of_the_fpu_and_of_alignment_are_delivered_at_the_instruction() {
    // fld1; sqrtps xmm0, xmm1, with CR0.TS: #NM.
    for code in [&[0xd9, 0xe8][..], &[0x0f, 0x51, 0xc1]] {
        let mut rig = Rig::new(code).with(|state| state.core.system.cr0 |= 8);
        assert_eq!((rig.run(), rig.vector(), rig.pushed(0)), (CpuExit::Halted, 7, CODE));
    }
    // divps xmm0, xmm1 (0 / 0), unmasked: #XM, without an error code, and the flag that explains it.
    let mut rig = Rig::new(&[0x0f, 0x5e, 0xc1]).with(|state| state.core.fpu.mxcsr = 0x1f00);
    assert_eq!((rig.run(), rig.vector(), rig.pushed(0)), (CpuExit::Halted, 19, CODE));
    assert_eq!(rig.cpu.fpu().mxcsr & 1, 1);
    // fldz; fldz; fdivp, unmasked; the next x87 instruction that waits: #MF.
    let mut rig = Rig::new(&[0xd9, 0xee, 0xd9, 0xee, 0xde, 0xf9, 0xd9, 0xe8]).with(|state| {
        state.core.system.cr0 |= 1 << 5;
        state.core.fpu.fcw = 0x37e;
    });
    assert_eq!((rig.run(), rig.vector(), rig.pushed(0)), (CpuExit::Halted, 16, CODE + 6));
    // mov rax, [rbx] in ring 3, unaligned, with CR0.AM and RFLAGS.AC: #AC(0).
    let mut rig = Rig::new(&[0x48, 0x8b, 0x03]).in_ring3().with(|state| {
        state.core.system.cr0 |= 1 << 18;
        state.core.registers.rflags |= 1 << 18;
        state.core.registers.general[RBX] = DATA + 1;
    });
    assert_eq!((rig.run(), rig.vector(), rig.pushed(0), rig.pushed(1)), (CpuExit::Halted, 17, 0, CODE));
}

/// A descriptor at selector 0x30, and a frame of IRET to it at the top of the stack.
fn with_descriptor(code: &[u8], descriptor: u64) -> Rig {
    let rig = Rig::new(code).with(|state| {
        state.core.registers.general[RBX] = DATA;
        state.core.system.gdt.limit = 0x3f;
    });
    rig.memory.write_object(0x5030, descriptor).unwrap();
    for (i, word) in (0..).zip([CODE, 0x30, 2, STACK, DATA0.into()]) {
        rig.memory.write_object(STACK + 8 * i, word).unwrap();
    }
    // The same as a far pointer of 32 bits.
    rig.memory.write_object(DATA, CODE | 0x30 << 32).unwrap();
    rig
}

#[test]
fn test_a_way_into_compatibility_mode_is_an_exit_and_nothing_of_it_is_done() {
    const CODE32: u64 = 0x00cf_9b00_0000_ffff;
    // iretq; lretq; jmp far [rbx]; call far [rbx]
    for code in [&[0x48, 0xcf][..], &[0x48, 0xcb], &[0xff, 0x2b], &[0xff, 0x1b]] {
        for is_slow in [false, true] {
            let mut rig = with_descriptor(code, CODE32);
            rig.cpu.set_slow(is_slow);
            let before = rig.cpu.snapshot();
            for _ in 0..2 {
                assert_eq!(rig.run(), CpuExit::Missing(Missing::LegacyMode), "{code:02x?}");
                assert!(rig.cpu.snapshot() == before, "{code:02x?}");
            }
        }
    }
}

#[test]
fn test_sysret_to_compatibility_mode_is_an_exit_in_ring_0_and_a_fault_elsewhere() {
    let sysretd = [0x0f, 0x07];
    assert_eq!(Rig::new(&sysretd).run(), CpuExit::Missing(Missing::LegacyMode));
    let mut rig = Rig::new(&sysretd).in_ring3();
    assert_eq!((rig.run(), rig.vector()), (CpuExit::Halted, 13));
}

#[test]
fn test_a_far_transfer_to_a_segment_that_no_mode_knows_is_a_fault() {
    // L and D are both set; not present; data; a call gate of a level that may not use it.
    let gate = 0x0000_8c00_0008_0000;
    for (descriptor, vector) in
        [(0x00ef_9b00_0000_ffff, 13), (0x00cf_1b00_0000_ffff, 11), (0x00cf_9300_0000_ffff, 13), (gate, 13)]
    {
        let mut rig = with_descriptor(&[0x48, 0xcf], descriptor);
        assert_eq!((rig.run(), rig.vector(), rig.pushed(0), rig.pushed(1)), (CpuExit::Halted, vector, 0x30, CODE));
    }
}

#[test]
fn test_a_far_call_through_a_gate_is_an_exit_and_nothing_of_it_is_done() {
    let mut rig = with_descriptor(&[0xff, 0x1b], 0x0000_8c00_0008_0000);
    assert_eq!((rig.run(), rig.rip(), rig.register(RSP)), (CpuExit::Missing(Missing::CallGate), CODE, STACK));
}

#[test]
fn test_no_mode_but_the_64_bit_one_executes() {
    let mut rig = Rig::new(&[0x90]).with(|state| state.core.system.cs.attributes = 0xc09b);
    assert_eq!((rig.run(), rig.rip()), (CpuExit::Missing(Missing::LegacyMode), CODE));
}

#[test]
fn test_a_load_of_ss_holds_off_the_trap_flag_until_the_next_instruction_is_done() {
    // mov ss, ax; nop; nop, with TF: the first trap comes after the first nop.
    let mut rig = Rig::new(&[0x8e, 0xd0, 0x90, 0x90]).with(|state| {
        state.core.registers.general[RAX] = DATA0.into();
        state.core.registers.rflags |= 0x100;
    });
    assert_eq!((rig.run(), rig.vector(), rig.pushed(0)), (CpuExit::Halted, 1, CODE + 3));
}

#[test]
fn test_trap_flag_stops_a_repeated_instruction_after_each_iteration() {
    // rep movsb with TF.
    let mut rig = Rig::new(&[0xf3, 0xa4]).with(|state| {
        let general = &mut state.core.registers.general;
        (general[RCX], general[6], general[RDI]) = (3, DATA, DATA + 64);
        state.core.registers.rflags |= 0x100;
    });
    assert_eq!((rig.run(), rig.vector(), rig.pushed(0), rig.register(RCX)), (CpuExit::Halted, 1, CODE, 2));
}

#[test]
fn test_single_step_of_a_repeated_instruction_counts_it_once() {
    let mut rig = Rig::new(&[0xf3, 0xa4, 0xf4]).with(|state| {
        let general = &mut state.core.registers.general;
        (general[RCX], general[6], general[RDI]) = (4, DATA, DATA + 64);
    });
    rig.cpu.set_debug(DebugOptions { single_step: true, ..DebugOptions::default() });
    for left in (1..4).rev() {
        assert_eq!((rig.run(), rig.rip(), rig.register(RCX)), (CpuExit::SingleStep, CODE, left));
    }
    assert_eq!((rig.run(), rig.rip(), rig.cpu.instructions()), (CpuExit::SingleStep, CODE + 2, 1));
}
