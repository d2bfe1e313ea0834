//! What makes the closing of a VM quick. Linux 6.18 frees what its interrupt controllers' registration has replaced after a
//! grace period that takes some ticks of the kernel's clock, and a VM's end waits for that: 13 ms with 250 ticks a second,
//! for a guest that lives 2 ms. A grace period that somebody waits for is hastened, and ends with the next tick.

use std::os::fd::AsRawFd;

use kvm_bindings::{KVM_PMU_EVENT_DENY, kvm_pmu_event_filter};
use kvm_ioctls::VmFd;

/// KVM_SET_PMU_EVENT_FILTER = _IOW(KVMIO, 0xb2, struct kvm_pmu_event_filter), whose list has no place in the size.
const SET_PMU_EVENT_FILTER: libc::c_ulong = 0x4020_aeb2;

/// Ends the VM's grace period, and waits for it meanwhile: by a filter that denies no event, which is how a VM begins. A
/// KVM that has no such filter loses nothing.
pub(super) fn hasten(vm: &VmFd) {
    let filter = kvm_pmu_event_filter { action: KVM_PMU_EVENT_DENY, ..Default::default() };
    // SAFETY: a VM's fd that is open, and a filter with a list of no events, which the kernel only reads.
    unsafe { libc::ioctl(vm.as_raw_fd(), SET_PMU_EVENT_FILTER, &raw const filter) };
}
