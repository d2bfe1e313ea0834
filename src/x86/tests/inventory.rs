//! Every instruction form of the feature sets that the emulator is meant to know is found by enumerating encodings, and
//! executed: none may be answered with [`Outcome::Unsupported`]. A table counts forms tried and executed.

use std::collections::{BTreeMap, BTreeSet};

use iced_x86::{Code, CpuidFeature, EncodingKind, Instruction, Mnemonic};

use super::machine::{DATA, HANDLERS, Rig};
use super::{Memory, Random};
use crate::registers::{CR4_OSXSAVE, RBX, RCX, RDI, RDX, RSI, RSP};
use crate::x86::{CpuState, Outcome, decode, step_bytes};

const BASE: u64 = 0x10_0000;

/// Feature sets that a guest may be told of, by what they need of the host.
pub(super) fn features() -> BTreeSet<CpuidFeature> {
    use CpuidFeature as F;
    let mut features = BTreeSet::from([
        F::INTEL8086,
        F::INTEL186,
        F::INTEL286,
        F::INTEL386,
        F::INTEL486,
        F::X64,
        F::CMOV,
        F::CX8,
        F::CMPXCHG16B,
        F::MULTIBYTENOP,
        F::MOVBE,
        F::POPCNT,
        F::LZCNT,
        F::BMI1,
        F::BMI2,
        F::ADX,
        F::FPU,
        F::FPU287,
        F::FPU387,
        F::MMX,
        F::SSE,
        F::SSE2,
        F::FXSR,
        F::XSAVE,
        F::XSAVEOPT,
        F::XSAVEC,
        F::XSAVES,
        F::CLFSH,
        F::CLFLUSHOPT,
        F::CLWB,
        F::PREFETCHW,
        F::PREFETCHWT1,
        F::PAUSE,
        F::RDPID,
        F::TSC,
        F::RDTSCP,
        F::FSGSBASE,
        F::CET_IBT,
    ]);
    let on_host = [
        (std::is_x86_feature_detected!("sse3"), F::SSE3),
        (std::is_x86_feature_detected!("ssse3"), F::SSSE3),
        (std::is_x86_feature_detected!("sse4.1"), F::SSE4_1),
        (std::is_x86_feature_detected!("sse4.2"), F::SSE4_2),
        (std::is_x86_feature_detected!("aes"), F::AES),
        (std::is_x86_feature_detected!("pclmulqdq"), F::PCLMULQDQ),
        (std::is_x86_feature_detected!("sha"), F::SHA),
        (std::is_x86_feature_detected!("avx"), F::AVX),
        (std::is_x86_feature_detected!("avx2"), F::AVX2),
        (std::is_x86_feature_detected!("f16c"), F::F16C),
        (std::is_x86_feature_detected!("fma"), F::FMA),
        (std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("aes"), F::VAES),
        (std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("pclmulqdq"), F::VPCLMULQDQ),
    ];
    features.extend(on_host.iter().filter(|(is_there, _)| *is_there).map(|(_, feature)| *feature));
    features
}

/// System instructions, which belong to the CPU around this emulator, and what 64-bit mode decodes without executing.
pub(super) fn is_excluded(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    let by_name = matches!(
        instruction.mnemonic(),
        M::In
            | M::Out
            | M::Insb
            | M::Insw
            | M::Insd
            | M::Outsb
            | M::Outsw
            | M::Outsd
            | M::Int
            | M::Int1
            | M::Int3
            | M::Iret
            | M::Iretd
            | M::Iretq
            | M::Retf
            | M::Hlt
            | M::Cli
            | M::Sti
            | M::Lar
            | M::Lsl
            | M::Verr
            | M::Verw
            | M::Lgdt
            | M::Lidt
            | M::Lldt
            | M::Ltr
            | M::Sgdt
            | M::Sidt
            | M::Sldt
            | M::Str
            | M::Smsw
            | M::Lmsw
            | M::Clts
            | M::Lss
            | M::Lfs
            | M::Lgs
            | M::Invd
            | M::Wbinvd
            | M::Invlpg
            | M::Swapgs
            | M::Xsetbv
            | M::Ud0
            | M::Ud1
            | M::Ud2
            | M::Rsm
            | M::Endbr32
    );
    let names_system_register = (0..instruction.op_count()).any(|n| {
        let register = instruction.op_register(n);
        register.is_segment_register() || register.is_cr() || register.is_dr() || register.is_tr()
    });
    let is_far = matches!(
        instruction.code(),
        Code::Jmp_m1616 | Code::Jmp_m1632 | Code::Jmp_m1664 | Code::Call_m1616 | Code::Call_m1632 | Code::Call_m1664
    );
    by_name || names_system_register || is_far
}

