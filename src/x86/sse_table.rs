//! The table of vector operations that SSE has: mnemonics, those of the AVX forms beside those of SSE, with their
//! functions.

use std::arch::asm;
use std::is_x86_feature_detected as has;

use iced_x86::Mnemonic;

use super::vector::{Answer, Control, Halves, Operation, VectorFn};
use super::vector_asm::{bare, float, float_immediate, immediate, immediate_table, plain, third, to_general};
use super::vector_soft as soft;

/// A `match` over mnemonics whose assembler text is `name xmm0, xmm1`.
macro_rules! plain_entries {
    ($mnemonic:expr, $($($name:ident)|+ $text:literal,)+) => {
        match $mnemonic {
            $($(Mnemonic::$name)|+ => Some(Operation::plain(plain!(concat!($text, " xmm0, xmm1")))),)+
            _ => None,
        }
    };
}

/// The same for those under MXCSR.
macro_rules! float_entries {
    ($mnemonic:expr, $($($name:ident)|+ $text:literal,)+) => {
        match $mnemonic {
            $($(Mnemonic::$name)|+ => {
                let operation = Operation::float(float!("movups [{d}], xmm0", concat!($text, " xmm0, xmm1")));
                Some(operation.named($text).with_bare(bare!("movups [{d}], xmm0", concat!($text, " xmm0, xmm1"))))
            })+
            _ => None,
        }
    };
}

/// Conversions to integers, by the assembler's name.
macro_rules! to_integer {
    ($text:literal) => {{
        let narrow = float!("mov [{d}], rax", concat!($text, " eax, xmm1"));
        let wide = float!("mov [{d}], rax", concat!($text, " rax, xmm1"));
        Operation { to_wide: Some(wide), ..Operation::float(narrow).answers(Answer::General) }
    }};
}

/// Conversions from an integer, which arrives sign-extended to 8 bytes.
macro_rules! from_integer {
    ($text:literal) => {
        Operation::float(float!("movups [{d}], xmm0", "movq rax, xmm1", concat!($text, " xmm0, rax"))).with_bare(bare!(
            "movups [{d}], xmm0",
            "movq rax, xmm1",
            concat!($text, " xmm0, rax")
        ))
    };
}

/// Comparisons that answer in EFLAGS.
macro_rules! float_flags {
    ($text:literal) => {
        Operation::float(float!("mov [{d}], rax", concat!($text, " xmm0, xmm1"), "pushfq", "pop rax"))
            .answers(Answer::Flags)
            .with_bare(bare!("mov [{d}], rax", concat!($text, " xmm0, xmm1"), "pushfq", "pop rax"))
    };
}

/// A sign mask, `bits` from each half.
macro_rules! sign_mask {
    ($text:literal, $bits:literal) => {
        Operation::plain(to_general!(concat!($text, " eax, xmm1"))).answers(Answer::General).with(Halves::Joined($bits))
    };
}

/// The operation, if SSE has it and the host can execute it.
pub(super) fn find(mnemonic: Mnemonic) -> Option<Operation> {
    find_sse2(mnemonic)
        .or_else(|| find_shift(mnemonic))
        .or_else(|| find_float(mnemonic))
        .or_else(|| find_scalar(mnemonic))
        .or_else(|| find_immediate(mnemonic))
        .or_else(|| if has!("sse3") { find_sse3(mnemonic) } else { None })
        .or_else(|| if has!("ssse3") { find_ssse3(mnemonic) } else { None })
        .or_else(|| if has!("sse4.1") { find_sse41(mnemonic) } else { None })
        .or_else(|| if has!("sse4.2") { find_sse42(mnemonic) } else { None })
        .or_else(|| if has!("aes") { find_aes(mnemonic) } else { None })
        .or_else(|| if has!("pclmulqdq") { find_pclmulqdq(mnemonic) } else { None })
        .or_else(|| if has!("sha") { find_sha(mnemonic) } else { None })
}

