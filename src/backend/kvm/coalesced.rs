//! Port writes that KVM queues in a ring instead of leaving the guest for each (KVM_REGISTER_COALESCED_MMIO with PIO).
//! One ring a VM, shared with the kernel: it moves `last`, we move `first`. A full ring makes the next write an exit.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{KVM_COALESCED_MMIO_PAGE_OFFSET, kvm_coalesced_mmio, kvm_coalesced_mmio_ring};

use crate::backend::Coalesced;
use crate::error::{Error, Result};

const PAGE: usize = 4096;
#[allow(clippy::cast_possible_truncation)]
/// Entries that fit behind the header in the one page of the ring.
const ENTRIES: u32 = ((PAGE - size_of::<kvm_coalesced_mmio_ring>()) / size_of::<kvm_coalesced_mmio>()) as u32;

/// The ring of one VM, mapped through one of its vCPUs.
pub(super) struct Ring {
    page: *mut kvm_coalesced_mmio_ring,
    consumer: Mutex<()>,
}

// SAFETY: the two indices are used as atomics; entries between them belong to the one who holds `consumer`.
unsafe impl Send for Ring {}
// SAFETY: as above.
unsafe impl Sync for Ring {}

impl Ring {
    pub(super) fn map(vcpu: BorrowedFd<'_>) -> Result<Self> {
        let offset = i64::from(KVM_COALESCED_MMIO_PAGE_OFFSET) * PAGE as i64;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping of one page of a vCPU fd, at the offset that KVM's interface gives the ring.
        let page =
            unsafe { libc::mmap(std::ptr::null_mut(), PAGE, protection, libc::MAP_SHARED, vcpu.as_raw_fd(), offset) };
        if page == libc::MAP_FAILED {
            return Err(Error::Hypervisor {
                call: "mmap of the coalesced ring",
                source: std::io::Error::last_os_error(),
            });
        }
        Ok(Self { page: page.cast(), consumer: Mutex::new(()) })
    }

    fn first(&self) -> &AtomicU32 {
        // SAFETY: the page is mapped as long as `self` lives, and the kernel accesses the index atomically too.
        unsafe { AtomicU32::from_ptr(&raw mut (*self.page).first) }
    }

    fn last(&self) -> &AtomicU32 {
        // SAFETY: as for `first`.
        unsafe { AtomicU32::from_ptr(&raw mut (*self.page).last) }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: mapped in `map`, and nobody uses it any more.
        unsafe { libc::munmap(self.page.cast(), PAGE) };
    }
}

impl Coalesced for Ring {
    fn marks(&self) -> (&AtomicU32, &AtomicU32) {
        (self.first(), self.last())
    }

    fn drain(&self, take: &mut dyn FnMut(u16, &[u8]) -> bool) {
        if self.is_empty() {
            return;
        }
        let _consumer = self.consumer.lock().unwrap_or_else(|e| e.into_inner());
        loop {
            let first = self.first().load(Ordering::Relaxed);
            if first == self.last().load(Ordering::Acquire) || first >= ENTRIES {
                return;
            }
            // SAFETY: `first` is below the number of entries in the page, and the kernel wrote the entry before it moved `last`.
            let entry = unsafe { (*self.page).coalesced_mmio.as_ptr().add(first as usize).read_volatile() };
            let length = (entry.len as usize).min(entry.data.len());
            let port = u16::try_from(entry.phys_addr).unwrap_or(u16::MAX);
            if !take(port, &entry.data[..length]) {
                return;
            }
            self.first().store((first + 1) % ENTRIES, Ordering::Release);
        }
    }
}
