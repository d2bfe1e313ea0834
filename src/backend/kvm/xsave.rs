//! The XSAVE area that KVM gives of a vCPU. It has the standard format, whatever format the guest's own XSAVE instructions
//! write: the legacy area, a header, and each further state component where CPUID leaf 0xD says (Intel SDM 1, 13.4). A
//! component whose bit in XSTATE_BV is clear is in its initial state, which is zero, and its bytes mean nothing.

use kvm_bindings::kvm_cpuid_entry2;

use crate::registers::{ExtendedState, Extensions};

const CPUID_XSAVE: u32 = 0xd;
/// Words of the area that `kvm_xsave` has.
pub(super) const WORDS: usize = 1024;
/// The word of XSTATE_BV's low half.
pub(super) const XSTATE_BV: usize = 512 / 4;
pub(super) const XSTATE_X87_SSE: u32 = 3;

/// A state component by its number in XCR0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Component {
    Avx = 2,
    Opmask = 5,
    ZmmHigh256 = 6,
    HighZmm = 7,
    Pkru = 9,
}

impl Component {
    const ALL: [Self; 5] = [Self::Avx, Self::Opmask, Self::ZmmHigh256, Self::HighZmm, Self::Pkru];

    fn bit(self) -> u32 {
        1 << self as u32
    }

    /// Bytes that its registers take.
    fn size(self) -> usize {
        match self {
            Self::Avx => 256,
            Self::Opmask => 64,
            Self::ZmmHigh256 => 512,
            Self::HighZmm => 1024,
            Self::Pkru => 4,
        }
    }
}

/// Where the components are, as words of the area.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Layout {
    places: [Option<usize>; 10],
}

impl Layout {
    /// The layout that CPUID leaf 0xD describes; a component that XCR0 can't enable, or that lies outside of the area, is
    /// not there.
    pub(super) fn new(cpuid: &[kvm_cpuid_entry2]) -> Self {
        let leaf = |index: u32| cpuid.iter().find(|e| e.function == CPUID_XSAVE && e.index == index);
        let permitted = leaf(0).map_or(0, |entry| entry.eax);
        let mut layout = Self::default();
        for component in Component::ALL.into_iter().filter(|c| permitted & c.bit() != 0) {
            let Some(entry) = leaf(component as u32) else { continue };
            let (offset, size) = (entry.ebx as usize, entry.eax as usize);
            let is_inside = offset.checked_add(component.size()).is_some_and(|end| end <= WORDS * 4);
            if size >= component.size() && offset % 4 == 0 && is_inside {
                layout.places[component as usize] = Some(offset / 4);
            }
        }
        layout
    }

    pub(super) fn extensions(&self) -> Extensions {
        let has = |component: Component| self.places[component as usize].is_some();
        let avx = has(Component::Avx);
        let avx512 = avx && [Component::Opmask, Component::ZmmHigh256, Component::HighZmm].into_iter().all(has);
        Extensions { avx, avx512, pkru: has(Component::Pkru) }
    }

    /// The words of a component that is there and not in its initial state.
    fn live<'a>(&self, area: &'a [u32; WORDS], component: Component) -> Option<&'a [u32]> {
        let place = self.places[component as usize]?;
        let is_live = area[XSTATE_BV] & component.bit() != 0;
        is_live.then(|| &area[place..place + component.size() / 4])
    }

    /// Writes a component, if it is there.
    fn put(&self, area: &mut [u32; WORDS], component: Component, values: impl Iterator<Item = u32>) {
        let Some(place) = self.places[component as usize] else { return };
        for (word, value) in area[place..place + component.size() / 4].iter_mut().zip(values) {
            *word = value;
        }
        area[XSTATE_BV] |= component.bit();
    }

    /// Bits 128 to 255 of YMM0 to YMM15.
    pub(super) fn ymm_high(&self, area: &[u32; WORDS]) -> [u128; 16] {
        let mut high = [0; 16];
        fill(&mut high, self.live(area, Component::Avx));
        high
    }

    pub(super) fn put_ymm_high(&self, high: &[u128; 16], area: &mut [u32; WORDS]) {
        self.put(area, Component::Avx, words(high));
    }

    pub(super) fn extended(&self, area: &[u32; WORDS]) -> ExtendedState {
        let mut state = ExtendedState::default();
        fill(state.zmm_high.as_flattened_mut(), self.live(area, Component::ZmmHigh256));
        fill(state.zmm_upper.as_flattened_mut(), self.live(area, Component::HighZmm));
        for (mask, pair) in
            state.masks.iter_mut().zip(self.live(area, Component::Opmask).unwrap_or(&[]).chunks_exact(2))
        {
            *mask = u64::from(pair[0]) | u64::from(pair[1]) << 32;
        }
        state.pkru = self.live(area, Component::Pkru).map_or(0, |words| words[0]);
        state
    }

    /// Writes what differs from what is there.
    pub(super) fn put_extended(&self, state: &ExtendedState, area: &mut [u32; WORDS]) {
        let before = self.extended(area);
        if state.masks != before.masks {
            let halves =
                |mask: &u64| [*mask & 0xffff_ffff, *mask >> 32].map(|half| u32::try_from(half).expect("32 bits"));
            self.put(area, Component::Opmask, state.masks.iter().flat_map(halves));
        }
        if state.zmm_high != before.zmm_high {
            self.put(area, Component::ZmmHigh256, words(state.zmm_high.as_flattened()));
        }
        if state.zmm_upper != before.zmm_upper {
            self.put(area, Component::HighZmm, words(state.zmm_upper.as_flattened()));
        }
        if state.pkru != before.pkru {
            self.put(area, Component::Pkru, std::iter::once(state.pkru));
        }
    }
}