/// All encodings worth a look: each opcode with each mandatory prefix, operand size and ModRM byte that selects
/// another form.
pub(super) fn encodings() -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    let prefixes: [&[u8]; 7] = [&[], &[0x66], &[0xf2], &[0xf3], &[0x66, 0xf2], &[0x67], &[0xf0]];
    let maps: [&[u8]; 4] = [&[], &[0x0f], &[0x0f, 0x38], &[0x0f, 0x3a]];
    for map in maps {
        for opcode in 0..=255u8 {
            for prefix in prefixes {
                for rex in [&[][..], &[0x48]] {
                    all.extend(modrms().map(|modrm| [prefix, rex, map, &[opcode, modrm]].concat()));
                }
            }
        }
    }
    for map in 1..=3u8 {
        for opcode in 0..=255u8 {
            // vvvv is 15 (none) and 9; W, L and pp take all values.
            for low in (0..16u8).flat_map(|bits| {
                let rest = (bits & 8) << 4 | (bits & 7);
                [rest | 0x78, rest | 0x30]
            }) {
                all.extend(modrms().map(|modrm| vec![0xc4, 0xe0 | map, low, opcode, modrm]));
            }
        }
    }
    for bytes in &mut all {
        // A SIB byte (base RSP, index RSI), then a displacement or immediate.
        bytes.extend([0x34, 1, 0, 0, 0, 0, 0, 0, 0]);
        bytes.truncate(15);
    }
    all
}

/// All register forms, and each extension with memory at [rsi], [rsi+disp8] and SIB.
fn modrms() -> impl Iterator<Item = u8> {
    (0xc0..=0xff).chain((0..8).flat_map(|extension| [extension << 3 | 6, extension << 3 | 4]))
}

fn state(random: &mut Random) -> CpuState {
    let mut cpu = CpuState::default();
    cpu.registers.general = [BASE + 1024; 16];
    cpu.registers.general[RCX] = 3;
    cpu.registers.general[RDX] = 0;
    cpu.registers.general[RSP] = BASE + 2048;
    (cpu.registers.general[RSI], cpu.registers.general[RDI]) = (BASE + 1024, BASE + 1536);
    cpu.registers.rip = 0x40_0000;
    cpu.system.cr4 |= CR4_OSXSAVE | 1 << 16 | 1 << 10;
    cpu.xcr0 = 7;
    for vector in &mut cpu.fpu.xmm {
        *vector = u128::from(random.below(16)) << 64 | u128::from(random.below(16));
    }
    cpu
}

/// How a form fared.
#[derive(Default)]
struct Tally {
    tried: usize,
    done: usize,
    unsupported: usize,
    example: String,
}

#[test]
fn test_every_form_of_the_known_features_is_executed() {
    let wanted = features();
    let mut random = Random(5);
    let mut forms: BTreeMap<String, (BTreeSet<CpuidFeature>, Tally)> = BTreeMap::new();
    for bytes in encodings() {
        let mut cpu = state(&mut random);
        let Ok(instruction) = decode(&bytes, cpu.registers.rip) else { continue };
        let is_wanted = instruction.cpuid_features().iter().all(|feature| wanted.contains(feature));
        if !is_wanted || is_excluded(&instruction) || instruction.encoding() == EncodingKind::D3NOW {
            continue;
        }
        let features = instruction.cpuid_features().iter().copied().collect();
        let entry = forms.entry(format!("{:?}", instruction.code())).or_insert((features, Tally::default()));
        let tally = &mut entry.1;
        if tally.tried >= 40 && tally.done > 0 {
            continue;
        }
        let outcome = step_bytes(&mut cpu, &mut Memory::new(BASE, 4096), &bytes);
        tally.tried += 1;
        tally.done += usize::from(matches!(outcome, Outcome::Done | Outcome::Repeat));
        if outcome == Outcome::Unsupported {
            tally.unsupported += 1;
            tally.example = format!("{} {bytes:02x?}", crate::x86::disassemble(&bytes, 0));
        }
    }
    report(&forms);
    let unsupported: Vec<_> = forms
        .iter()
        .filter(|(_, (_, tally))| tally.unsupported > 0)
        .map(|(name, (features, tally))| format!("{name} {features:?}: {}", tally.example))
        .collect();
    assert!(unsupported.is_empty(), "{} forms are unsupported:\n{}", unsupported.len(), unsupported.join("\n"));
}

