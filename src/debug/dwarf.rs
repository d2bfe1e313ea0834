//! The debug information of an image (DWARF 2 to 5), opened when somebody asks. It is read with gimli alone: what an
//! image says about itself is not trusted, so that every walk here and in [`super::lines`], [`super::functions`] and
//! [`super::unwind`] is a loop with a bound, and what does not fit is left out. Addresses are the image's own, without its load bias.

use std::collections::HashMap;
use std::io::Read as _;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use gimli::{DebugInfoOffset, Dwarf, DwarfSections, EndianSlice, LittleEndian, SectionId};
use object::Endianness;
use object::ReadRef as _;
use object::elf::{ELFCOMPRESS_ZLIB, FileHeader64, SHF_COMPRESSED, SectionHeader64};
use object::read::elf::{CompressionHeader as _, FileHeader as _, SectionHeader as _};

use super::functions::Functions;
use super::lines::Lines;
use super::unwind::FrameTable;

pub(super) type Slice<'a> = EndianSlice<'a, LittleEndian>;
pub(super) type Unit<'a> = gimli::Unit<Slice<'a>>;

/// How long a walk over all units of an image may take; what is not come to by then is not found.
const LISTING: Duration = Duration::from_secs(3);
/// Address ranges of all units together.
const MAX_RANGES: usize = 1 << 20;
/// Units that an address is looked for in: it lies in one, or in few that share its code.
const NEAR: usize = 4;
/// Rows of lines, or ranges of functions, that are kept.
const MAX_KEPT: usize = 1 << 24;

/// What compressed sections may hold together, unpacked; what is more is left out.
const MAX_UNPACKED: u64 = 1 << 28;

/// A section of the file: its bytes, and its address.
#[derive(Debug, Clone, Default)]
pub(super) struct Section {
    bytes: Bytes,
    address: u64,
}

#[derive(Debug, Clone)]
enum Bytes {
    Image(Range<usize>),
    Unpacked(Arc<[u8]>),
}

impl Default for Bytes {
    fn default() -> Self {
        Self::Image(0..0)
    }
}

impl Section {
    fn bytes<'a>(&'a self, image: &'a [u8]) -> &'a [u8] {
        match &self.bytes {
            Bytes::Image(range) => image.get(range.clone()).unwrap_or_default(),
            Bytes::Unpacked(bytes) => bytes,
        }
    }
}

/// Where code comes from in the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceLine {
    /// The file as the compiler wrote it, with its directories.
    pub file: String,
    /// The line, from 1; 0 for code without one.
    pub line: u32,
}

/// A function that an address lies in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceFunction {
    /// Its name, demangled.
    pub name: Option<String>,
    /// Where its body was inlined: the place of the call.
    pub call: Option<SourceLine>,
}

/// The units and their ranges.
pub(super) struct Units {
    /// Where they begin in `.debug_info`.
    offsets: Vec<usize>,
    /// Begin and end of addresses, and the index of the unit.
    ranges: Vec<(u64, u64, usize)>,
}

/// The debug information of one image.
pub struct DebugInfo {
    image: Arc<[u8]>,
    sections: OnceLock<HashMap<&'static str, Section>>,
    dwarf: OnceLock<DwarfSections<Section>>,
    units: OnceLock<Units>,
    /// By the line program's offset, which units may share.
    lines: Mutex<Tables<Lines>>,
    /// By the unit's index.
    functions: Mutex<Tables<Functions>>,
    frames: OnceLock<FrameTable>,
}

/// The sections that are looked for.
const SECTIONS: [&str; 13] = [
    ".debug_abbrev",
    ".debug_addr",
    ".debug_info",
    ".debug_line",
    ".debug_line_str",
    ".debug_str",
    ".debug_str_offsets",
    ".debug_ranges",
    ".debug_rnglists",
    ".debug_frame",
    ".eh_frame",
    ".text",
    ".got",
];

