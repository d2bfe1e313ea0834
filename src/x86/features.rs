//! Which instruction sets CPUID may announce to a guest: those that every host has for this emulator, and those whose
//! arithmetic this host's own CPU executes.

use std::is_x86_feature_detected as has;

/// Bits of CPUID's feature leaves that stand for instructions which user programs execute. What the CPU around the
/// emulator adds (paging, APIC, MSRs, system calls) is not among them, nor is OSXSAVE, which follows CR4.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Features {
    /// Leaf 1, ECX.
    pub basic_ecx: u32,
    /// Leaf 1, EDX.
    pub basic_edx: u32,
    /// Leaf 7, EBX.
    pub structured_ebx: u32,
    /// Leaf 7, ECX.
    pub structured_ecx: u32,
    /// Leaf 0xd, subleaf 1, EAX: forms of XSAVE. Not XSAVES, which would announce `IA32_XSS` too.
    pub xsave_eax: u32,
    /// Leaf 0x8000_0001, ECX.
    pub extended_ecx: u32,
    /// XCR0 with all components that XSAVE manages.
    pub components: u64,
}

/// Those of the pairs' bits whose conditions hold.
fn bits(pairs: &[(u32, bool)]) -> u32 {
    pairs.iter().filter(|(_, is_there)| *is_there).fold(0, |all, (bit, _)| all | 1 << bit)
}

/// What may be announced on this host.
pub fn features() -> Features {
    // Each of SSE's generations implies the one before, and compilers rely on that.
    let sse3 = has!("sse3");
    let ssse3 = sse3 && has!("ssse3");
    let sse41 = ssse3 && has!("sse4.1");
    let sse42 = sse41 && has!("sse4.2");
    let avx = sse42 && has!("avx");
    let avx2 = avx && has!("avx2");
    let (aes, clmul) = (has!("aes"), has!("pclmulqdq"));
    let always = true;
    Features {
        basic_ecx: bits(&[
            (0, sse3),
            (1, clmul),
            (9, ssse3),
            (12, avx && has!("fma")),
            (13, always), // CMPXCHG16B
            (19, sse41),
            (20, sse42),
            (22, always), // MOVBE
            (23, always), // POPCNT
            (25, aes),
            (26, always), // XSAVE
            (28, avx),
            (29, avx && has!("f16c")),
            (30, always), // RDRAND
        ]),
        // FPU, TSC, CMPXCHG8B, CMOV, CLFLUSH, MMX, FXSAVE, SSE, SSE2.
        basic_edx: bits(&[0, 4, 8, 15, 19, 23, 24, 25, 26].map(|bit| (bit, always))),
        structured_ebx: bits(&[
            (0, always), // FSGSBASE
            (3, always), // BMI1
            (5, avx2),
            (8, always),  // BMI2
            (9, always),  // ERMS
            (18, always), // RDSEED
            (19, always), // ADX
            (23, always), // CLFLUSHOPT
            (24, always), // CLWB
            (29, has!("sha")),
        ]),
        // VAES and VPCLMULQDQ are the 128-bit operations on both halves; RDPID.
        structured_ecx: bits(&[(9, avx2 && aes), (10, avx2 && clmul), (22, always)]),
        // XSAVEOPT, XSAVEC, XGETBV with index 1.
        xsave_eax: bits(&[0, 1, 2].map(|bit| (bit, always))),
        // LAHF in 64-bit mode, LZCNT, PREFETCHW.
        extended_ecx: bits(&[0, 5, 8].map(|bit| (bit, always))),
        components: if avx { 7 } else { 3 },
    }
}
