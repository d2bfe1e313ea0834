//! What CPUID answers: only features that the CPU has. The platform adds topology and frequencies.

use super::state::State;

/// The registers EAX, EBX, ECX and EDX that CPUID gives for a leaf in that state.
pub fn cpuid(leaf: u32, subleaf: u32, state: &State) -> [u32; 4] {
    let _ = (subleaf, state);
    match leaf {
        0 => [0x1f, 0x756e_6547, 0x6c65_746e, 0x4965_6e69],
        0x8000_0000 => [0x8000_0008, 0, 0, 0],
        _ => [0; 4],
    }
}
