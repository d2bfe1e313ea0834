//! The instructions that move the whole x87, SSE and AVX state between the vCPU and memory: FXSAVE, FXRSTOR, XSAVE with
//! its optimised and compacted forms, and XRSTOR. Layouts are those of the Intel manual, volume 1, sections 10.5 and
//! 13.4. AVX is the only component beyond the legacy area; it lies at byte 576 in the standard and in the compacted format.

use iced_x86::Mnemonic;

use super::Outcome;
use super::flags::flag;
use super::fpu_environment::set_control_and_status;
use super::operand::{Address, Machine, Step};
use super::sse::CR0_EM;
use super::vector_call::MXCSR_VALID;
use crate::registers::{CR0_TS, CR4_OSXSAVE, FpuState, RAX, RDX};

/// Bytes of the FXSAVE area.
const LEGACY: usize = 512;
/// Bytes of the legacy area and the XSAVE header.
const WITH_HEADER: usize = 576;
/// Bytes of the upper halves of the YMM registers.
const AVX_BYTES: usize = 256;
/// Bytes of an XSAVE area with all components that are known here.
const WHOLE: usize = WITH_HEADER + AVX_BYTES;

/// State component x87.
const X87: u64 = 1;
/// State component SSE.
const SSE: u64 = 2;
/// State component AVX.
const AVX: u64 = 4;
/// XCOMP_BV: the area is in the compacted format.
const COMPACTED: u64 = 1 << 63;
/// MXCSR after a reset.
const MXCSR_INITIAL: u32 = 0x1f80;

/// An FXSAVE area, in the alignment that the host's own FXSAVE wants.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Legacy(pub [u8; LEGACY]);

/// Executes the instruction if it belongs here; false if it does not.
pub(super) fn execute(m: &mut Machine) -> Step<bool> {
    use Mnemonic as M;
    match m.instruction.mnemonic() {
        M::Fxsave => fxsave(m, false)?,
        M::Fxsave64 => fxsave(m, true)?,
        M::Fxrstor => fxrstor(m, false)?,
        M::Fxrstor64 => fxrstor(m, true)?,
        M::Xsave => xsave(m, false, Format::Standard)?,
        M::Xsave64 => xsave(m, true, Format::Standard)?,
        M::Xsaveopt => xsave(m, false, Format::Optimised)?,
        M::Xsaveopt64 => xsave(m, true, Format::Optimised)?,
        M::Xsavec => xsave(m, false, Format::Compacted)?,
        M::Xsavec64 => xsave(m, true, Format::Compacted)?,
        M::Xsaves => xsave_supervisor(m, false)?,
        M::Xsaves64 => xsave_supervisor(m, true)?,
        M::Xrstor => xrstor(m, false, false)?,
        M::Xrstor64 => xrstor(m, true, false)?,
        M::Xrstors => xrstor_supervisor(m, false)?,
        M::Xrstors64 => xrstor_supervisor(m, true)?,
        _ => return Ok(false),
    }
    Ok(true)
}

/// How XSAVE lays out its area and what it leaves out.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    Standard,
    /// Standard, without components in their initial state.
    Optimised,
    Compacted,
}

fn put(area: &mut [u8], offset: usize, bytes: &[u8]) {
    area[offset..offset + bytes.len()].copy_from_slice(bytes);
}

fn get<const N: usize>(area: &[u8], offset: usize) -> [u8; N] {
    area[offset..offset + N].try_into().expect("the slice has N bytes")
}

/// Stores the x87 component; the pointers have 64 bits if `is_wide`, else 32 and a zero selector.
pub(super) fn put_x87(area: &mut [u8], fpu: &FpuState, is_wide: bool) {
    let pointer = |value: u64| if is_wide { value } else { value & 0xffff_ffff };
    put(area, 0, &fpu.fcw.to_le_bytes());
    put(area, 2, &fpu.fsw.to_le_bytes());
    put(area, 4, &[fpu.ftw, 0]);
    put(area, 6, &fpu.fop.to_le_bytes());
    put(area, 8, &pointer(fpu.fip).to_le_bytes());
    put(area, 16, &pointer(fpu.fdp).to_le_bytes());
    for (i, register) in fpu.st.iter().enumerate() {
        put(area, 32 + 16 * i, &register[..10]);
        put(area, 42 + 16 * i, &[0; 6]);
    }
}

/// Loads the x87 component.
pub(super) fn get_x87(area: &[u8], fpu: &mut FpuState, is_wide: bool) {
    let pointer = |value: u64| if is_wide { value } else { value & 0xffff_ffff };
    fpu.ftw = area[4];
    fpu.fop = u16::from_le_bytes(get(area, 6)) & 0x7ff;
    fpu.fip = pointer(u64::from_le_bytes(get(area, 8)));
    fpu.fdp = pointer(u64::from_le_bytes(get(area, 16)));
    for (i, register) in fpu.st.iter_mut().enumerate() {
        *register = [0; 16];
        register[..10].copy_from_slice(&area[32 + 16 * i..42 + 16 * i]);
    }
    set_control_and_status(fpu, u16::from_le_bytes(get(area, 0)), u16::from_le_bytes(get(area, 2)));
}

