//! Random instructions of every opcode map, with random and boundary operands, emulated and executed by the host: all
//! registers, defined flags and memory have to agree. The emulator goes first, so that the host only gets instructions
//! that stay inside the scratch memory.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use iced_x86::{FlowControl, Instruction, Mnemonic, Register, RflagsBits};

use super::native::{Native, SCRATCH};
use super::{Memory, Random};
use crate::registers::{CR4_OSXSAVE, FpuState, RDI, RSI, RSP, SystemRegisters};
use crate::x86::accesses::accesses;
use crate::x86::{CpuState, Outcome, decode, step_bytes};

/// An SSE exception that is not masked.
const XM: Outcome = Outcome::fault(19);

/// Opcode maps by their escape bytes.
pub(super) const MAPS: [&[u8]; 4] = [&[], &[0x0f], &[0x0f, 0x38], &[0x0f, 0x3a]];

/// A random instruction: prefixes, opcode, a ModRM byte that names registers or scratch memory, and operands after it.
pub(super) fn instruction_bytes(random: &mut Random, map: &[u8], opcode: u8) -> Vec<u8> {
    let mut bytes = Vec::new();
    if random.below(4) == 0 {
        bytes.push(0x66);
    }
    match random.below(8) {
        0 => bytes.push(0xf2),
        1 => bytes.push(0xf3),
        2 => bytes.push(0xf0),
        _ => {}
    }
    if random.below(16) == 0 {
        bytes.push(0x67);
    }
    if random.below(2) == 0 {
        bytes.push(0x40 | random.below(16) as u8);
    }
    bytes.extend_from_slice(map);
    bytes.push(opcode);
    let modrm = random.next() as u8;
    // Half with registers; the rest mostly [reg] and [reg+disp8].
    let modrm = match random.below(4) {
        0 | 1 => modrm | 0xc0,
        2 => modrm & 0x3f,
        _ => modrm & 0x3f | 0x40,
    };
    bytes.push(modrm);
    while bytes.len() < 15 {
        bytes.push(random.value() as u8);
    }
    bytes
}

/// The same with a three-byte VEX prefix, for BMI.
fn vex_bytes(random: &mut Random, map: u8, opcode: u8) -> Vec<u8> {
    let mut bytes = vec![0xc4, (random.next() as u8 & 0xe0) | map, random.next() as u8 & !4, opcode];
    let modrm = random.next() as u8;
    bytes.push(if random.below(2) == 0 { modrm | 0xc0 } else { modrm & 0x3f });
    bytes.extend((0..6).map(|_| random.value() as u8));
    bytes
}

/// A random instruction with a VEX prefix, of three or, where that can say it, two bytes.
fn avx_bytes(random: &mut Random, map: u8, opcode: u8) -> Vec<u8> {
    let bits = random.next() as u8;
    // Half of them name no third register.
    let low = if random.below(2) == 0 { bits | 0x78 } else { bits };
    let mut bytes = if map == 1 && random.below(2) == 0 {
        vec![0xc5, low, opcode]
    } else {
        vec![0xc4, random.next() as u8 & 0xe0 | map, low, opcode]
    };
    let modrm = random.next() as u8;
    bytes.push(match random.below(4) {
        0 | 1 => modrm | 0xc0,
        2 => modrm & 0x3f,
        _ => modrm & 0x3f | 0x40,
    });
    bytes.extend((0..7).map(|_| random.value() as u8));
    bytes
}