fn fill(registers: &mut [u128], words: Option<&[u32]>) {
    for (register, words) in registers.iter_mut().zip(words.unwrap_or(&[]).chunks_exact(4)) {
        *register = words.iter().rev().fold(0, |value, word| value << 32 | u128::from(*word));
    }
}

fn words(registers: &[u128]) -> impl Iterator<Item = u32> {
    let quarter = |value: u128, i: usize| u32::try_from(value >> (32 * i) & 0xffff_ffff).expect("32 bits");
    registers.iter().flat_map(move |value| (0..4).map(move |i| quarter(*value, i)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Leaf 0xD of a processor that places components as `offsets` says.
    fn cpuid(permitted: u32, offsets: &[(u32, u32, u32)]) -> Vec<kvm_cpuid_entry2> {
        let entry = |index, eax, ebx| kvm_cpuid_entry2 { function: CPUID_XSAVE, index, eax, ebx, ..Default::default() };
        let components = offsets.iter().map(|(index, size, offset)| entry(*index, *size, *offset));
        std::iter::once(entry(0, permitted, 0)).chain(components).collect()
    }

    const INTEL: [(u32, u32, u32); 5] = [(2, 256, 576), (5, 64, 1088), (6, 512, 1152), (7, 1024, 1664), (9, 8, 2688)];
    const AMD: [(u32, u32, u32); 5] = [(2, 256, 576), (5, 64, 832), (6, 512, 896), (7, 1024, 1408), (9, 8, 2432)];

    fn state() -> ExtendedState {
        let vector = |i: usize, n: u128| (n << 100) + i as u128 + 1;
        ExtendedState {
            masks: std::array::from_fn(|i| 0x1111_0000_0000 * (i as u64 + 1) + i as u64),
            zmm_high: std::array::from_fn(|i| [vector(i, 1), vector(i, 2)]),
            zmm_upper: std::array::from_fn(|i| [vector(i, 3), vector(i, 4), vector(i, 5), vector(i, 6)]),
            pkru: 0x5555_5554,
        }
    }

    #[test]
    fn test_extended_registers_lie_where_cpuid_says_on_each_vendors_processors() {
        for offsets in [INTEL, AMD] {
            let layout = Layout::new(&cpuid(0x2e7, &offsets));
            assert_eq!(layout.extensions(), Extensions { avx: true, avx512: true, pkru: true });
            let mut area = [0u32; WORDS];
            layout.put_extended(&state(), &mut area);
            layout.put_ymm_high(&[7 << 96 | 5; 16], &mut area);

            let at = |component: usize, byte: usize| area[(offsets[component].2 as usize + byte) / 4];
            assert_eq!(area[XSTATE_BV], 0x2e4);
            assert_eq!((at(0, 0), at(0, 12)), (5, 7), "YMM0's upper half");
            assert_eq!((at(1, 8), at(1, 12)), (1, 0x2222), "K1");
            assert_eq!((at(2, 32), at(2, 44)), (2, 1 << 4), "bits 256 to 383 of ZMM1");
            assert_eq!(at(2, 60), 2 << 4, "bits 384 to 511 of ZMM1");
            assert_eq!((at(3, 15 * 64), at(3, 15 * 64 + 60)), (16, 6 << 4), "ZMM31");
            assert_eq!(at(4, 0), 0x5555_5554);
            assert_eq!(layout.extended(&area), state());
            assert_eq!(layout.ymm_high(&area), [7 << 96 | 5; 16]);
        }
    }

    #[test]
    fn test_component_in_its_initial_state_reads_as_zero_whatever_its_bytes_are() {
        let layout = Layout::new(&cpuid(0x2e7, &INTEL));
        let mut area = [u32::MAX; WORDS];
        area[XSTATE_BV] = XSTATE_X87_SSE;
        assert_eq!(layout.extended(&area), ExtendedState::default());
        assert_eq!(layout.ymm_high(&area), [0; 16]);

        let mut masks = ExtendedState::default();
        masks.masks[3] = 1;
        layout.put_extended(&masks, &mut area);
        assert_eq!(area[XSTATE_BV], XSTATE_X87_SSE | 1 << 5);
        assert_eq!(layout.extended(&area), masks, "the other masks have become zero");
    }

    #[test]
    fn test_components_that_are_not_permitted_or_lie_outside_are_not_there() {
        let only_avx = Extensions { avx: true, ..Default::default() };
        assert_eq!(Layout::new(&[]).extensions(), Extensions::default());
        assert_eq!(Layout::new(&cpuid(7, &INTEL)).extensions(), only_avx);
        assert_eq!(Layout::new(&cpuid(0x67, &INTEL)).extensions(), only_avx, "without the upper 16 registers");
        for broken in [(7, 1024, 4096 - 1020), (7, 1023, 1664), (7, 1024, u32::MAX - 3), (7, 1024, 1666)] {
            let mut offsets = INTEL;
            offsets[3] = broken;
            let layout = Layout::new(&cpuid(0x2e7, &offsets));
            assert_eq!(layout.extensions(), Extensions { avx: true, avx512: false, pkru: true }, "{broken:?}");
            let mut area = [0u32; WORDS];
            layout.put_extended(&state(), &mut area);
            assert_eq!(layout.extended(&area).zmm_upper, [[0; 4]; 16]);
        }
    }
}
