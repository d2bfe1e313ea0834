//! Thread ids as the protocol writes them, and the list of threads.

use super::ThreadEntry;
use super::frame::number;

/// The process that all threads belong to.
const PROCESS: u64 = 1;

/// A thread id of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ThreadId {
    /// `-1`, or a process as a whole.
    All,
    /// `0`
    Any,
    One(u64),
    /// Of a process that isn't ours.
    Foreign,
}

impl ThreadId {
    /// `TID`, `pPID` or `pPID.TID`.
    pub(super) fn parse(text: &[u8]) -> Option<Self> {
        let Some(rest) = text.strip_prefix(b"p") else { return Self::parse_one(text) };
        let mut parts = rest.splitn(2, |byte| *byte == b'.');
        let process = Self::parse_one(parts.next()?)?;
        let thread = parts.next().map_or(Some(Self::All), Self::parse_one)?;
        match process {
            Self::One(process) if process != PROCESS => Some(Self::Foreign),
            _ => Some(thread),
        }
    }

    fn parse_one(text: &[u8]) -> Option<Self> {
        match text {
            b"-1" => Some(Self::All),
            text => number(text).map(|id| if id == 0 { Self::Any } else { Self::One(id) }),
        }
    }
}

/// A thread id for a client that knows of processes or not.
pub(super) fn thread_name(thread: u64, multiprocess: bool) -> String {
    if multiprocess { format!("p{PROCESS:x}.{thread:x}") } else { format!("{thread:x}") }
}

/// The document of `qXfer:threads:read`.
pub(super) fn document(threads: &[ThreadEntry], multiprocess: bool) -> String {
    let mut text = String::from("<?xml version=\"1.0\"?>\n<threads>\n");
    for thread in threads {
        let core = thread.core.map(|core| format!(" core=\"{core}\"")).unwrap_or_default();
        text += &format!(
            "<thread id=\"{}\"{core} name=\"{}\">{}</thread>\n",
            thread_name(thread.id, multiprocess),
            xml(&thread.name),
            xml(&thread.extra),
        );
    }
    text + "</threads>\n"
}

/// Text within an XML document; control characters are none that XML has.
fn xml(text: &str) -> String {
    let mut escaped = String::new();
    for character in text.chars() {
        match character {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '"' => escaped += "&quot;",
            c if c.is_control() => escaped.push('?'),
            c => escaped.push(c),
        }
    }
    escaped
}
