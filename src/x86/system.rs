//! The instructions that read system state without changing the machine, and FS's and GS's base: XGETBV, RDTSC, RDTSCP,
//! RDPID, RDFSBASE and its relatives, RDRAND. Everything else that is privileged is left to the hypervisor.

use iced_x86::Mnemonic;

use super::Outcome;
use super::flags::{ARITHMETIC, CF};
use super::operand::{Machine, Step};
use crate::registers::{CR4_OSXSAVE, RAX, RCX, RDX};

/// CR4: RDTSC in ring 3 is refused.
const CR4_TSD: u64 = 1 << 2;
/// CR4: RDFSBASE and its relatives are allowed.
const CR4_FSGSBASE: u64 = 1 << 16;

/// Executes the instruction if it belongs here; false if it does not.
pub(super) fn execute(m: &mut Machine) -> Step<bool> {
    use Mnemonic as M;
    match m.instruction.mnemonic() {
        M::Xgetbv => xgetbv(m)?,
        M::Rdtsc => read_tsc(m)?,
        M::Rdtscp => {
            read_tsc(m)?;
            m.set_general(RCX, 4, m.cpu.tsc_aux);
        }
        M::Rdpid => m.write(0, 8, m.cpu.tsc_aux & 0xffff_ffff)?,
        M::Rdfsbase | M::Rdgsbase => read_base(m)?,
        M::Wrfsbase | M::Wrgsbase => write_base(m)?,
        M::Rdrand | M::Rdseed => random(m)?,
        _ => return Ok(false),
    }
    Ok(true)
}

/// Sets EDX:EAX.
fn set_pair(m: &mut Machine, value: u64) {
    m.set_general(RAX, 4, value);
    m.set_general(RDX, 4, value >> 32);
}

fn xgetbv(m: &mut Machine) -> Step {
    if m.cpu.system.cr4 & CR4_OSXSAVE == 0 {
        return Err(Outcome::fault(6));
    }
    // Index 1 asks which components are in use; "all that are enabled" is always a legal answer.
    if m.general(RCX, 4) > 1 {
        return Err(Outcome::fault_zero(13));
    }
    set_pair(m, m.cpu.xcr0);
    Ok(())
}

fn read_tsc(m: &mut Machine) -> Step {
    if m.cpu.system.cr4 & CR4_TSD != 0 && m.cpu.system.cs.selector & 3 != 0 {
        return Err(Outcome::fault_zero(13));
    }
    let now = m.bus.read_tsc();
    set_pair(m, now);
    Ok(())
}

fn check_base_access(m: &Machine) -> Step {
    if m.cpu.system.cr4 & CR4_FSGSBASE == 0 { Err(Outcome::fault(6)) } else { Ok(()) }
}

fn read_base(m: &mut Machine) -> Step {
    check_base_access(m)?;
    let is_fs = m.instruction.mnemonic() == Mnemonic::Rdfsbase;
    let base = if is_fs { m.cpu.system.fs.base } else { m.cpu.system.gs.base };
    let size = m.size(0)?;
    m.write(0, size, base)
}

fn write_base(m: &mut Machine) -> Step {
    check_base_access(m)?;
    let size = m.size(0)?;
    let base = m.read(0, size)?;
    if !m.is_canonical(base) {
        return Err(Outcome::fault_zero(13));
    }
    let is_fs = m.instruction.mnemonic() == Mnemonic::Wrfsbase;
    *(if is_fs { &mut m.cpu.system.fs.base } else { &mut m.cpu.system.gs.base }) = base;
    Ok(())
}

fn random(m: &mut Machine) -> Step {
    let value = m.bus.random().ok_or(Outcome::Unsupported)?;
    let size = m.size(0)?;
    m.write(0, size, value)?;
    m.set_flags(ARITHMETIC, CF);
    Ok(())
}
