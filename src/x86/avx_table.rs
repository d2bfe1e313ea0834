//! The table of vector operations that only AVX, AVX2, FMA and F16C have and that keep 128-bit halves apart.

use std::arch::asm;
use std::is_x86_feature_detected as has;

use iced_x86::Mnemonic;

use super::vector::{Answer, Control, Halves, Operation, VectorFn};
use super::vector_asm::{float, float_immediate, float_third, immediate, immediate_table, plain, to_general};

/// The operation, if it is one of AVX's and the host can execute it.
pub(super) fn find(mnemonic: Mnemonic) -> Option<Operation> {
    let avx = if has!("avx") { find_avx(mnemonic) } else { None };
    avx.or_else(|| if has!("avx2") { find_avx2(mnemonic) } else { None })
        .or_else(|| if has!("f16c") { find_f16c(mnemonic) } else { None })
        .or_else(|| if has!("fma") { find_fma(mnemonic) } else { None })
}

/// AVX's comparisons with their 32 predicates, and what SSE has no form of.
fn find_avx(mnemonic: Mnemonic) -> Option<Operation> {
    use Mnemonic as M;
    let test = |function| Some(Operation::plain(function).answers(Answer::Flags).with(Halves::Both));
    match mnemonic {
        M::Vcmpps => Some(Operation::float(float_immediate!(32, "0xc5, 0xf8, 0xc2, 0xc1"))),
        M::Vcmppd => Some(Operation::float(float_immediate!(32, "0xc5, 0xf9, 0xc2, 0xc1"))),
        M::Vcmpss => Some(Operation::float(float_immediate!(32, "0xc5, 0xfa, 0xc2, 0xc1"))),
        M::Vcmpsd => Some(Operation::float(float_immediate!(32, "0xc5, 0xfb, 0xc2, 0xc1"))),
        M::Vpermilps => Some(Operation::plain(plain!("vpermilps xmm0, xmm0, xmm1"))),
        M::Vpermilpd => Some(Operation::plain(plain!("vpermilpd xmm0, xmm0, xmm1"))),
        M::Vtestps => test(to_general!("vtestps xmm0, xmm1", "pushfq", "pop rax")),
        M::Vtestpd => test(to_general!("vtestpd xmm0, xmm1", "pushfq", "pop rax")),
        _ => None,
    }
}

/// Shifts with a count for each element, and blends.
fn find_avx2(mnemonic: Mnemonic) -> Option<Operation> {
    use Mnemonic as M;
    Some(Operation::plain(match mnemonic {
        M::Vpsllvd => plain!("vpsllvd xmm0, xmm0, xmm1"),
        M::Vpsllvq => plain!("vpsllvq xmm0, xmm0, xmm1"),
        M::Vpsrlvd => plain!("vpsrlvd xmm0, xmm0, xmm1"),
        M::Vpsrlvq => plain!("vpsrlvq xmm0, xmm0, xmm1"),
        M::Vpsravd => plain!("vpsravd xmm0, xmm0, xmm1"),
        M::Vpblendd => {
            let function = immediate!(16, "0xc4, 0xe3, 0x79, 0x02, 0xc1");
            return Some(Operation::plain(function).with(Halves::Immediate(4)));
        }
        _ => return None,
    }))
}

/// Conversions from and to half precision.
fn find_f16c(mnemonic: Mnemonic) -> Option<Operation> {
    match mnemonic {
        Mnemonic::Vcvtph2ps => {
            let function = float!("movups [{d}], xmm0", "vcvtph2ps xmm0, xmm1");
            Some(Operation::float(function).with(Halves::Spread(8)))
        }
        Mnemonic::Vcvtps2ph => {
            let function = float_immediate!(8, "0xc4, 0xe3, 0x79, 0x1d, 0xc8");
            Some(Operation::float(function).with(Halves::Narrow).named("vcvtps2ph"))
        }
        _ => None,
    }
}

/// A `match` over FMA's mnemonics; the third operand is the instruction's second register.
macro_rules! fma_entries {
    ($mnemonic:expr, $($name:ident $text:literal,)+) => {
        match $mnemonic {
            $(Mnemonic::$name => {
                Some(Operation::float(float_third!(concat!($text, " xmm2, xmm0, xmm1"))).with_third().named($text))
            })+
            _ => None,
        }
    };
}

/// Fused multiplication and addition.
#[rustfmt::skip]
fn find_fma(mnemonic: Mnemonic) -> Option<Operation> {
    fma_entries!(mnemonic,
        Vfmadd132ps "vfmadd132ps", Vfmadd132pd "vfmadd132pd", Vfmadd132ss "vfmadd132ss", Vfmadd132sd
        "vfmadd132sd", Vfmadd213ps "vfmadd213ps", Vfmadd213pd "vfmadd213pd", Vfmadd213ss "vfmadd213ss",
        Vfmadd213sd "vfmadd213sd", Vfmadd231ps "vfmadd231ps", Vfmadd231pd "vfmadd231pd", Vfmadd231ss
        "vfmadd231ss", Vfmadd231sd "vfmadd231sd", Vfmsub132ps "vfmsub132ps", Vfmsub132pd "vfmsub132pd",
        Vfmsub132ss "vfmsub132ss", Vfmsub132sd "vfmsub132sd", Vfmsub213ps "vfmsub213ps", Vfmsub213pd
        "vfmsub213pd", Vfmsub213ss "vfmsub213ss", Vfmsub213sd "vfmsub213sd", Vfmsub231ps "vfmsub231ps",
        Vfmsub231pd "vfmsub231pd", Vfmsub231ss "vfmsub231ss", Vfmsub231sd "vfmsub231sd", Vfnmadd132ps
        "vfnmadd132ps", Vfnmadd132pd "vfnmadd132pd", Vfnmadd132ss "vfnmadd132ss", Vfnmadd132sd
        "vfnmadd132sd", Vfnmadd213ps "vfnmadd213ps", Vfnmadd213pd "vfnmadd213pd", Vfnmadd213ss
        "vfnmadd213ss", Vfnmadd213sd "vfnmadd213sd", Vfnmadd231ps "vfnmadd231ps", Vfnmadd231pd
        "vfnmadd231pd", Vfnmadd231ss "vfnmadd231ss", Vfnmadd231sd "vfnmadd231sd", Vfnmsub132ps
        "vfnmsub132ps", Vfnmsub132pd "vfnmsub132pd", Vfnmsub132ss "vfnmsub132ss", Vfnmsub132sd
        "vfnmsub132sd", Vfnmsub213ps "vfnmsub213ps", Vfnmsub213pd "vfnmsub213pd", Vfnmsub213ss
        "vfnmsub213ss", Vfnmsub213sd "vfnmsub213sd", Vfnmsub231ps "vfnmsub231ps", Vfnmsub231pd
        "vfnmsub231pd", Vfnmsub231ss "vfnmsub231ss", Vfnmsub231sd "vfnmsub231sd", Vfmaddsub132ps
        "vfmaddsub132ps", Vfmaddsub132pd "vfmaddsub132pd", Vfmaddsub213ps "vfmaddsub213ps",
        Vfmaddsub213pd "vfmaddsub213pd", Vfmaddsub231ps "vfmaddsub231ps", Vfmaddsub231pd
        "vfmaddsub231pd", Vfmsubadd132ps "vfmsubadd132ps", Vfmsubadd132pd "vfmsubadd132pd",
        Vfmsubadd213ps "vfmsubadd213ps", Vfmsubadd213pd "vfmsubadd213pd", Vfmsubadd231ps
        "vfmsubadd231ps", Vfmsubadd231pd "vfmsubadd231pd",
    )
}