impl DebugInfo {
    /// The debug information in an ELF image. Costs nothing yet; an image without any, or a broken one, has none.
    pub fn new(kernel: &Arc<[u8]>) -> Self {
        Self {
            image: Arc::clone(kernel),
            sections: OnceLock::new(),
            dwarf: OnceLock::new(),
            units: OnceLock::new(),
            lines: Mutex::default(),
            functions: Mutex::default(),
            frames: OnceLock::new(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.units().offsets.is_empty()
    }

    /// The source line of an address.
    pub fn line(&self, address: u64) -> Option<SourceLine> {
        self.candidates(address).find_map(|index| {
            let dwarf = self.dwarf();
            let unit = self.unit(&dwarf, index)?;
            let (file, line) = self.lines_of(&unit)?.find(address)?;
            Some(SourceLine { file: super::lines::file_name(&dwarf, &unit, file)?, line })
        })
    }

    /// The functions that an address lies in, the innermost inlined one first.
    pub fn functions(&self, address: u64) -> Vec<SourceFunction> {
        let found = self.candidates(address).find_map(|index| {
            let dwarf = self.dwarf();
            let unit = self.unit(&dwarf, index)?;
            let functions = self.functions_of(index, &dwarf, &unit)?;
            super::functions::at(self, &dwarf, &unit, functions.find(address)?, address)
        });
        found.unwrap_or_default()
    }

    /// Where a line is entered, by address. `file` is a path's last components. If the line has no code, those of the
    /// next line that has, with its number.
    pub fn addresses(&self, file: &str, line: u32) -> (u32, Vec<u64>) {
        let dwarf = self.dwarf();
        let mut found: Vec<(u32, u64)> = Vec::new();
        let units = self.units().offsets.len();
        let deadline = Instant::now() + LISTING;
        for index in 0..units {
            if Instant::now() > deadline {
                warn_of_size();
                break;
            }
            let Some(unit) = self.unit(&dwarf, index) else { continue };
            let files = super::lines::files_named(&dwarf, &unit, file, deadline);
            if !files.is_empty()
                && let Some(lines) = self.lines_of(&unit)
            {
                found.extend(lines.statements(&files, line));
            }
        }
        found.sort_unstable();
        found.dedup();
        let Some(best) = found.first().map(|(line, _)| *line) else { return (line, Vec::new()) };
        (best, found.into_iter().take_while(|(line, _)| *line == best).map(|(_, address)| address).collect())
    }

    /// The addresses of the line that an address belongs to, around it; for a step by lines.
    pub fn line_range(&self, address: u64) -> Option<Range<u64>> {
        self.candidates(address).find_map(|index| {
            let dwarf = self.dwarf();
            let unit = self.unit(&dwarf, index)?;
            self.lines_of(&unit)?.range(address)
        })
    }

    /// Where the function that an address lies in begins.
    pub fn function_start(&self, address: u64) -> Option<u64> {
        self.candidates(address).find_map(|index| {
            let dwarf = self.dwarf();
            let unit = self.unit(&dwarf, index)?;
            self.functions_of(index, &dwarf, &unit)?.start(address)
        })
    }

    /// The unwind information.
    pub(super) fn frames(&self) -> &FrameTable {
        self.frames.get_or_init(|| FrameTable::new(self))
    }

    /// A section's bytes and its address; empty if there is none.
    pub(super) fn section(&self, name: &str) -> (&[u8], u64) {
        self.sections().get(name).map_or((&[], 0), |section| (section.bytes(&self.image), section.address))
    }

    fn sections(&self) -> &HashMap<&'static str, Section> {
        self.sections.get_or_init(|| parse_sections(&self.image).unwrap_or_default())
    }

    pub(super) fn dwarf(&self) -> Dwarf<Slice<'_>> {
        let load = |id: SectionId| {
            Ok::<_, std::convert::Infallible>(self.sections().get(id.name()).cloned().unwrap_or_default())
        };
        let sections = self.dwarf.get_or_init(|| match DwarfSections::load(load) {
            Ok(sections) => sections,
            Err(never) => match never {},
        });
        sections.borrow(|section| EndianSlice::new(section.bytes(&self.image), LittleEndian))
    }

