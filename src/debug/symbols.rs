//! The symbol table of an image: from a name that a user would type to an address, and back. Names are matched as the
//! linker wrote them, demangled, and by their last path segments; Hermit's kernel, whose mangled names carry the prefix
//! `libhermit_` or `hermit_`, reads like any other crate. Nothing is parsed before the first question, names are
//! demangled at the first that needs it, and an image that lies about itself costs no more than its size.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use crate::error::{Error, Result};

mod elf;
mod names;

use self::elf::Entry;

/// The name for people of a name that the linker wrote: demangled, without hash and prefix.
pub(crate) fn demangle(raw: &str) -> String {
    names::display(raw)
}

/// How many candidates an error lists.
const LISTED: usize = 10;

/// How many near names are suggested for one that does not exist.
const SUGGESTED: usize = 5;

/// What a symbol stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SymbolKind {
    /// Code with a type, `STT_FUNC`.
    Function,
    /// Data, `STT_OBJECT`.
    Data,
    /// A label without a type, as assembly and linker scripts make them.
    Label,
}

impl std::fmt::Display for SymbolKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Function => "function",
            Self::Data => "data",
            Self::Label => "label",
        })
    }
}

/// A named place in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Symbol {
    /// For people: demangled, without hash and, if it is mangled, without Hermit's prefix.
    pub name: String,
    /// As the linker wrote it.
    pub raw: String,
    /// Guest-virtual address, where the image was loaded.
    pub address: u64,
    /// Bytes; 0 if the image does not say.
    pub size: u64,
    /// What it stands for.
    pub kind: SymbolKind,
    /// Whether other object files could see it (weak ones included).
    pub global: bool,
}

/// What a name stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lookup {
    /// Nothing.
    None {
        /// Existing names that are near.
        suggestions: Vec<String>,
    },
    /// One address.
    One(Symbol),
    /// Several addresses, in their order; each listed once.
    Many(Vec<Symbol>),
}

/// A bounded part of the symbols.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Matches {
    /// The first ones by address.
    pub symbols: Vec<Symbol>,
    /// How many there are in all.
    pub total: usize,
}

/// The symbols of one image at the address where it was loaded.
#[derive(Debug)]
pub struct SymbolTable {
    image: Arc<[u8]>,
    bias: u64,
    table: OnceLock<Table>,
    names: OnceLock<Names>,
}

/// The symbols by address.
#[derive(Debug)]
struct Table {
    /// By address, the best name of an address first.
    entries: Vec<Entry>,
    /// For each entry the furthest end of those up to it: how far back an enclosing symbol may start.
    reach: Vec<u64>,
}

/// The demangled names.
#[derive(Debug)]
struct Names {
    /// For each entry its name for people.
    display: Vec<Box<str>>,
    /// Entries by [`names::key`].
    by_key: HashMap<Box<str>, Vec<usize>>,
}

impl SymbolTable {
    /// The symbols in an ELF image that was loaded `bias` bytes above the addresses in it. Costs nothing yet; an image
    /// that is broken or stripped gives an empty table.
    pub fn from_elf(kernel: &Arc<[u8]>, bias: u64) -> Self {
        Self { image: Arc::clone(kernel), bias, table: OnceLock::new(), names: OnceLock::new() }
    }

    /// How many symbols there are.
    pub fn len(&self) -> usize {
        self.table().entries.len()
    }

