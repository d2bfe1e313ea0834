//! The symbols in an ELF file, as ranges of its bytes. The file is not trusted: what does not fit is left out, names
//! have a greatest length, and all names together are bounded by the string table's size, so that overlapping names
//! can't make a small file expensive.

use std::borrow::Cow;
use std::ops::Range;

use object::elf::{FileHeader64, SHN_ABS, SHN_COMMON, SHN_UNDEF, SHT_DYNSYM, SHT_SYMTAB, STB_GLOBAL, STB_WEAK, Sym64};
use object::elf::{STT_FUNC, STT_GNU_IFUNC, STT_NOTYPE, STT_OBJECT};
use object::read::elf::{FileHeader as _, SectionHeader as _, SectionTable, Sym as _};
use object::{Endianness, ReadRef as _};

use super::SymbolKind;

/// The longest name that is taken.
const MAX_NAME: usize = 4096;

/// Linkers share the tails of names; more than this much sharing is no linker's work.
const MAX_SHARING: usize = 4;

/// One symbol. Its name stays in the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    name: Range<usize>,
    pub(super) address: u64,
    pub(super) size: u64,
    /// Where it ends, exclusive; for one without a size, where the next begins.
    pub(super) end: u64,
    pub(super) kind: SymbolKind,
    pub(super) global: bool,
    weak: bool,
}

impl Entry {
    pub(super) fn raw_bytes<'a>(&self, image: &'a [u8]) -> &'a [u8] {
        &image[self.name.clone()]
    }

    pub(super) fn raw<'a>(&self, image: &'a [u8]) -> Cow<'a, str> {
        String::from_utf8_lossy(self.raw_bytes(image))
    }

    /// The better name of an address sorts first: what is typed, sized, global and strong; then the shorter.
    fn rank(&self, image: &[u8]) -> impl Ord + use<> {
        (self.kind, self.size == 0, !self.global, self.weak, self.name.len(), self.raw_bytes(image).to_vec())
    }
}

/// The symbols of `.symtab` and `.dynsym` by address, the best name of an address first; none if the file is broken.
pub(super) fn entries(image: &[u8], bias: u64) -> Vec<Entry> {
    let mut entries = parse(image, bias).unwrap_or_default();
    entries.sort_by_cached_key(|entry| (entry.address, entry.rank(image)));
    entries.dedup_by(|b, a| (a.address, a.raw_bytes(image)) == (b.address, b.raw_bytes(image)));
    let mut next = u64::MAX;
    for index in (0..entries.len()).rev() {
        let following = entries.get(index + 1).map_or(u64::MAX, |entry| entry.address);
        if following != entries[index].address {
            next = following;
        }
        if entries[index].size == 0 {
            entries[index].end = entries[index].end.min(next);
        }
    }
    entries
}

fn parse(image: &[u8], bias: u64) -> Option<Vec<Entry>> {
    let header = FileHeader64::<Endianness>::parse(image).ok()?;
    let endian = header.endian().ok()?;
    let sections = header.sections(endian, image).ok()?;
    let mut entries = Vec::new();
    for kind in [SHT_SYMTAB, SHT_DYNSYM] {
        let Some(section) = sections.iter().find(|section| section.sh_type(endian) == kind) else { continue };
        let Ok(symbols) = section.data_as_array::<Sym64<Endianness>, _>(endian, image) else { continue };
        let Some(strings) = sections.section(section.link(endian)).ok().and_then(|strings| strings.file_range(endian))
        else {
            continue;
        };
        read(image, endian, &sections, symbols, strings, bias, &mut entries);
    }
    Some(entries)
}

fn read(
    image: &[u8],
    endian: Endianness,
    sections: &SectionTable<'_, FileHeader64<Endianness>>,
    symbols: &[Sym64<Endianness>],
    (start, size): (u64, u64),
    bias: u64,
    entries: &mut Vec<Entry>,
) {
    let (Ok(start), Ok(strings)) = (usize::try_from(start), image.read_bytes_at(start, size)) else { return };
    let mut budget = strings.len().saturating_mul(MAX_SHARING);
    for symbol in symbols {
        let Some(kind) = kind(symbol) else { continue };
        let place = symbol.st_shndx(endian);
        if place == SHN_UNDEF || place == SHN_ABS || place == SHN_COMMON {
            continue;
        }
        let Some(name) = name(strings, symbol.st_name(endian)) else { continue };
        let Some(left) = budget.checked_sub(name.len()) else { return };
        budget = left;
        let address = symbol.st_value(endian).wrapping_add(bias);
        let size = symbol.st_size(endian);
        let section_end = || {
            let section = sections.section(object::SectionIndex(usize::from(place.index()?))).ok()?;
            Some(section.sh_addr(endian).checked_add(section.sh_size(endian))?.wrapping_add(bias))
        };
        let end = if size == 0 { section_end().unwrap_or(address) } else { address.saturating_add(size) };
        let (global, weak) =
            (symbol.st_bind() == STB_GLOBAL || symbol.st_bind() == STB_WEAK, symbol.st_bind() == STB_WEAK);
        entries.push(Entry { name: start + name.start..start + name.end, address, size, end, kind, global, weak });
    }
}

fn kind(symbol: &Sym64<Endianness>) -> Option<SymbolKind> {
    match symbol.st_type() {
        STT_FUNC | STT_GNU_IFUNC => Some(SymbolKind::Function),
        STT_OBJECT => Some(SymbolKind::Data),
        STT_NOTYPE => Some(SymbolKind::Label),
        // Sections and files are no places, and a thread-local symbol's value is an offset into each thread's block.
        _ => None,
    }
}

fn name(strings: &[u8], offset: u32) -> Option<Range<usize>> {
    let start = usize::try_from(offset).ok()?;
    let rest = strings.get(start..)?;
    let length = rest.iter().take(MAX_NAME + 1).position(|byte| *byte == 0)?;
    (length > 0).then_some(start..start + length)
}
