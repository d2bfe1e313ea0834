//! What an exit costs: a port write through this crate's whole loop (thread, dispatch, counters), against a bare
//! KVM_RUN loop in the same process. Prints the ratio of interleaved rounds, then criterion's own figures.
//!
//! `cargo bench --bench exits`

use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit};
use uhyve_core::boot::Image;
use uhyve_core::debug::engine::{Plan, Status};
use uhyve_core::devices::serial::Output;
use uhyve_core::error::Error;
use uhyve_core::memory::{Backing, GuestMemory};
use uhyve_core::registers::RCX;
use uhyve_core::vm::{Config, Machine};

/// Exits a round.
const COUNT: u64 = 20_000;
/// Interleaved rounds for the ratio.
const ROUNDS: usize = 15;
/// A port that nothing answers.
const PORT: u8 = 0x99;
/// `again: out 0x99, al; dec rcx; jnz again`, then `mov dx, 0x1010; xor edi, edi; out dx, eax`: exit with code 0.
const PROGRAM: [u8; 14] = [0xe6, PORT, 0x48, 0xff, 0xc9, 0x75, 0xf9, 0x66, 0xba, 0x10, 0x10, 0x31, 0xff, 0xef];

/// A machine of ours that does [`COUNT`] port writes and exits, in whole seconds of its run.
fn ours() -> Duration {
    let config = Config {
        image: Arc::new(Image::from_bytes("demo", uhyve_core::demo::IMAGE.to_vec()).expect("the package's own image")),
        memory: None,
        cpus: None,
        kernel_args: None,
        args: None,
        environment: Vec::new(),
        files: Vec::new(),
        output: Output::Discard,
        backend: "kvm".into(),
        aslr: false,
        backing: Backing::default(),
        pit: false,
        cpu_pm: false,
        affinity: Vec::new(),
        tempdir: None,
        isolation: uhyve_core::isolation::landlock::FileIsolation::None,
        io_mode: Default::default(),
        soft: Default::default(),
        debugging: true,
        wrapper: None,
        measure: Default::default(),
    };
    let machine = Machine::start(config).expect("KVM works here");
    let mut check = || Ok::<(), Error>(());
    machine.wait(None, &mut check).expect("it stops at its entry");
    machine
        .with_vcpu(0, |context| {
            let mut registers = context.cpu.registers()?;
            let mode = (&context.cpu.system_registers()?).into();
            machine.view().write(&mode, registers.rip, &PROGRAM)?;
            registers.general[RCX] = COUNT;
            context.cpu.set_registers(&registers)
        })
        .expect("the guest is stopped");
    let start = Instant::now();
    machine.resume(|_| Plan::Run).expect("the guest is stopped");
    let status = machine.wait(None, &mut check).expect("it ends");
    let took = start.elapsed();
    assert!(matches!(status, Some(Status::Stopped(stop)) if stop.reason.name() == "exit"));
    machine.close();
    took
}

/// The same program on kvm-ioctls alone.
fn bare() -> Duration {
    let kvm = Kvm::new().expect("KVM works here");
    let vm = kvm.create_vm().expect("KVM makes a VM");
    let memory = GuestMemory::new(0, 2 << 20, Backing::default()).expect("2 MiB are there");
    for (table, entry) in [(0x1000u64, 0x2003u64), (0x2000, 0x3003), (0x3000, 0x83)] {
        memory.write_object(table, entry).expect("in RAM");
    }
    memory.write(0x8000, &PROGRAM).expect("in RAM");
    let region = kvm_userspace_memory_region {
        memory_size: memory.size(),
        userspace_addr: memory.host_pointer() as u64,
        ..Default::default()
    };
    // SAFETY: `memory` outlives `vm`'s last use.
    unsafe { vm.set_user_memory_region(region) }.expect("KVM takes the slot");
    let mut vcpu = vm.create_vcpu(0).expect("KVM makes a vCPU");
    let mut sregs = vcpu.get_sregs().expect("KVM gives registers");
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8000_0031, 0x1000, 0x20, 0x500);
    (sregs.cs.base, sregs.cs.selector, sregs.cs.l, sregs.cs.db, sregs.cs.type_, sregs.cs.g) = (0, 8, 1, 0, 11, 1);
    (sregs.cs.limit, sregs.ss.limit, sregs.ss.g, sregs.ss.type_) = (u32::MAX, u32::MAX, 1, 3);
    vcpu.set_sregs(&sregs).expect("KVM takes registers");
    let mut regs = vcpu.get_regs().expect("KVM gives registers");
    (regs.rip, regs.rcx, regs.rflags, regs.rsp) = (0x8000, COUNT, 2, 0x7000);
    vcpu.set_regs(&regs).expect("KVM takes registers");
    let start = Instant::now();
    loop {
        match vcpu.run().expect("the guest runs") {
            VcpuExit::IoOut(port, _) if port == u16::from(PORT) => {}
            VcpuExit::IoOut(0x1010, _) => return start.elapsed(),
            other => panic!("unexpected exit {other:?}"),
        }
    }
}

/// The median ratio of rounds in turn, and its quartiles.
fn ratio() {
    let mut ratios: Vec<f64> = (0..ROUNDS).map(|_| ours().as_secs_f64() / bare().as_secs_f64()).collect();
    ratios.sort_by(f64::total_cmp);
    let at = |part: usize| ratios[part * (ROUNDS - 1) / 4];
    println!(
        "port exit, ours / bare KVM_RUN: median {:.3} (quartiles {:.3} to {:.3}) of {ROUNDS} rounds of {COUNT} exits",
        at(2),
        at(1),
        at(3)
    );
}

fn benchmarks(c: &mut Criterion) {
    if Kvm::new().is_err() {
        println!("exits: skipped, /dev/kvm can't be opened");
        return;
    }
    ratio();
    let mut group = c.benchmark_group("port_exit");
    group.sample_size(10);
    for (name, run) in [("bare", bare as fn() -> Duration), ("ours", ours)] {
        group.bench_function(name, |b| {
            b.iter_custom(|n| {
                let rounds = n.div_ceil(COUNT);
                let total: Duration = (0..rounds).map(|_| run()).sum();
                total.mul_f64(n as f64 / (rounds * COUNT) as f64)
            });
        });
    }
    group.finish();
}

criterion_group!(benches, benchmarks);
criterion_main!(benches);