    /// Whether there are none: the image is stripped.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All symbols by address.
    pub fn iter(&self) -> impl Iterator<Item = Symbol> + '_ {
        (0..self.len()).map(|index| self.symbol(index))
    }

    /// The symbols whose name for people or raw name matches a pattern (`*` any characters, `?` one), at most `limit`.
    pub fn matching(&self, pattern: &str, limit: usize) -> Matches {
        let display = &self.names().display;
        let mut matches = Matches { symbols: Vec::new(), total: 0 };
        for (index, entry) in self.table().entries.iter().enumerate() {
            if names::glob(pattern, &display[index]) || names::glob(pattern, &entry.raw(&self.image)) {
                matches.total += 1;
                if matches.symbols.len() < limit {
                    matches.symbols.push(self.symbol(index));
                }
            }
        }
        matches
    }

    /// What a name stands for: a raw name before a demangled one, with or without hash and prefix, before the last
    /// segments of a path. Names of the same address are one symbol.
    pub fn lookup(&self, name: &str) -> Lookup {
        let name = name.trim();
        let by_raw = || {
            let entries = self.table().entries.iter().enumerate();
            entries
                .filter(|(_, entry)| entry.raw_bytes(&self.image) == name.as_bytes())
                .map(|(index, _)| index)
                .collect()
        };
        let by_path = |exact| self.by_path(name, exact);
        let mut found: Vec<usize> = by_raw();
        if found.is_empty() {
            found = by_path(true);
        }
        if found.is_empty() {
            found = by_path(false);
        }
        found.dedup_by_key(|index| self.table().entries[*index].address);
        match found.as_slice() {
            [] => Lookup::None { suggestions: self.suggestions(name) },
            [one] => Lookup::One(self.symbol(*one)),
            many => Lookup::Many(many.iter().map(|index| self.symbol(*index)).collect()),
        }
    }

    /// The symbol that an address lies in, and how far: the nearest before it that is long enough. A symbol without a
    /// size reaches to the next one, or to the end of its section.
    pub fn symbolize(&self, address: u64) -> Option<(Symbol, u64)> {
        let Table { entries, reach } = self.table();
        let after = entries.partition_point(|entry| entry.address <= address);
        let mut best: Option<usize> = None;
        for index in (0..after).rev() {
            let entry = &entries[index];
            if reach[index] <= address && entry.address != address
                || best.is_some_and(|b| entries[b].address != entry.address)
            {
                break;
            }
            if entry.end > address || entry.address == address {
                best = Some(index);
            }
        }
        best.map(|index| (self.symbol(index), address - entries[index].address))
    }

    /// The address that an expression of a user names: `symbol`, `symbol+0x10`, `symbol-4`, `0x1234`, `1234` or
    /// `*0x1234`. Numbers are guest-virtual addresses as they are, without the image's bias.
    pub fn resolve(&self, expression: &str) -> Result<u64> {
        let text = expression.trim();
        let (address, starred) = match text.strip_prefix('*') {
            Some(rest) => (rest.trim(), true),
            None => (text, false),
        };
        if address.is_empty() {
            return Err(Error::Breakpoint(
                "a location is needed: a symbol, symbol+offset, or an address such as 0x1234".into(),
            ));
        }
        if let Some(number) = names::number(address) {
            return Ok(number);
        }
        let whole = self.lookup(address);
        if let (Lookup::None { .. }, Some((base, offset, negative))) = (&whole, names::split_offset(address)) {
            let base = names::number(base).map_or_else(|| self.one(base, self.lookup(base)), Ok)?;
            let moved = if negative { base.checked_sub(offset) } else { base.checked_add(offset) };
            return moved.ok_or_else(|| Error::Breakpoint(format!("{} lies outside of 64 bits", names::shown(text))));
        }
        if starred && matches!(whole, Lookup::None { .. }) {
            return Err(Error::Breakpoint(format!("{} is not an address: write *0x1234", names::shown(text))));
        }
        self.one(address, whole)
    }

    /// The only address of a lookup, or the error that lists what there is instead.
    fn one(&self, name: &str, lookup: Lookup) -> Result<u64> {
        let name = names::shown(name);
        Err(Error::Breakpoint(match lookup {
            Lookup::One(symbol) => return Ok(symbol.address),
            Lookup::Many(symbols) => {
                let mut text = format!("{name} is ambiguous, {} addresses have that name:", symbols.len());
                for symbol in symbols.iter().take(LISTED) {
                    text += &format!("\n  {:#x} {} ({})", symbol.address, symbol.name, symbol.kind);
                }
                if symbols.len() > LISTED {
                    text += &format!("\n  and {} more", symbols.len() - LISTED);
                }
                text + "\ngive more of the path, or an address as *0x1234"
            }
            Lookup::None { .. } if self.is_empty() => {
                format!("no symbol {name}: the image has no symbols (it is stripped); give an address as *0x1234")
            }
            Lookup::None { suggestions } if suggestions.is_empty() => format!("no symbol {name}"),
            Lookup::None { suggestions } => format!("no symbol {name}; did you mean {}?", suggestions.join(", ")),
        }))
    }

    fn table(&self) -> &Table {
        self.table.get_or_init(|| {
            let entries = elf::entries(&self.image, self.bias);
            let reach = entries.iter().scan(0, |furthest: &mut u64, entry| {
                *furthest = entry.end.max(*furthest);
                Some(*furthest)
            });
            Table { reach: reach.collect(), entries }
        })
    }

    fn names(&self) -> &Names {
        self.names.get_or_init(|| {
            let mut names = Names { display: Vec::with_capacity(self.len()), by_key: HashMap::new() };
            for (index, entry) in self.table().entries.iter().enumerate() {
                let raw = entry.raw(&self.image);
                let display = names::display(&raw);
                for path in names::paths(&raw, &display) {
                    let indices: &mut Vec<usize> = names.by_key.entry(names::key(path).into()).or_default();
                    if indices.last() != Some(&index) {
                        indices.push(index);
                    }
                }
                names.display.push(display.into());
            }
            names
        })
    }

    /// The entries whose demangled name is, or ends with, a path.
    fn by_path(&self, path: &str, exact: bool) -> Vec<usize> {
        let names = self.names();
        let candidates = names.by_key.get(names::key(names::without_hash(path)));
        let fits = |index: &&usize| {
            let raw = self.table().entries[**index].raw(&self.image);
            names::paths(&raw, &names.display[**index]).any(|known| names::fits(known, path, exact))
                || names::without_hash(path) != path && names::fits(&names::display_with_hash(&raw), path, exact)
        };
        candidates.into_iter().flatten().filter(fits).copied().collect()
    }

    fn suggestions(&self, name: &str) -> Vec<String> {
        let known = self.names().display.iter().map(AsRef::as_ref);
        names::nearest(name, known, SUGGESTED)
    }

    fn symbol(&self, index: usize) -> Symbol {
        let entry = &self.table().entries[index];
        let raw = entry.raw(&self.image).into_owned();
        let name = self.names.get().map_or_else(|| names::display(&raw), |names| names.display[index].to_string());
        Symbol { name, raw, address: entry.address, size: entry.size, kind: entry.kind, global: entry.global }
    }
}

#[cfg(test)]
mod tests;
