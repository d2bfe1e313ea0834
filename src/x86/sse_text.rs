//! SSE4.2's comparisons of text, PCMPESTRI and its three relatives, after the Intel manual, volume 2, section 4.1.

use iced_x86::{EncodingKind, Mnemonic};

use super::Outcome;
use super::flags::{CF, OF, SF, ZF, flag};
use super::operand::{Machine, Step};
use super::sse::{check_enabled, load_vector, xmm_index};
use super::vector_call::set_register;
use crate::registers::{RAX, RCX, RDX};

/// Executes the instruction if it belongs here; false if it does not.
pub(super) fn execute(m: &mut Machine) -> Step<bool> {
    use Mnemonic as M;
    let (is_explicit, wants_mask) = match m.instruction.mnemonic() {
        M::Pcmpestri | M::Pcmpestri64 | M::Vpcmpestri | M::Vpcmpestri64 => (true, false),
        M::Pcmpestrm | M::Pcmpestrm64 | M::Vpcmpestrm | M::Vpcmpestrm64 => (true, true),
        M::Pcmpistri | M::Vpcmpistri => (false, false),
        M::Pcmpistrm | M::Vpcmpistrm => (false, true),
        _ => return Ok(false),
    };
    let is_vex = m.instruction.encoding() == EncodingKind::VEX;
    check_enabled(m)?;
    let first = m.cpu.fpu.xmm[xmm_index(m, 0).ok_or(Outcome::Unsupported)?];
    let second = match xmm_index(m, 1) {
        Some(index) => m.cpu.fpu.xmm[index],
        None => load_vector(m, 16, false)?,
    };
    let control = Control(m.instruction.immediate8());
    let texts = if is_explicit {
        let wide =
            matches!(m.instruction.mnemonic(), M::Pcmpestri64 | M::Pcmpestrm64 | M::Vpcmpestri64 | M::Vpcmpestrm64);
        [Text::counted(m, first, RAX, wide, control), Text::counted(m, second, RDX, wide, control)]
    } else {
        [Text::terminated(first, control), Text::terminated(second, control)]
    };
    let bits = control.inverted(compare(&texts, control), texts[1].length);
    if wants_mask {
        let mask = control.expanded(bits);
        if is_vex {
            set_register(m.cpu, 0, [mask, 0]);
        } else {
            m.cpu.fpu.xmm[0] = mask;
        }
    } else {
        m.set_general(RCX, 4, control.index(bits));
    }
    let is_short = |text: &Text| text.length < control.elements();
    let flags = [(bits != 0, CF), (is_short(&texts[1]), ZF), (is_short(&texts[0]), SF), (bits & 1 != 0, OF)];
    m.set_arithmetic(flags.iter().fold(0, |all, (is_set, which)| all | flag(*is_set, *which)));
    Ok(true)
}

/// The immediate.
#[derive(Clone, Copy)]
struct Control(u8);

impl Control {
    fn elements(self) -> usize {
        if self.0 & 1 != 0 { 8 } else { 16 }
    }

    fn is_signed(self) -> bool {
        self.0 & 2 != 0
    }

    /// All elements' bits.
    fn all(self) -> u32 {
        (1 << self.elements()) - 1
    }

    /// The bits after the polarity is applied; with the masked one, elements beyond the second text stay.
    fn inverted(self, bits: u32, length: usize) -> u32 {
        match self.0 >> 4 & 3 {
            1 => bits ^ self.all(),
            3 => bits ^ ((1 << length) - 1),
            _ => bits,
        }
    }

    /// Number of the first or last bit; the number of elements if there is none.
    fn index(self, bits: u32) -> u64 {
        if bits == 0 {
            return self.elements() as u64;
        }
        (if self.0 & 0x40 == 0 { bits.trailing_zeros() } else { bits.ilog2() }).into()
    }

    /// The bits themselves, or a mask of elements.
    fn expanded(self, bits: u32) -> u128 {
        if self.0 & 0x40 == 0 {
            return bits.into();
        }
        let width = 128 / self.elements();
        let element = u128::MAX >> (128 - width);
        (0..self.elements()).filter(|n| bits >> n & 1 != 0).fold(0, |mask, n| mask | element << (width * n))
    }
}

/// One operand: its elements, of which the first `length` are the text.
struct Text {
    elements: [i32; 16],
    length: usize,
}

impl Text {
    fn new(vector: u128, control: Control) -> Self {
        let bytes = vector.to_le_bytes();
        let element = |n: usize| match (control.elements(), control.is_signed()) {
            (16, false) => bytes[n].into(),
            (16, true) => bytes[n].cast_signed().into(),
            (_, false) => u16::from_le_bytes([bytes[2 * n % 16], bytes[2 * n % 16 + 1]]).into(),
            (_, true) => i16::from_le_bytes([bytes[2 * n % 16], bytes[2 * n % 16 + 1]]).into(),
        };
        Self { elements: std::array::from_fn(element), length: control.elements() }
    }

    /// A text that ends before the first zero.
    fn terminated(vector: u128, control: Control) -> Self {
        let text = Self::new(vector, control);
        let end = text.elements[..text.length].iter().position(|element| *element == 0);
        Self { length: end.unwrap_or(text.length), ..text }
    }

    /// A text whose length is the absolute value of a register.
    fn counted(m: &Machine, vector: u128, register: usize, is_wide: bool, control: Control) -> Self {
        let text = Self::new(vector, control);
        let size = if is_wide { 8 } else { 4 };
        let length = super::flags::sign_extend(m.general(register, size), size).unsigned_abs();
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        Self { length: length.min(text.length), ..text }
    }
}

/// One bit for each element of the second text, by the aggregation.
fn compare([a, b]: &[Text; 2], control: Control) -> u32 {
    let (first, second) = (&a.elements[..a.length], &b.elements[..b.length]);
    let holds = |j: usize| match control.0 >> 2 & 3 {
        0 => second.get(j).is_some_and(|element| first.contains(element)),
        1 => second
            .get(j)
            .is_some_and(|element| first.chunks_exact(2).any(|range| range[0] <= *element && *element <= range[1])),
        2 => first.get(j) == second.get(j),
        _ => (0..control.elements() - j).all(|i| match (first.get(i), second.get(j + i)) {
            (None, _) => true,
            (Some(a), b) => b == Some(a),
        }),
    };
    (0..control.elements()).filter(|j| holds(*j)).fold(0, |bits, j| bits | 1 << j)
}