fn put_mxcsr(area: &mut [u8], fpu: &FpuState) {
    put(area, 24, &fpu.mxcsr.to_le_bytes());
    put(area, 28, &MXCSR_VALID.to_le_bytes());
}

/// MXCSR from an area; #GP if a reserved bit is set.
fn get_mxcsr(area: &[u8]) -> Step<u32> {
    let value = u32::from_le_bytes(get(area, 24));
    if value & !MXCSR_VALID == 0 { Ok(value) } else { Err(Outcome::fault_zero(13)) }
}

fn put_vectors(area: &mut [u8], offset: usize, vectors: &[u128; 16]) {
    for (i, vector) in vectors.iter().enumerate() {
        put(area, offset + 16 * i, &vector.to_le_bytes());
    }
}

fn get_vectors(area: &[u8], offset: usize) -> [u128; 16] {
    std::array::from_fn(|i| u128::from_le_bytes(get(area, offset + 16 * i)))
}

/// The operand's address; #NM or #GP where FXSAVE and FXRSTOR raise them.
fn legacy_address(m: &Machine) -> Step<Address> {
    if m.cpu.system.cr0 & (CR0_EM | CR0_TS) != 0 {
        return Err(Outcome::fault(7));
    }
    let address = m.address()?;
    m.check_alignment(address, 16)?;
    Ok(address)
}

fn fxsave(m: &mut Machine, is_wide: bool) -> Step {
    let address = legacy_address(m)?;
    let mut area = [0; LEGACY];
    // Bytes that FXSAVE does not define keep their values.
    m.load_bytes(address, &mut area)?;
    put_x87(&mut area, &m.cpu.fpu, is_wide);
    put_mxcsr(&mut area, &m.cpu.fpu);
    put_vectors(&mut area, 160, &m.cpu.fpu.xmm);
    m.store_bytes(address, &area)
}

fn fxrstor(m: &mut Machine, is_wide: bool) -> Step {
    let address = legacy_address(m)?;
    let mut area = [0; LEGACY];
    m.load_bytes(address, &mut area)?;
    let mxcsr = get_mxcsr(&area)?;
    get_x87(&area, &mut m.cpu.fpu, is_wide);
    m.cpu.fpu.mxcsr = mxcsr;
    m.cpu.fpu.xmm = get_vectors(&area, 160);
    Ok(())
}

/// The operand's address; #UD, #NM or #GP where the XSAVE family raises them.
fn xsave_address(m: &Machine) -> Step<Address> {
    if m.cpu.system.cr4 & CR4_OSXSAVE == 0 {
        return Err(Outcome::fault(6));
    }
    if m.cpu.system.cr0 & CR0_TS != 0 {
        return Err(Outcome::fault(7));
    }
    let address = m.address()?;
    m.check_alignment(address, 64)?;
    Ok(address)
}

/// The components that the instruction works on: those in EDX:EAX that XCR0 enables.
fn requested(m: &Machine) -> Step<u64> {
    let requested = (m.general(RDX, 4) << 32 | m.general(RAX, 4)) & m.cpu.xcr0;
    if requested & !(X87 | SSE | AVX) == 0 { Ok(requested) } else { Err(Outcome::Unsupported) }
}

/// Which components are not in their initial state.
fn in_use(m: &Machine) -> u64 {
    let (fpu, initial) = (&m.cpu.fpu, FpuState { mxcsr: MXCSR_INITIAL, ..FpuState::default() });
    let x87 = FpuState { xmm: initial.xmm, mxcsr: initial.mxcsr, ..*fpu } != initial;
    let sse = fpu.xmm != initial.xmm || fpu.mxcsr != initial.mxcsr;
    let avx = m.cpu.ymm_high != [0; 16];
    flag(x87, X87) | flag(sse, SSE) | flag(avx, AVX)
}

fn xsave(m: &mut Machine, is_wide: bool, format: Format) -> Step {
    let address = xsave_address(m)?;
    let (requested, in_use) = (requested(m)?, in_use(m));
    let written = if format == Format::Standard { requested } else { requested & in_use };
    let mut whole = [0; WHOLE];
    // The area's extent follows from what is written; all else in it keeps its value.
    let area = &mut whole[..if written & AVX != 0 { WHOLE } else { WITH_HEADER }];
    m.load_bytes(address, area)?;
    put_components(m, area, written, is_wide);
    let has_mxcsr = if format == Format::Compacted { written & SSE } else { requested & (SSE | AVX) };
    if has_mxcsr != 0 {
        put_mxcsr(area, &m.cpu.fpu);
    }
    let before = u64::from_le_bytes(get(area, LEGACY));
    let kept = if format == Format::Compacted { 0 } else { before & !requested };
    put(area, LEGACY, &(kept | requested & in_use).to_le_bytes());
    if format == Format::Compacted {
        put(area, LEGACY + 8, &(requested | COMPACTED).to_le_bytes());
    }
    m.store_bytes(address, area)
}

