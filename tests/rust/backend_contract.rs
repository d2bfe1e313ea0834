//! What every back end must keep of the contract in `backend`: one suite, run against each that this machine has. The
//! guests are a few instructions in 64-bit ring 0.

// Helpers of tests unwrap as the tests do.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use uhyve_core::backend::{
    self, Backend, DebugEvent, Exception, Exit, GuestDebug, HardwareBreakpoint, Int3, MachineOptions, Vcpu,
};
use uhyve_core::error::Error;
use uhyve_core::memory::{Backing, GuestMemory};
use uhyve_core::registers::{
    CR0_PE, CR0_PG, CR4_OSFXSR, CR4_PAE, EFER_LMA, EFER_LME, EFER_NXE, FpuState, RAX, RBX, RCX, RDI, RDX, RFLAGS_TF,
    RSI, RSP, Registers, Segment,
};

const BACKENDS: [&str; 2] = ["kvm", "soft"];

const PML4: u64 = 0x1000;
const IDT: u64 = 0x4000;
const GDT: u64 = 0x5000;
const STACK: u64 = 0x7000;
const CODE: u64 = 0x8000;
const DATA: u64 = 0x9000;
const HANDLERS: u64 = 0xa000;
/// A page of virtual addresses behind which there is no RAM, and what is there instead.
const DEVICE: u64 = 0x20_0000;
const DEVICE_PHYSICAL: u64 = 0x8000_0000;
/// `out 0xe0, al`: the guest got to its end.
const MARKER: [u8; 2] = [0xe6, 0xe0];
const MARKER_PORT: u16 = 0xe0;
/// Vector n's handler writes to this port, and returns by IRETQ.
const HANDLER_PORT: u16 = 0xe2;
const NOP: u8 = 0x90;
/// `jmp $`.
const SPIN: [u8; 2] = [0xeb, 0xfe];
const SOON: Duration = Duration::from_secs(10);

/// One vCPU, bound to the calling thread.
struct Guest {
    vcpu: Box<dyn Vcpu>,
    backend: Arc<dyn Backend>,
    memory: GuestMemory,
}

impl Guest {
    fn start(name: &str, code: &[u8]) -> Result<Self, Error> {
        let memory = GuestMemory::new(0, 0x20_0000, Backing::default())?;
        let backend = backend::open(name, &memory, &MachineOptions { cpus: 1, ..Default::default() })?;
        let mut vcpu = backend.create_vcpu(0)?;
        vcpu.bind_to_current_thread()?;
        // PML4 → PDPT → PD → two 2 MiB pages, present and writable: RAM, and the device.
        let tables = [
            (PML4, PML4 + 0x1003),
            (PML4 + 0x1000, PML4 + 0x2003),
            (PML4 + 0x2000, 0x83),
            (PML4 + 0x2008, DEVICE_PHYSICAL | 0x83),
        ];
        for (at, entry) in tables {
            memory.write_object(at, entry)?;
        }
        for (n, descriptor) in (0..).zip([0u64, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff]) {
            memory.write_object(GDT + 8 * n, descriptor)?;
        }
        memory.write(CODE, &[code, &MARKER, &[0xf4]].concat())?;
        let mut system = vcpu.system_registers()?;
        let data = Segment { selector: 0x10, base: 0, limit: u32::MAX, attributes: 0xc093 };
        system.cs = Segment { selector: 8, base: 0, limit: u32::MAX, attributes: 0xa09b };
        (system.ds, system.es, system.fs, system.gs, system.ss) = (data, data, data, data, data);
        (system.gdt.base, system.gdt.limit) = (GDT, 23);
        (system.idt.base, system.idt.limit) = (IDT, 0);
        (system.cr0, system.cr3, system.cr4) = (CR0_PE | CR0_PG | 0x30, PML4, CR4_PAE | CR4_OSFXSR);
        system.efer = EFER_LME | EFER_LMA | EFER_NXE;
        vcpu.set_system_registers(&system)?;
        let mut registers = Registers { rip: CODE, rflags: 2, ..Default::default() };
        registers.general[RSP] = STACK;
        vcpu.set_registers(&registers)?;
        Ok(Self { vcpu, backend, memory })
    }