    fn units(&self) -> &Units {
        self.units.get_or_init(|| list_units(&self.dwarf()))
    }

    pub(super) fn unit<'a>(&self, dwarf: &Dwarf<Slice<'a>>, index: usize) -> Option<Unit<'a>> {
        let offset = DebugInfoOffset(*self.units().offsets.get(index)?);
        dwarf.unit(dwarf.debug_info.header_from_offset(offset).ok()?).ok()
    }

    /// The unit that an offset of `.debug_info` lies in.
    pub(super) fn unit_at<'a>(&self, dwarf: &Dwarf<Slice<'a>>, offset: usize) -> Option<Unit<'a>> {
        let after = self.units().offsets.partition_point(|start| *start <= offset);
        self.unit(dwarf, after.checked_sub(1)?)
    }

    fn candidates(&self, address: u64) -> impl Iterator<Item = usize> + '_ {
        let mut last = None;
        let contains = move |(begin, end, _): &&(u64, u64, usize)| (*begin..*end).contains(&address);
        let indices = self.units().ranges.iter().filter(contains).map(|(_, _, index)| *index);
        // The ranges of a unit stand together.
        indices.filter(move |index| last.replace(*index) != Some(*index)).take(NEAR)
    }

    fn lines_of(&self, unit: &Unit<'_>) -> Option<Arc<Lines>> {
        let offset = unit.line_program.as_ref()?.header().offset().0;
        keep(&self.lines, offset, Lines::len, || Lines::parse(unit))
    }

    fn functions_of(&self, index: usize, dwarf: &Dwarf<Slice<'_>>, unit: &Unit<'_>) -> Option<Arc<Functions>> {
        keep(&self.functions, index, Functions::len, || Functions::parse(dwarf, unit))
    }
}

/// Tables that were made, and how long they are together.
struct Tables<T> {
    known: HashMap<usize, Arc<T>>,
    length: usize,
}

impl<T> Default for Tables<T> {
    fn default() -> Self {
        Self { known: HashMap::new(), length: 0 }
    }
}

/// A table, made once.
fn keep<T>(
    tables: &Mutex<Tables<T>>,
    key: usize,
    length: impl Fn(&T) -> usize,
    make: impl FnOnce() -> Option<T>,
) -> Option<Arc<T>> {
    let lock = || tables.lock().unwrap_or_else(|e| e.into_inner());
    if let Some(known) = lock().known.get(&key) {
        return Some(known.clone());
    }
    let made = Arc::new(make()?);
    // An empty one takes room, too.
    let length = length(&made) + 1;
    let mut tables = lock();
    if tables.length + length > MAX_KEPT {
        *tables = Tables::default();
    }
    tables.length += length;
    tables.known.insert(key, made.clone());
    Some(made)
}

fn warn_of_size() {
    log::warn!("the image's debug information is too large to be listed; parts of it are not used");
}

fn list_units(dwarf: &Dwarf<Slice<'_>>) -> Units {
    let mut units = Units { offsets: Vec::new(), ranges: Vec::new() };
    let deadline = Instant::now() + LISTING;
    let mut headers = dwarf.units();
    while let Ok(Some(header)) = headers.next() {
        if Instant::now() > deadline || units.ranges.len() >= MAX_RANGES {
            warn_of_size();
            break;
        }
        let index = units.offsets.len();
        let Some(offset) = header.debug_info_offset() else { break };
        if let Ok(unit) = dwarf.unit(header)
            && let Ok(mut ranges) = dwarf.unit_ranges(&unit)
        {
            while let Ok(Some(range)) = ranges.next() {
                // What the linker has dropped is left at 0.
                if range.begin < range.end && range.begin != 0 && units.ranges.len() < MAX_RANGES {
                    units.ranges.push((range.begin, range.end, index));
                }
            }
        }
        units.offsets.push(offset.0);
    }
    units
}

