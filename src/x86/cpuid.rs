//! What CPUID answers (Intel SDM volume 2, CPUID): only features that this CPU has, the same on every host that can do
//! its SSE. The platform adds topology, APIC ids and frequencies.

use super::features::features;
use super::mmu::PHYSICAL_BITS;
use super::state::State;
use crate::registers::CR4_OSXSAVE;

/// XCR0: upper halves of the YMM registers.
const XCR0_AVX: u64 = 4;
/// Highest basic and extended leaves.
const LAST: u32 = 0x1f;
const LAST_EXTENDED: u32 = 0x8000_0008;
/// Family 6, model 85, stepping 4.
const SIGNATURE: u32 = 0x0005_0654;
const BRAND: &[u8; 48] = b"uhyve software CPU\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
/// Bytes of an XSAVE area without and with the AVX component.
const XSAVE_BASE: u32 = 576;
const XSAVE_AVX: u32 = 832;

/// A register with these bits set.
const fn bits(numbers: &[u32]) -> u32 {
    let (mut value, mut i) = (0, 0);
    while i < numbers.len() {
        value |= 1 << numbers[i];
        i += 1;
    }
    value
}

/// What the CPU adds to the instruction sets of [`features`]. Leaf 1, ECX: x2APIC, TSC deadline, hypervisor.
const LEAF1_ECX: u32 = bits(&[21, 24, 31]);
/// Leaf 1, EDX: DE, PSE, MSR, PAE, APIC, MTRR, PGE, PAT, PSE36.
const LEAF1_EDX: u32 = bits(&[2, 3, 5, 6, 9, 12, 13, 16, 17]);
/// Leaf 7, EBX: SMEP, INVPCID, SMAP.
const LEAF7_EBX: u32 = bits(&[7, 10, 20]);
/// Leaf 7, ECX: UMIP.
const LEAF7_ECX: u32 = bits(&[2]);

/// Whether XSETBV accepts the value.
pub(super) fn is_valid_xcr0(value: u64) -> bool {
    let avx_without_sse = value & 6 == XCR0_AVX;
    value & 1 != 0 && value & !features().components == 0 && !avx_without_sse
}

/// The registers EAX, EBX, ECX and EDX that CPUID gives for a leaf in that state.
pub fn cpuid(leaf: u32, subleaf: u32, state: &State) -> [u32; 4] {
    match leaf {
        0 => [LAST, 0x756e_6547, 0x6c65_746e, 0x4965_6e69],
        1 => signature(state),
        2 => [0x00fe_ff01, 0, 0, 0],
        4 => cache(subleaf),
        // The APIC timer always runs.
        6 => [bits(&[2]), 0, 0, 0],
        7 if subleaf == 0 => [0, LEAF7_EBX | features().structured_ebx, LEAF7_ECX | features().structured_ecx, 0],
        0xb | 0x1f => topology(subleaf),
        0xd => extended_state(subleaf, state),
        0x8000_0000 => [LAST_EXTENDED, 0, 0, 0],
        // SYSCALL, NX, 1 GiB pages, RDTSCP, long mode.
        0x8000_0001 => [0, 0, features().extended_ecx, bits(&[11, 20, 26, 27, 29])],
        0x8000_0002..=0x8000_0004 => brand(leaf - 0x8000_0002),
        0x8000_0006 => [0, 0, 0x0100_6040, 0],
        // The time-stamp counter runs at one rate.
        0x8000_0007 => [0, 0, 0, bits(&[8])],
        0x8000_0008 => [PHYSICAL_BITS | 48 << 8, 0, 0, 0],
        _ => [0; 4],
    }
}

/// Leaf 1.
fn signature(state: &State) -> [u32; 4] {
    let has_osxsave = state.core.system.cr4 & CR4_OSXSAVE != 0;
    let ecx = LEAF1_ECX | features().basic_ecx | u32::from(has_osxsave) << 27;
    // CLFLUSH works on 8 units of 8 bytes; one logical processor.
    [SIGNATURE, 8 << 8 | 1 << 16, ecx, LEAF1_EDX | features().basic_edx]
}

/// Leaf 4: 32 KiB of first-level caches, 1 MiB behind them.
fn cache(subleaf: u32) -> [u32; 4] {
    let describe =
        |kind: u32, level: u32, ways: u32, sets: u32| [kind | level << 5 | 1 << 8, 63 | (ways - 1) << 22, sets - 1, 0];
    match subleaf {
        0 => describe(1, 1, 8, 64),
        1 => describe(2, 1, 8, 64),
        2 => describe(3, 2, 16, 1024),
        _ => [0; 4],
    }
}

/// Leaves 0xB and 0x1F of a single processor.
fn topology(subleaf: u32) -> [u32; 4] {
    match subleaf {
        0 => [0, 1, 0x100, 0],
        1 => [0, 1, 0x201, 0],
        _ => [0, 0, subleaf & 0xff, 0],
    }
}

/// Leaf 0xD: what the XSAVE family handles.
fn extended_state(subleaf: u32, state: &State) -> [u32; 4] {
    let size = |components: u64| if components & XCR0_AVX != 0 { XSAVE_AVX } else { XSAVE_BASE };
    let low = |value: u64| u32::try_from(value & 0xffff_ffff).expect("32 bits");
    let supported = features().components;
    match subleaf {
        0 => [low(supported), size(state.core.xcr0), size(supported), 0],
        1 => [features().xsave_eax, size(state.core.xcr0), 0, 0],
        2 if supported & XCR0_AVX != 0 => [256, XSAVE_BASE, 0, 0],
        _ => [0; 4],
    }
}

fn brand(part: u32) -> [u32; 4] {
    std::array::from_fn(|i| {
        let at = usize::try_from(part).expect("at most 2") * 16 + 4 * i;
        u32::from_le_bytes(BRAND[at..at + 4].try_into().expect("four bytes"))
    })
}
