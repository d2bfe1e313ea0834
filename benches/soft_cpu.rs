//! The software CPU on bare guest code, for `soft_cpu.py`: it reads lines `WORKLOAD COUNT` for the code in the file
//! that it is given, runs each, and prints the nanoseconds, the instructions and the guest's result. A line `fresh`
//! takes a new CPU, `break` sets a breakpoint that is never met, `step COUNT` single-steps.
#![allow(missing_docs, clippy::unwrap_used)]

use std::io::BufRead;

use nix::time::{ClockId, clock_gettime};
use uhyve_core::memory::{Backing, GuestMemory};
use uhyve_core::x86::{Cpu, CpuExit, DebugOptions, Nothing};

/// Where the code begins.
const CODE: u64 = 0x10_0000;
const STACK: u64 = 0x8_0000;
const MEMORY: u64 = 64 << 20;
const RSP: usize = 4;
const RSI: usize = 6;
const RDI: usize = 7;

/// A CPU in ring 0, with all memory mapped to itself by pages of 2 MiB.
fn machine(code: &[u8]) -> Cpu {
    let memory = GuestMemory::new(0, MEMORY, Backing::default()).unwrap();
    memory.write_object(0x1000, 0x2003u64).unwrap();
    memory.write_object(0x2000, 0x3003u64).unwrap();
    for page in 0..MEMORY >> 21 {
        memory.write_object(0x3000 + 8 * page, page << 21 | 0x83).unwrap();
    }
    memory.write(CODE, code).unwrap();
    let mut cpu = Cpu::new(&memory);
    let mut state = cpu.snapshot();
    state.core.system.cr3 = 0x1000;
    cpu.restore(&state);
    cpu
}

/// Nanoseconds of this thread's CPU time: what others do on a busy host does not count.
fn now() -> i64 {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap();
    time.tv_sec() * 1_000_000_000 + time.tv_nsec()
}

/// Prepares the call of a workload.
fn enter(cpu: &mut Cpu, workload: u64, count: u64) {
    cpu.set_halted(false);
    let mut registers = cpu.registers();
    registers.rip = CODE;
    registers.general[RSP] = STACK;
    registers.general[RDI] = workload;
    registers.general[RSI] = count;
    cpu.set_registers(&registers);
}

fn main() {
    let Some(path) = std::env::args().nth(1).filter(|path| path != "--bench") else {
        println!("see benches/soft_cpu.py");
        return;
    };
    let code = std::fs::read(path).unwrap();
    let mut cpu = machine(&code);
    for line in std::io::stdin().lock().lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        let before = cpu.instructions();
        let start;
        match words[..] {
            ["fresh"] => cpu = machine(&code),
            ["break"] => cpu.set_debug(DebugOptions { breakpoints: vec![STACK], ..DebugOptions::default() }),
            ["clear"] => cpu.set_debug(DebugOptions::default()),
            ["step", count] => {
                enter(&mut cpu, 0, 1 << 40);
                cpu.set_debug(DebugOptions { single_step: true, ..DebugOptions::default() });
                start = now();
                for _ in 0..count.parse::<u64>().unwrap() {
                    assert_eq!(cpu.run(&mut Nothing, 1), CpuExit::SingleStep);
                }
                let took = now() - start;
                cpu.set_debug(DebugOptions::default());
                println!("{took} {} 0", cpu.instructions() - before);
            }
            [workload, count] => {
                enter(&mut cpu, workload.parse().unwrap(), count.parse().unwrap());
                start = now();
                assert_eq!(cpu.run(&mut Nothing, u64::MAX), CpuExit::Halted);
                let took = now() - start;
                println!("{took} {} {}", cpu.instructions() - before, cpu.registers().general[0]);
            }
            _ => panic!("{line:?} is no request"),
        }
    }
}