fn parse_sections(image: &[u8]) -> Option<HashMap<&'static str, Section>> {
    let header = FileHeader64::<Endianness>::parse(image).ok()?;
    let endian = header.endian().ok()?;
    let sections = header.sections(endian, image).ok()?;
    let mut found = HashMap::new();
    let mut left = MAX_UNPACKED;
    for section in sections.iter() {
        let Ok(name) = sections.section_name(endian, section) else { continue };
        let Some(known) = SECTIONS.iter().find(|known| known.as_bytes() == name) else { continue };
        let bytes = if section.sh_flags(endian).contains(SHF_COMPRESSED) {
            unpacked(image, endian, section, &mut left)
        } else {
            stored(image, endian, section)
        };
        if let Some(bytes) = bytes {
            found.entry(*known).or_insert(Section { bytes, address: section.sh_addr(endian) });
        }
    }
    Some(found)
}

fn stored(image: &[u8], endian: Endianness, section: &SectionHeader64<Endianness>) -> Option<Bytes> {
    // One without bytes in the file has no range.
    let (offset, size) = section.file_range(endian)?;
    let (offset, size) = (usize::try_from(offset).ok()?, usize::try_from(size).ok()?);
    let end = offset.checked_add(size).filter(|end| *end <= image.len())?;
    Some(Bytes::Image(offset..end))
}

/// A section that the linker has compressed by zlib, and that fits into what is `left`.
fn unpacked(image: &[u8], endian: Endianness, section: &SectionHeader64<Endianness>, left: &mut u64) -> Option<Bytes> {
    let (header, offset, size) = section.compression(endian, image).ok()??;
    if header.ch_type(endian) != ELFCOMPRESS_ZLIB {
        log::warn!("the image's debug information is compressed by another method than zlib and is not used");
        return None;
    }
    let whole = header.ch_size(endian);
    *left = left.checked_sub(whole)?;
    let mut bytes = Vec::new();
    let packed = image.read_bytes_at(offset, size).ok()?;
    flate2::read::ZlibDecoder::new(packed).take(whole).read_to_end(&mut bytes).ok()?;
    Some(Bytes::Unpacked(bytes.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The test program itself: tens of megabytes of debug information of Rust code.
    fn own() -> DebugInfo {
        let image: Arc<[u8]> = std::fs::read("/proc/self/exe").unwrap().into();
        DebugInfo::new(&image)
    }

    /// What the kernel has added to the addresses of the program's file.
    fn bias() -> u64 {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let path = std::fs::read_link("/proc/self/exe").unwrap();
        let first = maps.lines().find(|line| line.ends_with(path.to_str().unwrap())).unwrap();
        u64::from_str_radix(first.split('-').next().unwrap(), 16).unwrap()
    }

    const LANDMARK: u32 = line!();
    #[inline(never)]
    fn landmark() -> u32 {
        std::process::id()
    }

    #[test]
    fn test_own_function_is_found_with_its_line_in_time_even_in_a_large_program() {
        let info = own();
        let address = (landmark as fn() -> u32 as usize as u64).wrapping_sub(bias());
        let started = Instant::now();
        let line = info.line(address).unwrap();
        assert!(line.file.ends_with("src/debug/dwarf.rs"), "{line:?}");
        assert!(line.line - LANDMARK <= 4, "{line:?}");
        let functions = info.functions(address);
        assert!(functions.last().unwrap().name.as_ref().unwrap().ends_with("tests::landmark"), "{functions:?}");
        let (_, addresses) = info.addresses("debug/dwarf.rs", line.line);
        assert!(addresses.contains(&address), "{addresses:x?} {address:x}");
        assert_eq!(info.function_start(address + 1), Some(address));
        assert!(info.line_range(address).unwrap().contains(&address));
        assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
    }

    #[test]
    fn test_file_that_is_no_image_has_no_debug_information() {
        let info = DebugInfo::new(&Arc::from(b"no image".as_slice()));
        assert!(info.is_empty() && info.line(0x1000).is_none() && info.functions(0x1000).is_empty());
        assert_eq!(info.addresses("file.c", 1), (1, Vec::new()));
    }
}
