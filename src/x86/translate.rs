//! From instructions to blocks of operations. What has no operation of its own becomes one of the slow kind, and what
//! changes the machine ends its block for the slow executor.

mod arithmetic;
mod families;
mod moves;
mod operands;
mod templates;
mod vectors;

use std::collections::HashSet;

use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register};

use super::MAX_LENGTH;
use super::block::{Draft, Handler, LONGEST, Op, Tables};
use super::core::{Decoded, shows_machine};
use super::engine::ZERO;
use super::mmu::{Mmu, PAGE};
use super::notes::{Note, Ops};
use super::ops::alu::{self, Joined};
use super::ops::locked::{Kind, locked};
use super::ops::{breakpoint, flow, redo, slow, string, system};
use super::privileged::needs_machine;
use super::vector::VectorFn;
use super::vector_call::VectorCall;
use arithmetic::{ARITHMETIC, SHIFTS, UNARY};
use families::{Family, Member, member};
use operands::{has_memory, immediate, offset, register_operand, with_memory};

/// The most bytes of a block. A longer one would be rare, and all of them are copied first.
const WINDOW: usize = 256;

/// What an instruction becomes.
enum Made {
    /// An operation; the block goes on.
    Op,
    /// None: it does nothing.
    Nothing,
    /// An operation that ends the block.
    End,
}

/// Where blocks are made, one after the other.
pub(super) struct Workshop {
    ops: Ops,
    tables: Tables<Vec<Decoded>, Vec<VectorCall>, Vec<VectorFn>>,
    /// The code, as it was when the block was made.
    bytes: [u8; WINDOW],
}

impl Default for Workshop {
    fn default() -> Self {
        Self { ops: Ops::default(), tables: Tables::default(), bytes: [0; WINDOW] }
    }
}

/// Where the code of a block lies.
#[derive(Clone, Copy)]
pub(super) struct Place {
    /// Linear address.
    pub rip: u64,
    pub physical: u64,
    /// The page where its only instruction goes on, if it crosses into one.
    pub rest: Option<u64>,
}

/// Whether the instruction at a place does not end in its page.
pub(super) fn is_cut(mmu: &Mmu, physical: u64) -> bool {
    let room = PAGE - physical % PAGE;
    let mut bytes = [0; MAX_LENGTH];
    if room >= MAX_LENGTH as u64 {
        return false;
    }
    let length = copy(mmu, physical, room, &mut bytes);
    let mut decoder = Decoder::new(64, &bytes[..length], DecoderOptions::NONE);
    length > 0 && decoder.decode().is_invalid() && decoder.last_error() == DecoderError::NoMoreBytes
}

/// Copies as many bytes of RAM, which lie in one page, as fit. Returns how many.
fn copy(mmu: &Mmu, physical: u64, length: u64, to: &mut [u8]) -> usize {
    let length = to.len().min(usize::try_from(length).unwrap_or(usize::MAX));
    let Some(host) = mmu.host(physical, length as u64) else { return 0 };
    // SAFETY: at least that many bytes of RAM, and no more than the slice has.
    unsafe { std::ptr::copy_nonoverlapping(host, to.as_mut_ptr(), length) };
    length
}

/// Decodes a block. `None` if there is no code in RAM, or none that is decodable: the slow executor then raises what
/// there is to raise.
pub(super) fn translate<'a>(
    mmu: &Mmu,
    place: Place,
    is_single: bool,
    workshop: &'a mut Workshop,
    breakpoints: &HashSet<u64>,
) -> Option<Draft<'a>> {
    let Place { rip, physical, rest } = place;
    let most = if is_single || rest.is_some() { 1 } else { LONGEST };
    let Workshop { ops, tables, bytes } = workshop;
    let mut room = copy(mmu, physical, PAGE - physical % PAGE, bytes);
    if let Some(rest) = rest {
        room += copy(mmu, rest, PAGE, &mut bytes[room..MAX_LENGTH]);
    }
    ops.clear();
    tables.slow.clear();
    tables.vectors.clear();
    tables.functions.clear();
    let mut builder = Builder { rip, ops, tables, offset: 0, number: 0, before: None };
    let ended = if breakpoints.is_empty() || is_single {
        builder.fill(&bytes[..room], most, |_| false)
    } else {
        builder.fill(&bytes[..room], most, |at| breakpoints.contains(&at))
    };
    if builder.ops.as_slice().is_empty() && builder.number == 0 {
        return None;
    }
    if !ended {
        builder.ops.note(Note::default());
        let op = builder.op(if is_single { flow::go_on_alone } else { flow::go_on });
        builder.ops.push(op);
    }
    builder.ops.drop_dead_flags();
    let (length, count) = (builder.offset, builder.number.into());
    let Tables { slow, vectors, functions } = tables;
    let (tables, code) =
        (Tables { slow: &**slow, vectors: &**vectors, functions: &**functions }, &bytes[..usize::from(length)]);
    Some(Draft { place, is_single, length: length.into(), count, ops: ops.as_slice(), tables, code })
}