    /// Gives the guest a handler for each vector of 0–31: `out 0xe2, al`, then IRETQ, past the error code if there is one.
    fn with_handlers(mut self) -> Self {
        for vector in 0..32u64 {
            let handler = HANDLERS + 16 * vector;
            let gate = (handler & 0xffff) | 8 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
            self.memory.write_object(IDT + 16 * vector, gate).unwrap();
            self.memory.write_object(IDT + 16 * vector + 8, handler >> 32).unwrap();
            let has_code = matches!(vector, 8 | 10..=14 | 17);
            let pop: &[u8] = if has_code { &[0x48, 0x83, 0xc4, 8] } else { &[] };
            self.memory.write(handler, &[&[0xe6, 0xe2], pop, &[0x48, 0xcf]].concat()).unwrap();
        }
        let mut system = self.vcpu.system_registers().unwrap();
        system.idt.limit = 32 * 16 - 1;
        self.vcpu.set_system_registers(&system).unwrap();
        self
    }

    fn with(mut self, values: &[(usize, u64)]) -> Self {
        let mut registers = self.registers();
        for (register, value) in values {
            registers.general[*register] = *value;
        }
        self.vcpu.set_registers(&registers).unwrap();
        self
    }

    fn registers(&mut self) -> Registers {
        self.vcpu.registers().unwrap()
    }

    /// The next exit that is no interruption.
    fn run(&mut self) -> Exit {
        for _ in 0..100 {
            match self.vcpu.run().unwrap() {
                Exit::Interrupted => {}
                exit => return exit,
            }
        }
        panic!("interrupted without end");
    }

    fn debug(&mut self) -> DebugEvent {
        match self.run() {
            Exit::Debug(event) => event,
            other => panic!("no debug exit: {other:?}"),
        }
    }

    fn runs_to_its_end(&mut self) {
        assert!(matches!(self.run(), Exit::IoOut { port: MARKER_PORT, size: 1, count: 1, .. }));
    }
}

/// Runs `test` with a guest of `code` on each back end that this machine has.
fn on_each(code: &[u8], test: impl Fn(Guest)) {
    for name in BACKENDS {
        match Guest::start(name, code) {
            Ok(guest) => {
                // Whatever blocks in the guest, the test ends: a kick that is no part of it makes it fail.
                let over = Arc::new(AtomicBool::new(false));
                let (watched, kick) = (over.clone(), guest.vcpu.kick_handle());
                let watchdog = std::thread::spawn(move || {
                    let until = Instant::now() + SOON;
                    while !watched.load(Ordering::SeqCst) {
                        if Instant::now() > until {
                            eprintln!("the guest is stuck");
                            kick.kick();
                        }
                        std::thread::park_timeout(Duration::from_millis(50));
                    }
                });
                test(guest);
                over.store(true, Ordering::SeqCst);
                watchdog.thread().unpark();
                watchdog.join().unwrap();
            }
            Err(Error::HypervisorUnavailable(text) | Error::Config(text)) => println!("{name} is skipped: {text}"),
            Err(error) => panic!("{name}: {error}"),
        }
    }
}

#[test]
fn test_out_has_its_port_size_and_value_and_is_completed_without_another_instruction() {
    // out 0x60, al; out dx, ax; out dx, eax
    on_each(&[0xe6, 0x60, 0x66, 0xef, 0xef], |guest| {
        let mut guest = guest.with(&[(RAX, 0x1122_3344_5566_7788), (RDX, 0x1234)]);
        for (port, size, value, next) in
            [(0x60, 1, 0x88, CODE + 2), (0x1234, 2, 0x7788, CODE + 4), (0x1234, 4, 0x5566_7788, CODE + 5)]
        {
            assert_eq!(guest.run(), Exit::IoOut { port, size, count: 1, value });
            assert_eq!(guest.vcpu.io_data(), &value.to_le_bytes()[..usize::from(size)]);
            assert_eq!(guest.vcpu.complete_io().unwrap(), None);
            assert_eq!(guest.vcpu.complete_io().unwrap(), None, "nothing is left");
            assert_eq!(guest.registers().rip, next);
        }
        guest.runs_to_its_end();
    });
}