/// Instructions that must not run on the host, or whose result is not a function of the state.
fn is_excluded(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    let by_name = matches!(
        instruction.mnemonic(),
        M::Wrfsbase
            | M::Wrgsbase
            | M::Rdfsbase
            | M::Rdgsbase
            | M::Rdtsc
            | M::Rdtscp
            | M::Rdpid
            | M::Rdrand
            | M::Rdseed
            | M::Xgetbv
            | M::Xsave
            | M::Xsave64
            | M::Xsaveopt
            | M::Xsaveopt64
            | M::Xsavec
            | M::Xsavec64
            | M::Xrstor
            | M::Xrstor64
            | M::Fxsave
            | M::Fxsave64
            | M::Fxrstor
            | M::Fxrstor64
            | M::Fnstenv
            | M::Fnsave
            | M::Pushf
            | M::Pushfq
            | M::Popf
            | M::Popfq
            | M::Xsaves
            | M::Xsaves64
            | M::Xrstors
            | M::Xrstors64
    );
    let names_segment = (0..instruction.op_count()).any(|n| {
        instruction.op_kind(n) == iced_x86::OpKind::Register && instruction.op_register(n).is_segment_register()
    });
    let has_base = matches!(instruction.segment_prefix(), Register::FS | Register::GS);
    // With memory, processors differ in whether it is an MMX instruction.
    let is_disputed = matches!(instruction.mnemonic(), M::Cvtpi2ps | M::Cvtpi2pd)
        && instruction.op1_kind() == iced_x86::OpKind::Memory
        || instruction.mnemonic() == M::Reservednop;
    by_name || names_segment || has_base || is_disputed || instruction.flow_control() != FlowControl::Next
}

/// Random state; most registers point into the scratch memory.
pub(super) fn state(random: &mut Random, native: &Native) -> CpuState {
    let mut cpu = CpuState::default();
    for register in &mut cpu.registers.general {
        *register = match random.below(3) {
            0 => native.scratch() + 1024 + random.below(128) * 16,
            1 => native.scratch() + 1024 + random.below(2048),
            _ => random.value(),
        };
    }
    if random.below(4) == 0 {
        // Small numbers, so that divisions don't overflow.
        cpu.registers.general[2] = random.below(2);
    }
    cpu.registers.general[RSP] = native.scratch() + 2048 + random.below(64) * 8;
    cpu.registers.rip = native.rip();
    cpu.registers.rflags = 0x202 | random.next() & 0x8d5;
    cpu.system.cr4 |= CR4_OSXSAVE | 1 << 10;
    cpu.fpu = fpu(random);
    if random.below(4) == 0 {
        // Some exceptions are not masked, and none of these is pending.
        cpu.fpu.mxcsr &= !((random.next() as u32 & 0x3f) * 0x81);
    }
    if std::is_x86_feature_detected!("avx") {
        cpu.xcr0 = 7;
        cpu.ymm_high = std::array::from_fn(|_| random.vector());
    }
    cpu
}

/// Random vector and x87 registers under random rounding control, all exceptions masked.
fn fpu(random: &mut Random) -> FpuState {
    let mut fpu = FpuState::default();
    for vector in &mut fpu.xmm {
        *vector = random.vector();
    }
    let rounding = random.below(4) as u16;
    fpu.mxcsr = 0x1f80 | u32::from(rounding) << 13 | (random.below(2) as u32) << 15 | (random.below(2) as u32) << 6;
    fpu.mxcsr |= random.below(64) as u32;
    fpu.fcw = 0x7f | rounding << 10 | random.pick(&[0u16, 2, 3]) << 8;
    if random.below(4) == 0 {
        fpu.fcw &= !(random.next() as u16 & 0x3f);
    }
    fpu.fsw = (random.below(8) as u16) << 11 | random.next() as u16 & 0x4700;
    fpu.ftw = random.next() as u8;
    for register in &mut fpu.st {
        register[..8].copy_from_slice(&(random.value() | 1 << 63).to_le_bytes());
        let exponent = random.pick(&[0u16, 0x3fff, 0x4000, 0x400e, 0x3ffe, 0x7fff, 0xbfff, 0x4030, 0xffff]);
        register[8..10].copy_from_slice(&exponent.to_le_bytes());
    }
    fpu
}