struct Builder<'a> {
    rip: u64,
    ops: &'a mut Ops,
    tables: &'a mut Tables<Vec<Decoded>, Vec<VectorCall>, Vec<VectorFn>>,
    /// Bytes so far.
    offset: u16,
    /// Instructions so far.
    number: u8,
    /// What the last operation may be joined with a branch as, with its operand size.
    before: Option<(Joined, u8)>,
}

impl Builder<'_> {
    /// Decodes up to `most` instructions; true if the last ends the block.
    fn fill(&mut self, bytes: &[u8], most: usize, is_breakpoint: impl Fn(u64) -> bool) -> bool {
        // It stays where it is made: it is large.
        let mut decoder = Decoder::try_with_ip(64, bytes, self.rip, DecoderOptions::NONE);
        let Ok(decoder) = &mut decoder else { return false };
        let mut instruction = Instruction::default();
        while usize::from(self.number) < most && decoder.can_decode() {
            if is_breakpoint(self.rip.wrapping_add(self.offset.into())) {
                self.ops.nothing_known();
                let op = self.op(breakpoint);
                self.ops.push(op);
                // It counts as an instruction that is never executed, so that a block is never empty.
                self.number += 1;
                self.offset += 1;
                return true;
            }
            decoder.decode_out(&mut instruction);
            if decoder.last_error() != DecoderError::None {
                return false;
            }
            let made = self.make(&instruction, bytes);
            self.number += 1;
            self.offset += u16::from(instruction.len().to_le_bytes()[0]);
            match made {
                Made::Op => {}
                Made::Nothing => self.before = None,
                Made::End => return true,
            }
        }
        false
    }

    /// Makes it the instruction's operation.
    #[inline(always)]
    #[allow(clippy::unnecessary_wraps)]
    fn place(&mut self, op: Op) -> Option<()> {
        self.ops.push(op);
        Some(())
    }

    /// An operation for the instruction at the current offset.
    #[inline(always)]
    fn op(&self, run: Handler) -> Op {
        let zero = offset(ZERO);
        Op {
            run,
            imm: 0,
            disp: 0,
            base: zero,
            index: zero,
            scale: 0,
            r1: 0,
            r2: 0,
            number: self.number,
            at: self.offset,
        }
    }

    /// Makes an operation of an instruction, which stands at the current offset of the code.
    fn make(&mut self, i: &Instruction, code: &[u8]) -> Made {
        let before = self.before.take();
        self.common(i, before).unwrap_or_else(|| self.any(i, before, code))
    }

    /// What most instructions become, with few questions asked.
    #[inline(always)]
    fn common(&mut self, i: &Instruction, before: Option<(Joined, u8)>) -> Option<Made> {
        if i.has_lock_prefix() || i.has_rep_prefix() || i.has_repne_prefix() {
            return None;
        }
        let Member { family, number } = member(i.mnemonic());
        match family {
            Family::Branch => self.branch(i).map(|()| Made::End),
            Family::Conditional => self.conditional(i, before, number).map(|()| Made::End),
            _ => self.by_family(i, family, number).map(|()| Made::Op),
        }
    }

    /// An operation of a family.
    #[inline(always)]
    fn by_family(&mut self, i: &Instruction, family: Family, number: u8) -> Option<()> {
        let place = usize::from(number);
        match family {
            // All of these say what is known of them.
            Family::Arithmetic => return self.two_operands(i, ARITHMETIC.get(place)?),
            Family::Unary => return self.unary(i, UNARY.get(place)?),
            Family::Move => return self.mov(i),
            Family::Shift => return self.shifted(i, SHIFTS.get(place)?),
            _ => self.ops.nothing_known(),
        }
        match family {
            Family::Extend => self.extended(i, number != 0),
            Family::Address => self.address(i),
            Family::Set => self.set_if(i, number),
            Family::MoveIf => self.move_if(i, number),
            Family::Accumulator => self.accumulator(i),
            Family::Stack => self.stack(i),
            Family::Count => self.counted(i),
            Family::Vector => self.vector(i),
            _ => None,
        }
    }

    /// What any instruction becomes.
    #[inline(never)]
    fn any(&mut self, i: &Instruction, before: Option<(Joined, u8)>, code: &[u8]) -> Made {
        self.ops.nothing_known();
        let Member { family, number } = member(i.mnemonic());
        let is_branch = match family {
            Family::Conditional => self.conditional(i, before, number),
            Family::Branch => self.branch(i),
            _ => None,
        };
        if is_branch.is_some() {
            return Made::End;
        }
        if self.system(i).is_some() {
            return Made::Op;
        }
        if i.flow_control() != FlowControl::Next || needs_machine(i) || shows_machine(i) {
            self.place(self.op(redo));
            return Made::End;
        }
        if does_nothing(i) {
            return Made::Nothing;
        }
        if self.fast(i).is_some() {
            return Made::Op;
        }
        self.ops.nothing_known();
        let imm = i32::try_from(self.tables.slow.len()).expect("at most 64");
        let mut bytes = [0; MAX_LENGTH];
        let start = usize::from(self.offset);
        bytes[..i.len()].copy_from_slice(&code[start..start + i.len()]);
        self.tables.slow.push(Decoded { instruction: *i, code: bytes });
        self.place(Op { imm, ..self.op(slow) });
        Made::Op
    }

    /// Where a direct branch leads, from the block's start.
    #[inline(always)]
    fn target(&self, i: &Instruction) -> Option<i32> {
        if i.op0_kind() != OpKind::NearBranch64 {
            return None;
        }
        let target = i.near_branch64();
        // One that wraps out of the canonical range is the slow executor's.
        if (target << 16).cast_signed() >> 16 != target.cast_signed() {
            return None;
        }
        i32::try_from(target.wrapping_sub(self.rip).cast_signed()).ok()
    }

    /// Direct and indirect jumps and calls, and returns.
    fn branch(&mut self, i: &Instruction) -> Option<()> {
        self.ops.nothing_known();
        if i.op_count() > 0 && i.op0_kind() == OpKind::NearBranch64 {
            let disp = self.target(i)?;
            return match i.mnemonic() {
                Mnemonic::Jmp => self.place(Op { disp, ..self.op(flow::jump) }),
                Mnemonic::Call => self.place(Op { disp, ..self.op(flow::call) }),
                _ => None,
            };
        }
        let (register, memory): (Handler, Handler) = match i.code() {
            Code::Jmp_rm64 => (flow::jump_r, flow::jump_m),
            Code::Call_rm64 => (flow::call_r, flow::call_m),
            Code::Retnq => return self.place(self.op(flow::ret)),
            Code::Retnq_imm16 => return self.place(Op { imm: i.immediate16().into(), ..self.op(flow::ret) }),
            _ => return None,
        };
        if let Some((r1, _)) = register_operand(i, 0) {
            return self.place(Op { r1, ..self.op(register) });
        }
        self.place(with_memory(self.op(memory), self.memory(i)?))
    }

    /// Jcc, joined with the operation before it if that can be.
    fn conditional(&mut self, i: &Instruction, before: Option<(Joined, u8)>, condition: u8) -> Option<()> {
        let disp = self.target(i)?;
        self.ops.nothing_known();
        if let Some((what, size)) = before
            && let Some(run) = alu::joined(what, size.into(), condition)
        {
            let last = self.ops.pop().expect("there is one before");
            self.ops.note(Note { sets_flags: !matches!(what, Joined::Inc | Joined::Dec), ..Note::pure(0, 0) });
            return self.place(Op { run, disp, ..last });
        }
        self.place(Op { disp, ..self.op(flow::conditional(condition)) })
    }

    /// The operation of its own that an instruction has.
    fn fast(&mut self, i: &Instruction) -> Option<()> {
        if i.has_lock_prefix() || i.mnemonic() == Mnemonic::Xchg && has_memory(i) {
            return self.atomic(i);
        }
        if i.has_rep_prefix() && !i.has_repne_prefix() && self.repeated(i).is_some() {
            return Some(());
        }
        let Member { family, number } = member(i.mnemonic());
        match family {
            Family::Other => self.rare(i),
            _ => self.by_family(i, family, number),
        }
    }

    /// An operation of none of the families.
    fn rare(&mut self, i: &Instruction) -> Option<()> {
        self.moved(i).or_else(|| self.shifted_without_flags(i)).or_else(|| self.counted(i)).or_else(|| self.vector(i))
    }

    /// What belongs to the machine and needs no more than the CPU's registers.
    fn system(&mut self, i: &Instruction) -> Option<()> {
        match i.code() {
            Code::Cli => self.place(self.op(system::clear_interrupts)),
            Code::Mov_r64_cr => {
                let run = system::read_control(i.op1_register().number())?;
                self.place(Op { r1: register_operand(i, 0)?.0, ..self.op(run) })
            }
            Code::Invlpg_m => {
                let op = Op { imm: i32::try_from(i.len()).ok()?, ..self.op(system::invalidate) };
                self.place(with_memory(op, self.memory(i)?))
            }
            _ => None,
        }
    }

    fn repeated(&mut self, i: &Instruction) -> Option<()> {
        let (size, moves) = match i.code() {
            Code::Movsb_m8_m8 => (1, true),
            Code::Movsw_m16_m16 => (2, true),
            Code::Movsd_m32_m32 => (4, true),
            Code::Movsq_m64_m64 => (8, true),
            Code::Stosb_m8_AL => (1, false),
            Code::Stosw_m16_AX => (2, false),
            Code::Stosd_m32_EAX => (4, false),
            Code::Stosq_m64_RAX => (8, false),
            _ => return None,
        };
        let is_wide = i.op_kind(0) == OpKind::MemoryESRDI;
        let is_plain = !moves || !matches!(i.memory_segment(), Register::FS | Register::GS);
        let is_wide = is_wide && (!moves || i.op_kind(1) == OpKind::MemorySegRSI);
        (is_wide && is_plain).then(|| self.op(string::string(size, moves))).and_then(|op| self.place(op))
    }

    fn atomic(&mut self, i: &Instruction) -> Option<()> {
        use Mnemonic as M;
        let kind = match i.mnemonic() {
            M::Xchg => Kind::Exchange,
            M::Cmpxchg => Kind::CompareExchange,
            M::Xadd => Kind::ExchangeAdd,
            M::Add => Kind::Add,
            M::Sub => Kind::Sub,
            M::And => Kind::And,
            M::Or => Kind::Or,
            M::Xor => Kind::Xor,
            M::Inc => Kind::Inc,
            M::Dec => Kind::Dec,
            _ => return None,
        };
        let memory = self.memory(i)?;
        let size = i.memory_size().size();
        let register = register_operand(i, 1).or_else(|| register_operand(i, 0));
        let imm = if i.op_count() == 2 && register.is_none() { Some(immediate(i, 1)?) } else { None };
        let op = self.op(locked(kind, size, imm.is_some())?);
        let op = Op { r2: register.map_or(0, |(r, _)| r), imm: imm.unwrap_or(0), ..op };
        self.place(with_memory(op, memory))
    }
}

/// An operand size as notes have it.
fn bytes(size: usize) -> u8 {
    u8::try_from(size).expect("at most 8")
}

/// NOPs and hints.
fn does_nothing(i: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(i.mnemonic(), M::Nop | M::Endbr64)
}
