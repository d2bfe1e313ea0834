//! Names of symbols: demangled for people, cut into path segments, compared with what a user typed, and searched for
//! near ones. Everything here is text to text and bounded in time, whatever an image claims its names to be.

use std::fmt::Write;

/// The prefixes that Hermit's build gives the symbols of its kernel.
const PREFIXES: [&str; 2] = ["libhermit_", "hermit_"];

/// The longest demangled name; a longer one is shown mangled. Back references can make a name exponentially long.
const MAX_DISPLAY: usize = 8192;

/// The longest text that is compared for nearness.
const MAX_NEAR: usize = 64;

/// A raw name without Hermit's prefix.
fn without_prefix(raw: &str) -> &str {
    PREFIXES.iter().find_map(|prefix| raw.strip_prefix(prefix)).filter(|rest| !rest.is_empty()).unwrap_or(raw)
}

/// Text that refuses to grow past [`MAX_DISPLAY`].
struct Bounded(String);

impl Write for Bounded {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        if self.0.len() + text.len() > MAX_DISPLAY {
            return Err(std::fmt::Error);
        }
        self.0.push_str(text);
        Ok(())
    }
}

fn demangle(raw: &str, hash: bool) -> String {
    let Ok(demangled) = rustc_demangle::try_demangle(without_prefix(raw)) else { return raw.to_owned() };
    let mut text = Bounded(String::new());
    let written = if hash { write!(text, "{demangled}") } else { write!(text, "{demangled:#}") };
    if written.is_ok() { text.0 } else { raw.to_owned() }
}

/// The name for people: demangled without hash and prefix. A name that is not mangled stays as it is.
pub(super) fn display(raw: &str) -> String {
    demangle(raw, false)
}

/// The demangled name with its hash.
pub(super) fn display_with_hash(raw: &str) -> String {
    demangle(raw, true)
}

/// What a symbol may be called besides its raw name: the name for people, and the raw name without prefix.
pub(super) fn paths<'a>(raw: &'a str, display: &'a str) -> impl Iterator<Item = &'a str> {
    let plain = without_prefix(raw);
    std::iter::once(display).chain((plain != raw && plain != display).then_some(plain))
}

/// A path without the hash of legacy mangling, `::h` and 16 hexadecimal digits.
pub(super) fn without_hash(path: &str) -> &str {
    let hash =
        |hash: &str| hash.len() == 17 && hash.starts_with('h') && hash[1..].bytes().all(|b| b.is_ascii_hexdigit());
    path.rsplit_once("::").filter(|(_, last)| last.is_ascii() && hash(last)).map_or(path, |(rest, _)| rest)
}

/// Where the last `::` outside of brackets is.
fn last_separator(path: &str) -> Option<usize> {
    let bytes = path.as_bytes();
    let mut depth = 0i32;
    for at in (1..bytes.len()).rev() {
        match bytes[at] {
            b'>' if bytes[at - 1] == b'-' => {}
            b'>' | b')' | b']' | b'}' => depth += 1,
            b'<' | b'(' | b'[' | b'{' => depth -= 1,
            b':' if depth <= 0 && bytes[at - 1] == b':' => return Some(at - 1),
            _ => {}
        }
    }
    None
}

/// A path without the generic arguments at its end: `f` of `f<T>` and of `f::<T>`.
fn without_generics(path: &str) -> &str {
    let start = last_separator(path).map_or(0, |at| at + 2);
    let last = &path[start..];
    match last.find('<') {
        Some(0) if start > 2 => &path[..start - 2],
        Some(at) if at > 0 && last.ends_with('>') => &path[..start + at],
        _ => path,
    }
}

/// The last segment of a path without generic arguments: what the index of names is by.
pub(super) fn key(path: &str) -> &str {
    let path = without_generics(path);
    &path[last_separator(path).map_or(0, |at| at + 2)..]
}

/// Whether a symbol's name is a path or, unless `exact`, ends with its segments; generic arguments may be left out.
pub(super) fn fits(known: &str, path: &str, exact: bool) -> bool {
    [known, without_generics(known)].iter().any(|known| match known.strip_suffix(path) {
        Some("") => true,
        Some(rest) => !exact && rest.ends_with("::"),
        None => false,
    })
}

/// A number as users write addresses: decimal, or hexadecimal with `0x`; underscores are allowed.
pub(super) fn number(text: &str) -> Option<u64> {
    let digits = text.replace('_', "");
    let (digits, radix) = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(hex) => (hex, 16),
        None => (digits.as_str(), 10),
    };
    let plain = text.starts_with(|c: char| c.is_ascii_digit()) && digits.bytes().all(|b| b.is_ascii_hexdigit());
    if plain { u64::from_str_radix(digits, radix).ok() } else { None }
}

/// Splits `base+offset` or `base-offset`; true for minus.
pub(super) fn split_offset(text: &str) -> Option<(&str, u64, bool)> {
    let at = text.rfind(['+', '-'])?;
    let (base, offset) = (text[..at].trim(), number(text[at + 1..].trim())?);
    (!base.is_empty()).then_some((base, offset, text.as_bytes()[at] == b'-'))
}

/// A user's text in quotes, cut where it is too long for a message.
pub(super) fn shown(text: &str) -> String {
    let cut: String = text.chars().take(200).collect();
    if cut.len() < text.len() { format!("'{cut}…'") } else { format!("'{cut}'") }
}

/// Whether text matches a pattern of `*` and `?`. Takes at most the product of both lengths.
pub(super) fn glob(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
    let (mut p, mut t, mut retry) = (0, 0, None);
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                p += 1;
                retry = Some((p, t));
            }
            Some(byte) if *byte == b'?' || *byte == text[t] => {
                p += 1;
                t += 1;
            }
            _ => match retry {
                Some((star, from)) => {
                    p = star;
                    t = from + 1;
                    retry = Some((star, t));
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

/// The known names that are nearest to one: by edits of the last segment, then those that contain it.
pub(super) fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>, limit: usize) -> Vec<String> {
    let wanted: String = key(without_hash(name)).chars().take(MAX_NEAR).collect::<String>().to_lowercase();
    if wanted.is_empty() {
        return Vec::new();
    }
    let allowed = (wanted.chars().count() / 3).clamp(1, 4);
    let mut near: Vec<(usize, usize, &str)> = known
        .filter_map(|candidate| {
            let last = key(candidate);
            let distance = if last.len() <= MAX_NEAR { edits(&wanted, &last.to_lowercase(), allowed) } else { None };
            let contains = || (wanted.len() >= 3 && last.to_lowercase().contains(&wanted)).then_some(allowed + 1);
            distance.or_else(contains).map(|distance| (distance, candidate.len(), candidate))
        })
        .collect();
    near.sort_unstable();
    near.dedup();
    near.into_iter().take(limit).map(|(_, _, candidate)| candidate.to_owned()).collect()
}

/// The Levenshtein distance, if it is at most `allowed`.
fn edits(a: &str, b: &str, allowed: usize) -> Option<usize> {
    let b: Vec<char> = b.chars().collect();
    if a.chars().count().abs_diff(b.len()) > allowed {
        return None;
    }
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row.last().copied().filter(|distance| *distance <= allowed)
}