/// Integer and bitwise instructions of SSE and SSE2.
#[rustfmt::skip]
fn find_sse2(mnemonic: Mnemonic) -> Option<Operation> {
    plain_entries!(mnemonic,
        Paddb | Vpaddb "paddb", Paddw | Vpaddw "paddw", Paddd | Vpaddd "paddd", Paddq | Vpaddq "paddq",
        Paddsb | Vpaddsb "paddsb", Paddsw | Vpaddsw "paddsw", Paddusb | Vpaddusb "paddusb", Paddusw |
        Vpaddusw "paddusw", Psubb | Vpsubb "psubb", Psubw | Vpsubw "psubw", Psubd | Vpsubd "psubd",
        Psubq | Vpsubq "psubq", Psubsb | Vpsubsb "psubsb", Psubsw | Vpsubsw "psubsw", Psubusb | Vpsubusb
        "psubusb", Psubusw | Vpsubusw "psubusw", Pmullw | Vpmullw "pmullw", Pmulhw | Vpmulhw "pmulhw",
        Pmulhuw | Vpmulhuw "pmulhuw", Pmuludq | Vpmuludq "pmuludq", Pmaddwd | Vpmaddwd "pmaddwd", Psadbw
        | Vpsadbw "psadbw", Pavgb | Vpavgb "pavgb", Pavgw | Vpavgw "pavgw", Pmaxub | Vpmaxub "pmaxub",
        Pminub | Vpminub "pminub", Pmaxsw | Vpmaxsw "pmaxsw", Pminsw | Vpminsw "pminsw", Pcmpeqb |
        Vpcmpeqb "pcmpeqb", Pcmpeqw | Vpcmpeqw "pcmpeqw", Pcmpeqd | Vpcmpeqd "pcmpeqd", Pcmpgtb |
        Vpcmpgtb "pcmpgtb", Pcmpgtw | Vpcmpgtw "pcmpgtw", Pcmpgtd | Vpcmpgtd "pcmpgtd", Pand | Vpand
        "pand", Pandn | Vpandn "pandn", Por | Vpor "por", Pxor | Vpxor "pxor", Andps | Vandps "andps",
        Andpd | Vandpd "andpd", Andnps | Vandnps "andnps", Andnpd | Vandnpd "andnpd", Orps | Vorps
        "orps", Orpd | Vorpd "orpd", Xorps | Vxorps "xorps", Xorpd | Vxorpd "xorpd", Punpcklbw |
        Vpunpcklbw "punpcklbw", Punpcklwd | Vpunpcklwd "punpcklwd", Punpckldq | Vpunpckldq "punpckldq",
        Punpcklqdq | Vpunpcklqdq "punpcklqdq", Punpckhbw | Vpunpckhbw "punpckhbw", Punpckhwd |
        Vpunpckhwd "punpckhwd", Punpckhdq | Vpunpckhdq "punpckhdq", Punpckhqdq | Vpunpckhqdq
        "punpckhqdq", Unpcklps | Vunpcklps "unpcklps", Unpcklpd | Vunpcklpd "unpcklpd", Unpckhps |
        Vunpckhps "unpckhps", Unpckhpd | Vunpckhpd "unpckhpd", Packsswb | Vpacksswb "packsswb", Packssdw
        | Vpackssdw "packssdw", Packuswb | Vpackuswb "packuswb",
    )
}

/// Shifts by a count in the low 8 bytes of the source.
#[rustfmt::skip]
fn find_shift(mnemonic: Mnemonic) -> Option<Operation> {
    let shift = plain_entries!(mnemonic,
        Psllw | Vpsllw "psllw", Pslld | Vpslld "pslld", Psllq | Vpsllq "psllq", Psrlw | Vpsrlw "psrlw",
        Psrld | Vpsrld "psrld", Psrlq | Vpsrlq "psrlq", Psraw | Vpsraw "psraw", Psrad | Vpsrad "psrad",
    );
    shift.map(|operation| operation.with(Halves::Count))
}

/// Arithmetic and packed conversions of SSE and SSE2.
#[rustfmt::skip]
fn find_float(mnemonic: Mnemonic) -> Option<Operation> {
    float_entries!(mnemonic,
        Addps | Vaddps "addps", Addpd | Vaddpd "addpd", Addss | Vaddss "addss", Addsd | Vaddsd "addsd",
        Subps | Vsubps "subps", Subpd | Vsubpd "subpd", Subss | Vsubss "subss", Subsd | Vsubsd "subsd",
        Mulps | Vmulps "mulps", Mulpd | Vmulpd "mulpd", Mulss | Vmulss "mulss", Mulsd | Vmulsd "mulsd",
        Divps | Vdivps "divps", Divpd | Vdivpd "divpd", Divss | Vdivss "divss", Divsd | Vdivsd "divsd",
        Minps | Vminps "minps", Minpd | Vminpd "minpd", Minss | Vminss "minss", Minsd | Vminsd "minsd",
        Maxps | Vmaxps "maxps", Maxpd | Vmaxpd "maxpd", Maxss | Vmaxss "maxss", Maxsd | Vmaxsd "maxsd",
        Sqrtps | Vsqrtps "sqrtps", Sqrtpd | Vsqrtpd "sqrtpd", Sqrtss | Vsqrtss "sqrtss", Sqrtsd |
        Vsqrtsd "sqrtsd", Cvtss2sd | Vcvtss2sd "cvtss2sd", Cvtsd2ss | Vcvtsd2ss "cvtsd2ss", Cvtdq2ps |
        Vcvtdq2ps "cvtdq2ps", Cvtps2dq | Vcvtps2dq "cvtps2dq", Cvttps2dq | Vcvttps2dq "cvttps2dq",
    )
    .or_else(|| find_resized(mnemonic))
}

