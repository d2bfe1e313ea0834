//! Which memory an instruction is about to read and write, from its operands and the registers: for a debugger that
//! watches data while the CPU, not this emulator, executes the instruction.

use iced_x86::{InstructionInfoFactory, InstructionInfoOptions, OpAccess, Register};

use super::operand::slot;
use super::{decode, flags::mask};
use crate::backend::DataAccess;
use crate::registers::{RCX, Registers, SystemRegisters};

/// The most bytes that an instruction of the XSAVE family is taken to access; iced gives no size for them.
const UNSIZED: u64 = 832;

/// The accesses of one instruction.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Accesses {
    /// Operands in memory, explicit and implicit, the stack included.
    pub memory: Vec<DataAccess>,
    /// Where the next instruction is if this one neither branches nor faults.
    pub next: Option<u64>,
}

/// The accesses of the instruction that `code` starts with, as it stands at RIP. A vector of addresses (gather) and
/// what an exception does to the stack are not found.
pub fn accesses(code: &[u8], registers: &Registers, system: &SystemRegisters) -> Accesses {
    let Ok(instruction) = decode(code, registers.rip) else { return Accesses::default() };
    let is_string = instruction.has_rep_prefix() || instruction.has_repne_prefix();
    if is_string && instruction.is_string_instruction() && registers.general[RCX] == 0 {
        return Accesses { memory: Vec::new(), next: Some(instruction.next_ip()) };
    }
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info_options(&instruction, InstructionInfoOptions::NO_REGISTER_USAGE);
    let value = |register: Register, _element: usize, _size: usize| match register {
        Register::FS => Some(system.fs.base),
        Register::GS => Some(system.gs.base),
        Register::CS | Register::DS | Register::ES | Register::SS => Some(0),
        Register::RIP | Register::EIP => Some(0),
        register => slot(register).map(|s| registers.general[s.index] >> s.shift & mask(s.size)),
    };
    let memory = info.used_memory().iter().filter_map(|used| {
        let write = match used.access() {
            OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite => true,
            OpAccess::Read | OpAccess::CondRead => false,
            _ => return None,
        };
        let length = match used.memory_size().size() {
            0 => UNSIZED,
            size => size as u64,
        };
        Some(DataAccess { address: used.virtual_address(0, value)?, length, write })
    });
    let is_plain = instruction.flow_control() == iced_x86::FlowControl::Next;
    Accesses { memory: memory.collect(), next: is_plain.then(|| instruction.next_ip()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registers::{RAX, RBX, RDI, RSI, RSP};

    fn of(code: &[u8]) -> Vec<(u64, u64, bool)> {
        let mut registers = Registers { rip: 0x1000, ..Default::default() };
        for (register, value) in [(RAX, 0x100), (RBX, 0x10), (RSP, 0x8000), (RSI, 0x200), (RDI, 0x300)] {
            registers.general[register] = value;
        }
        let mut system = SystemRegisters::default();
        system.fs.base = 0x7_0000;
        let found = accesses(code, &registers, &system).memory;
        let mut found: Vec<_> = found.into_iter().map(|a| (a.address, a.length, a.write)).collect();
        found.sort_unstable();
        found
    }

    #[test]
    fn test_operands_of_an_instruction_are_found_with_their_sizes_and_directions() {
        assert_eq!(of(&[0x48, 0x89, 0x44, 0x58, 0x04]), [(0x124, 8, true)], "mov [rax+rbx*2+4], rax");
        assert_eq!(of(&[0x64, 0x8b, 0x04, 0x25, 0x10, 0, 0, 0]), [(0x7_0010, 4, false)], "mov eax, fs:[0x10]");
        assert_eq!(of(&[0x80, 0x00, 0x01]), [(0x100, 1, true)], "add byte [rax], 1");
        assert_eq!(of(&[0x8b, 0x05, 0x10, 0, 0, 0]), [(0x1016, 4, false)], "mov eax, [rip+0x10]");
        assert_eq!(of(&[0x53]), [(0x7ff8, 8, true)], "push rbx");
        assert_eq!(of(&[0xc3]), [(0x8000, 8, false)], "ret");
        assert_eq!(of(&[0xa4]), [(0x200, 1, false), (0x300, 1, true)], "movsb");
        assert_eq!(of(&[0x48, 0x8d, 0x00]), [], "lea");
        assert_eq!(of(&[0xf3, 0xa4]), [], "rep movsb of nothing");
        assert_eq!(of(&[0x06]), [], "no instruction");
    }
}
