//! The SSE instructions that the host's own CPU executes for the guest: one small function each, which loads its
//! operands into XMM registers, executes the instruction and stores the result. Those that depend on MXCSR run under
//! the guest's rounding control with all exceptions masked. Immediates select an entry of a jump table, since an
//! instruction's immediate can't be a variable.
//!
//! All functions are `unsafe`: the pointers have to be valid for 16 bytes (not necessarily aligned), and the host has to
//! have the instruction. [`find`] answers only with functions that the host has.

use std::arch::asm;
use std::is_x86_feature_detected as has;

use iced_x86::Mnemonic;

/// `dst = operation(dst, src)`.
pub(super) type Plain = unsafe fn(dst: *mut u128, src: *const u128);
/// The same with an immediate.
pub(super) type Immediate = unsafe fn(dst: *mut u128, src: *const u128, immediate: u8);
/// The same under MXCSR; see [`Control`].
pub(super) type Float = unsafe fn(dst: *mut u128, src: *const u128, control: *mut Control);
/// Both.
pub(super) type FloatImmediate = unsafe fn(dst: *mut u128, src: *const u128, control: *mut Control, immediate: u8);
/// The same with a third operand, which the instruction takes from XMM0.
pub(super) type Implicit = unsafe fn(dst: *mut u128, src: *const u128, xmm0: *const u128);

/// What a floating-point function runs under.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Control {
    /// In: the guest's rounding control, all exceptions masked, no flags. Out: the same with the flags raised.
    pub mxcsr: u32,
    /// The host's MXCSR while the guest's is loaded.
    pub saved: u32,
}

/// How to execute an instruction.
#[derive(Clone, Copy)]
pub(super) enum Entry {
    /// On XMM registers and memory; the destination may be a general register.
    Plain(Plain),
    /// With an immediate.
    Immediate(Immediate),
    /// Under MXCSR.
    Float(Float),
    /// Under MXCSR with an immediate.
    FloatImmediate(FloatImmediate),
    /// With XMM0 as third operand.
    Implicit(Implicit),
    /// A conversion to an integer of 4 or of 8 bytes.
    ToInteger(Float, Float),
    /// Answers with arithmetic flags, in the low bits of `dst`.
    Flags(Plain),
    /// Answers with arithmetic flags, under MXCSR.
    FloatFlags(Float),
}

/// A function that executes `text` with `dst` in XMM0 and `src` in XMM1 and stores XMM0 to `dst`.
macro_rules! plain {
    ($text:expr) => {{
        unsafe fn run(dst: *mut u128, src: *const u128) {
            // SAFETY: the caller vouches for the pointers and that the host has the instruction.
            unsafe {
                asm!("movups xmm0, [{d}]", "movups xmm1, [{s}]", $text, "movups [{d}], xmm0",
                    d = in(reg) dst, s = in(reg) src, out("xmm0") _, out("xmm1") _, options(nostack));
            }
        }
        run
    }};
}

/// The same for an instruction that leaves its answer in RAX.
macro_rules! to_general {
    ($($text:expr),+) => {{
        unsafe fn run(dst: *mut u128, src: *const u128) {
            // SAFETY: as in `plain`; 8 bytes are stored to `dst`. The stack is used to read the flags.
            unsafe {
                asm!("movups xmm0, [{d}]", "movups xmm1, [{s}]", $($text,)+ "mov [{d}], rax",
                    d = in(reg) dst, s = in(reg) src, out("rax") _, out("xmm0") _, out("xmm1") _);
            }
        }
        run
    }};
}

/// The same under the guest's MXCSR, with the store as a parameter.
macro_rules! float {
    ($store:expr, $($text:expr),+) => {{
        unsafe fn run(dst: *mut u128, src: *const u128, control: *mut Control) {
            // SAFETY: as in `plain`; `control` is valid, masks every exception and has no reserved bit set, and the
            // host's MXCSR is back before any other code runs.
            unsafe {
                asm!("stmxcsr [{c} + 4]", "movups xmm0, [{d}]", "movups xmm1, [{s}]", "ldmxcsr [{c}]",
                    $($text,)+ "stmxcsr [{c}]", "ldmxcsr [{c} + 4]", $store,
                    d = in(reg) dst, s = in(reg) src, c = in(reg) control,
                    out("rax") _, out("xmm0") _, out("xmm1") _);
            }
        }
        run
    }};
}

