//! x87 instructions. Arithmetic, loads and stores are executed by the host's own FPU: the vCPU's state is loaded with
//! FXRSTOR, one entry of a table of all x87 opcodes runs, and FXSAVE takes the state back. The guest's exceptions stay
//! unmasked while the host executes: x87 reports one at the next instruction that waits, and neither FXSAVE nor FXRSTOR
//! does. So pending exceptions come back as the host's own CPU leaves them, and the guest's next x87 instruction is #MF.

use std::arch::asm;

use iced_x86::{Mnemonic, OpKind};

use super::Outcome;
use super::flags::ARITHMETIC;
use super::fpu_environment::{
    EXCEPTIONS, clear_exceptions, initialise, load_control, load_environment, restore, save, set_control_and_status,
    store_environment,
};
use super::operand::{Machine, Step};
use super::sse::CR0_EM;
use super::xsave::{Legacy, get_x87, put_x87};
use crate::registers::{CR0_TS, FpuState};

/// CR0: WAIT obeys TS.
const CR0_MP: u64 = 1 << 1;
/// The host's MXCSR while the guest's x87 state is loaded.
const MXCSR_QUIET: u32 = 0x1f80;
/// Exceptions of a store that, unmasked, keep it from being made: invalid operation, overflow, underflow.
const PREVENTS_STORE: u16 = 1 | 1 << 3 | 1 << 4;
/// The largest memory operand that the host's instructions get.
const OPERAND: usize = 16;

/// First opcode byte (0 for D8 to 7 for DF) and ModRM byte.
#[derive(Clone, Copy)]
struct Opcode {
    escape: u8,
    modrm: u8,
}

impl Opcode {
    fn is_memory(self) -> bool {
        self.modrm < 0xc0
    }

    /// The opcode extension in ModRM.
    fn extension(self) -> u8 {
        self.modrm >> 3 & 7
    }

    /// Whether the memory operand is written.
    fn stores(self) -> bool {
        matches!(
            (self.escape, self.extension()),
            (1, 2 | 3 | 6 | 7) | (3, 1 | 2 | 3 | 7) | (5, 1 | 2 | 3 | 6 | 7) | (7, 1 | 2 | 3 | 6 | 7)
        )
    }
}

/// The x87 opcode after the prefixes.
fn opcode(code: &[u8]) -> Option<Opcode> {
    let is_prefix = |byte: &u8| matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x4f | 0x64..=0x67 | 0xf2 | 0xf3);
    let mut rest = code.iter().copied().skip_while(is_prefix);
    let escape = rest.next().filter(|byte| matches!(byte, 0xd8..=0xdf))?;
    Some(Opcode { escape: escape - 0xd8, modrm: rest.next()? })
}

/// Executes the instruction if it belongs here; false if it does not.
pub(super) fn execute(m: &mut Machine) -> Step<bool> {
    match m.instruction.mnemonic() {
        Mnemonic::Wait => wait(m)?,
        _ => {
            let Some(opcode) = opcode(m.code) else { return Ok(false) };
            check_enabled(m)?;
            if !execute_control(m, opcode)? {
                check_no_pending(m)?;
                execute_on_host(m, opcode)?;
            }
        }
    }
    Ok(true)
}

fn check_enabled(m: &Machine) -> Step {
    if m.cpu.system.cr0 & (CR0_EM | CR0_TS) != 0 { Err(Outcome::fault(7)) } else { Ok(()) }
}

/// Raises #MF if an earlier instruction left an unmasked exception.
pub(super) fn check_no_pending(m: &Machine) -> Step {
    // The summary bit follows from the others, and a debugger may have set it without them.
    if m.cpu.fpu.fsw & !m.cpu.fpu.fcw & EXCEPTIONS == 0 {
        return Ok(());
    }
    // Without CR0.NE the error would go through the interrupt controller of a PC/AT, which no machine here has.
    Err(Outcome::fault(16))
}

fn wait(m: &mut Machine) -> Step {
    const BOTH: u64 = CR0_MP | CR0_TS;
    if m.cpu.system.cr0 & BOTH == BOTH {
        return Err(Outcome::fault(7));
    }
    check_no_pending(m)
}

/// The instructions on control and status; false for any other.
fn execute_control(m: &mut Machine, opcode: Opcode) -> Step<bool> {
    if opcode.is_memory() {
        return execute_control_in_memory(m, opcode);
    }
    match (opcode.escape, opcode.modrm) {
        (7, 0xe0) => m.write(0, 2, m.cpu.fpu.fsw.into())?,
        (3, 0xe2) => clear_exceptions(&mut m.cpu.fpu),
        (3, 0xe3) => initialise(&mut m.cpu.fpu),
        // FNENI, FNDISI and FNSETPM of older coprocessors do nothing.
        (3, 0xe0 | 0xe1 | 0xe4) => {}
        _ => return Ok(false),
    }
    Ok(true)
}