/// Arithmetic flags that the manuals leave undefined.
fn undefined_flags(instruction: &Instruction) -> u64 {
    use Mnemonic as M;
    let named = instruction.rflags_undefined();
    let pairs = [
        (RflagsBits::CF, 1),
        (RflagsBits::PF, 4),
        (RflagsBits::AF, 0x10),
        (RflagsBits::ZF, 0x40),
        (RflagsBits::SF, 0x80),
        (RflagsBits::OF, 0x800),
    ];
    let named: u64 = pairs.iter().filter(|(bit, _)| named & bit != 0).map(|(_, flag)| *flag).sum();
    // With a count in CL iced does not know whether OF and CF are defined.
    let shift = matches!(
        instruction.mnemonic(),
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    );
    named | if shift { 0x810 } else { 0 }
}

/// Whether the host has what the emulator does without it.
fn host_has(instruction: &Instruction) -> bool {
    use iced_x86::CpuidFeature as F;
    use std::is_x86_feature_detected as has;
    // SAFETY: every 64-bit processor has CPUID, and one with AVX or ADX has leaf 7; others answer with other bits.
    let structured = std::arch::x86_64::__cpuid_count(7, 0).ebx;
    instruction.cpuid_features().iter().all(|feature| match feature {
        F::ADX => has!("adx"),
        F::MOVBE => has!("movbe"),
        F::POPCNT => has!("popcnt"),
        F::LZCNT => has!("lzcnt"),
        F::BMI1 => has!("bmi1"),
        F::BMI2 => has!("bmi2"),
        F::VAES => has!("vaes"),
        F::VPCLMULQDQ => has!("vpclmulqdq"),
        F::CLFLUSHOPT => structured >> 23 & 1 != 0,
        F::CLWB => structured >> 24 & 1 != 0,
        _ => true,
    })
}

/// Whether the result itself is undefined: a 16-bit double shift by more than 16, or what a repeated string instruction
/// with 32-bit addresses and a count of 0 leaves in the upper halves (Intel's CPUs clear them, AMD's don't).
fn is_undefined(instruction: &Instruction, before: &CpuState, scratch: u64) -> bool {
    let is_word = instruction.op0_register().is_gpr16() || instruction.memory_size().size() == 2;
    let count = if instruction.op_count() == 3 {
        instruction.try_immediate(2).unwrap_or(before.registers.general[1]) & 0x1f
    } else {
        0
    };
    let double = matches!(instruction.mnemonic(), Mnemonic::Shld | Mnemonic::Shrd);
    let is_repeated = instruction.has_rep_prefix() || instruction.has_repne_prefix();
    let addresses_32 = (0..instruction.op_count()).any(|n| {
        use iced_x86::OpKind as O;
        matches!(instruction.op_kind(n), O::MemoryESEDI | O::MemorySegESI | O::MemorySegEDI)
    });
    let repeats_never = is_repeated && addresses_32 && before.registers.general[1].trailing_zeros() >= 32;
    // Whether a masked store may fault if no byte is selected.
    let is_masked = matches!(instruction.mnemonic(), Mnemonic::Maskmovq | Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu);
    let at = before.registers.general[RDI].wrapping_sub(scratch);
    repeats_never
        || is_masked && (addresses_32 || at > SCRATCH as u64 - 16)
        || double && is_word && count > 16
        || instruction.mnemonic() == Mnemonic::Bswap && instruction.op0_register().is_gpr16()
}

/// Sets what can't be compared alike.
fn forget(cpu: &mut CpuState, flags: u64) {
    cpu.registers.rip = 0;
    cpu.registers.rflags &= 0xcd5 & !flags;
    (cpu.fpu.fip, cpu.fpu.fdp, cpu.fpu.fop) = (0, 0, 0);
}

fn names_mmx(instruction: &Instruction) -> bool {
    (0..instruction.op_count())
        .any(|n| instruction.op_kind(n) == iced_x86::OpKind::Register && instruction.op_register(n).is_mm())
}

