//! Single steps, which have a short way while nothing changes between them: beside the slow executor, with everything
//! changed between them that a debugger or a machine may change. `UHYVE_FUZZ` is the number of rounds.

use std::sync::atomic::Ordering;

use super::Random;
use super::differential::{common_instruction, randomise, rounds};
use super::machine::{CODE, DATA, Rig};
use crate::registers::{RFLAGS_IF, RFLAGS_TF, RSP};
use crate::x86::{CpuExit, DebugOptions, Fault, State, WatchKind, Watchpoint};

/// Steps of a round.
const STEPS: u64 = 48;

fn stepping(breakpoints: Vec<u64>, watchpoints: Vec<Watchpoint>) -> DebugOptions {
    DebugOptions { breakpoints, watchpoints, single_step: true, ..DebugOptions::default() }
}

/// Changes something, or nothing, by two numbers.
fn disturb(rig: &mut Rig, begin: &State, action: u64, number: u64) {
    let mut registers = rig.cpu.registers();
    let mut state = rig.cpu.snapshot();
    let place = CODE + number % 40;
    match action {
        0 => {
            registers.general[3] = number;
            rig.cpu.set_registers(&registers);
        }
        1 => {
            registers.rflags |= RFLAGS_TF;
            rig.cpu.set_registers(&registers);
        }
        2 => {
            registers.rflags |= RFLAGS_IF;
            rig.cpu.set_registers(&registers);
            rig.board.pending = Some(0x40);
        }
        3 => rig.cpu.inject(Fault::plain(6)),
        4 => rig.cpu.set_halted(true),
        5 => rig.cpu.set_debug(stepping(vec![place], Vec::new())),
        6 => rig.cpu.resume_from_breakpoint(),
        7 => {
            let watched = Watchpoint { address: DATA, length: 0x2000, kind: WatchKind::ReadWrite };
            rig.cpu.set_debug(stepping(Vec::new(), vec![watched]));
        }
        8 => rig.cpu.set_debug(DebugOptions { block_interrupts: true, ..stepping(Vec::new(), Vec::new()) }),
        9 => rig.cpu.interrupt_flag().store(true, Ordering::Relaxed),
        10 => rig.memory.write(place, &[0x90]).unwrap(),
        11 => {
            (state.debug[7], state.debug[0]) = (1, place);
            rig.cpu.restore(&state);
        }
        12 => {
            state.interrupt_shadow = true;
            rig.cpu.restore(&state);
        }
        13 => rig.cpu.set_debug(DebugOptions::default()),
        14 => rig.board.pending = Some(0x41),
        15..=19 => rig.cpu.restore(begin),
        20..=24 => rig.cpu.set_debug(stepping(Vec::new(), Vec::new())),
        _ => {}
    }
}

#[test]
fn test_single_steps_agree_with_the_slow_executor_whatever_is_changed_between_them() {
    let mut random = Random(0x5151_7171_9191_b1b1);
    for _ in 0..rounds(400) {
        let mut code: Vec<u8> = (0..6).flat_map(|_| common_instruction(&mut random)).collect();
        let back = -i8::try_from(code.len() + 2).expect("six short instructions");
        code.extend([0xeb, back as u8]);
        let mut begin = Rig::new(&code).cpu.snapshot();
        randomise(&mut random, &mut begin);
        begin.core.registers.general[RSP] = DATA + 0x1800;
        let mut rigs = [Rig::new(&code), Rig::new(&code)];
        for (rig, is_slow) in rigs.iter_mut().zip([false, true]) {
            rig.cpu.restore(&begin);
            rig.cpu.set_slow(is_slow);
            rig.cpu.set_debug(stepping(Vec::new(), Vec::new()));
        }
        for step in 0..STEPS {
            // The loop is known when the first change comes.
            let (action, number) = (if step < 16 { u64::MAX } else { random.below(96) }, random.next());
            let after = rigs.each_mut().map(|rig| {
                disturb(rig, &begin, action, number);
                let exit = rig.cpu.run(&mut rig.board, 1);
                (exit, rig.cpu.registers(), rig.cpu.instructions())
            });
            assert_eq!(after[0], after[1], "step {step} of {code:02x?}, change {action}");
        }
        assert!(rigs[0].cpu.snapshot() == rigs[1].cpu.snapshot(), "{code:02x?}");
    }
}

#[test]
fn test_single_steps_of_a_known_loop_count_and_stop_at_what_comes() {
    // inc rax; jmp back
    let mut rig = Rig::new(&[0x48, 0xff, 0xc0, 0xeb, 0xfb]);
    rig.cpu.set_debug(stepping(Vec::new(), Vec::new()));
    let before = rig.cpu.instructions();
    for _ in 0..100 {
        assert_eq!(rig.cpu.run(&mut rig.board, 1), CpuExit::SingleStep);
    }
    assert_eq!((rig.register(0), rig.cpu.instructions() - before), (50, 100));
    rig.cpu.interrupt_flag().store(true, Ordering::Relaxed);
    assert_eq!(rig.cpu.run(&mut rig.board, 1), CpuExit::Interrupted);
    assert_eq!(rig.cpu.run(&mut rig.board, 0), CpuExit::Budget);
    rig.cpu.set_debug(stepping(vec![CODE + 3], Vec::new()));
    assert_eq!(rig.cpu.run(&mut rig.board, 1), CpuExit::SingleStep);
    assert_eq!(rig.cpu.run(&mut rig.board, 1), CpuExit::Breakpoint);
    rig.cpu.inject(Fault::plain(6));
    assert_eq!(rig.cpu.run(&mut rig.board, 1), CpuExit::SingleStep);
    assert_eq!((rig.register(0), rig.cpu.instructions() - before), (51, 101));
}
