//! The functions of one unit of debug information, and what was inlined into them.

use std::ops::Range;

use gimli::{AttributeValue, Dwarf, EntriesRaw, Reader as _, UnitOffset, UnitSectionOffset, constants};

use super::dwarf::{DebugInfo, Slice, SourceFunction, SourceLine, Unit};
use super::lines::file_name;
use super::symbols;

/// Address ranges of one unit's functions, or looked at for one question.
const MAX_RANGES: usize = 1 << 20;
/// Entries that are looked at to find what was inlined at an address.
const MAX_ENTRIES: usize = 1 << 22;
/// How often an entry may refer to another one for its name.
const MAX_REFERENCES: usize = 16;
/// How deep inlining goes.
const MAX_DEPTH: usize = 256;
/// The longest name that is taken.
const MAX_NAME: usize = 4096;

/// The functions of a unit by address.
#[derive(Debug)]
pub(super) struct Functions {
    /// Begin and end of a part of a function, and the function.
    ranges: Vec<(u64, u64, Function)>,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Function {
    entry: UnitOffset<usize>,
    start: u64,
}

/// The attributes of an entry that this file is about.
#[derive(Default)]
struct Attributes<'a> {
    low: Option<u64>,
    high: Option<AttributeValue<Slice<'a>>>,
    ranges: Option<AttributeValue<Slice<'a>>>,
    /// Where the names are; what is not shown is not looked for.
    name: Option<AttributeValue<Slice<'a>>>,
    linkage_name: Option<AttributeValue<Slice<'a>>>,
    origin: Option<AttributeValue<Slice<'a>>>,
    call_file: Option<u64>,
    call_line: u32,
}

impl<'a> Attributes<'a> {
    fn read(
        dwarf: &Dwarf<Slice<'a>>,
        unit: &Unit<'a>,
        entries: &mut EntriesRaw<'_, Slice<'a>>,
        abbreviation: &gimli::Abbreviation,
    ) -> Option<Self> {
        let mut found = Self::default();
        for specification in abbreviation.attributes() {
            let attribute = entries.read_attribute(*specification).ok()?;
            let value = attribute.value();
            match attribute.name() {
                constants::DW_AT_low_pc => found.low = dwarf.attr_address(unit, value).ok().flatten(),
                constants::DW_AT_high_pc => found.high = Some(value),
                constants::DW_AT_ranges => found.ranges = Some(value),
                constants::DW_AT_name => found.name = Some(value),
                constants::DW_AT_linkage_name => found.linkage_name = Some(value),
                constants::DW_AT_abstract_origin | constants::DW_AT_specification => found.origin = Some(value),
                constants::DW_AT_call_file => {
                    if let AttributeValue::FileIndex(index) = value {
                        found.call_file = Some(index);
                    }
                }
                constants::DW_AT_call_line => {
                    found.call_line = attribute.udata_value().and_then(|line| u32::try_from(line).ok()).unwrap_or(0);
                }
                _ => {}
            }
        }
        Some(found)
    }

    /// The entry's addresses, at most `budget` ranges, which it counts down.
    fn ranges(&self, dwarf: &Dwarf<Slice<'a>>, unit: &Unit<'a>, budget: &mut usize) -> Vec<Range<u64>> {
        let mut found = Vec::new();
        if let Some(value) = self.ranges {
            let Ok(Some(mut ranges)) = dwarf.attr_ranges(unit, value) else { return found };
            while let (Some(left), Ok(Some(range))) = (budget.checked_sub(1), ranges.next()) {
                *budget = left;
                found.push(range.begin..range.end);
            }
        } else if let (Some(low), Some(high)) = (self.low, self.high) {
            let end = match high.udata_value() {
                Some(size) => low.checked_add(size),
                None => dwarf.attr_address(unit, high).ok().flatten(),
            };
            *budget = budget.saturating_sub(1);
            found.extend(end.map(|end| low..end));
        }
        found.retain(|range| range.start < range.end && range.start != 0);
        found
    }
}

