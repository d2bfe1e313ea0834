//! The floor under stops of the world: threads in bare KVM_RUN loops whose guests spin, kicked together. Each notes when
//! it came out, the last one wakes who kicked; nothing else is done. With more threads than host CPUs it is mostly the
//! host's scheduler, which a stop of a VM can't be quicker than.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Barrier, Condvar, Mutex};
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use super::floor::{self, CODE, MEMORY, TABLES};
use crate::backend::Kick;
use crate::backend::kvm::kick::KvmKick;
use crate::backend::kvm::open_kvm;
use crate::error::{Error, Result};
use crate::memory::{Backing, GuestMemory};
use crate::stats::clock;

/// `jmp` to itself.
const SPIN: [u8; 2] = [0xeb, 0xfe];
/// Longer than this no round takes.
const DEADLINE: Duration = Duration::from_secs(10);
/// The spinning guests run so long before they are kicked.
const BETWEEN: Duration = Duration::from_millis(1);

/// What the threads and who kicks them share.
struct Crowd {
    round: Mutex<u64>,
    begins: Condvar,
    /// Those that have not come out in this round.
    inside: AtomicUsize,
    /// When each went in for the last time.
    entered: Vec<AtomicU64>,
    over: AtomicBool,
    told: EventFd,
}

/// Nanoseconds from the first kick until who kicked is told that all are out, of so many rounds.
pub fn measure(cpus: u32, rounds: u32) -> Result<Vec<f64>> {
    let memory = GuestMemory::new(0, MEMORY, Backing::default())?;
    for (table, entry) in TABLES {
        memory.write_object(table, entry)?;
    }
    memory.write(CODE, &SPIN)?;
    let kvm = open_kvm()?;
    // SAFETY: `memory` is declared before the VM and its vCPUs, which are gone before it.
    let vm = unsafe { floor::bare_vm(&kvm, &memory) }?;
    let vcpus = (0..cpus).map(|n| floor::kvm_vcpu(&kvm, &vm, n)).collect::<Result<Vec<_>>>()?;
    let crowd = Crowd {
        round: Mutex::new(0),
        begins: Condvar::new(),
        inside: AtomicUsize::new(0),
        entered: (0..cpus).map(|_| AtomicU64::new(0)).collect(),
        over: AtomicBool::new(false),
        told: EventFd::new().map_err(|e| Error::Host { what: "can't make an eventfd".into(), source: e.into() })?,
    };
    let kicks: Vec<_> = vcpus.iter().map(|_| KvmKick::new()).collect();
    let ready = Barrier::new(vcpus.len() + 1);
    std::thread::scope(|scope| {
        let threads: Vec<_> = vcpus
            .into_iter()
            .zip(&kicks)
            .enumerate()
            .map(|(n, (vcpu, kick))| {
                let (crowd, ready) = (&crowd, &ready);
                scope.spawn(move || crowd.body(n, vcpu, kick, ready))
            })
            .collect();
        ready.wait();
        let found = (0..rounds).map(|_| crowd.round(&kicks)).collect();
        crowd.begin(true);
        kicks.iter().for_each(Kick::kick);
        for thread in threads {
            thread.join().unwrap_or_else(|_| Err(Error::VmState("a thread of the floor has panicked".into())))?;
        }
        found
    })
}

impl Crowd {
    /// A thread: spins in its guest once a round.
    fn body(&self, n: usize, mut vcpu: VcpuFd, kick: &KvmKick, ready: &Barrier) -> Result<()> {
        let flag: *mut u8 = &mut vcpu.get_kvm_run().immediate_exit;
        // SAFETY: the byte lives as long as the vCPU's page, has no alignment, and everybody uses it atomically.
        let flag = unsafe { std::sync::atomic::AtomicU8::from_ptr(flag) };
        let bound = crate::backend::signal::unblock().and_then(|()| kick.bind(flag));
        ready.wait();
        bound?;
        let mut seen = 0;
        loop {
            let begun = self.begins.wait_while(self.lock(), |round| *round == seen);
            seen = *begun.unwrap_or_else(|e| e.into_inner());
            if self.over.load(Ordering::SeqCst) {
                break;
            }
            self.entered[n].store(clock::now(), Ordering::SeqCst);
            // SAFETY: a vCPU fd that is open, and a request without argument; the guest spins in its own memory.
            while unsafe { libc::ioctl(vcpu.as_raw_fd(), floor::KVM_RUN, 0) } == 0 {}
            flag.store(0, Ordering::SeqCst);
            if self.inside.fetch_sub(1, Ordering::SeqCst) == 1 {
                let _ = self.told.write(1);
            }
        }
        // Before the page goes.
        kick.unbind();
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, u64> {
        self.round.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn begin(&self, over: bool) {
        let mut round = self.lock();
        self.over.store(over, Ordering::SeqCst);
        self.inside.store(self.entered.len(), Ordering::SeqCst);
        *round += 1;
        self.begins.notify_all();
    }

    /// Lets all of them spin for a while, and kicks them.
    fn round(&self, kicks: &[KvmKick]) -> Result<f64> {
        let (begun, since) = (clock::now(), Instant::now());
        self.begin(false);
        while since.elapsed() < DEADLINE && self.entered.iter().any(|e| e.load(Ordering::SeqCst) < begun) {
            std::thread::sleep(BETWEEN / 8);
        }
        std::thread::sleep(BETWEEN);
        let asked = clock::now();
        kicks.iter().for_each(Kick::kick);
        let mut told = [PollFd::new(std::os::fd::AsFd::as_fd(&self.told), PollFlags::POLLIN)];
        let limit = PollTimeout::try_from(DEADLINE).unwrap_or(PollTimeout::NONE);
        let come = poll(&mut told, limit).is_ok_and(|n| n == 1);
        let took = clock::now().saturating_sub(asked) as f64 / clock::ticks_per_ns();
        if !come {
            return Err(Error::VmState("the bare threads have not come out of their guests".into()));
        }
        self.told.read().map_err(|e| Error::Host { what: "can't read an eventfd".into(), source: e.into() })?;
        Ok(took)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_crowd_of_bare_threads_comes_out_at_each_kick() {
        if open_kvm().is_err() {
            return;
        }

        let found = measure(2, 3).unwrap();

        assert_eq!(found.len(), 3);
        assert!(found.iter().all(|ns| *ns > 0.0));
    }
}
