//! What only some processors have: the registers of AVX-512, and the one of protection keys for user pages.

/// The vector registers of AVX-512 beyond AVX's, its masks, and PKRU.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ExtendedState {
    /// K0 to K7.
    pub masks: [u64; 8],
    /// Bits 256 to 511 of ZMM0 to ZMM15, the low half first.
    pub zmm_high: [[u128; 2]; 16],
    /// ZMM16 to ZMM31, the lowest quarter first.
    pub zmm_upper: [[u128; 4]; 16],
    /// Access rights by protection key.
    pub pkru: u32,
}

/// Which registers beyond those of SSE a vCPU has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Extensions {
    /// AVX: 16 registers of 256 bits.
    pub avx: bool,
    /// AVX-512: 32 registers of 512 bits, and masks.
    pub avx512: bool,
    /// Protection keys for user pages.
    pub pkru: bool,
}
