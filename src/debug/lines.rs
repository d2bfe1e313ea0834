//! The line table of one unit of debug information: from an address to a line, and from a line to its statements.

use std::ops::Range;
use std::time::Instant;

use gimli::{AttributeValue, Dwarf, Reader as _};

use super::dwarf::{Slice, Unit};

/// Rows of one unit.
const MAX_ROWS: usize = 1 << 22;
/// Files of one unit.
const MAX_FILES: u64 = 1 << 16;
/// The longest path that is shown.
const MAX_PATH: usize = 4096;

#[derive(Debug, Clone, Copy)]
struct Row {
    address: u64,
    file: u32,
    line: u32,
    is_statement: bool,
}

/// Rows whose addresses rise.
#[derive(Debug)]
struct Sequence {
    end: u64,
    rows: Range<usize>,
}

/// The rows of a unit.
#[derive(Debug)]
pub(super) struct Lines {
    rows: Vec<Row>,
    sequences: Vec<Sequence>,
}

impl Lines {
    /// How many rows there are.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    pub fn parse(unit: &Unit<'_>) -> Option<Self> {
        let mut rows = unit.line_program.clone()?.rows();
        let mut lines = Self { rows: Vec::new(), sequences: Vec::new() };
        let mut begin = 0;
        while let Ok(Some((_, row))) = rows.next_row() {
            if row.end_sequence() {
                let end = row.address();
                let is_sound = lines.rows[begin..].is_sorted_by_key(|row| row.address)
                    && lines.rows.get(begin).is_some_and(|first| first.address < end && first.address != 0);
                if is_sound {
                    lines.sequences.push(Sequence { end, rows: begin..lines.rows.len() });
                } else {
                    lines.rows.truncate(begin);
                }
                begin = lines.rows.len();
                continue;
            }
            if lines.rows.len() >= MAX_ROWS {
                break;
            }
            lines.rows.push(Row {
                address: row.address(),
                file: u32::try_from(row.file_index()).unwrap_or(u32::MAX),
                line: row.line().map_or(0, |line| u32::try_from(line.get()).unwrap_or(0)),
                is_statement: row.is_stmt(),
            });
        }
        lines.rows.truncate(begin);
        lines.sequences.sort_unstable_by_key(|sequence| lines.rows[sequence.rows.start].address);
        Some(lines)
    }

    /// The row that covers an address, by its index, and its sequence.
    fn row(&self, address: u64) -> Option<(usize, &Sequence)> {
        let after = self.sequences.partition_point(|s| self.rows[s.rows.start].address <= address);
        let sequence = self.sequences.get(after.checked_sub(1)?).filter(|s| address < s.end)?;
        let rows = &self.rows[sequence.rows.clone()];
        let index = rows.partition_point(|row| row.address <= address).checked_sub(1)?;
        Some((sequence.rows.start + index, sequence))
    }

    /// The file's index and the line of an address.
    pub fn find(&self, address: u64) -> Option<(u64, u32)> {
        let (index, _) = self.row(address)?;
        let row = self.rows[index];
        Some((row.file.into(), row.line))
    }

    /// The addresses around one that belong to the same line of the same file.
    pub fn range(&self, address: u64) -> Option<Range<u64>> {
        let (index, sequence) = self.row(address)?;
        let is_same =
            |n: &usize| (self.rows[*n].file, self.rows[*n].line) == (self.rows[index].file, self.rows[index].line);
        let first = (sequence.rows.start..=index).rev().take_while(is_same).last().unwrap_or(index);
        let behind = (index..sequence.rows.end).find(|n| !is_same(n));
        let end = behind.map_or(sequence.end, |n| self.rows[n].address);
        Some(self.rows[first].address..end)
    }

    /// Where a line of some files is entered, or, if it has no statement, the next line that has: line and address of
    /// the first statement of each of its stretches. Compilers copy lines, so that a function may have several.
    pub fn statements(&self, files: &[u64], line: u32) -> Vec<(u32, u64)> {
        let fits = |row: &Row| row.line >= line && files.contains(&row.file.into());
        let statements = self.rows.iter().filter(|row| row.is_statement && fits(row));
        let Some(best) = statements.map(|row| row.line).min() else { return Vec::new() };
        let mut found = Vec::new();
        for sequence in &self.sequences {
            let mut is_open = false;
            for row in &self.rows[sequence.rows.clone()] {
                if !(row.line == best && fits(row)) {
                    is_open = false;
                } else if row.is_statement && !is_open {
                    is_open = true;
                    found.push((best, row.address));
                }
            }
        }
        found
    }
}

fn path_of(dwarf: &Dwarf<Slice<'_>>, unit: &Unit<'_>, index: u64) -> Option<Vec<String>> {
    let program = unit.line_program.as_ref()?;
    let header = program.header();
    let file = header.file(index)?;
    let text = |value: AttributeValue<Slice<'_>>| {
        let string = dwarf.attr_string(unit, value).ok()?;
        let bytes = string.to_slice().ok()?;
        Some(String::from_utf8_lossy(&bytes[..bytes.len().min(MAX_PATH)]).into_owned())
    };
    let name = text(file.path_name())?;
    let directory = file.directory(header).and_then(text).filter(|directory| !directory.is_empty());
    Some([directory, Some(name)].into_iter().flatten().collect())
}

/// The path of a file: its directory, unless the name is absolute, and its name.
pub(super) fn file_name(dwarf: &Dwarf<Slice<'_>>, unit: &Unit<'_>, index: u64) -> Option<String> {
    let parts = path_of(dwarf, unit, index)?;
    let mut path = String::new();
    for part in parts {
        if part.starts_with('/') {
            path.clear();
        } else if !path.is_empty() && !path.ends_with('/') {
            path.push('/');
        }
        path.push_str(&part);
    }
    if !path.starts_with('/')
        && let Some(base) = unit.comp_dir.as_ref().and_then(|dir| dir.to_string().ok())
    {
        path = format!("{}/{path}", base.get(..base.len().min(MAX_PATH)).unwrap_or_default());
    }
    Some(path)
}

/// The indices of a unit's files whose paths end with the components of `wanted`, as far as they are found in time.
pub(super) fn files_named(dwarf: &Dwarf<Slice<'_>>, unit: &Unit<'_>, wanted: &str, deadline: Instant) -> Vec<u64> {
    let Some(program) = unit.line_program.as_ref() else { return Vec::new() };
    let count = program.header().file_names().len() as u64;
    let last = wanted.rsplit('/').next().unwrap_or(wanted);
    let fits = |index: &u64| {
        let Some(name) = path_of(dwarf, unit, *index).and_then(|parts| parts.last().cloned()) else { return false };
        let is_name = name.rsplit('/').next() == Some(last);
        is_name && file_name(dwarf, unit, *index).is_some_and(|path| ends_with(&path, wanted))
    };
    (0..=count.min(MAX_FILES)).take_while(|_| Instant::now() < deadline).filter(fits).collect()
}

fn ends_with(path: &str, wanted: &str) -> bool {
    let mut path = path.rsplit('/').filter(|part| *part != ".");
    wanted.rsplit('/').filter(|part| *part != ".").all(|part| part.is_empty() || path.next() == Some(part))
}
