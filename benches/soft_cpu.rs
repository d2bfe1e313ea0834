//! How fast the software CPU is: millions of guest instructions a second for small loops, and nanoseconds for a single
//! step. `cargo bench --bench soft_cpu`; ratios in one run count, not the numbers.
#![allow(missing_docs, clippy::unwrap_used, clippy::cast_precision_loss)]

use std::time::Instant;

use uhyve_core::memory::{Backing, GuestMemory};
use uhyve_core::x86::{Cpu, CpuExit, DebugOptions, MsrReply, Platform, Reply};

/// Where the code begins.
const CODE: u64 = 0x1_0000;
/// Instructions a measurement.
const COUNT: u64 = 100_000_000;

/// A loop of shifts, adds and LEA; a loop over 64 KiB of memory; a recursive Fibonacci; a copy by SSE.
const WORKLOADS: [(&str, &[u8]); 4] = [
    (
        "integer",
        &[
            0xb9, 0xff, 0xff, 0xff, 0x7f, 0x48, 0x89, 0xc8, 0x48, 0xc1, 0xe0, 0x07, 0x48, 0x31, 0xc2, 0x48, 0x83, 0xc2,
            0x0d, 0x48, 0x8d, 0x5c, 0x42, 0x05, 0x48, 0x29, 0xde, 0xff, 0xc9, 0x75, 0xe6, 0xeb, 0xdf,
        ],
    ),
    (
        "memory",
        &[
            0xbf, 0x00, 0x00, 0x10, 0x00, 0x31, 0xc9, 0x48, 0x8b, 0x04, 0xcf, 0x48, 0x01, 0xc8, 0x48, 0x89, 0x04, 0xcf,
            0x83, 0xc1, 0x01, 0x81, 0xf9, 0x00, 0x20, 0x00, 0x00, 0x72, 0xea, 0xeb, 0xe6,
        ],
    ),
    (
        "fib",
        &[
            0xbf, 0x1e, 0x00, 0x00, 0x00, 0xe8, 0x02, 0x00, 0x00, 0x00, 0xeb, 0xf4, 0x53, 0x55, 0x48, 0x89, 0xfb, 0x83,
            0xff, 0x02, 0x72, 0x18, 0x8d, 0x7b, 0xff, 0xe8, 0xee, 0xff, 0xff, 0xff, 0x48, 0x89, 0xc5, 0x8d, 0x7b, 0xfe,
            0xe8, 0xe3, 0xff, 0xff, 0xff, 0x48, 0x01, 0xe8, 0xeb, 0x03, 0x48, 0x89, 0xf8, 0x5d, 0x5b, 0xc3,
        ],
    ),
    (
        "sse copy",
        &[
            0xbf, 0x00, 0x00, 0x10, 0x00, 0xbe, 0x00, 0x00, 0x18, 0x00, 0x31, 0xc9, 0x0f, 0x10, 0x04, 0x0f, 0x0f, 0x10,
            0x4c, 0x0f, 0x10, 0x66, 0x0f, 0xfe, 0xc1, 0x0f, 0x11, 0x04, 0x0e, 0x0f, 0x11, 0x4c, 0x0e, 0x10, 0x83, 0xc1,
            0x20, 0x81, 0xf9, 0x00, 0x00, 0x01, 0x00, 0x72, 0xdf, 0xeb, 0xdb,
        ],
    ),
];

/// A machine without devices.
struct Nothing;

impl Platform for Nothing {
    fn port_read(&mut self, _: u16, _: &mut [u8], _: u64) -> Reply {
        Reply::Unknown
    }
    fn port_write(&mut self, _: u16, _: &[u8], _: u64) -> Reply {
        Reply::Unknown
    }
    fn mmio_read(&mut self, _: u64, _: &mut [u8], _: u64) -> Reply {
        Reply::Unknown
    }
    fn mmio_write(&mut self, _: u64, _: &[u8], _: u64) -> Reply {
        Reply::Unknown
    }
    fn read_msr(&mut self, _: u32, _: u64) -> MsrReply {
        MsrReply::Refused
    }
    fn write_msr(&mut self, _: u32, _: u64, _: u64) -> MsrReply {
        MsrReply::Refused
    }
    fn tsc(&mut self, now: u64) -> u64 {
        now
    }
    fn pending_interrupt(&mut self, _: u64) -> Option<u8> {
        None
    }
    fn acknowledge_interrupt(&mut self, _: u8, _: u64) {}
    fn task_priority(&mut self) -> u8 {
        0
    }
    fn set_task_priority(&mut self, _: u8, _: u64) {}
}

/// A CPU in ring 0, with 4 MiB mapped to themselves, before `code`.
fn machine(code: &[u8]) -> Cpu {
    let memory = GuestMemory::new(0, 4 << 20, Backing::default()).unwrap();
    for (at, entry) in [(0x1000, 0x2003u64), (0x2000, 0x3003), (0x3000, 0x83), (0x3008, 0x20_0083)] {
        memory.write_object(at, entry).unwrap();
    }
    memory.write(CODE, code).unwrap();
    let mut cpu = Cpu::new(&memory);
    let mut state = cpu.snapshot();
    state.core.system.cr3 = 0x1000;
    state.core.registers.rip = CODE;
    state.core.registers.general[4] = 0x8_0000;
    cpu.restore(&state);
    cpu
}

fn main() {
    for (name, code) in WORKLOADS {
        let mut cpu = machine(code);
        assert_eq!(cpu.run(&mut Nothing, COUNT / 100), CpuExit::Budget);
        let start = Instant::now();
        assert_eq!(cpu.run(&mut Nothing, COUNT), CpuExit::Budget);
        println!("{name:10} {:8.0} MIPS", COUNT as f64 / start.elapsed().as_secs_f64() / 1e6);
    }
    let mut cpu = machine(WORKLOADS[0].1);
    cpu.set_debug(DebugOptions { single_step: true, ..DebugOptions::default() });
    let start = Instant::now();
    for _ in 0..COUNT / 100 {
        assert_eq!(cpu.run(&mut Nothing, 1), CpuExit::SingleStep);
    }
    println!("{:10} {:8.1} ns", "step", start.elapsed().as_secs_f64() * 1e9 / (COUNT / 100) as f64);
}