/// Where overflow or underflow is not masked, the flag for precision says whether a result with an exponent of any
/// size would have been exact. A guest's handler has no use for that, and the emulator does not find it out.
fn forget_precision(expected: &mut CpuState, emulated: &mut CpuState) {
    const PRECISION: u32 = 1 << 5;
    const RANGE: u32 = 3 << 3;
    if emulated.fpu.mxcsr & !(emulated.fpu.mxcsr >> 7) & RANGE != 0 {
        expected.fpu.mxcsr |= PRECISION;
        emulated.fpu.mxcsr |= PRECISION;
    }
}

fn is_approximate(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(mnemonic, M::Rcpps | M::Rcpss | M::Rsqrtps | M::Rsqrtss)
        || matches!(mnemonic, M::Vrcpps | M::Vrcpss | M::Vrsqrtps | M::Vrsqrtss)
}

/// Asserts that each element is within what the manuals allow, and then takes ours for the host's.
fn assert_close(instruction: &Instruction, before: &CpuState, expected: &mut CpuState, ours: &CpuState) {
    let elements = |cpu: &CpuState, n: usize| {
        let bytes = [cpu.fpu.xmm[n].to_le_bytes(), cpu.ymm_high[n].to_le_bytes()].concat();
        let element = |n: usize| f32::from_le_bytes(bytes[4 * n..4 * n + 4].try_into().unwrap());
        std::array::from_fn::<f32, 8, _>(element)
    };
    let register = instruction.op0_register();
    let first = if register.is_ymm() { Register::YMM0 } else { Register::XMM0 };
    let index = register as usize - first as usize;
    for (host, ours) in elements(expected, index).iter().zip(elements(ours, index)) {
        let is_same = host.to_bits() == ours.to_bits();
        let error = (f64::from(*host) - f64::from(ours)).abs() / f64::from(ours).abs();
        // Twice 1.5 × 2⁻¹²; or one of them is flushed to zero where the other is barely normal.
        let is_tiny = host.abs().max(ours.abs()) <= f32::MIN_POSITIVE * 1.001 && host.signum() == ours.signum();
        assert!(is_same || error < 0.00075 || is_tiny, "{instruction:?} {host:e} {ours:e} {:x?}", before.fpu.xmm);
    }
    (expected.fpu.xmm[index], expected.ymm_high[index]) = (ours.fpu.xmm[index], ours.ymm_high[index]);
}

/// Random contents of the scratch memory: a piece of one long random text, which costs less than a new one.
fn scratch(random: &mut Random) -> Vec<u8> {
    static TEXT: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let mut random = Random(0x5eed);
        (0..4 * SCRATCH / 16).flat_map(|_| random.vector().to_le_bytes()).collect()
    });
    let start = 16 * random.below(3 * SCRATCH as u64 / 16) as usize;
    TEXT[start..start + SCRATCH].to_vec()
}