fn execute_control_in_memory(m: &mut Machine, opcode: Opcode) -> Step<bool> {
    match (opcode.escape, opcode.extension()) {
        (1, 5) => {
            check_no_pending(m)?;
            load_control(m)?;
        }
        (1, 7) => m.write(0, 2, m.cpu.fpu.fcw.into())?,
        (5, 7) => m.write(0, 2, m.cpu.fpu.fsw.into())?,
        (1, 4) => {
            check_no_pending(m)?;
            load_environment(m)?;
        }
        (1, 6) => store_environment(m)?,
        (5, 4) => {
            check_no_pending(m)?;
            restore(m)?;
        }
        (5, 6) => save(m)?,
        _ => return Ok(false),
    }
    Ok(true)
}

fn execute_on_host(m: &mut Machine, opcode: Opcode) -> Step {
    let mut operand = [0; OPERAND];
    let size = if opcode.is_memory() { m.instruction.memory_size().size() } else { 0 };
    let bytes = operand.get_mut(..size).ok_or(Outcome::Unsupported)?;
    if opcode.is_memory() && !opcode.stores() {
        let address = m.address()?;
        m.load_bytes(address, bytes)?;
    }
    let mut host = prepare(m);
    let mut flags = m.cpu.registers.rflags & ARITHMETIC;
    run_on_host(opcode, &mut host, &mut operand, &mut flags);
    let fpu = take_back(m, &host);
    if opcode.stores() && opcode.is_memory() && fpu.fsw & !fpu.fcw & PREVENTS_STORE == 0 {
        let address = m.address()?;
        m.store_bytes(address, &operand[..size])?;
    }
    m.set_arithmetic(flags);
    m.cpu.fpu = fpu;
    note_last_instruction(m, opcode)
}

/// The vCPU's x87 state for FXRSTOR.
fn prepare(m: &Machine) -> Legacy {
    let mut fpu = m.cpu.fpu;
    let (fcw, fsw) = (fpu.fcw, fpu.fsw);
    set_control_and_status(&mut fpu, fcw, fsw);
    let mut image = Legacy([0; 512]);
    put_x87(&mut image.0, &fpu, true);
    image.0[24..28].copy_from_slice(&MXCSR_QUIET.to_le_bytes());
    image
}

/// The vCPU's state after the host's instruction.
fn take_back(m: &Machine, host: &Legacy) -> FpuState {
    let before = &m.cpu.fpu;
    let mut fpu = *before;
    get_x87(&host.0, &mut fpu, true);
    (fpu.fip, fpu.fdp, fpu.fop) = (before.fip, before.fdp, before.fop);
    fpu
}

/// Records where the last instruction and its operand were.
fn note_last_instruction(m: &mut Machine, opcode: Opcode) -> Step {
    m.cpu.fpu.fip = m.instruction.ip();
    m.cpu.fpu.fop = u16::from(opcode.escape) << 8 | u16::from(opcode.modrm);
    if m.instruction.op_kinds().any(|kind| kind == OpKind::Memory) {
        m.cpu.fpu.fdp = m.address()?.linear;
    }
    Ok(())
}

/// Executes one x87 instruction on `image`: entry `escape * 64 + ModRM - C0` of a table for the register forms, entry
/// `escape * 8 + extension` of another for those with an operand at RAX.
fn run_on_host(opcode: Opcode, image: &mut Legacy, operand: &mut [u8; OPERAND], flags: &mut u64) {
    let mut own = Legacy([0; 512]);
    let escape = usize::from(opcode.escape);
    let entry = if opcode.is_memory() {
        512 + escape * 8 + usize::from(opcode.extension())
    } else {
        escape * 64 + usize::from(opcode.modrm & 0x3f)
    };
    // SAFETY: the entry is below 576, so the jump stays within the two tables, which follow one another. The decoder
    // has accepted the opcode, so it is valid; the instructions that store more than 16 bytes are executed elsewhere. The
    // areas are aligned and valid; no exception is pending before the instruction, and nothing after it waits for one;
    // the host's x87 and SSE state is back before any other code runs. Of the flags only arithmetic ones can be set.
    unsafe {
        asm!(
            "fxsave64 [{own}]",
            "fxrstor64 [{image}]",
            "lea {entry}, [{entry} * 8]",
            "lea {table}, [rip + 2f]",
            "add {entry}, {table}",
            "push qword ptr [{flags}]",
            "popfq",
            "jmp {entry}",
            ".set .Luhyve_x87, 0",
            ".balign 8",
            "2:",
            ".rept 512",
            ".byte 0xd8 + (.Luhyve_x87 >> 6), 0xc0 + (.Luhyve_x87 & 63)",
            "jmp 3f",
            ".balign 8",
            ".set .Luhyve_x87, .Luhyve_x87 + 1",
            ".endr",
            ".set .Luhyve_x87, 0",
            ".rept 64",
            ".byte 0xd8 + (.Luhyve_x87 >> 3), (.Luhyve_x87 & 7) << 3",
            "jmp 3f",
            ".balign 8",
            ".set .Luhyve_x87, .Luhyve_x87 + 1",
            ".endr",
            "3:",
            "pushfq",
            "pop qword ptr [{flags}]",
            "fxsave64 [{image}]",
            "fxrstor64 [{own}]",
            own = in(reg) &raw mut own,
            image = in(reg) &raw mut *image,
            entry = inout(reg) entry => _,
            table = out(reg) _,
            flags = in(reg) &raw mut *flags,
            in("rax") operand.as_mut_ptr(),
        );
    }
}