/// Jumps to the entry of a table of 256 copies of an instruction on XMM0 and XMM1, one for each immediate.
macro_rules! immediate_table {
    ($bytes:literal) => {
        concat!(
            "lea {t}, [rip + 2f]\nshl {i}, 4\nadd {t}, {i}\njmp {t}\n",
            ".set .Luhyve_immediate, 0\n.balign 16\n2:\n.rept 256\n.byte ",
            $bytes,
            ", 0xc1, .Luhyve_immediate\n",
            "jmp 3f\n.balign 16\n.set .Luhyve_immediate, .Luhyve_immediate + 1\n.endr\n3:"
        )
    };
}

macro_rules! immediate {
    ($bytes:literal) => {{
        unsafe fn run(dst: *mut u128, src: *const u128, immediate: u8) {
            // SAFETY: as in `plain`; the jump stays within the table since the immediate is below 256.
            unsafe {
                asm!("movups xmm0, [{d}]", "movups xmm1, [{s}]", immediate_table!($bytes), "movups [{d}], xmm0",
                    d = in(reg) dst, s = in(reg) src, t = out(reg) _, i = inout(reg) u64::from(immediate) => _,
                    out("xmm0") _, out("xmm1") _, options(nostack));
            }
        }
        run
    }};
}

macro_rules! float_immediate {
    ($bytes:literal) => {{
        unsafe fn run(dst: *mut u128, src: *const u128, control: *mut Control, immediate: u8) {
            // SAFETY: as in `float` and `immediate`.
            unsafe {
                asm!("stmxcsr [{c} + 4]", "movups xmm0, [{d}]", "movups xmm1, [{s}]", "ldmxcsr [{c}]",
                    immediate_table!($bytes), "stmxcsr [{c}]", "ldmxcsr [{c} + 4]", "movups [{d}], xmm0",
                    d = in(reg) dst, s = in(reg) src, c = in(reg) control,
                    t = out(reg) _, i = inout(reg) u64::from(immediate) => _,
                    out("xmm0") _, out("xmm1") _, options(nostack));
            }
        }
        run
    }};
}

macro_rules! implicit {
    ($text:expr) => {{
        unsafe fn run(dst: *mut u128, src: *const u128, xmm0: *const u128) {
            // SAFETY: as in `plain`.
            unsafe {
                asm!("movups xmm2, [{d}]", "movups xmm1, [{s}]", "movups xmm0, [{x}]", $text, "movups [{d}], xmm2",
                    d = in(reg) dst, s = in(reg) src, x = in(reg) xmm0,
                    out("xmm0") _, out("xmm1") _, out("xmm2") _, options(nostack));
            }
        }
        run
    }};
}

/// A `match` over mnemonics whose assembler text is `name xmm0, xmm1`.
macro_rules! plain_entries {
    ($mnemonic:expr, $($name:ident $text:literal)+) => {
        match $mnemonic {
            $(Mnemonic::$name => Some(Entry::Plain(plain!(concat!($text, " xmm0, xmm1")))),)+
            _ => None,
        }
    };
}

macro_rules! float_entries {
    ($mnemonic:expr, $($name:ident $text:literal)+) => {
        match $mnemonic {
            $(Mnemonic::$name => Some(Entry::Float(float!("movups [{d}], xmm0", concat!($text, " xmm0, xmm1")))),)+
            _ => None,
        }
    };
}

macro_rules! immediate_entries {
    ($mnemonic:expr, $entry:ident, $make:ident, $($name:ident $bytes:literal)+) => {
        match $mnemonic {
            $(Mnemonic::$name => Some(Entry::$entry($make!($bytes))),)+
            _ => None,
        }
    };
}

/// Conversions to integers, by the assembler's name.
macro_rules! to_integer {
    ($text:literal) => {
        Some(Entry::ToInteger(
            float!("mov [{d}], rax", concat!($text, " eax, xmm1")),
            float!("mov [{d}], rax", concat!($text, " rax, xmm1")),
        ))
    };
}

