//! Control flow, the stack, and the instructions that only touch flags: jumps, calls, returns, PUSH and POP, SETcc and
//! CMOVcc, NOP and its many spellings.

use iced_x86::{Code, ConditionCode, Instruction, Mnemonic, OpKind, Register};

use super::Outcome;
use super::flags::{ARITHMETIC, CF, DF, ZF, holds, mask};
use super::integer::{LOW_FLAGS, selector};
use super::masked::probe_write;
use super::operand::{Address, Machine, Step};
use crate::registers::{RBP, RCX, RFLAGS_IF, RFLAGS_RF, RFLAGS_TF, RSP};

/// RFLAGS bits that PUSHF shows as 0: resume and virtual-8086 mode.
const HIDDEN_FROM_PUSHF: u64 = 1 << 16 | 1 << 17;
/// Position of the I/O privilege level.
const IO_LEVEL_SHIFT: u32 = 12;
/// RFLAGS bits that POPF changes at every privilege level: arithmetic, direction, TF, nested task, alignment check, ID.
const FREE_FLAGS: u64 = ARITHMETIC | DF | RFLAGS_TF | 1 << 14 | 1 << 18 | 1 << 21;
/// CR4: control-flow enforcement; calls and returns then use a shadow stack that is not emulated.
const CR4_CET: u64 = 1 << 23;

/// Executes the instruction if it belongs here; false if it does not.
pub(super) fn execute(m: &mut Machine) -> Step<bool> {
    use Mnemonic as M;
    match m.instruction.mnemonic() {
        M::Push => push(m)?,
        M::Pop => pop(m)?,
        M::Jmp => jump(m)?,
        M::Call => call(m)?,
        M::Ret => ret(m)?,
        M::Enter => enter(m)?,
        M::Leave => leave(m)?,
        M::Popf => pop_flags(m, 2)?,
        M::Popfq => pop_flags(m, 8)?,
        M::Pushfq => m.push(8, m.cpu.registers.rflags & !HIDDEN_FROM_PUSHF)?,
        M::Pushf => m.push(2, m.cpu.registers.rflags)?,
        M::Loop | M::Loope | M::Loopne => loop_near(m)?,
        M::Jrcxz | M::Jecxz => jump_if_zero(m)?,
        M::Cld => m.set_flags(DF, 0),
        M::Std => m.set_flags(DF, DF),
        M::Clc => m.set_flags(CF, 0),
        M::Stc => m.set_flags(CF, CF),
        M::Cmc => m.set_flags(CF, !m.cpu.registers.rflags),
        M::Lahf => m.set_register(Register::AH, m.cpu.registers.rflags & LOW_FLAGS | 2)?,
        M::Sahf => m.set_flags(LOW_FLAGS, m.register(Register::AH)?),
        M::Clflush | M::Clflushopt | M::Clwb => {
            // Caches are coherent; what is left is the check of a load.
            let address = m.address()?;
            m.load(address, 1)?;
        }
        _ if does_nothing(m.instruction) => {}
        _ => return conditional(m),
    }
    Ok(true)
}

/// NOPs, hints and fences: nothing is reordered or cached here beyond what the host's own accesses are.
fn does_nothing(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    let mnemonic = instruction.mnemonic();
    let is_fence = matches!(mnemonic, M::Mfence | M::Lfence | M::Sfence);
    if is_fence {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    }
    let is_prefetch = matches!(
        mnemonic,
        M::Prefetchnta | M::Prefetcht0 | M::Prefetcht1 | M::Prefetcht2 | M::Prefetchw | M::Prefetch | M::Prefetchwt1
    );
    // With REX.B the bytes that iced calls PAUSE exchange R8 with RAX.
    let is_pause = mnemonic == M::Pause && instruction.len() == 2;
    let is_hint = matches!(mnemonic, M::Nop | M::Endbr64 | M::Endbr32 | M::Reservednop);
    is_fence || is_prefetch || is_hint || is_pause
}