impl Functions {
    /// How many ranges there are.
    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    pub fn parse(dwarf: &Dwarf<Slice<'_>>, unit: &Unit<'_>) -> Option<Self> {
        let mut budget = MAX_RANGES;
        let mut functions = Self { ranges: Vec::new() };
        let mut entries = unit.entries_raw(None).ok()?;
        while !entries.is_empty() && budget > 0 {
            let entry = entries.next_offset();
            let Ok(abbreviation) = entries.read_abbreviation() else { break };
            let Some(abbreviation) = abbreviation else { continue };
            if abbreviation.tag() != constants::DW_TAG_subprogram {
                if entries.skip_attributes(abbreviation.attributes()).is_err() {
                    break;
                }
                continue;
            }
            let Some(attributes) = Attributes::read(dwarf, unit, &mut entries, abbreviation) else { break };
            let ranges = attributes.ranges(dwarf, unit, &mut budget);
            let Some(start) = attributes.low.or_else(|| ranges.first().map(|range| range.start)) else { continue };
            let function = Function { entry, start };
            functions.ranges.extend(ranges.into_iter().map(|range| (range.start, range.end, function)));
        }
        functions.ranges.sort_unstable_by_key(|(begin, end, _)| (*begin, *end));
        Some(functions)
    }

    /// The function that an address lies in.
    pub fn find(&self, address: u64) -> Option<Function> {
        let after = self.ranges.partition_point(|(begin, ..)| *begin <= address);
        // The nearest that reaches so far; functions do not nest deeply.
        let near = self.ranges[..after].iter().rev().take(MAX_DEPTH);
        near.into_iter().find(|(_, end, _)| address < *end).map(|(.., function)| *function)
    }

    /// Where the function that an address lies in begins.
    pub fn start(&self, address: u64) -> Option<u64> {
        self.find(address).map(|function| function.start)
    }
}

/// The function and what of it was inlined at an address, the innermost first.
pub(super) fn at<'a>(
    info: &DebugInfo,
    dwarf: &Dwarf<Slice<'a>>,
    unit: &Unit<'a>,
    function: Function,
    address: u64,
) -> Option<Vec<SourceFunction>> {
    let (mut entry_budget, mut budget) = (MAX_ENTRIES, MAX_RANGES);
    let mut entries = unit.entries_raw(Some(function.entry)).ok()?;
    let abbreviation = entries.read_abbreviation().ok()??;
    let attributes = Attributes::read(dwarf, unit, &mut entries, abbreviation)?;
    let mut found = vec![SourceFunction { name: name(info, dwarf, unit, attributes), call: None }];
    // Entries at this depth or less are no part of the innermost function that was found.
    let mut depth = 0;
    while !entries.is_empty() && entries.next_depth() > 0 && entry_budget > 0 && found.len() < MAX_DEPTH {
        entry_budget -= 1;
        let next = entries.next_depth();
        let Ok(abbreviation) = entries.read_abbreviation() else { break };
        let Some(abbreviation) = abbreviation else { continue };
        if next <= depth {
            break;
        }
        if abbreviation.tag() != constants::DW_TAG_inlined_subroutine {
            if entries.skip_attributes(abbreviation.attributes()).is_err() {
                break;
            }
            continue;
        }
        let Some(attributes) = Attributes::read(dwarf, unit, &mut entries, abbreviation) else { break };
        if attributes.ranges(dwarf, unit, &mut budget).iter().any(|range| range.contains(&address)) {
            depth = next;
            let file = attributes.call_file.and_then(|index| file_name(dwarf, unit, index));
            let call = file.map(|file| SourceLine { file, line: attributes.call_line });
            found.push(SourceFunction { name: name(info, dwarf, unit, attributes), call });
        }
    }
    found.reverse();
    Some(found)
}

fn name<'a>(
    info: &DebugInfo,
    dwarf: &Dwarf<Slice<'a>>,
    unit: &Unit<'a>,
    mut attributes: Attributes<'a>,
) -> Option<String> {
    let mut other: Option<Unit<'a>> = None;
    for _ in 0..MAX_REFERENCES {
        let unit_of_name = other.as_ref().unwrap_or(unit);
        let text = |value| dwarf.attr_string(unit_of_name, value).ok();
        if let Some(raw) = attributes.linkage_name.and_then(text).or_else(|| attributes.name.and_then(text)) {
            let bytes = raw.to_slice().ok()?;
            return Some(symbols::demangle(&String::from_utf8_lossy(&bytes[..bytes.len().min(MAX_NAME)])));
        }
        let offset = match attributes.origin? {
            AttributeValue::UnitRef(offset) => offset,
            AttributeValue::DebugInfoRef(offset) => {
                other = Some(info.unit_at(dwarf, offset.0)?);
                let unit = other.as_ref().expect("just set");
                UnitSectionOffset(offset.0).to_unit_offset(unit)?
            }
            _ => return None,
        };
        let unit = other.as_ref().unwrap_or(unit);
        let mut entries = unit.entries_raw(Some(offset)).ok()?;
        let abbreviation = entries.read_abbreviation().ok()??;
        attributes = Attributes::read(dwarf, unit, &mut entries, abbreviation)?;
    }
    None
}
