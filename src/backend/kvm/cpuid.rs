//! CPUID as a vCPU sees it: what KVM supports on this host, with the topology made true for each vCPU.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use super::failed;
use crate::error::{Error, Result};

const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_MSR: u32 = 1 << 5;
const BRAND: &[u8; 48] = b"uhyve - unikernel hypervisor\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

/// CPUID of vCPU `number` of `cpus`.
pub(super) fn for_vcpu(kvm: &Kvm, number: u32, cpus: u32) -> Result<CpuId> {
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
    let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    let mut entries = supported.as_slice().to_vec();
    entries.retain(|e| !matches!(e.function, 0xb | 0x1f));
    for entry in &mut entries {
        patch(entry, number, cpus, deadline);
    }
    entries.extend(topology(number, cpus));
    CpuId::from_entries(&entries)
        .map_err(|_| Error::Config("this KVM reports more CPUID leaves than it accepts".into()))
}

fn patch(entry: &mut kvm_cpuid_entry2, number: u32, cpus: u32, deadline: bool) {
    match entry.function {
        0x1 => {
            entry.ecx |= ECX_HYPERVISOR | if deadline { ECX_TSC_DEADLINE } else { 0 };
            entry.edx |= EDX_MSR;
            // Initial APIC id in bits 31–24, logical processors in bits 23–16 (Intel SDM, CPUID leaf 1).
            entry.ebx = (entry.ebx & 0xffff) | (number.min(255) << 24) | (cpus.min(255) << 16);
        }
        // No performance counters.
        0xa => entry.eax = 0,
        0x8000_0002..=0x8000_0004 => {
            let at = 16 * (entry.function - 0x8000_0002) as usize;
            let word = |i: usize| u32::from_le_bytes(BRAND[at + 4 * i..at + 4 * i + 4].try_into().expect("four bytes"));
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (word(0), word(1), word(2), word(3));
        }
        // Extended APIC id (AMD APM, CPUID Fn8000_001E).
        0x8000_001e => entry.eax = number,
        _ => {}
    }
}

/// Leaf 0xB: one thread a core, all cores in one package.
fn topology(number: u32, cpus: u32) -> [kvm_cpuid_entry2; 3] {
    let flags = kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
    let bits = cpus.next_power_of_two().trailing_zeros();
    let level = |index: u32, eax: u32, ebx: u32, kind: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags,
        eax,
        ebx,
        ecx: index | kind << 8,
        edx: number,
        ..Default::default()
    };
    [level(0, 0, 1, 1), level(1, bits, cpus, 2), level(2, 0, 0, 0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_topology_of_each_vcpu_has_its_own_id() {
        let leaves = topology(3, 6);
        assert!(leaves.iter().all(|l| l.edx == 3 && l.function == 0xb));
        assert_eq!((leaves[1].eax, leaves[1].ebx, leaves[1].ecx), (3, 6, 0x201));
        let mut leaf1 = kvm_cpuid_entry2 { function: 1, ebx: 0xff12_3456, ..Default::default() };
        patch(&mut leaf1, 5, 8, true);
        assert_eq!(leaf1.ebx, 0x0508_3456);
        assert_eq!(leaf1.ecx, ECX_HYPERVISOR | ECX_TSC_DEADLINE);
    }
}