#[test]
fn test_in_takes_what_is_put_there_and_completing_makes_registers_true() {
    // in al, 0x60; in eax, dx
    on_each(&[0xe4, 0x60, 0xed], |guest| {
        let mut guest = guest.with(&[(RAX, u64::MAX), (RDX, 0x74)]);
        assert_eq!(guest.run(), Exit::IoIn { port: 0x60, size: 1, count: 1 });
        guest.vcpu.io_data().copy_from_slice(&[0x5a]);
        assert_eq!(guest.vcpu.complete_io().unwrap(), None);
        let registers = guest.registers();
        assert_eq!((registers.general[RAX], registers.rip), (0xffff_ffff_ffff_ff5a, CODE + 2));
        assert_eq!(guest.run(), Exit::IoIn { port: 0x74, size: 4, count: 1 });
        guest.vcpu.io_data().copy_from_slice(&0xdead_beefu32.to_le_bytes());
        // Without complete_io: the next run does it.
        guest.runs_to_its_end();
        assert_eq!(guest.registers().general[RAX], 0xdead_beef, "a 32-bit result is zero-extended");
    });
}

#[test]
fn test_registers_may_be_changed_after_completing() {
    // in al, 0x60
    on_each(&[0xe4, 0x60, NOP], |mut guest| {
        assert_eq!(guest.run(), Exit::IoIn { port: 0x60, size: 1, count: 1 });
        guest.vcpu.io_data().fill(1);
        guest.vcpu.complete_io().unwrap();
        let mut registers = guest.registers();
        registers.general[RAX] = 0x77;
        registers.rip = CODE + 3;
        guest.vcpu.set_registers(&registers).unwrap();
        assert_eq!(guest.run(), Exit::IoOut { port: MARKER_PORT, size: 1, count: 1, value: 0x77 });
    });
}

#[test]
fn test_string_out_gives_all_elements_in_their_order() {
    // rep outsw
    on_each(&[0xf3, 0x66, 0x6f], |guest| {
        let text: Vec<u8> = (0..64).collect();
        guest.memory.write(DATA, &text).unwrap();
        let mut guest = guest.with(&[(RDX, 0x80), (RSI, DATA), (RCX, 32)]);
        let mut seen = Vec::new();
        let mut exit = guest.run();
        while let Exit::IoOut { port: 0x80, size: 2, count, value } = exit {
            let data = guest.vcpu.io_data();
            assert_eq!(data.len(), 2 * count as usize);
            assert_eq!(value.to_le_bytes()[..2], data[..2]);
            seen.extend_from_slice(data);
            exit = match guest.vcpu.complete_io().unwrap() {
                Some(exit) => exit,
                None => guest.run(),
            };
        }
        assert!(matches!(exit, Exit::IoOut { port: MARKER_PORT, .. }), "{exit:?}");
        assert_eq!(seen, text);
        let registers = guest.registers();
        assert_eq!((registers.general[RCX], registers.general[RSI]), (0, DATA + 64));
    });
}

#[test]
fn test_string_in_writes_all_elements_to_memory() {
    // rep insb
    on_each(&[0xf3, 0x6c], |guest| {
        let mut guest = guest.with(&[(RDX, 0x81), (RDI, DATA), (RCX, 40)]);
        let mut next = 0u8;
        let mut exit = guest.run();
        while let Exit::IoIn { port: 0x81, size: 1, count } = exit {
            assert_eq!(guest.vcpu.io_data().len(), count as usize);
            for byte in guest.vcpu.io_data() {
                next += 1;
                *byte = next;
            }
            exit = match guest.vcpu.complete_io().unwrap() {
                Some(exit) => exit,
                None => guest.run(),
            };
        }
        assert!(matches!(exit, Exit::IoOut { port: MARKER_PORT, .. }), "{exit:?}");
        let mut seen = [0u8; 41];
        guest.memory.read(DATA, &mut seen).unwrap();
        assert!(seen[..40].iter().copied().eq(1..=40) && seen[40] == 0, "{seen:?}");
        assert_eq!(guest.registers().general[RDI], DATA + 40);
    });
}