/// What bits of CPUID stand for: leaf, subleaf, register, bit, and the feature of the decoder. Bits without instructions of
/// their own have none.
fn announced() -> Vec<([u32; 2], usize, u32, Option<CpuidFeature>)> {
    use CpuidFeature as F;
    let mut bits = Vec::new();
    let mut leaf = |leaf: [u32; 2], register: usize, features: &[(u32, CpuidFeature)], others: &[u32]| {
        bits.extend(features.iter().map(|(bit, feature)| (leaf, register, *bit, Some(*feature))));
        bits.extend(others.iter().map(|bit| (leaf, register, *bit, None)));
    };
    let basic_ecx = [
        (0, F::SSE3),
        (1, F::PCLMULQDQ),
        (9, F::SSSE3),
        (12, F::FMA),
        (13, F::CMPXCHG16B),
        (19, F::SSE4_1),
        (20, F::SSE4_2),
        (22, F::MOVBE),
        (23, F::POPCNT),
        (25, F::AES),
        (26, F::XSAVE),
        (28, F::AVX),
        (29, F::F16C),
        (30, F::RDRAND),
    ];
    leaf([1, 0], 2, &basic_ecx, &[21, 24, 27, 31]);
    let basic_edx = [
        (0, F::FPU),
        (4, F::TSC),
        (5, F::MSR),
        (8, F::CX8),
        (15, F::CMOV),
        (19, F::CLFSH),
        (23, F::MMX),
        (24, F::FXSR),
        (25, F::SSE),
        (26, F::SSE2),
    ];
    leaf([1, 0], 3, &basic_edx, &[2, 3, 6, 9, 12, 13, 16, 17]);
    let structured_ebx = [
        (0, F::FSGSBASE),
        (3, F::BMI1),
        (5, F::AVX2),
        (8, F::BMI2),
        (10, F::INVPCID),
        (18, F::RDSEED),
        (19, F::ADX),
        (20, F::SMAP),
        (23, F::CLFLUSHOPT),
        (24, F::CLWB),
        (29, F::SHA),
    ];
    leaf([7, 0], 1, &structured_ebx, &[7, 9]);
    leaf([7, 0], 2, &[(9, F::VAES), (10, F::VPCLMULQDQ), (22, F::RDPID)], &[2]);
    leaf([7, 0], 3, &[], &[]);
    leaf([0xd, 1], 0, &[(0, F::XSAVEOPT), (1, F::XSAVEC)], &[2]);
    leaf([0x8000_0001, 0], 2, &[(5, F::LZCNT), (8, F::PREFETCHW)], &[0]);
    leaf([0x8000_0001, 0], 3, &[(11, F::SYSCALL), (27, F::RDTSCP)], &[20, 26, 29]);
    bits
}

/// An encoding of each instruction that needs more than the registers and the memory of [`step_bytes`], by its feature.
fn system_instructions() -> Vec<(CpuidFeature, Vec<u8>)> {
    use CpuidFeature as F;
    [
        (F::MSR, &[0x0f, 0x32][..]),
        (F::MSR, &[0x0f, 0x30]),
        (F::INVPCID, &[0x66, 0x0f, 0x38, 0x82, 0x03]),
        (F::SMAP, &[0x0f, 0x01, 0xca]),
        (F::SMAP, &[0x0f, 0x01, 0xcb]),
        (F::SYSCALL, &[0x0f, 0x05]),
        (F::SYSCALL, &[0x48, 0x0f, 0x07]),
        (F::RDRAND, &[0x48, 0x0f, 0xc7, 0xf0]),
        (F::RDSEED, &[0x48, 0x0f, 0xc7, 0xf8]),
        (F::XSAVE, &[0x0f, 0x01, 0xd1]),
        (F::RDTSCP, &[0x0f, 0x01, 0xf9]),
    ]
    .into_iter()
    .map(|(feature, code)| (feature, code.to_vec()))
    .collect()
}

#[test]
fn test_all_that_cpuid_announces_is_executed() {
    let state = Rig::new(&[]).cpu.snapshot();
    let (bits, known) = (announced(), features());
    let system: BTreeSet<CpuidFeature> = system_instructions().into_iter().map(|(feature, _)| feature).collect();
    let leaves: BTreeSet<([u32; 2], usize)> = bits.iter().map(|(leaf, register, ..)| (*leaf, *register)).collect();
    for (leaf, register) in leaves {
        let answer = crate::x86::cpuid(leaf[0], leaf[1], &state)[register];
        for bit in (0..32).filter(|bit| answer >> bit & 1 != 0) {
            let found = bits.iter().find(|(l, r, b, _)| (*l, *r, *b) == (leaf, register, bit));
            let (.., feature) = found.unwrap_or_else(|| panic!("bit {bit} of register {register}, leaf {leaf:x?}"));
            assert!(feature.is_none_or(|f| known.contains(&f) || system.contains(&f)), "{feature:?} is not tried");
        }
    }
}

#[test]
fn test_announced_system_instructions_are_known() {
    for (feature, code) in system_instructions() {
        // At an address of its own, so that SYSRET goes on, and with a descriptor of INVPCID that is all zeros.
        let mut rig = Rig::new(&code).with(|state| {
            state.core.registers.general[RBX] = DATA;
            state.core.registers.general[RCX] = 0;
        });
        let _ = rig.cpu.run(&mut rig.board, 1);
        let handler = HANDLERS + 16 * 6;
        assert!(!(handler..handler + 16).contains(&rig.rip()), "{feature:?} {code:02x?} is undefined");
    }
}

/// Prints the table: forms, encodings tried and executed, by feature.
fn report(forms: &BTreeMap<String, (BTreeSet<CpuidFeature>, Tally)>) {
    let mut rows: BTreeMap<String, [usize; 4]> = BTreeMap::new();
    for (features, tally) in forms.values() {
        let row = rows.entry(format!("{features:?}")).or_default();
        row[0] += 1;
        row[1] += usize::from(tally.unsupported == 0);
        row[2] += tally.tried;
        row[3] += tally.done;
    }
    println!("{:40} {:>6} {:>9} {:>8} {:>8}", "features", "forms", "supported", "tried", "done");
    for (name, [forms, supported, tried, done]) in rows {
        println!("{name:40} {forms:6} {supported:9} {tried:8} {done:8}");
    }
}