/// Conversions between elements of different sizes, and the approximations.
fn find_resized(mnemonic: Mnemonic) -> Option<Operation> {
    use Mnemonic as M;
    let spread = float_entries!(mnemonic, Cvtps2pd | Vcvtps2pd "cvtps2pd", Cvtdq2pd | Vcvtdq2pd "cvtdq2pd",);
    let narrow = float_entries!(mnemonic, Cvtpd2ps | Vcvtpd2ps "cvtpd2ps", Cvtpd2dq | Vcvtpd2dq "cvtpd2dq",
        Cvttpd2dq | Vcvttpd2dq "cvttpd2dq",);
    let soft = match mnemonic {
        M::Rcpps | M::Vrcpps => Some(Operation::plain(soft::reciprocal_packed)),
        M::Rcpss | M::Vrcpss => Some(Operation::plain(soft::reciprocal_scalar)),
        M::Rsqrtps | M::Vrsqrtps => Some(Operation::plain(soft::reciprocal_root_packed)),
        M::Rsqrtss | M::Vrsqrtss => Some(Operation::plain(soft::reciprocal_root_scalar)),
        _ => None,
    };
    spread
        .map(|operation| operation.with(Halves::Spread(8)))
        .or(narrow.map(|operation| operation.with(Halves::Narrow)))
        .or(soft)
}

/// Instructions between general and XMM registers, or with flags as the answer, of SSE and SSE2.
fn find_scalar(mnemonic: Mnemonic) -> Option<Operation> {
    use Mnemonic as M;
    Some(match mnemonic {
        M::Cvtsi2sd | M::Vcvtsi2sd => from_integer!("cvtsi2sd"),
        M::Cvtsi2ss | M::Vcvtsi2ss => from_integer!("cvtsi2ss"),
        M::Cvtsd2si | M::Vcvtsd2si => to_integer!("cvtsd2si"),
        M::Cvttsd2si | M::Vcvttsd2si => to_integer!("cvttsd2si"),
        M::Cvtss2si | M::Vcvtss2si => to_integer!("cvtss2si"),
        M::Cvttss2si | M::Vcvttss2si => to_integer!("cvttss2si"),
        M::Ucomiss | M::Vucomiss => float_flags!("ucomiss"),
        M::Ucomisd | M::Vucomisd => float_flags!("ucomisd"),
        M::Comiss | M::Vcomiss => float_flags!("comiss"),
        M::Comisd | M::Vcomisd => float_flags!("comisd"),
        M::Pmovmskb | M::Vpmovmskb => sign_mask!("pmovmskb", 16),
        M::Movmskps | M::Vmovmskps => sign_mask!("movmskps", 4),
        M::Movmskpd | M::Vmovmskpd => sign_mask!("movmskpd", 2),
        _ => return None,
    })
}

/// Instructions with an immediate of SSE and SSE2. The comparisons of AVX know more predicates.
fn find_immediate(mnemonic: Mnemonic) -> Option<Operation> {
    use Mnemonic as M;
    Some(match mnemonic {
        M::Pshufd | M::Vpshufd => Operation::plain(immediate!(256, "0x66, 0x0f, 0x70, 0xc1")),
        M::Pshuflw | M::Vpshuflw => Operation::plain(immediate!(256, "0xf2, 0x0f, 0x70, 0xc1")),
        M::Pshufhw | M::Vpshufhw => Operation::plain(immediate!(256, "0xf3, 0x0f, 0x70, 0xc1")),
        M::Shufps | M::Vshufps => Operation::plain(immediate!(256, "0x0f, 0xc6, 0xc1")),
        M::Shufpd | M::Vshufpd => Operation::plain(immediate!(4, "0x66, 0x0f, 0xc6, 0xc1")).with(Halves::Immediate(2)),
        M::Cmpps => Operation::float(float_immediate!(8, "0x0f, 0xc2, 0xc1")),
        M::Cmppd => Operation::float(float_immediate!(8, "0x66, 0x0f, 0xc2, 0xc1")),
        M::Cmpss => Operation::float(float_immediate!(8, "0xf3, 0x0f, 0xc2, 0xc1")),
        M::Cmpsd => Operation::float(float_immediate!(8, "0xf2, 0x0f, 0xc2, 0xc1")),
        _ => return None,
    })
}