#[test]
fn test_access_outside_of_ram_is_mmio_with_its_bytes() {
    // mov [rbx], rax; mov rax, [rbx + 8]; mov cx, [rbx]
    on_each(&[0x48, 0x89, 0x03, 0x48, 0x8b, 0x43, 0x08, 0x66, 0x8b, 0x0b], |guest| {
        let mut guest = guest.with(&[(RAX, 0x0102_0304_0506_0708), (RBX, DEVICE + 0x10), (RCX, u64::MAX)]);
        assert_eq!(guest.run(), Exit::MmioWrite { address: DEVICE_PHYSICAL + 0x10, size: 8 });
        assert_eq!(guest.vcpu.io_data(), 0x0102_0304_0506_0708u64.to_le_bytes());
        assert_eq!(guest.vcpu.complete_io().unwrap(), None);
        assert_eq!(guest.registers().rip, CODE + 3);
        assert_eq!(guest.run(), Exit::MmioRead { address: DEVICE_PHYSICAL + 0x18, size: 8 });
        guest.vcpu.io_data().copy_from_slice(&0xfeed_0000_0000_beefu64.to_le_bytes());
        assert_eq!(guest.vcpu.complete_io().unwrap(), None);
        let registers = guest.registers();
        assert_eq!((registers.general[RAX], registers.rip), (0xfeed_0000_0000_beef, CODE + 7));
        assert_eq!(guest.run(), Exit::MmioRead { address: DEVICE_PHYSICAL + 0x10, size: 2 });
        guest.vcpu.io_data().copy_from_slice(&[0xcd, 0xab]);
        guest.runs_to_its_end();
        assert_eq!(guest.registers().general[RCX], 0xffff_ffff_ffff_abcd);
    });
}

#[test]
fn test_exception_without_a_handler_is_a_shutdown() {
    // ud2
    on_each(&[0x0f, 0x0b], |mut guest| assert_eq!(guest.run(), Exit::Shutdown));
}

#[test]
fn test_kick_before_a_run_interrupts_it_and_only_it() {
    on_each(&[NOP], |mut guest| {
        guest.vcpu.kick_handle().kick();
        assert_eq!(guest.vcpu.run().unwrap(), Exit::Interrupted);
        assert!(matches!(guest.vcpu.run().unwrap(), Exit::IoOut { port: MARKER_PORT, .. }));
    });
}

#[test]
fn test_kick_during_a_run_interrupts_a_guest_that_spins_or_halts() {
    for code in [&SPIN[..], &[0xf4], &[0xfb, 0xf4]] {
        on_each(code, |mut guest| {
            let kick = guest.vcpu.kick_handle();
            let kicker = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(30));
                kick.kick();
            });
            let before = Instant::now();
            // A back end that leaves waiting to us gives an exit of its own first.
            while matches!(guest.vcpu.run().unwrap(), Exit::Hlt) {}
            assert!(before.elapsed() >= Duration::from_millis(25) && before.elapsed() < SOON);
            kicker.join().unwrap();
        });
    }
}

#[test]
fn test_kick_after_an_exit_outlives_the_completion_of_its_access() {
    // in al, 0x60; jmp $
    on_each(&[0xe4, 0x60, 0xeb, 0xfe], |mut guest| {
        assert_eq!(guest.run(), Exit::IoIn { port: 0x60, size: 1, count: 1 });
        guest.vcpu.io_data().fill(9);
        guest.vcpu.kick_handle().kick();
        assert_eq!(guest.vcpu.complete_io().unwrap(), None);
        assert_eq!(guest.vcpu.run().unwrap(), Exit::Interrupted, "the kick is lost");
        let registers = guest.registers();
        assert_eq!((registers.general[RAX], registers.rip), (9, CODE + 2));
    });
}

#[test]
fn test_kick_with_an_access_pending_completes_it_and_interrupts() {
    // in al, 0x60; jmp $
    on_each(&[0xe4, 0x60, 0xeb, 0xfe], |mut guest| {
        assert_eq!(guest.run(), Exit::IoIn { port: 0x60, size: 1, count: 1 });
        guest.vcpu.io_data().fill(9);
        guest.vcpu.kick_handle().kick();
        assert_eq!(guest.vcpu.run().unwrap(), Exit::Interrupted);
        assert_eq!(guest.vcpu.complete_io().unwrap(), None);
        let registers = guest.registers();
        assert_eq!((registers.general[RAX], registers.rip), (9, CODE + 2));
    });
}

