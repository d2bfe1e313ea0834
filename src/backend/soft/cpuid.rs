//! What CPUID tells of the machine: which vCPU this is, how many there are, the interrupt controller and the clock. The
//! CPU's own features are its own to tell.

use super::clock::TSC_KHZ;

const ECX_X2APIC: u32 = 1 << 21;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_APIC: u32 = 1 << 9;
const EDX_INVARIANT_TSC: u32 = 1 << 8;
const HIGHEST_LEAF: u32 = 0x16;
const BRAND: &[u8; 48] = b"uhyve - unikernel hypervisor (software CPU)\0\0\0\0\0";

/// CPUID of vCPU `number` of `cpus`; `table` is what the CPU answers.
pub(super) fn cpuid(leaf: u32, subleaf: u32, table: [u32; 4], number: u32, cpus: u32) -> [u32; 4] {
    let [eax, ebx, ecx, edx] = table;
    match leaf {
        0 => [eax.max(HIGHEST_LEAF), ebx, ecx, edx],
        // Initial APIC id in bits 31–24, logical processors in bits 23–16.
        1 => [
            eax,
            (ebx & 0xffff) | number.min(255) << 24 | cpus.min(255) << 16,
            ecx | ECX_X2APIC | ECX_TSC_DEADLINE | ECX_HYPERVISOR,
            edx | EDX_APIC,
        ],
        0xb | 0x1f => topology(subleaf, number, cpus),
        // The time stamp counter is a crystal's clock, one to one.
        0x15 => [1, 1, TSC_KHZ * 1000, 0],
        0x16 => [TSC_KHZ / 1000, TSC_KHZ / 1000, 100, 0],
        0x8000_0000 => [eax.max(0x8000_0008), ebx, ecx, edx],
        0x8000_0002..=0x8000_0004 => {
            let at = 16 * (leaf - 0x8000_0002) as usize;
            let word = |i: usize| u32::from_le_bytes(BRAND[at + 4 * i..at + 4 * i + 4].try_into().expect("four bytes"));
            [word(0), word(1), word(2), word(3)]
        }
        0x8000_0007 => [eax, ebx, ecx, edx | EDX_INVARIANT_TSC],
        _ => table,
    }
}

/// Leaf 0xB: one thread a core, all cores in one package.
fn topology(subleaf: u32, number: u32, cpus: u32) -> [u32; 4] {
    let bits = cpus.next_power_of_two().trailing_zeros();
    let (shift, count, kind) = match subleaf {
        0 => (0, 1, 1),
        1 => (bits, cpus, 2),
        _ => (0, 0, 0),
    };
    [shift, count, (subleaf & 0xff) | kind << 8, number]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_each_vcpu_finds_its_own_id() {
        let ids = |number| (cpuid(1, 0, [1, 0xffff_0802, 2, 4], number, 6), cpuid(0xb, 1, [0; 4], number, 6));
        assert_eq!(ids(3).0, [1, 0x0306_0802, 2 | ECX_X2APIC | ECX_TSC_DEADLINE | ECX_HYPERVISOR, 4 | EDX_APIC]);
        assert_eq!(ids(5).1, [3, 6, 0x201, 5]);
        assert_eq!(cpuid(0xb, 7, [0; 4], 5, 6), [0, 0, 7, 5]);
    }

    #[test]
    fn test_frequency_is_that_of_the_clock() {
        assert_eq!(cpuid(0x15, 0, [0; 4], 0, 1), [1, 1, 1_000_000_000, 0]);
        assert!(cpuid(0, 0, [1, 2, 3, 4], 0, 1)[0] >= 0x16);
    }
}