/// What became of a comparison.
pub(super) enum Compared {
    /// The host was not asked, for this reason.
    Not(&'static str),
    /// Both were done; the difference, if there is one.
    Done(Mnemonic, Option<String>),
}

/// Emulates and, where the emulator succeeds, executes one instruction.
fn compare(random: &mut Random, native: &mut Native, bytes: &[u8]) -> Compared {
    let before = state(random, native);
    compare_from(before, random, native, bytes)
}

/// The same from a given state.
pub(super) fn compare_from(before: CpuState, random: &mut Random, native: &mut Native, bytes: &[u8]) -> Compared {
    let Ok(instruction) = decode(bytes, before.registers.rip) else { return Compared::Not("no instruction") };
    if is_excluded(&instruction) {
        return Compared::Not("it would change the test's own process, or its result is the machine's");
    }
    if !host_has(&instruction) {
        return Compared::Not("the host does not have it");
    }
    if is_undefined(&instruction, &before, native.scratch()) {
        return Compared::Not("its result is undefined");
    }
    let code = &bytes[..instruction.len()];
    // Where an exception comes before the access here, it may come after the access there, and that one must not fail.
    if leaves_scratch(code, &before, native.scratch()) {
        return Compared::Not("an operand is elsewhere");
    }
    let mut memory = Memory::new(native.scratch(), SCRATCH);
    memory.bytes = scratch(random);
    let initial = memory.bytes.clone();
    let mut emulated = before;
    let outcome = step_bytes(&mut emulated, &mut memory, code);
    if outcome == XM {
        let mut unchanged = emulated;
        unchanged.fpu.mxcsr = before.fpu.mxcsr;
        assert!(unchanged == before && initial == memory.bytes);
    } else if outcome != Outcome::Done {
        assert_eq!(emulated.registers.rip, before.registers.rip);
        return Compared::Not("it faults with these operands");
    } else {
        assert_eq!(emulated.registers.rip, instruction.next_ip());
    }
    let mut expected_memory = initial;
    let (mut expected, has_trapped) = native.run(&before, code, &mut expected_memory);
    if outcome == XM {
        if names_mmx(&instruction) {
            // Whether the transition from x87 has happened is not said.
            return Compared::Not("a trapping MMX instruction");
        }
        forget_precision(&mut expected, &mut emulated);
    }
    let is_sum_of_products =
        matches!(instruction.mnemonic(), Mnemonic::Dpps | Mnemonic::Dppd | Mnemonic::Vdpps | Mnemonic::Vdppd);
    if is_sum_of_products && has_trapped != (outcome == XM) {
        return Compared::Not("which of its sums raises an exception is the processor's own");
    }
    let undefined = undefined_flags(&instruction);
    forget(&mut expected, undefined);
    forget(&mut emulated, undefined);
    if is_approximate(instruction.mnemonic()) {
        assert_close(&instruction, &before, &mut expected, &emulated);
    }
    let is_equal = expected == emulated && expected_memory == memory.bytes && has_trapped == (outcome == XM);
    let difference = (!is_equal)
        .then(|| format!("trapped: {has_trapped}, {outcome:?} {}", describe(&before, &expected, &emulated, code)));
    Compared::Done(instruction.mnemonic(), difference)
}

/// Whether an operand in memory does not lie in the scratch area.
fn leaves_scratch(code: &[u8], before: &CpuState, scratch: u64) -> bool {
    let found = accesses(code, &before.registers, &SystemRegisters::default());
    let end = scratch + SCRATCH as u64;
    // The longest operand that has a size is a vector of 64 bytes.
    found.memory.iter().any(|a| a.address < scratch || a.address.saturating_add(a.length.min(64)) > end)
}

/// What a failed comparison shows.
fn describe(before: &CpuState, expected: &CpuState, emulated: &CpuState, code: &[u8]) -> String {
    let text = crate::x86::disassemble(code, before.registers.rip);
    let mut parts = vec![format!("{text} {code:02x?}")];
    if expected.registers != emulated.registers {
        let [before, host, ours] = [before, expected, emulated].map(|cpu| cpu.registers);
        parts.push(format!("before\n{before}\nhost\n{host}\nemulated\n{ours}"));
    }
    if expected.fpu != emulated.fpu {
        parts.push(format!("before {:x?}\nhost {:x?}\nemulated {:x?}", before.fpu, expected.fpu, emulated.fpu));
    }
    parts.join("\n")
}

/// How often each instruction was compared.
type Counts = BTreeMap<String, usize>;

/// Compares many random instructions and fails with the first difference of each mnemonic.
fn compare_all(seed: u64, opcodes: &[u8], rounds: usize, make: impl Fn(&mut Random, u8) -> Vec<u8>) -> Counts {
    let (mut random, mut native) = (Random(seed), Native::new());
    let (mut counts, mut failures) = (Counts::new(), BTreeMap::new());
    for opcode in opcodes {
        for _ in 0..rounds {
            let bytes = make(&mut random, *opcode);
            let Compared::Done(mnemonic, difference) = compare(&mut random, &mut native, &bytes) else { continue };
            *counts.entry(format!("{mnemonic:?}")).or_default() += 1;
            if let Some(difference) = difference {
                failures.entry(format!("{mnemonic:?}")).or_insert(difference);
            }
        }
    }
    let texts: Vec<_> = failures.values().map(String::as_str).collect();
    assert!(texts.is_empty(), "{} instructions differ:\n{}", texts.len(), texts.join("\n\n"));
    counts
}

fn compare_map(map: usize, rounds: usize) -> Counts {
    let opcodes: Vec<u8> = (0..=255).collect();
    let seed = 0x9e37_79b9 + map as u64;
    compare_all(seed, &opcodes, rounds, |random, opcode| instruction_bytes(random, MAPS[map], opcode))
}

fn assert_compared(counts: &Counts, names: &str, least: usize) {
    if std::env::var_os("X86_COUNTS").is_some() {
        println!("{counts:?}");
    }
    for name in names.split_whitespace() {
        let count = counts.get(name).copied().unwrap_or(0);
        assert!(count >= least, "{name} was compared {count} times");
    }
}

#[test]
fn test_one_byte_opcodes_random_operands_agree_with_host() {
    let counts = compare_map(0, 1000);
    let names = "Add Or Adc Sbb And Sub Xor Cmp Test Mov Movsxd Push Pop Imul Mul Div Idiv Neg Not Inc Dec Lea Xchg Cbw Cwde
        Cdqe Cwd Cdq Cqo Rol Ror Rcl Rcr Shl Shr Sar Movsb Movsd Movsq Stosb Stosd Stosq Lodsb Lodsd Cmpsb Scasb Leave Lahf
        Sahf Cmc Clc Stc Cld Std Nop Xlatb Fld Fadd Fmul Fsub Fdiv Fst Fstp Fild Fistp Fist Fcom Fxch Fldz Fld1 Fldpi Fsqrt
        Fnstcw Fldcw Fnstsw Fninit Fnclex Fucomi Fcomi Fcmove Fprem Fxam Fabs Fchs Fisttp Fbld";
    assert_compared(&counts, names, 3);
}

#[test]
fn test_x87_opcodes_random_operands_agree_with_host() {
    let escapes: Vec<u8> = (0xd8..=0xdf).collect();
    let counts = compare_all(87, &escapes, 20_000, |random, opcode| instruction_bytes(random, MAPS[0], opcode));
    let names = "Fldz Fld1 Fldpi Fldl2e Fsqrt Fsin Fptan Fyl2x F2xm1 Fprem Fscale Frndint Fxam Ftst Fchs Fabs Fcompp";
    assert_compared(&counts, names, 60);
}

#[test]
fn test_two_byte_opcodes_random_operands_agree_with_host() {
    let counts = compare_map(1, 1200);
    let names = "Movzx Movsx Cmove Cmovl Sete Setg Bt Bts Btr Btc Bsf Bsr Shld Shrd Popcnt Lzcnt Tzcnt Imul Xadd Cmpxchg
        Bswap Nop Movaps Movups Movdqa Movdqu Movapd Movupd Movss Movsd Movd Movq Movlps Movhps Movlpd Movhpd Movhlps Movlhps
        Xorps Xorpd Pxor Pand Pandn Por Orps Andps Andpd Pcmpeqb Pcmpeqw Pcmpeqd Pmovmskb Punpcklbw Punpcklwd Punpckldq
        Punpcklqdq Punpckhbw Unpcklpd Unpckhpd Pshuflw Pshufhw Pshufd Paddb Paddq Psubw Pmuludq Pmullw Pcmpgtd Pmaxub Pminub
        Psllw Psrld Psrad Psllq Pslldq Psrldq Packuswb Packssdw Shufps Shufpd Cvtsi2sd Cvtsi2ss Cvttsd2si Cvtsd2si Cvtss2sd
        Cvtsd2ss Cvtdq2pd Cvtdq2ps Cvttps2dq Addss Addsd Addps Addpd Subsd Mulsd Divsd Divps Minsd Maxss Sqrtsd Sqrtps Ucomisd
        Ucomiss Comisd Comiss Cmpsd Cmpss Cmpps Cmppd Pinsrw Pextrw Ldmxcsr Stmxcsr Movmskpd Haddps Movnti Cmpxchg8b";
    assert_compared(&counts, names, 3);
}

#[test]
fn test_three_byte_opcodes_random_operands_agree_with_host() {
    let counts = compare_map(2, 2000);
    assert_compared(&counts, "Crc32 Movbe", 20);
    if std::is_x86_feature_detected!("sse4.1") {
        assert_compared(&counts, "Pshufb Pmulld Ptest Pblendvb Pmovzxbw Pcmpgtq", 20);
    }
    let counts = compare_map(3, 2000);
    if std::is_x86_feature_detected!("sse4.1") {
        assert_compared(&counts, "Palignr Roundsd Pblendw Insertps Pextrd Pinsrb Dpps", 20);
    }
}

#[test]
fn test_bmi_random_operands_agree_with_host() {
    if !std::is_x86_feature_detected!("bmi2") || !std::is_x86_feature_detected!("bmi1") {
        return;
    }
    let mut counts =
        compare_all(77, &[0xf2, 0xf3, 0xf5, 0xf6, 0xf7], 10_000, |random, opcode| vex_bytes(random, 2, opcode));
    counts.extend(compare_all(78, &[0xf0], 10_000, |random, opcode| vex_bytes(random, 3, opcode)));
    let names = "Andn Bextr Blsi Blsr Blsmsk Bzhi Mulx Pdep Pext Rorx Sarx Shlx Shrx";
    assert_compared(&counts, names, 100);
}

#[test]
fn test_avx_random_operands_agree_with_host() {
    if !std::is_x86_feature_detected!("avx2") {
        return;
    }
    for (map, least) in [(1, 138), (2, 120), (3, 42)] {
        let opcodes: Vec<u8> = (0..=255).collect();
        let counts =
            compare_all(0xa5 + u64::from(map), &opcodes, 1500, |random, opcode| avx_bytes(random, map, opcode));
        assert_compared(&counts, "", 1);
        assert!(counts.len() >= least, "map {map}: {} instructions were compared", counts.len());
    }
}

#[test]
fn test_gathers_agree_with_host() {
    if !std::is_x86_feature_detected!("avx2") {
        return;
    }
    let (mut random, mut native) = (Random(0x9a7e), Native::new());
    let mut counts = Counts::new();
    for _ in 0..8000 {
        // XMM0 to XMM7 hold indices, the others select.
        let mut before = state(&mut random, &native);
        before.registers.general[RSI] = native.scratch() + 1024;
        for vector in before.fpu.xmm[..8].iter_mut().chain(&mut before.ymm_high[..8]) {
            let word = u128::from(random.next() & 0x7f | (random.next() & 0x7f) << 32);
            *vector = word | word.rotate_left(17) & 0x7f_0000_007f << 64;
            if random.below(3) == 0 {
                *vector |= u128::from(u32::MAX) << 32;
            }
        }
        let wide = random.below(2) as u8;
        let low = (random.next() as u8 & 0x80) | (random.below(8) as u8) << 3 | wide << 2 | 1;
        let sib = random.next() as u8 & 0xc0 | (random.below(8) as u8) << 3 | 6;
        let modrm = (random.below(8) as u8) << 3 | 4;
        let bytes = [0xc4, 0xe2 ^ (random.next() as u8 & 0x80), low, 0x90 | random.below(4) as u8, modrm, sib];
        let Compared::Done(mnemonic, difference) = compare_from(before, &mut random, &mut native, &bytes) else {
            continue;
        };
        assert_eq!(difference, None);
        *counts.entry(format!("{mnemonic:?}")).or_default() += 1;
    }
    let names = "Vgatherdps Vgatherdpd Vgatherqps Vgatherqpd Vpgatherdd Vpgatherdq Vpgatherqd Vpgatherqq";
    assert_compared(&counts, names, 100);
}
