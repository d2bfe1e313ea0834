//! Stores of selected bytes: MASKMOVQ, MASKMOVDQU and the storing forms of VMASKMOV. Bytes that are not selected are
//! neither written nor able to fault, and a fault leaves memory as it was.

use iced_x86::{OpKind, Register};

use super::Outcome;
use super::flags::mask;
use super::operand::{Address, Machine, Step};
use crate::registers::RDI;

/// Pages are what may fault.
const PAGE: u64 = 4096;

/// Stores those of up to 32 bytes whose bits in `selected` are set.
pub(super) fn store_selected(m: &mut Machine, address: Address, data: &[u8], selected: u32) -> Step {
    let runs = runs(selected, data.len());
    if runs.len() > 1 {
        probe(m, address, selected)?;
    }
    for (start, end) in runs {
        let place = Address { linear: address.linear.wrapping_add(start as u64), ..address };
        m.store_bytes(place, &data[start..end])?;
    }
    Ok(())
}

/// First and last-plus-one position of each run of selected bytes.
fn runs(selected: u32, length: usize) -> Vec<(usize, usize)> {
    let is_selected = |n: usize| n < length && selected >> n & 1 != 0;
    let starts = (0..length).filter(|n| is_selected(*n) && (*n == 0 || !is_selected(n - 1)));
    starts.map(|start| (start, (start..=length).find(|n| !is_selected(*n)).unwrap_or(length))).collect()
}

/// Raises the fault that the first selected byte of a page would, before any byte is written.
fn probe(m: &mut Machine, address: Address, selected: u32) -> Step {
    let mut last = None;
    for n in (0..32).filter(|n| selected >> n & 1 != 0) {
        let place = Address { linear: address.linear.wrapping_add(n), ..address };
        if last.replace(place.linear / PAGE) == Some(place.linear / PAGE) {
            continue;
        }
        probe_write(m, place)?;
    }
    Ok(())
}

/// Raises the fault that a write to a byte would: exchanges it for itself, which needs what a write needs and changes
/// nothing. What is no RAM can't fault.
pub(super) fn probe_write(m: &mut Machine, address: Address) -> Step {
    let found = match m.load(address, 1) {
        Ok(found) => found.into(),
        Err(Outcome::Unsupported) => return Ok(()),
        Err(fault) => return Err(fault),
    };
    match m.compare_exchange(address, 1, found, found) {
        Ok(_) | Err(Outcome::Unsupported) => Ok(()),
        Err(fault) => Err(fault),
    }
}

/// The topmost bit of each byte of `vector`.
pub(super) fn byte_signs(vector: &[u8]) -> u32 {
    vector.iter().enumerate().fold(0, |bits, (n, byte)| bits | u32::from(byte >> 7) << n)
}

/// Where MASKMOVQ and MASKMOVDQU store: at RDI or EDI.
pub(super) fn destination_address(m: &Machine) -> Step<Address> {
    let size = match m.instruction.op_kind(0) {
        OpKind::MemorySegRDI => 8,
        OpKind::MemorySegEDI => 4,
        _ => return Err(Outcome::Unsupported),
    };
    let base = match m.instruction.memory_segment() {
        Register::FS => m.cpu.system.fs.base,
        Register::GS => m.cpu.system.gs.base,
        _ => 0,
    };
    let linear = (m.cpu.registers.general[RDI] & mask(size)).wrapping_add(base);
    Ok(Address { linear, is_stack: false })
}