#[test]
fn test_kick_at_any_moment_is_never_lost() {
    // out 0x60, al; jmp back
    on_each(&[0xe6, 0x60, 0xeb, 0xfc], |mut guest| {
        const KICKS: u32 = 2000;
        let answered = Arc::new(AtomicU32::new(0));
        let (count, kick) = (answered.clone(), guest.vcpu.kick_handle());
        let kicker = std::thread::spawn(move || {
            for n in 0..KICKS {
                for _ in 0..n % 97 {
                    std::hint::spin_loop();
                }
                kick.kick();
                let until = Instant::now() + SOON;
                while count.load(Ordering::SeqCst) <= n {
                    assert!(Instant::now() < until, "kick {n} is lost");
                    std::thread::yield_now();
                }
            }
        });
        while answered.load(Ordering::SeqCst) < KICKS {
            match guest.vcpu.run().unwrap() {
                Exit::Interrupted => drop(answered.fetch_add(1, Ordering::SeqCst)),
                Exit::IoOut { port: 0x60, .. } => {
                    assert_eq!(guest.vcpu.complete_io().unwrap(), None);
                    if kicker.is_finished() {
                        break;
                    }
                }
                other => panic!("{other:?}"),
            }
        }
        kicker.join().unwrap();
    });
}

#[test]
fn test_kick_ends_a_blocking_host_call_of_the_bound_thread() {
    on_each(&[NOP], |guest| {
        let kick = guest.vcpu.kick_handle();
        let kicker = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            kick.kick();
        });
        let before = Instant::now();
        // SAFETY: no descriptors.
        let result = unsafe { libc::poll(std::ptr::null_mut(), 0, 5000) };
        assert_eq!((result, std::io::Error::last_os_error().raw_os_error()), (-1, Some(libc::EINTR)));
        assert!(before.elapsed() < Duration::from_secs(4));
        kicker.join().unwrap();
    });
}

#[test]
fn test_kick_after_unbinding_or_the_vcpus_end_does_nothing() {
    on_each(&[NOP], |mut guest| {
        let kick = guest.vcpu.kick_handle();
        guest.vcpu.unbind();
        kick.kick();
        drop(guest);
        kick.kick();
    });
}

#[test]
fn test_general_registers_survive_the_round_trip_and_the_guest() {
    on_each(&[NOP], |mut guest| {
        let mut registers =
            Registers { general: std::array::from_fn(|i| 0x0101_0101_0101_0101 * i as u64), rip: CODE, rflags: 0xad7 };
        registers.general[RSP] = STACK;
        guest.vcpu.set_registers(&registers).unwrap();
        assert_eq!(guest.registers(), registers);
        guest.runs_to_its_end();
        guest.vcpu.complete_io().unwrap();
        registers.rip = CODE + 3;
        assert_eq!(guest.registers(), registers);
    });
}

#[test]
fn test_registers_are_true_however_seldom_they_are_asked_for() {
    // in al, 0x60; inc rbx; jmp back
    on_each(&[0xe4, 0x60, 0x48, 0xff, 0xc3, 0xeb, 0xf9], |mut guest| {
        let mut exits = 0u64;
        for gap in [1, 1, 2, 63, 64, 65, 200, 1] {
            for _ in 0..gap {
                assert_eq!(guest.run(), Exit::IoIn { port: 0x60, size: 1, count: 1 });
                guest.vcpu.io_data().fill(exits.to_le_bytes()[0]);
                exits += 1;
            }
            guest.vcpu.complete_io().unwrap();
            let mut registers = guest.registers();
            assert_eq!((registers.general[RBX], registers.rip), (exits - 1, CODE + 2));
            assert_eq!(registers.general[RAX], u64::from((exits - 1).to_le_bytes()[0]));
            // Writing back what was read changes nothing, now or later.
            registers.general[RCX] = exits;
            guest.vcpu.set_registers(&registers).unwrap();
            assert_eq!(guest.registers().general[RCX], exits);
        }
    });
}