/// Jcc, SETcc and CMOVcc: iced names the condition, the operands tell which of the three it is.
fn conditional(m: &mut Machine) -> Step<bool> {
    let condition = m.instruction.condition_code();
    if condition == ConditionCode::None {
        return Ok(false);
    }
    let is_true = holds(condition, m.cpu.registers.rflags);
    match (m.instruction.op_count(), m.instruction.op_kind(0)) {
        (1, OpKind::NearBranch64) if is_true => go_to(m, m.instruction.near_branch64())?,
        (1, OpKind::NearBranch64) => {}
        (1, OpKind::Register | OpKind::Memory) => m.write(0, 1, is_true.into())?,
        (2, OpKind::Register) => {
            let size = m.size(0)?;
            let source = m.read(1, size)?;
            let value = if is_true { source } else { m.read(0, size)? };
            m.write(0, size, value)?;
        }
        _ => return Ok(false),
    }
    Ok(true)
}

/// Sets RIP, or raises #GP if the target is not canonical.
fn go_to(m: &mut Machine, target: u64) -> Step {
    if !m.is_canonical(target) {
        return Err(Outcome::fault_zero(13));
    }
    m.cpu.registers.rip = target;
    Ok(())
}

/// The target of a near JMP or CALL. Far ones and those of 16 bits are not emulated.
fn target(m: &mut Machine) -> Step<u64> {
    match m.instruction.code() {
        Code::Jmp_rel8_64 | Code::Jmp_rel32_64 | Code::Call_rel32_64 => Ok(m.instruction.near_branch64()),
        Code::Jmp_rm64 | Code::Call_rm64 => m.read(0, 8),
        _ => Err(Outcome::Unsupported),
    }
}

fn jump(m: &mut Machine) -> Step {
    let target = target(m)?;
    go_to(m, target)
}

fn check_no_shadow_stack(m: &Machine) -> Step {
    if m.cpu.system.cr4 & CR4_CET == 0 { Ok(()) } else { Err(Outcome::Unsupported) }
}

fn call(m: &mut Machine) -> Step {
    check_no_shadow_stack(m)?;
    let target = target(m)?;
    let back = m.cpu.registers.rip;
    go_to(m, target)?;
    m.push(8, back)
}

fn ret(m: &mut Machine) -> Step {
    check_no_shadow_stack(m)?;
    let released = match m.instruction.code() {
        Code::Retnq => 0,
        Code::Retnq_imm16 => u64::from(m.instruction.immediate16()),
        _ => return Err(Outcome::Unsupported),
    };
    let target = m.pop(8)?;
    let top = &mut m.cpu.registers.general[RSP];
    *top = top.wrapping_add(released);
    go_to(m, target)
}

/// How many bytes a PUSH or POP moves the stack pointer by.
fn stack_size(m: &Machine) -> usize {
    usize::try_from(m.instruction.stack_pointer_increment().unsigned_abs()).expect("2 or 8")
}

fn push(m: &mut Machine) -> Step {
    let size = stack_size(m);
    let value = match selector(m, 0) {
        Some(selector) => selector,
        // An immediate is sign-extended to the operand size.
        None => m.read(0, size)?,
    };
    m.push(size, value)
}

fn pop(m: &mut Machine) -> Step {
    // POP to a segment register loads a descriptor.
    if selector(m, 0).is_some() {
        return Err(Outcome::Unsupported);
    }
    let size = stack_size(m);
    let value = m.pop(size)?;
    // RSP as the destination, or as the base of the destination's address, is the incremented one.
    m.write(0, size, value)
}