fn put_components(m: &Machine, area: &mut [u8], components: u64, is_wide: bool) {
    if components & X87 != 0 {
        put_x87(area, &m.cpu.fpu, is_wide);
    }
    if components & SSE != 0 {
        put_vectors(area, 160, &m.cpu.fpu.xmm);
    }
    if components & AVX != 0 {
        put_vectors(area, WITH_HEADER, &m.cpu.ymm_high);
    }
}

/// What an XSAVE header says.
struct Header {
    /// Components that the area holds; the others get their initial values.
    present: u64,
    is_compacted: bool,
}

/// Checks and reads the header; #GP where it breaks the rules of XRSTOR.
fn header(m: &Machine, area: &[u8]) -> Step<Header> {
    let [present, layout] = [LEGACY, LEGACY + 8].map(|offset| u64::from_le_bytes(get(area, offset)));
    let is_compacted = layout & COMPACTED != 0;
    let reserved = &area[if is_compacted { LEGACY + 16..WITH_HEADER } else { LEGACY + 8..LEGACY + 24 }];
    let allowed = if is_compacted { layout & !COMPACTED } else { m.cpu.xcr0 };
    let is_valid = present & !allowed == 0 && allowed & !m.cpu.xcr0 == 0 && reserved.iter().all(|byte| *byte == 0);
    if is_valid { Ok(Header { present, is_compacted }) } else { Err(Outcome::fault_zero(13)) }
}

/// Raises #GP outside ring 0. IA32_XSS is 0, so that the supervisor's forms know no more components than the others.
fn check_supervisor(m: &Machine) -> Step {
    if m.cpu.system.cs.selector & 3 == 0 { Ok(()) } else { Err(Outcome::fault_zero(13)) }
}

fn xsave_supervisor(m: &mut Machine, is_wide: bool) -> Step {
    xsave_address(m)?;
    check_supervisor(m)?;
    xsave(m, is_wide, Format::Compacted)
}

fn xrstor_supervisor(m: &mut Machine, is_wide: bool) -> Step {
    xsave_address(m)?;
    check_supervisor(m)?;
    xrstor(m, is_wide, true)
}

fn xrstor(m: &mut Machine, is_wide: bool, is_supervisor: bool) -> Step {
    let address = xsave_address(m)?;
    let requested = requested(m)?;
    let mut area = [0; WHOLE];
    m.load_bytes(address, &mut area[..WITH_HEADER])?;
    let header = header(m, &area)?;
    if is_supervisor && !header.is_compacted {
        return Err(Outcome::fault_zero(13));
    }
    let loaded = requested & header.present;
    if loaded & AVX != 0 {
        let upper = Address { linear: address.linear.wrapping_add(WITH_HEADER as u64), ..address };
        m.load_bytes(upper, &mut area[WITH_HEADER..])?;
    }
    let mxcsr = restored_mxcsr(m, &area, requested, &header)?;
    if requested & X87 != 0 {
        restore_x87(&mut m.cpu.fpu, (loaded & X87 != 0).then_some(&area[..]), is_wide);
    }
    if requested & SSE != 0 {
        m.cpu.fpu.xmm = if loaded & SSE != 0 { get_vectors(&area, 160) } else { [0; 16] };
    }
    if requested & AVX != 0 {
        m.cpu.ymm_high = if loaded & AVX != 0 { get_vectors(&area, WITH_HEADER) } else { [0; 16] };
    }
    m.cpu.fpu.mxcsr = mxcsr;
    Ok(())
}

/// MXCSR after XRSTOR: the standard format loads it with SSE or AVX, present or not; the compacted one with SSE alone.
fn restored_mxcsr(m: &Machine, area: &[u8], requested: u64, header: &Header) -> Step<u32> {
    let by = if header.is_compacted { SSE } else { SSE | AVX };
    if requested & by == 0 {
        Ok(m.cpu.fpu.mxcsr)
    } else if header.is_compacted && header.present & SSE == 0 {
        Ok(MXCSR_INITIAL)
    } else {
        get_mxcsr(area)
    }
}

/// Loads the x87 component, or initialises it.
fn restore_x87(fpu: &mut FpuState, area: Option<&[u8]>, is_wide: bool) {
    match area {
        Some(area) => get_x87(area, fpu, is_wide),
        None => *fpu = FpuState { xmm: fpu.xmm, mxcsr: fpu.mxcsr, ..FpuState::default() },
    }
}