#[test]
fn test_system_registers_survive_the_round_trip() {
    on_each(&[NOP], |mut guest| {
        let mut system = guest.vcpu.system_registers().unwrap();
        (system.fs.base, system.gs.base) = (0x1234_5678_9abc, 0xffff_8000_0000_1000);
        (system.cr2, system.cr8) = (0xdead_0000, 3);
        guest.vcpu.set_system_registers(&system).unwrap();
        assert_eq!(guest.vcpu.system_registers().unwrap(), system);
        guest.runs_to_its_end();
        assert_eq!(guest.vcpu.system_registers().unwrap(), system);
    });
}

#[test]
fn test_vector_state_survives_the_round_trip_and_is_the_guests() {
    // movaps [DATA], xmm3
    on_each(&[0x0f, 0x29, 0x1c, 0x25, 0x00, 0x90, 0x00, 0x00], |mut guest| {
        let mut fpu = FpuState {
            xmm: std::array::from_fn(|i| {
                0x1111_2222_3333_4444_5555_6666_7777_8888u128.rotate_left(u32::try_from(i).unwrap())
            }),
            mxcsr: 0x1fa0,
            fcw: 0x27f,
            ..guest.vcpu.fpu().unwrap()
        };
        fpu.st[2][..10].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 0x88, 0xff, 0x3f]);
        fpu.ftw = 0x04;
        guest.vcpu.set_fpu(&fpu).unwrap();
        let found = guest.vcpu.fpu().unwrap();
        assert_eq!(
            (found.xmm, found.mxcsr, found.fcw, found.ftw, found.st),
            (fpu.xmm, fpu.mxcsr, fpu.fcw, fpu.ftw, fpu.st)
        );
        guest.runs_to_its_end();
        assert_eq!(guest.memory.read_object::<u128>(DATA).unwrap(), fpu.xmm[3]);
        assert_eq!(guest.vcpu.fpu().unwrap().xmm, fpu.xmm);
    });
}

#[test]
fn test_upper_halves_of_the_ymm_registers_survive_beside_the_lower() {
    if !std::arch::is_x86_feature_detected!("avx") {
        println!("skipped: this CPU has no AVX");
        return;
    }
    on_each(&[NOP], |mut guest| {
        let fpu = FpuState { xmm: std::array::from_fn(|i| i as u128 + 1), ..guest.vcpu.fpu().unwrap() };
        guest.vcpu.set_fpu(&fpu).unwrap();
        assert_eq!(guest.vcpu.ymm_high().unwrap(), [0; 16]);
        let high: [u128; 16] = std::array::from_fn(|i| u128::MAX << i);
        guest.vcpu.set_ymm_high(&high).unwrap();
        assert_eq!(guest.vcpu.ymm_high().unwrap(), high);
        assert_eq!(guest.vcpu.fpu().unwrap().xmm, fpu.xmm);
        guest.runs_to_its_end();
        assert_eq!(guest.vcpu.ymm_high().unwrap(), high);
    });
}

#[test]
fn test_msrs_survive_the_round_trip_and_one_that_is_none_is_an_error() {
    on_each(&[NOP], |mut guest| {
        // LSTAR, SFMASK, KERNEL_GS_BASE.
        for (index, value) in [(0xc000_0082, 0xffff_8000_1234_5678), (0xc000_0084, 0x4_7700), (0xc000_0102, 0x7000)] {
            guest.vcpu.set_msr(index, value).unwrap();
            assert_eq!(guest.vcpu.msr(index).unwrap(), value, "{index:#x}");
        }
        assert!(guest.vcpu.set_msr(0xc000_0082, 1 << 63).is_err(), "a non-canonical LSTAR");
        assert_ne!(guest.vcpu.xcr0().unwrap() & 1, 0, "x87 is always on");
    });
}