/// Conversions from an integer, which arrives sign-extended to 8 bytes.
macro_rules! from_integer {
    ($text:literal) => {
        Some(Entry::Float(float!("movups [{d}], xmm0", "movq rax, xmm1", concat!($text, " xmm0, rax"))))
    };
}

/// Comparisons that answer in EFLAGS.
macro_rules! float_flags {
    ($text:literal) => {
        Some(Entry::FloatFlags(float!("mov [{d}], rax", concat!($text, " xmm0, xmm1"), "pushfq", "pop rax")))
    };
}

/// The function for an SSE instruction, if there is one and the host can execute it.
pub(super) fn find(mnemonic: Mnemonic) -> Option<Entry> {
    find_sse2(mnemonic)
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
fn find_sse2(mnemonic: Mnemonic) -> Option<Entry> {
    plain_entries!(mnemonic,
        Paddb "paddb" Paddw "paddw" Paddd "paddd" Paddq "paddq" Paddsb "paddsb" Paddsw "paddsw" Paddusb
        "paddusb" Paddusw "paddusw" Psubb "psubb" Psubw "psubw" Psubd "psubd" Psubq "psubq" Psubsb "psubsb"
        Psubsw "psubsw" Psubusb "psubusb" Psubusw "psubusw" Pmullw "pmullw" Pmulhw "pmulhw" Pmulhuw "pmulhuw"
        Pmuludq "pmuludq" Pmaddwd "pmaddwd" Psadbw "psadbw" Pavgb "pavgb" Pavgw "pavgw" Pmaxub "pmaxub" Pminub
        "pminub" Pmaxsw "pmaxsw" Pminsw "pminsw" Pcmpeqb "pcmpeqb" Pcmpeqw "pcmpeqw" Pcmpeqd "pcmpeqd" Pcmpgtb
        "pcmpgtb" Pcmpgtw "pcmpgtw" Pcmpgtd "pcmpgtd" Pand "pand" Pandn "pandn" Por "por" Pxor "pxor" Andps
        "andps" Andpd "andpd" Andnps "andnps" Andnpd "andnpd" Orps "orps" Orpd "orpd" Xorps "xorps" Xorpd
        "xorpd" Punpcklbw "punpcklbw" Punpcklwd "punpcklwd" Punpckldq "punpckldq" Punpcklqdq "punpcklqdq"
        Punpckhbw "punpckhbw" Punpckhwd "punpckhwd" Punpckhdq "punpckhdq" Punpckhqdq "punpckhqdq" Unpcklps
        "unpcklps" Unpcklpd "unpcklpd" Unpckhps "unpckhps" Unpckhpd "unpckhpd" Packsswb "packsswb" Packssdw
        "packssdw" Packuswb "packuswb" Psllw "psllw" Pslld "pslld" Psllq "psllq" Psrlw "psrlw" Psrld "psrld"
        Psrlq "psrlq" Psraw "psraw" Psrad "psrad")
}

/// Arithmetic and packed conversions of SSE and SSE2.
fn find_float(mnemonic: Mnemonic) -> Option<Entry> {
    float_entries!(mnemonic,
        Addps "addps" Addpd "addpd" Addss "addss" Addsd "addsd" Subps "subps" Subpd "subpd" Subss "subss" Subsd
        "subsd" Mulps "mulps" Mulpd "mulpd" Mulss "mulss" Mulsd "mulsd" Divps "divps" Divpd "divpd" Divss
        "divss" Divsd "divsd" Minps "minps" Minpd "minpd" Minss "minss" Minsd "minsd" Maxps "maxps" Maxpd
        "maxpd" Maxss "maxss" Maxsd "maxsd" Sqrtps "sqrtps" Sqrtpd "sqrtpd" Sqrtss "sqrtss" Sqrtsd "sqrtsd"
        Cvtps2pd "cvtps2pd" Cvtpd2ps "cvtpd2ps" Cvtss2sd "cvtss2sd" Cvtsd2ss "cvtsd2ss" Cvtdq2ps "cvtdq2ps"
        Cvtdq2pd "cvtdq2pd" Cvtps2dq "cvtps2dq" Cvttps2dq "cvttps2dq" Cvtpd2dq "cvtpd2dq" Cvttpd2dq "cvttpd2dq"
        Rcpps "rcpps" Rcpss "rcpss" Rsqrtps "rsqrtps" Rsqrtss "rsqrtss")
}

/// Instructions between general and XMM registers, or with flags as the answer, of SSE and SSE2.
fn find_scalar(mnemonic: Mnemonic) -> Option<Entry> {
    use Mnemonic as M;
    match mnemonic {
        M::Cvtsi2sd => from_integer!("cvtsi2sd"),
        M::Cvtsi2ss => from_integer!("cvtsi2ss"),
        M::Cvtsd2si => to_integer!("cvtsd2si"),
        M::Cvttsd2si => to_integer!("cvttsd2si"),
        M::Cvtss2si => to_integer!("cvtss2si"),
        M::Cvttss2si => to_integer!("cvttss2si"),
        M::Ucomiss => float_flags!("ucomiss"),
        M::Ucomisd => float_flags!("ucomisd"),
        M::Comiss => float_flags!("comiss"),
        M::Comisd => float_flags!("comisd"),
        M::Pmovmskb => Some(Entry::Plain(to_general!("pmovmskb eax, xmm1"))),
        M::Movmskps => Some(Entry::Plain(to_general!("movmskps eax, xmm1"))),
        M::Movmskpd => Some(Entry::Plain(to_general!("movmskpd eax, xmm1"))),
        _ => None,
    }
}

/// Instructions with an immediate of SSE and SSE2.
fn find_immediate(mnemonic: Mnemonic) -> Option<Entry> {
    immediate_entries!(mnemonic, Immediate, immediate,
        Pshufd "0x66, 0x0f, 0x70"
        Pshuflw "0xf2, 0x0f, 0x70"
        Pshufhw "0xf3, 0x0f, 0x70"
        Shufps "0x0f, 0xc6"
        Shufpd "0x66, 0x0f, 0xc6")
    .or_else(|| {
        immediate_entries!(mnemonic, FloatImmediate, float_immediate,
        Cmpps "0x0f, 0xc2"
        Cmppd "0x66, 0x0f, 0xc2"
        Cmpss "0xf3, 0x0f, 0xc2"
        Cmpsd "0xf2, 0x0f, 0xc2")
    })
}

/// SSE3.
fn find_sse3(mnemonic: Mnemonic) -> Option<Entry> {
    plain_entries!(mnemonic,
        Movddup "movddup" Movshdup "movshdup" Movsldup "movsldup")
    .or_else(|| {
        float_entries!(mnemonic,
        Addsubps "addsubps" Addsubpd "addsubpd" Haddps "haddps" Haddpd "haddpd" Hsubps "hsubps" Hsubpd "hsubpd")
    })
}

/// SSSE3.
fn find_ssse3(mnemonic: Mnemonic) -> Option<Entry> {
    plain_entries!(mnemonic,
        Pshufb "pshufb" Phaddw "phaddw" Phaddd "phaddd" Phaddsw "phaddsw" Phsubw "phsubw" Phsubd "phsubd"
        Phsubsw "phsubsw" Pmaddubsw "pmaddubsw" Pmulhrsw "pmulhrsw" Psignb "psignb" Psignw "psignw" Psignd
        "psignd" Pabsb "pabsb" Pabsw "pabsw" Pabsd "pabsd")
    .or_else(|| {
        immediate_entries!(mnemonic, Immediate, immediate,
        Palignr "0x66, 0x0f, 0x3a, 0x0f")
    })
}

/// SSE4.1.
fn find_sse41(mnemonic: Mnemonic) -> Option<Entry> {
    match mnemonic {
        Mnemonic::Ptest => Some(Entry::Flags(to_general!("ptest xmm0, xmm1", "pushfq", "pop rax"))),
        Mnemonic::Pblendvb => Some(Entry::Implicit(implicit!("pblendvb xmm2, xmm1, xmm0"))),
        Mnemonic::Blendvps => Some(Entry::Implicit(implicit!("blendvps xmm2, xmm1, xmm0"))),
        Mnemonic::Blendvpd => Some(Entry::Implicit(implicit!("blendvpd xmm2, xmm1, xmm0"))),
        _ => find_sse41_packed(mnemonic),
    }
}

/// SSE4.1 on packed operands.
fn find_sse41_packed(mnemonic: Mnemonic) -> Option<Entry> {
    plain_entries!(mnemonic,
        Pmulld "pmulld" Pmuldq "pmuldq" Pminsb "pminsb" Pminsd "pminsd" Pminuw "pminuw" Pminud "pminud" Pmaxsb
        "pmaxsb" Pmaxsd "pmaxsd" Pmaxuw "pmaxuw" Pmaxud "pmaxud" Packusdw "packusdw" Pcmpeqq "pcmpeqq"
        Phminposuw "phminposuw" Pmovsxbw "pmovsxbw" Pmovsxbd "pmovsxbd" Pmovsxbq "pmovsxbq" Pmovsxwd "pmovsxwd"
        Pmovsxwq "pmovsxwq" Pmovsxdq "pmovsxdq" Pmovzxbw "pmovzxbw" Pmovzxbd "pmovzxbd" Pmovzxbq "pmovzxbq"
        Pmovzxwd "pmovzxwd" Pmovzxwq "pmovzxwq" Pmovzxdq "pmovzxdq")
    .or_else(|| {
        immediate_entries!(mnemonic, Immediate, immediate,
        Blendps "0x66, 0x0f, 0x3a, 0x0c"
        Blendpd "0x66, 0x0f, 0x3a, 0x0d"
        Pblendw "0x66, 0x0f, 0x3a, 0x0e"
        Mpsadbw "0x66, 0x0f, 0x3a, 0x42")
    })
    .or_else(|| {
        immediate_entries!(mnemonic, FloatImmediate, float_immediate,
        Roundps "0x66, 0x0f, 0x3a, 0x08"
        Roundpd "0x66, 0x0f, 0x3a, 0x09"
        Roundss "0x66, 0x0f, 0x3a, 0x0a"
        Roundsd "0x66, 0x0f, 0x3a, 0x0b"
        Dpps "0x66, 0x0f, 0x3a, 0x40"
        Dppd "0x66, 0x0f, 0x3a, 0x41")
    })
}

/// SSE4.2.
fn find_sse42(mnemonic: Mnemonic) -> Option<Entry> {
    plain_entries!(mnemonic,
        Pcmpgtq "pcmpgtq")
}

/// AES-NI.
fn find_aes(mnemonic: Mnemonic) -> Option<Entry> {
    plain_entries!(mnemonic,
        Aesenc "aesenc" Aesenclast "aesenclast" Aesdec "aesdec" Aesdeclast "aesdeclast" Aesimc "aesimc")
    .or_else(|| {
        immediate_entries!(mnemonic, Immediate, immediate,
        Aeskeygenassist "0x66, 0x0f, 0x3a, 0xdf")
    })
}

/// PCLMULQDQ.
fn find_pclmulqdq(mnemonic: Mnemonic) -> Option<Entry> {
    immediate_entries!(mnemonic, Immediate, immediate,
        Pclmulqdq "0x66, 0x0f, 0x3a, 0x44")
}

/// The SHA extensions.
fn find_sha(mnemonic: Mnemonic) -> Option<Entry> {
    if mnemonic == Mnemonic::Sha256rnds2 {
        return Some(Entry::Implicit(implicit!("sha256rnds2 xmm2, xmm1, xmm0")));
    }
    plain_entries!(mnemonic,
        Sha1msg1 "sha1msg1" Sha1msg2 "sha1msg2" Sha1nexte "sha1nexte" Sha256msg1 "sha256msg1" Sha256msg2
        "sha256msg2")
    .or_else(|| {
        immediate_entries!(mnemonic, Immediate, immediate,
        Sha1rnds4 "0x0f, 0x3a, 0xcc")
    })
}
