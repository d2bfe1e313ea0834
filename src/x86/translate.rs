//! From instructions to blocks of operations. What has no operation of its own becomes one of the slow kind, and what
//! changes the machine ends its block for the slow executor.

mod arithmetic;
mod vectors;

use iced_x86::{
    Code, ConditionCode, Decoder, DecoderError, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register,
};

use super::MAX_LENGTH;
use super::block::{Draft, Handler, LONGEST, Op, Tables};
use super::core::{Decoded, shows_machine};
use super::engine::{FS, GS, START, ZERO};
use super::mmu::{Mmu, PAGE};
use super::notes::{Note, Ops, bit as of};
use super::operand::slot;
use super::ops::alu::{self, Form, Joined};
use super::ops::locked::{Kind, locked};
use super::ops::pair::First;
use super::ops::{breakpoint, data, flow, redo, slow, string, system};
use super::privileged::needs_machine;
use super::vector::VectorFn;
use super::vector_call::VectorCall;
use crate::registers::{RAX, RDX};

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

/// A memory operand as operations have it.
#[derive(Clone, Copy)]
struct Memory {
    base: u8,
    index: u8,
    scale: u8,
    disp: i32,
    is_indexed: bool,
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
    is_breakpoint: impl Fn(u64) -> bool,
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
    let ended = builder.fill(&bytes[..room], most, |at| !is_single && is_breakpoint(at));
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

/// The families of operations that the builder knows by the mnemonic alone. An instruction of one may still have a form
/// that the family has no operation for.
#[derive(Clone, Copy)]
enum Family {
    Other,
    Branch,
    Arithmetic,
    Data,
    Stack,
    Shift,
    Count,
    Vector,
}

/// Families by mnemonic.
static FAMILIES: [Family; 2048] = {
    use Mnemonic as M;
    let members: [(Family, &[Mnemonic]); 11] = [
        (Family::Branch, &[M::Jmp, M::Call, M::Ret, M::Jo, M::Jno, M::Jb, M::Jae, M::Je, M::Jne, M::Jbe, M::Ja]),
        (Family::Branch, &[M::Js, M::Jns, M::Jp, M::Jnp, M::Jl, M::Jge, M::Jle, M::Jg]),
        (Family::Arithmetic, &[M::Add, M::Adc, M::Sub, M::Sbb, M::Cmp, M::And, M::Or, M::Xor, M::Test]),
        (Family::Arithmetic, &[M::Inc, M::Dec, M::Neg, M::Not]),
        (Family::Data, &[M::Mov, M::Movzx, M::Movsx, M::Movsxd, M::Lea, M::Cdqe, M::Cwde, M::Cdq, M::Cqo]),
        (
            Family::Data,
            &[M::Sete, M::Setne, M::Setb, M::Setae, M::Seta, M::Setbe, M::Setl, M::Setg, M::Setle, M::Setge],
        ),
        (Family::Data, &[M::Cmove, M::Cmovne, M::Cmovb, M::Cmovae, M::Cmova, M::Cmovbe, M::Cmovs, M::Cmovns]),
        (Family::Stack, &[M::Push, M::Pop, M::Leave]),
        (Family::Shift, &[M::Shl, M::Shr, M::Sar, M::Rol, M::Ror]),
        (Family::Count, &[M::Imul, M::Mul, M::Div, M::Idiv, M::Bswap, M::Bt]),
        (Family::Vector, &[M::Movaps, M::Movups, M::Movdqa, M::Movdqu, M::Movd, M::Movq, M::Pxor, M::Xorps]),
    ];
    let mut families = [Family::Other; 2048];
    let mut list = 0;
    while list < members.len() {
        let (family, mnemonics) = members[list];
        let mut n = 0;
        while n < mnemonics.len() {
            families[mnemonics[n] as usize] = family;
            n += 1;
        }
        list += 1;
    }
    families
};

struct Builder<'a> {
    rip: u64,
    ops: &'a mut Ops,
    tables: &'a mut Tables<Vec<Decoded>, Vec<VectorCall>, Vec<VectorFn>>,
    /// Bytes so far.
    offset: u16,
    /// Instructions so far.
    number: u8,
    /// What the last operation may be joined with a branch as, with its operand size.
    before: Option<(Joined, usize)>,
}