#[test]
fn test_single_step_leaves_after_each_instruction_without_a_trace_in_the_flags() {
    // nop; inc rbx; nop
    on_each(&[NOP, 0x48, 0xff, 0xc3, NOP], |mut guest| {
        assert!(guest.backend.capabilities().unwrap().single_step);
        for next in [CODE + 1, CODE + 4, CODE + 5] {
            guest.vcpu.set_guest_debug(&GuestDebug { single_step: true, ..Default::default() }).unwrap();
            let event = guest.debug();
            assert!(event.single_step && !event.software, "{event:?}");
            assert_eq!(event.pc, next);
            let registers = guest.registers();
            assert_eq!((registers.rip, registers.rflags & RFLAGS_TF), (next, 0));
        }
        guest.vcpu.set_guest_debug(&GuestDebug::default()).unwrap();
        assert_eq!(guest.registers().rflags & RFLAGS_TF, 0);
        guest.runs_to_its_end();
        assert_eq!(guest.registers().general[RBX], 1);
    });
}

#[test]
fn test_single_step_armed_after_registers_were_set_takes() {
    on_each(&[NOP; 8], |mut guest| {
        let step = GuestDebug { single_step: true, ..Default::default() };
        for start in [4, 2, 6] {
            let mut registers = guest.registers();
            registers.rip = CODE + start;
            guest.vcpu.set_registers(&registers).unwrap();
            guest.vcpu.set_guest_debug(&step).unwrap();
            assert_eq!(guest.debug().pc, CODE + start + 1);
        }
    });
}

#[test]
fn test_single_step_of_port_accesses_is_over_when_they_are_completed() {
    // in al, 0x60; out 0x61, al
    on_each(&[0xe4, 0x60, 0xe6, 0x61], |mut guest| {
        let step = GuestDebug { single_step: true, ..Default::default() };
        for next in [CODE + 2, CODE + 4] {
            guest.vcpu.set_guest_debug(&step).unwrap();
            match guest.run() {
                Exit::IoIn { port: 0x60, .. } => guest.vcpu.io_data().fill(7),
                Exit::IoOut { port: 0x61, value: 7, .. } => {}
                other => panic!("{other:?}"),
            }
            let done = guest.vcpu.complete_io().unwrap();
            assert!(matches!(done, None | Some(Exit::Debug(DebugEvent { software: false, .. }))), "{done:?}");
            assert_eq!(guest.registers().rip, next);
        }
        guest.vcpu.set_guest_debug(&GuestDebug::default()).unwrap();
        guest.runs_to_its_end();
    });
}

#[test]
fn test_single_step_of_hlt_does_not_wait() {
    on_each(&[0xf4, NOP], |mut guest| {
        guest.vcpu.set_guest_debug(&GuestDebug { single_step: true, ..Default::default() }).unwrap();
        let before = Instant::now();
        assert!(matches!(guest.vcpu.run().unwrap(), Exit::Debug(_) | Exit::Hlt));
        assert!(before.elapsed() < Duration::from_secs(1));
        assert_eq!(guest.registers().rip, CODE + 1);
    });
}

#[test]
fn test_hardware_breakpoints_fire_before_their_instruction_and_not_once_taken_away() {
    on_each(&[NOP; 8], |mut guest| {
        let working = guest.backend.capabilities().unwrap().hardware_breakpoints;
        if working < 4 {
            println!("skipped: {working} hardware breakpoints");
            return;
        }
        let hardware = (1..5).map(|i| HardwareBreakpoint::execute(CODE + i)).collect();
        let mut debug = GuestDebug { hardware, ..Default::default() };
        guest.vcpu.set_guest_debug(&debug).unwrap();
        let event = guest.debug();
        assert_eq!((event.pc, event.hardware & 1, event.software), (CODE + 1, 1, false));
        debug.hardware.remove(0);
        guest.vcpu.set_guest_debug(&debug).unwrap();
        assert_eq!(guest.debug().pc, CODE + 2);
        guest.vcpu.set_guest_debug(&GuestDebug::default()).unwrap();
        guest.runs_to_its_end();
    });
}

#[test]
fn test_int3_under_debug_does_what_was_probed() {
    on_each(&[0xcc], |guest| {
        let mut guest = guest.with_handlers();
        let int3 = guest.backend.capabilities().unwrap().int3;
        guest.vcpu.set_guest_debug(&GuestDebug { software_breakpoints: true, ..Default::default() }).unwrap();
        match (int3, guest.run()) {
            (Int3::DebugExit, Exit::Debug(event)) => assert!(event.software && event.pc == CODE),
            (Int3::Unemulated, Exit::Unemulated) => {}
            (Int3::NotIntercepted, Exit::IoOut { port: HANDLER_PORT, .. }) => return,
            (probed, exit) => panic!("{probed:?}, but {exit:?}"),
        }
        assert_eq!(guest.registers().rip, CODE, "not yet executed");
    });
}

