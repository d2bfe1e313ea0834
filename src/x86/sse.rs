//! SSE and AVX instructions: the checks before one may execute, its memory operand, and the call of its operation. What
//! needs no arithmetic is in `vector_move`; what exchanges halves of 256 bits in `avx_lane`; MMX forms in `mmx`.

use iced_x86::EncodingKind;

use super::Outcome;
use super::operand::{Machine, Step};
use super::vector_call::{Source, VectorCall, Wide, vector_index};
use crate::registers::{CR0_TS, CR4_OSFXSR, CR4_OSXSAVE};

/// CR0: there is no coprocessor.
pub(super) const CR0_EM: u64 = 1 << 2;
/// XCR0: SSE and AVX state are enabled.
const XCR0_AVX: u64 = 6;

/// Executes the instruction if it belongs here; false if it does not.
pub(super) fn execute(m: &mut Machine) -> Step<bool> {
    let is_vex = match m.instruction.encoding() {
        EncodingKind::Legacy => false,
        EncodingKind::VEX => true,
        _ => return Ok(false),
    };
    if !is_vex && super::mmx::execute(m)? || super::vector_move::execute(m)? || super::sse_text::execute(m)? {
        return Ok(true);
    }
    if is_vex && (super::avx_lane::execute(m)? || super::avx_masked::execute(m)?) {
        return Ok(true);
    }
    let Some(call) = VectorCall::new(m.instruction) else { return Ok(false) };
    check_enabled(m)?;
    run(m, &call)?;
    Ok(true)
}

/// Executes a call whose checks are made, with its memory operand loaded.
pub(super) fn run(m: &mut Machine, call: &VectorCall) -> Step {
    let mut memory = [0; 2];
    if let Source::Memory { size, is_aligned, .. } = call.source {
        memory = load_wide(m, size.into(), is_aligned)?;
    }
    call.run(m.cpu, &memory)
}

/// Raises #UD or #NM where the control registers forbid SSE or, for an instruction with a VEX prefix, AVX.
pub(super) fn check_enabled(m: &Machine) -> Step {
    let system = &m.cpu.system;
    let is_enabled = if m.instruction.encoding() == EncodingKind::VEX {
        system.cr4 & CR4_OSXSAVE != 0 && m.cpu.xcr0 & XCR0_AVX == XCR0_AVX
    } else {
        system.cr0 & CR0_EM == 0 && system.cr4 & CR4_OSFXSR != 0
    };
    if !is_enabled {
        return Err(Outcome::fault(6));
    }
    if system.cr0 & CR0_TS != 0 { Err(Outcome::fault(7)) } else { Ok(()) }
}

/// Number of an XMM register that an operand names.
pub(super) fn xmm_index(m: &Machine, operand: u32) -> Option<usize> {
    vector_index(m.instruction, operand).map(usize::from)
}

/// Reads `size` bytes (up to 16) of the memory operand, zero-extended. Operands of 16 bytes may have to be aligned.
pub(super) fn load_vector(m: &mut Machine, size: usize, is_aligned: bool) -> Step<u128> {
    if size > 16 { Err(Outcome::Unsupported) } else { Ok(load_wide(m, size, is_aligned)?[0]) }
}

/// Reads `size` bytes (up to 32) of the memory operand, zero-extended. If `is_aligned`, the address is a multiple of 16
/// or of `size`, whichever is larger.
pub(super) fn load_wide(m: &mut Machine, size: usize, is_aligned: bool) -> Step<Wide> {
    let address = m.address()?;
    if is_aligned && size >= 16 {
        m.check_alignment(address, size as u64)?;
    }
    let mut buffer = [0; 32];
    m.load_bytes(address, buffer.get_mut(..size).ok_or(Outcome::Unsupported)?)?;
    let half = |at: usize| u128::from_le_bytes(buffer[at..at + 16].try_into().expect("16 bytes"));
    Ok([half(0), half(16)])
}