/// POPF. What it may change beyond the arithmetic flags follows from the privilege level; RF is cleared.
fn pop_flags(m: &mut Machine, size: usize) -> Step {
    let level = u64::from(m.cpu.system.cs.selector & 3);
    let io_level = m.cpu.registers.rflags >> IO_LEVEL_SHIFT & 3;
    let mut changed = FREE_FLAGS;
    if level <= io_level {
        changed |= RFLAGS_IF;
    }
    if level == 0 {
        changed |= 3 << IO_LEVEL_SHIFT;
    }
    let value = m.pop(size)?;
    m.set_flags(changed & mask(size), value);
    m.set_flags(RFLAGS_RF, 0);
    Ok(())
}

/// ENTER. All that it pushes is stored at once, so that a fault leaves the stack as it was; the place that RSP comes to
/// has to be writable.
fn enter(m: &mut Machine) -> Step {
    let size = if m.instruction.code() == Code::Enterw_imm16_imm8 { 2 } else { 8 };
    let level = m.instruction.immediate8_2nd() & 31;
    let (top, base) = (m.cpu.registers.general[RSP], m.cpu.registers.general[RBP]);
    let frame = top.wrapping_sub(size as u64);
    // What is copied from other frames may lie where this instruction has pushed before.
    let mut pushed = vec![base];
    for n in 1..level {
        let linear = base.wrapping_sub(u64::from(n) * size as u64);
        let mut bytes = m.load(Address { linear, is_stack: true }, size)?.to_le_bytes();
        for (byte, address) in bytes[..size].iter_mut().zip(linear..=u64::MAX) {
            let distance = usize::try_from(top.wrapping_sub(1).wrapping_sub(address)).unwrap_or(usize::MAX);
            if let Some(value) = pushed.get(distance / size) {
                *byte = value.to_le_bytes()[size - 1 - distance % size];
            }
        }
        pushed.push(u64::from_le_bytes(bytes));
    }
    if level > 0 {
        pushed.push(frame);
    }
    let bytes: Vec<u8> = pushed.iter().rev().flat_map(|value| value.to_le_bytes()[..size].to_vec()).collect();
    let bottom = top.wrapping_sub(bytes.len() as u64);
    let end = bottom.wrapping_sub(m.instruction.immediate16().into());
    probe_write(m, Address { linear: end, is_stack: true })?;
    m.store_bytes(Address { linear: bottom, is_stack: true }, &bytes)?;
    m.set_general(RBP, size, frame);
    m.cpu.registers.general[RSP] = end;
    Ok(())
}

fn leave(m: &mut Machine) -> Step {
    m.cpu.registers.general[RSP] = m.cpu.registers.general[RBP];
    let size = if m.instruction.code() == Code::Leavew { 2 } else { 8 };
    let base = m.pop(size)?;
    m.set_general(RBP, size, base);
    Ok(())
}

/// Bytes of the counter of LOOP and JRCXZ: the address size.
fn counter_size(m: &Machine) -> Step<usize> {
    match m.instruction.code() {
        Code::Loop_rel8_64_RCX | Code::Loope_rel8_64_RCX | Code::Loopne_rel8_64_RCX | Code::Jrcxz_rel8_64 => Ok(8),
        Code::Loop_rel8_64_ECX | Code::Loope_rel8_64_ECX | Code::Loopne_rel8_64_ECX | Code::Jecxz_rel8_64 => Ok(4),
        _ => Err(Outcome::Unsupported),
    }
}

fn loop_near(m: &mut Machine) -> Step {
    let size = counter_size(m)?;
    let count = m.general(RCX, size).wrapping_sub(1);
    m.set_general(RCX, size, count);
    let is_zero = m.cpu.registers.rflags & ZF != 0;
    let goes_on = match m.instruction.mnemonic() {
        Mnemonic::Loope => is_zero,
        Mnemonic::Loopne => !is_zero,
        _ => true,
    };
    if goes_on && m.general(RCX, size) != 0 { go_to(m, m.instruction.near_branch64()) } else { Ok(()) }
}

fn jump_if_zero(m: &mut Machine) -> Step {
    let size = counter_size(m)?;
    if m.general(RCX, size) == 0 { go_to(m, m.instruction.near_branch64()) } else { Ok(()) }
}