#[test]
fn test_injected_exception_is_delivered_once_with_its_error_code_and_address() {
    on_each(&[NOP, NOP], |guest| {
        let mut guest = guest.with_handlers();
        let exceptions = [
            Exception { vector: 6, error_code: None, address: None },
            Exception { vector: 13, error_code: Some(0x18), address: None },
            Exception { vector: 14, error_code: Some(2), address: Some(0x7fff_1234) },
        ];
        for exception in exceptions {
            let mut registers = guest.registers();
            (registers.rip, registers.general[RSP]) = (CODE, STACK);
            guest.vcpu.set_registers(&registers).unwrap();
            guest.vcpu.inject(exception).unwrap();
            assert!(matches!(guest.run(), Exit::IoOut { port: HANDLER_PORT, .. }), "{exception:?}");
            guest.vcpu.complete_io().unwrap();
            let registers = guest.registers();
            assert_eq!(registers.rip, HANDLERS + 16 * u64::from(exception.vector) + 2);
            let mut frame = registers.general[RSP];
            if let Some(code) = exception.error_code {
                assert_eq!(guest.memory.read_object::<u64>(frame).unwrap(), u64::from(code));
                frame += 8;
            }
            assert_eq!(guest.memory.read_object::<u64>(frame).unwrap(), CODE, "a fault's address is its instruction's");
            if let Some(address) = exception.address {
                assert_eq!(guest.vcpu.system_registers().unwrap().cr2, address);
            }
            guest.runs_to_its_end();
            guest.vcpu.complete_io().unwrap();
        }
    });
}

#[test]
fn test_injected_exception_outlives_an_interruption() {
    on_each(&[NOP], |guest| {
        let mut guest = guest.with_handlers();
        guest.vcpu.inject(Exception { vector: 6, error_code: None, address: None }).unwrap();
        for _ in 0..3 {
            guest.vcpu.kick_handle().kick();
            assert_eq!(guest.vcpu.run().unwrap(), Exit::Interrupted);
        }
        let registers = guest.registers();
        guest.vcpu.set_registers(&registers).unwrap();
        assert!(matches!(guest.run(), Exit::IoOut { port: HANDLER_PORT, .. }));
        guest.runs_to_its_end();
    });
}

#[test]
fn test_injected_breakpoint_exception_comes_before_the_instruction_however_often_it_is_interrupted() {
    // int3
    on_each(&[0xcc], |guest| {
        let mut guest = guest.with_handlers();
        assert!(guest.vcpu.is_at_instruction().unwrap());
        if guest.backend.capabilities().unwrap().int3 == Int3::Unemulated {
            let mut registers = guest.registers();
            registers.rip += 1;
            guest.vcpu.set_registers(&registers).unwrap();
        }
        guest.vcpu.inject(Exception { vector: 3, error_code: None, address: None }).unwrap();
        for _ in 0..3 {
            assert!(!guest.vcpu.is_at_instruction().unwrap(), "it waits to be delivered");
            guest.vcpu.kick_handle().kick();
            assert_eq!(guest.vcpu.run().unwrap(), Exit::Interrupted);
        }
        let exit = guest.run();
        assert!(matches!(exit, Exit::IoOut { port: HANDLER_PORT, .. }), "{exit:?}");
        guest.vcpu.complete_io().unwrap();
        assert!(guest.vcpu.is_at_instruction().unwrap());
    });
}

#[test]
fn test_unknown_backend_is_an_error_that_names_the_choices() {
    let memory = GuestMemory::new(0, 0x20_0000, Backing::default()).unwrap();
    match backend::open("vax", &memory, &MachineOptions::default()) {
        Err(Error::Config(text)) => assert!(text.contains("vax") && text.contains("kvm"), "{text}"),
        _ => panic!("opened"),
    }
}
