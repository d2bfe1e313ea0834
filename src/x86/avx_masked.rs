//! AVX's accesses to selected elements: VMASKMOV, VPMASKMOV and the gathers. Elements that are not selected do not fault.

use iced_x86::{Mnemonic, OpKind, Register};

use super::Outcome;
use super::flags::{mask, sign_extend};
use super::masked::store_selected;
use super::operand::{Address, Machine, Step, from_bytes};
use super::sse::check_enabled;
use super::vector_call::{Wide, is_wide, register, set_register, vector_index};
use crate::registers::{RBP, RSP};

/// A vector register's bytes.
type Bytes = [u8; 32];

/// Executes the instruction if it belongs here; false if it does not.
pub(super) fn execute(m: &mut Machine) -> Step<bool> {
    use Mnemonic as M;
    let (size, index_size) = match m.instruction.mnemonic() {
        M::Vmaskmovps | M::Vpmaskmovd => (4, None),
        M::Vmaskmovpd | M::Vpmaskmovq => (8, None),
        M::Vgatherdps | M::Vpgatherdd => (4, Some(4)),
        M::Vgatherdpd | M::Vpgatherdq => (8, Some(4)),
        M::Vgatherqps | M::Vpgatherqd => (4, Some(8)),
        M::Vgatherqpd | M::Vpgatherqq => (8, Some(8)),
        _ => return Ok(false),
    };
    check_enabled(m)?;
    match index_size {
        Some(index_size) => gather(m, size, index_size)?,
        None if m.instruction.op_kind(0) == OpKind::Memory => store(m, size)?,
        None => load(m, size)?,
    }
    Ok(true)
}

fn to_bytes(value: Wide) -> Bytes {
    let mut bytes = [0; 32];
    bytes[..16].copy_from_slice(&value[0].to_le_bytes());
    bytes[16..].copy_from_slice(&value[1].to_le_bytes());
    bytes
}

fn from_wide_bytes(bytes: &Bytes) -> Wide {
    [0, 16].map(|at| u128::from_le_bytes(bytes[at..at + 16].try_into().expect("16 bytes")))
}

/// The number and the bytes of the vector register that an operand names.
fn operand(m: &Machine, number: u32) -> Step<(u8, Bytes)> {
    let index = vector_index(m.instruction, number).ok_or(Outcome::Unsupported)?;
    Ok((index, to_bytes(register(m.cpu, index))))
}

/// Whether the sign bit of element `n` is set.
fn is_selected(selection: &Bytes, size: usize, n: usize) -> bool {
    selection[size * n + size - 1] & 0x80 != 0
}

fn width(m: &Machine) -> usize {
    if is_wide(m.instruction) { 32 } else { 16 }
}

fn load(m: &mut Machine, size: usize) -> Step {
    let (to, (_, selection)) = (operand(m, 0)?.0, operand(m, 1)?);
    let address = m.address()?;
    let mut loaded = [0; 32];
    for n in (0..width(m) / size).filter(|n| is_selected(&selection, size, *n)) {
        let place = Address { linear: address.linear.wrapping_add((size * n) as u64), ..address };
        m.load_bytes(place, &mut loaded[size * n..size * (n + 1)])?;
    }
    set_register(m.cpu, to, from_wide_bytes(&loaded));
    Ok(())
}

fn store(m: &mut Machine, size: usize) -> Step {
    let ((_, selection), (_, data)) = (operand(m, 1)?, operand(m, 2)?);
    let element = u32::MAX >> (32 - size);
    let selected = (0..width(m) / size)
        .filter(|n| is_selected(&selection, size, *n))
        .fold(0, |bits, n| bits | element << (size * n));
    let address = m.address()?;
    store_selected(m, address, &data, selected)
}

/// Gathers: from the lowest element on, each that is loaded has its selection cleared, so that after a fault the
/// instruction goes on where it was.
fn gather(m: &mut Machine, size: usize, index_size: usize) -> Step {
    let ((to, mut data), (by, mut selection)) = (operand(m, 0)?, operand(m, 2)?);
    let indices = index_register(m)?;
    let is_wide = is_wide(m.instruction) || m.instruction.memory_index().is_ymm();
    let count = if is_wide { 32 } else { 16 } / size.max(index_size);
    for n in 0..count {
        if is_selected(&selection, size, n) {
            let index = from_bytes(&indices[index_size * n..index_size * (n + 1)]);
            let address = element_address(m, sign_extend(index, index_size))?;
            match m.load_bytes(address, &mut data[size * n..size * (n + 1)]) {
                Ok(()) => {}
                Err(Outcome::Unsupported) => return Err(Outcome::Unsupported),
                Err(fault) => {
                    set_register(m.cpu, to, from_wide_bytes(&data));
                    set_register(m.cpu, by, from_wide_bytes(&selection));
                    return Err(fault);
                }
            }
        }
        selection[size * n..size * (n + 1)].fill(0);
    }
    data[size * count..].fill(0);
    set_register(m.cpu, to, from_wide_bytes(&data));
    set_register(m.cpu, by, [0; 2]);
    Ok(())
}

/// The bytes of the vector register that the memory operand is indexed with.
fn index_register(m: &Machine) -> Step<Bytes> {
    let index = m.instruction.memory_index();
    let first = if index.is_ymm() { Register::YMM0 } else { Register::XMM0 };
    let number = (index as usize).checked_sub(first as usize).and_then(|number| u8::try_from(number).ok());
    let number = number.filter(|number| *number < 16).ok_or(Outcome::Unsupported)?;
    Ok(to_bytes(register(m.cpu, number)))
}

/// Where the element with that index is.
fn element_address(m: &Machine, index: i64) -> Step<Address> {
    let instruction = m.instruction;
    let base = instruction.memory_base();
    let offset = index.wrapping_mul(instruction.memory_index_scale().into());
    let mut effective = instruction.memory_displacement64().wrapping_add(offset.cast_unsigned());
    if base != Register::None {
        effective = effective.wrapping_add(m.register(base)?);
    }
    let is_short = base.is_gpr32() || base == Register::None && instruction.memory_displ_size() == 4;
    let effective = if is_short { effective & mask(4) } else { effective };
    let is_stack = super::operand::slot(base).is_some_and(|slot| matches!(slot.index, RSP | RBP))
        && !matches!(instruction.memory_segment(), Register::FS | Register::GS);
    Ok(Address { linear: effective.wrapping_add(m.segment_base()), is_stack })
}