impl Builder<'_> {
    /// Decodes up to `most` instructions; true if the last ends the block.
    fn fill(&mut self, bytes: &[u8], most: usize, is_breakpoint: impl Fn(u64) -> bool) -> bool {
        let mut decoder = Decoder::with_ip(64, bytes, self.rip, DecoderOptions::NONE);
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
            let length = instruction.len();
            let start = usize::from(self.offset);
            let made = self.make(&instruction, &bytes[start..start + length]);
            self.number += 1;
            self.offset += u16::try_from(length).expect("at most 15");
            match made {
                Made::Op => {
                    if self.ops.join() {
                        self.before = None;
                    }
                    self.ops.pair();
                }
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

    fn make(&mut self, i: &Instruction, code: &[u8]) -> Made {
        let before = self.before.take();
        self.ops.nothing_known();
        self.common(i, before).unwrap_or_else(|| self.any(i, before, code))
    }

    /// What most instructions become, with few questions asked.
    #[inline(always)]
    fn common(&mut self, i: &Instruction, before: Option<(Joined, usize)>) -> Option<Made> {
        if i.has_lock_prefix() || i.has_rep_prefix() || i.has_repne_prefix() {
            return None;
        }
        match FAMILIES.get(i.mnemonic() as usize)? {
            Family::Other => return None,
            Family::Branch => return self.branch(i, before).map(|()| Made::End),
            Family::Arithmetic => self.arithmetic(i),
            Family::Data => self.data(i),
            Family::Stack => self.stack(i),
            Family::Shift => self.shifted(i),
            Family::Count => self.counted(i),
            Family::Vector => self.vector(i),
        }
        .map(|()| Made::Op)
    }

    /// What any instruction becomes.
    #[inline(never)]
    fn any(&mut self, i: &Instruction, before: Option<(Joined, usize)>, code: &[u8]) -> Made {
        self.ops.nothing_known();
        if self.branch(i, before).is_some() {
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
        bytes[..code.len()].copy_from_slice(code);
        self.tables.slow.push(Decoded { instruction: *i, code: bytes });
        self.place(Op { imm, ..self.op(slow) });
        Made::Op
    }

    /// Direct and indirect branches, calls and returns.
    fn branch(&mut self, i: &Instruction, before: Option<(Joined, usize)>) -> Option<()> {
        if i.op_count() > 0 && i.op_kind(0) == OpKind::NearBranch64 {
            let disp = i32::try_from(i.near_branch64().wrapping_sub(self.rip).cast_signed()).ok()?;
            // A target that wraps out of the canonical range is the slow executor's.
            if (i.near_branch64() << 16).cast_signed() >> 16 != i.near_branch64().cast_signed() {
                return None;
            }
            return match i.mnemonic() {
                Mnemonic::Jmp => self.place(Op { disp, ..self.op(flow::jump) }),
                Mnemonic::Call => self.place(Op { disp, ..self.op(flow::call) }),
                _ if i.is_jcc_short_or_near() => self.conditional(i, before, disp),
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
    fn conditional(&mut self, i: &Instruction, before: Option<(Joined, usize)>, disp: i32) -> Option<()> {
        let condition = condition(i)?;
        if let Some((what, size)) = before
            && let Some(run) = alu::joined(what, size, condition)
        {
            let last = self.ops.pop().expect("there is one before");
            self.ops.note(Note { sets_flags: !matches!(what, Joined::Inc | Joined::Dec), ..Note::pure(0, 0) });
            return self.place(Op { run, disp, ..last });
        }
        self.place(Op { disp, ..self.op(flow::conditional(condition)) })
    }

    /// The memory operand, if operations can have it.
    fn memory(&self, i: &Instruction) -> Option<Memory> {
        let segment = match i.memory_segment() {
            Register::FS => Some(FS),
            Register::GS => Some(GS),
            _ => None,
        };
        let wide = |register: Register| match register {
            Register::None => Some(None),
            r => slot(r).filter(|s| s.size == 8).map(|s| Some(s.index)),
        };
        let mut displacement = i.memory_displacement64();
        let mut base;
        let mut index = wide(i.memory_index())?;
        let mut scale = u8::try_from(i.memory_index_scale().trailing_zeros()).ok()?;
        if i.memory_base() == Register::RIP {
            displacement = displacement.wrapping_sub(self.rip);
            base = Some(START);
        } else if i.memory_base() != Register::EIP {
            base = wide(i.memory_base())?;
            if base.is_none() && index.is_none() && i.memory_displ_size() == 4 {
                return None;
            }
        } else {
            return None;
        }
        if let Some(segment) = segment {
            match (base, index) {
                (None, _) => base = Some(segment),
                (Some(_), None) => (index, scale) = (Some(segment), 0),
                _ => return None,
            }
        }
        let disp = i32::try_from(displacement.cast_signed()).ok()?;
        let (is_indexed, index) = (index.is_some(), offset(index.unwrap_or(ZERO)));
        Some(Memory { base: offset(base.unwrap_or(ZERO)), index, scale, disp, is_indexed })
    }

    /// The operation of its own that an instruction has.
    fn fast(&mut self, i: &Instruction) -> Option<()> {
        if i.has_lock_prefix() || i.mnemonic() == Mnemonic::Xchg && has_memory(i) {
            return self.atomic(i);
        }
        if i.has_rep_prefix() && !i.has_repne_prefix() && self.repeated(i).is_some() {
            return Some(());
        }
        self.arithmetic(i)
            .or_else(|| self.data(i))
            .or_else(|| self.stack(i))
            .or_else(|| self.shifted(i))
            .or_else(|| self.counted(i))
            .or_else(|| self.vector(i))
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

    /// An operation on two operands of any form.
    #[inline(always)]
    fn two_operands(
        &self,
        i: &Instruction,
        choose: impl Fn(Form, usize, bool) -> Handler,
    ) -> Option<(Op, Form, usize)> {
        if let Some((r1, size)) = register_operand(i, 0) {
            if let Some((r2, _)) = register_operand(i, 1) {
                let form = Form::RegisterRegister;
                return Some((Op { r1, r2, ..self.op(choose(form, size, false)) }, form, size));
            }
            if i.op_kind(1) == OpKind::Memory {
                let (form, memory) = (Form::RegisterMemory, self.memory(i)?);
                let op = Op { r1, ..self.op(choose(form, size, memory.is_indexed)) };
                return Some((with_memory(op, memory), form, size));
            }
            let form = Form::RegisterImmediate;
            return Some((Op { r1, imm: immediate(i, 1)?, ..self.op(choose(form, size, false)) }, form, size));
        }
        if i.op_kind(0) != OpKind::Memory {
            return None;
        }
        let (memory, size) = (self.memory(i)?, i.memory_size().size());
        if let Some((r2, _)) = register_operand(i, 1) {
            let form = Form::MemoryRegister;
            let op = Op { r2, ..self.op(choose(form, size, memory.is_indexed)) };
            return Some((with_memory(op, memory), form, size));
        }
        let form = Form::MemoryImmediate;
        let op = Op { imm: immediate(i, 1)?, ..self.op(choose(form, size, memory.is_indexed)) };
        Some((with_memory(op, memory), form, size))
    }

    fn data(&mut self, i: &Instruction) -> Option<()> {
        use Mnemonic as M;
        match i.mnemonic() {
            M::Mov | M::Movnti => self.mov(i),
            M::Movzx => self.extended(i, false),
            M::Movsx | M::Movsxd => self.extended(i, true),
            M::Lea => {
                let (r1, size) = register_operand(i, 0)?;
                // A segment does not count, and only a 64-bit address is known.
                if matches!(i.memory_segment(), Register::FS | Register::GS) {
                    return None;
                }
                let memory = self.memory(i)?;
                let reads = of(memory.base) | of(memory.index) | narrow(r1, size);
                let first = if memory.is_indexed { First::Indexed } else { First::Based };
                let first = Some(first).filter(|_| size >= 4);
                self.ops.note(Note { first, size: bytes(size), ..Note::pure(reads, of(r1)) });
                self.place(with_memory(Op { r1, ..self.op(data::lea(size, memory.is_indexed)) }, memory))
            }
            M::Xchg => {
                let ((r1, size), (r2, _)) = (register_operand(i, 0)?, register_operand(i, 1)?);
                self.ops.note(Note::pure(of(r1) | of(r2), of(r1) | of(r2)));
                self.place(Op { r1, r2, ..self.op(data::exchange(size)) })
            }
            M::Cdqe => self.pure(data::cdqe, RAX, RAX),
            M::Cwde => self.pure(data::cwde, RAX, RAX),
            M::Cdq => self.pure(data::cdq, RAX, RDX),
            M::Cqo => self.pure(data::cqo, RAX, RDX),
            M::Cld => self.place(self.op(data::direction)),
            M::Std => self.place(Op { imm: 1, ..self.op(data::direction) }),
            M::Clc => self.place(self.op(data::carry)),
            M::Stc => self.place(Op { imm: 1, ..self.op(data::carry) }),
            M::Cmc => self.place(self.op(data::complement_carry)),
            _ => self.on_condition(i),
        }
    }

    /// An operation that only works on these registers.
    fn pure(&mut self, run: Handler, reads: usize, writes: usize) -> Option<()> {
        self.ops.note(Note::pure(1 << reads, 1 << writes));
        self.place(self.op(run))
    }

    fn mov(&mut self, i: &Instruction) -> Option<()> {
        if let (Some((r1, size)), OpKind::Immediate64) = (register_operand(i, 0), i.op_kind(1)) {
            let bytes = i.immediate64().to_le_bytes();
            let half = |at: usize| i32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
            debug_assert_eq!(size, 8);
            self.ops.note(Note::pure(0, of(r1)));
            return self.place(Op { r1, imm: half(0), disp: half(4), ..self.op(data::mov_wide) });
        }
        let choose = |form, size, is_indexed| match form {
            Form::RegisterRegister => data::move_register(size),
            Form::RegisterImmediate => data::move_immediate(size),
            Form::RegisterMemory => data::load(size, is_indexed),
            Form::MemoryRegister => data::store(size, is_indexed),
            Form::MemoryImmediate => data::store_immediate(size, is_indexed),
        };
        let (op, form, size) = self.two_operands(i, choose)?;
        let writes = of(op.r1);
        self.ops.note(match form {
            Form::RegisterRegister => {
                Note { copies: size >= 4, size: bytes(size), ..Note::pure(of(op.r2) | narrow(op.r1, size), writes) }
            }
            Form::RegisterImmediate => Note::pure(narrow(op.r1, size), writes),
            _ => Note::default(),
        });
        self.place(op)
    }

    fn extended(&mut self, i: &Instruction, is_signed: bool) -> Option<()> {
        let (r1, to) = register_operand(i, 0)?;
        if let Some((r2, from)) = register_operand(i, 1) {
            self.ops.note(Note::pure(of(r2) | narrow(r1, to), of(r1)));
            return self.place(Op { r1, r2, ..self.op(data::extending(to, from, is_signed, None)?) });
        }
        let (memory, from) = (self.memory(i)?, i.memory_size().size());
        let run = data::extending(to, from, is_signed, Some(memory.is_indexed))?;
        self.place(with_memory(Op { r1, ..self.op(run) }, memory))
    }

    /// SETcc and CMOVcc.
    fn on_condition(&mut self, i: &Instruction) -> Option<()> {
        let condition = condition(i)?;
        if i.op_count() == 1 {
            if let Some((r1, _)) = register_operand(i, 0) {
                self.ops.note(Note { reads_flags: true, ..Note::pure(of(r1), of(r1)) });
                return self.place(Op { r1, ..self.op(data::set_condition(condition, false)) });
            }
            return self.place(with_memory(self.op(data::set_condition(condition, true)), self.memory(i)?));
        }
        let (r1, size) = register_operand(i, 0)?;
        if let Some((r2, _)) = register_operand(i, 1) {
            self.ops.note(Note { reads_flags: true, ..Note::pure(of(r1) | of(r2), of(r1)) });
            return self.place(Op { r1, r2, ..self.op(data::conditional_move(size, condition, false)?) });
        }
        let op = Op { r1, ..self.op(data::conditional_move(size, condition, true)?) };
        self.place(with_memory(op, self.memory(i)?))
    }

    fn stack(&mut self, i: &Instruction) -> Option<()> {
        match i.code() {
            Code::Push_r64 => self.place(Op { r1: register_operand(i, 0)?.0, ..self.op(flow::push_r) }),
            Code::Pushq_imm8 | Code::Pushq_imm32 => self.place(Op { imm: immediate(i, 0)?, ..self.op(flow::push_i) }),
            Code::Push_rm64 if has_memory(i) => self.place(with_memory(self.op(flow::push_m), self.memory(i)?)),
            Code::Pop_r64 => self.place(Op { r1: register_operand(i, 0)?.0, ..self.op(flow::pop_r) }),
            Code::Leaveq => self.place(self.op(flow::leave)),
            Code::Pushfq => self.place(self.op(flow::push_flags)),
            _ => None,
        }
    }
}

/// The bit of a register of which a result of that size leaves a part.
fn narrow(register: u8, size: usize) -> u32 {
    if size < 4 { of(register) } else { 0 }
}

/// An operand size as notes have it.
fn bytes(size: usize) -> u8 {
    u8::try_from(size).expect("at most 8")
}

/// Byte offset of a register in the engine's.
fn offset(register: usize) -> u8 {
    u8::try_from(8 * register).expect("there are twenty")
}

/// Byte offset and size of a general register that an operand names.
fn register_operand(i: &Instruction, operand: u32) -> Option<(u8, usize)> {
    // What an instruction has not got is no register: there is no need to count.
    if i.op_kind(operand) != OpKind::Register {
        return None;
    }
    let place = slot(i.op_register(operand))?;
    Some((offset(place.index) + u8::from(place.shift == 8), place.size))
}

fn has_memory(i: &Instruction) -> bool {
    i.op_kinds().any(|kind| kind == OpKind::Memory)
}

/// An immediate that fits 32 bits, sign-extended.
fn immediate(i: &Instruction, operand: u32) -> Option<i32> {
    let value = i.try_immediate(operand).ok()?.cast_signed();
    // Of a 32-bit operation the low half alone counts.
    let is_narrow = matches!(i.op_kind(operand), OpKind::Immediate8 | OpKind::Immediate16 | OpKind::Immediate32);
    if is_narrow { Some((value & 0xffff_ffff) as u32 as i32) } else { i32::try_from(value).ok() }
}

#[inline(always)]
fn with_memory(op: Op, memory: Memory) -> Op {
    let Memory { base, index, scale, disp, .. } = memory;
    Op { base, index, scale, disp, ..op }
}

/// A condition's number in opcodes.
fn condition(i: &Instruction) -> Option<u8> {
    Some(match i.condition_code() {
        ConditionCode::None => return None,
        ConditionCode::o => 0,
        ConditionCode::no => 1,
        ConditionCode::b => 2,
        ConditionCode::ae => 3,
        ConditionCode::e => 4,
        ConditionCode::ne => 5,
        ConditionCode::be => 6,
        ConditionCode::a => 7,
        ConditionCode::s => 8,
        ConditionCode::ns => 9,
        ConditionCode::p => 10,
        ConditionCode::np => 11,
        ConditionCode::l => 12,
        ConditionCode::ge => 13,
        ConditionCode::le => 14,
        ConditionCode::g => 15,
    })
}

/// NOPs and hints.
fn does_nothing(i: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(i.mnemonic(), M::Nop | M::Endbr64)
}