/// SSE3.
fn find_sse3(mnemonic: Mnemonic) -> Option<Operation> {
    plain_entries!(mnemonic,
        Movddup | Vmovddup "movddup", Movshdup | Vmovshdup "movshdup", Movsldup | Vmovsldup "movsldup",)
    .or_else(|| {
        float_entries!(mnemonic,
            Addsubps | Vaddsubps "addsubps", Addsubpd | Vaddsubpd "addsubpd", Haddps | Vhaddps "haddps",
            Haddpd | Vhaddpd "haddpd", Hsubps | Vhsubps "hsubps", Hsubpd | Vhsubpd "hsubpd",)
    })
}

/// SSSE3.
#[rustfmt::skip]
fn find_ssse3(mnemonic: Mnemonic) -> Option<Operation> {
    if matches!(mnemonic, Mnemonic::Palignr | Mnemonic::Vpalignr) {
        return Some(Operation::plain(immediate!(256, "0x66, 0x0f, 0x3a, 0x0f, 0xc1")));
    }
    plain_entries!(mnemonic,
        Pshufb | Vpshufb "pshufb", Phaddw | Vphaddw "phaddw", Phaddd | Vphaddd "phaddd", Phaddsw |
        Vphaddsw "phaddsw", Phsubw | Vphsubw "phsubw", Phsubd | Vphsubd "phsubd", Phsubsw | Vphsubsw
        "phsubsw", Pmaddubsw | Vpmaddubsw "pmaddubsw", Pmulhrsw | Vpmulhrsw "pmulhrsw", Psignb | Vpsignb
        "psignb", Psignw | Vpsignw "psignw", Psignd | Vpsignd "psignd", Pabsb | Vpabsb "pabsb", Pabsw |
        Vpabsw "pabsw", Pabsd | Vpabsd "pabsd",
    )
}

/// SSE4.1.
fn find_sse41(mnemonic: Mnemonic) -> Option<Operation> {
    use Mnemonic as M;
    Some(match mnemonic {
        M::Ptest | M::Vptest => Operation::plain(to_general!("ptest xmm0, xmm1", "pushfq", "pop rax"))
            .answers(Answer::Flags)
            .with(Halves::Both),
        M::Pblendvb | M::Vpblendvb => Operation::plain(third!("pblendvb xmm2, xmm1, xmm0")).with_third(),
        M::Blendvps | M::Vblendvps => Operation::plain(third!("blendvps xmm2, xmm1, xmm0")).with_third(),
        M::Blendvpd | M::Vblendvpd => Operation::plain(third!("blendvpd xmm2, xmm1, xmm0")).with_third(),
        _ => return find_sse41_packed(mnemonic).or_else(|| find_sse41_immediate(mnemonic)),
    })
}

/// SSE4.1 on packed operands.
#[rustfmt::skip]
fn find_sse41_packed(mnemonic: Mnemonic) -> Option<Operation> {
    plain_entries!(mnemonic,
        Pmulld | Vpmulld "pmulld", Pmuldq | Vpmuldq "pmuldq", Pminsb | Vpminsb "pminsb", Pminsd |
        Vpminsd "pminsd", Pminuw | Vpminuw "pminuw", Pminud | Vpminud "pminud", Pmaxsb | Vpmaxsb
        "pmaxsb", Pmaxsd | Vpmaxsd "pmaxsd", Pmaxuw | Vpmaxuw "pmaxuw", Pmaxud | Vpmaxud "pmaxud",
        Packusdw | Vpackusdw "packusdw", Pcmpeqq | Vpcmpeqq "pcmpeqq", Phminposuw | Vphminposuw
        "phminposuw",
    )
    .or_else(|| {
        let spread = |bytes: u8| move |operation: Operation| operation.with(Halves::Spread(bytes));
        let halves = plain_entries!(mnemonic, Pmovsxbw | Vpmovsxbw "pmovsxbw", Pmovsxwd | Vpmovsxwd "pmovsxwd",
            Pmovsxdq | Vpmovsxdq "pmovsxdq", Pmovzxbw | Vpmovzxbw "pmovzxbw", Pmovzxwd | Vpmovzxwd "pmovzxwd",
            Pmovzxdq | Vpmovzxdq "pmovzxdq",);
        let quarters = plain_entries!(mnemonic, Pmovsxbd | Vpmovsxbd "pmovsxbd", Pmovsxwq | Vpmovsxwq "pmovsxwq",
            Pmovzxbd | Vpmovzxbd "pmovzxbd", Pmovzxwq | Vpmovzxwq "pmovzxwq",);
        let eighths = plain_entries!(mnemonic, Pmovsxbq | Vpmovsxbq "pmovsxbq", Pmovzxbq | Vpmovzxbq "pmovzxbq",);
        halves.map(spread(8)).or(quarters.map(spread(4))).or(eighths.map(spread(2)))
    })
}

