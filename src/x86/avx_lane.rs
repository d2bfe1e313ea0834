//! The AVX instructions that carry data between the 128-bit halves of a register, or clear halves: broadcasts, inserts,
//! extracts, permutations, VZEROUPPER; and VCVTPS2PH to memory.

use iced_x86::{Mnemonic, OpKind};

use super::Outcome;
use super::operand::{Machine, Step};
use super::sse::{check_enabled, load_wide};
use super::vector_call::{Wide, evaluate, is_wide, low, register, set_register, vector_index};

/// Executes the instruction if it belongs here; false if it does not.
pub(super) fn execute(m: &mut Machine) -> Step<bool> {
    use Mnemonic as M;
    let run: fn(&mut Machine) -> Step = match m.instruction.mnemonic() {
        M::Vzeroupper => zero_upper,
        M::Vzeroall => zero_all,
        M::Vpbroadcastb => |m| broadcast(m, 1),
        M::Vpbroadcastw => |m| broadcast(m, 2),
        M::Vbroadcastss | M::Vpbroadcastd => |m| broadcast(m, 4),
        M::Vbroadcastsd | M::Vpbroadcastq => |m| broadcast(m, 8),
        M::Vbroadcastf128 | M::Vbroadcasti128 => |m| broadcast(m, 16),
        M::Vinsertf128 | M::Vinserti128 => insert_half,
        M::Vextractf128 | M::Vextracti128 => extract_half,
        M::Vperm2f128 | M::Vperm2i128 => permute_halves,
        M::Vpermq | M::Vpermpd => permute_quads,
        M::Vpermd | M::Vpermps => permute_doubles,
        M::Vcvtps2ph if m.instruction.op_kind(0) == OpKind::Memory => store_half_precision,
        _ => return Ok(false),
    };
    check_enabled(m)?;
    run(m)?;
    Ok(true)
}

/// Value of a vector operand: a register, or `size` bytes of memory.
fn operand(m: &mut Machine, number: u32, size: usize) -> Step<Wide> {
    match vector_index(m.instruction, number) {
        Some(index) => Ok(register(m.cpu, index)),
        None => load_wide(m, size, false),
    }
}

/// Sets the register that operand 0 names.
fn set(m: &mut Machine, value: Wide) -> Step {
    let index = vector_index(m.instruction, 0).ok_or(Outcome::Unsupported)?;
    set_register(m.cpu, index, value);
    Ok(())
}

fn zero_upper(m: &mut Machine) -> Step {
    m.cpu.ymm_high = [0; 16];
    Ok(())
}

fn zero_all(m: &mut Machine) -> Step {
    m.cpu.fpu.xmm = [0; 16];
    zero_upper(m)
}

/// The first element of `size` bytes, everywhere.
fn broadcast(m: &mut Machine, size: usize) -> Step {
    let bytes = operand(m, 1, size)?[0].to_le_bytes();
    let half = u128::from_le_bytes(std::array::from_fn(|n| bytes[n % size]));
    let upper = if is_wide(m.instruction) { half } else { 0 };
    set(m, [half, upper])
}

fn insert_half(m: &mut Machine) -> Step {
    let (mut value, inserted) = (operand(m, 1, 32)?, operand(m, 2, 16)?[0]);
    value[usize::from(m.instruction.immediate8() & 1)] = inserted;
    set(m, value)
}

fn extract_half(m: &mut Machine) -> Step {
    let half = operand(m, 1, 32)?[usize::from(m.instruction.immediate8() & 1)];
    if m.instruction.op_kind(0) == OpKind::Memory {
        let address = m.address()?;
        return m.store_bytes(address, &half.to_le_bytes());
    }
    set(m, [half, 0])
}

/// Each half is any of four, or zero.
fn permute_halves(m: &mut Machine) -> Step {
    let (a, b) = (operand(m, 1, 32)?, operand(m, 2, 32)?);
    let choose = |control: u8| {
        if control & 8 != 0 { 0 } else { [a[0], a[1], b[0], b[1]][usize::from(control & 3)] }
    };
    let control = m.instruction.immediate8();
    set(m, [choose(control), choose(control >> 4)])
}

/// VPERMQ and VPERMPD.
fn permute_quads(m: &mut Machine) -> Step {
    let value = operand(m, 1, 32)?;
    let control = m.instruction.immediate8();
    let element = |n: u8| u128::from(low(value[usize::from(n >> 1 & 1)] >> (64 * u32::from(n & 1))));
    let half = |control: u8| element(control & 3) | element(control >> 2 & 3) << 64;
    set(m, [half(control), half(control >> 4)])
}

/// VPERMD and VPERMPS.
fn permute_doubles(m: &mut Machine) -> Step {
    let (indices, value) = (operand(m, 1, 32)?, operand(m, 2, 32)?);
    let element = |vector: &Wide, n: u32| vector[usize::from(n >= 4)] >> (32 * (n & 3)) & u128::from(u32::MAX);
    let half = |start: u32| {
        (0..4).fold(0, |half, n| {
            let index = (0..8).find(|index| u128::from(*index) == element(&indices, start + n) & 7).unwrap_or(0);
            half | element(&value, index) << (32 * n)
        })
    };
    set(m, [half(0), half(4)])
}

fn store_half_precision(m: &mut Machine) -> Step {
    let is_wide = is_wide(m.instruction);
    let source = operand(m, 1, 32)?;
    let before = m.cpu.fpu.mxcsr;
    let result = evaluate(m.cpu, Mnemonic::Vcvtps2ph, [[0; 2], source], m.instruction.immediate8(), is_wide)?;
    let result = result.ok_or(Outcome::Unsupported)?[0];
    let address = m.address()?;
    let stored = m.store_bytes(address, &result.to_le_bytes()[..if is_wide { 16 } else { 8 }]);
    if stored.is_err() {
        m.cpu.fpu.mxcsr = before;
    }
    stored
}