/// SSE4.1 with an immediate.
fn find_sse41_immediate(mnemonic: Mnemonic) -> Option<Operation> {
    use Mnemonic as M;
    Some(match mnemonic {
        M::Blendps | M::Vblendps => {
            Operation::plain(immediate!(16, "0x66, 0x0f, 0x3a, 0x0c, 0xc1")).with(Halves::Immediate(4))
        }
        M::Blendpd | M::Vblendpd => {
            Operation::plain(immediate!(4, "0x66, 0x0f, 0x3a, 0x0d, 0xc1")).with(Halves::Immediate(2))
        }
        M::Pblendw | M::Vpblendw => Operation::plain(immediate!(256, "0x66, 0x0f, 0x3a, 0x0e, 0xc1")),
        M::Mpsadbw | M::Vmpsadbw => {
            Operation::plain(immediate!(8, "0x66, 0x0f, 0x3a, 0x42, 0xc1")).with(Halves::Immediate(3))
        }
        M::Roundps | M::Vroundps => Operation::float(float_immediate!(16, "0x66, 0x0f, 0x3a, 0x08, 0xc1")),
        M::Roundpd | M::Vroundpd => Operation::float(float_immediate!(16, "0x66, 0x0f, 0x3a, 0x09, 0xc1")),
        M::Roundss | M::Vroundss => Operation::float(float_immediate!(16, "0x66, 0x0f, 0x3a, 0x0a, 0xc1")),
        M::Roundsd | M::Vroundsd => Operation::float(float_immediate!(16, "0x66, 0x0f, 0x3a, 0x0b, 0xc1")),
        M::Dpps | M::Vdpps => Operation::float(float_immediate!(256, "0x66, 0x0f, 0x3a, 0x40, 0xc1")),
        M::Dppd | M::Vdppd => Operation::float(float_immediate!(256, "0x66, 0x0f, 0x3a, 0x41, 0xc1")),
        _ => return None,
    })
}

/// SSE4.2.
fn find_sse42(mnemonic: Mnemonic) -> Option<Operation> {
    plain_entries!(mnemonic, Pcmpgtq | Vpcmpgtq "pcmpgtq",)
}

/// AES-NI.
#[rustfmt::skip]
fn find_aes(mnemonic: Mnemonic) -> Option<Operation> {
    if matches!(mnemonic, Mnemonic::Aeskeygenassist | Mnemonic::Vaeskeygenassist) {
        return Some(Operation::plain(immediate!(256, "0x66, 0x0f, 0x3a, 0xdf, 0xc1")));
    }
    plain_entries!(mnemonic,
        Aesenc | Vaesenc "aesenc", Aesenclast | Vaesenclast "aesenclast", Aesdec | Vaesdec "aesdec",
        Aesdeclast | Vaesdeclast "aesdeclast", Aesimc | Vaesimc "aesimc",
    )
}

/// PCLMULQDQ.
fn find_pclmulqdq(mnemonic: Mnemonic) -> Option<Operation> {
    matches!(mnemonic, Mnemonic::Pclmulqdq | Mnemonic::Vpclmulqdq)
        .then(|| Operation::plain(immediate!(256, "0x66, 0x0f, 0x3a, 0x44, 0xc1")))
}

/// The SHA extensions.
#[rustfmt::skip]
fn find_sha(mnemonic: Mnemonic) -> Option<Operation> {
    match mnemonic {
        Mnemonic::Sha256rnds2 => Some(Operation::plain(third!("sha256rnds2 xmm2, xmm1, xmm0")).with_third()),
        Mnemonic::Sha1rnds4 => Some(Operation::plain(immediate!(4, "0x0f, 0x3a, 0xcc, 0xc1"))),
        _ => plain_entries!(mnemonic,
            Sha1msg1 "sha1msg1", Sha1msg2 "sha1msg2", Sha1nexte "sha1nexte", Sha256msg1 "sha256msg1",
            Sha256msg2 "sha256msg2",
        ),
    }
}
