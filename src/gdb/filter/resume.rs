//! Packets that let the guest run. All become one form of `vCont`: explicit actions of known threads, each once, and
//! at most one default, which is to continue. That is what gdbstub takes without ending the session.

use super::frame::{number, split_once};
use super::threads::ThreadId;

/// Why a packet is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    Malformed,
    NoThread,
}

struct Action<'a> {
    /// As the packet writes it: `c`, `C05`, `s`, `S05` or `r10,20`.
    kind: &'a [u8],
    thread: ThreadId,
}

impl<'a> Action<'a> {
    fn parse(text: &'a [u8]) -> Option<Self> {
        let (kind, thread) = match split_once(text, b':') {
            Some((kind, thread)) => (kind, ThreadId::parse(thread)?),
            None => (text, ThreadId::All),
        };
        let valid = match kind {
            b"c" | b"s" => true,
            [b'C' | b'S', signal @ ..] => signal.len() == 2 && number(signal).is_some(),
            [b'r', range @ ..] => {
                let (start, end) = split_once(range, b',')?;
                number(start)? <= number(end)?
            }
            _ => false,
        };
        valid.then_some(Self { kind, thread })
    }

    fn continues(&self) -> bool {
        matches!(self.kind, [b'c' | b'C', ..])
    }
}

/// The normal form of `vCont;…`; `actions` is what follows the first semicolon. Threads are those that exist.
pub(super) fn normalize(actions: &[u8], threads: &[u64]) -> Result<Vec<u8>, Refusal> {
    let actions: Option<Vec<_>> = actions.split(|byte| *byte == b';').map(Action::parse).collect();
    let actions = actions.ok_or(Refusal::Malformed)?;
    let mut named = Vec::new();
    let mut packet = b"vCont".to_vec();
    let mut add = |kind: &[u8], thread: u64| {
        if !named.contains(&thread) {
            named.push(thread);
            packet.extend([b";", kind, format!(":{thread:x}").as_bytes()].concat());
        }
    };
    let mut default: Option<&Action> = None;
    for action in &actions {
        match action.thread {
            ThreadId::Foreign => return Err(Refusal::NoThread),
            ThreadId::One(thread) if !threads.contains(&thread) => return Err(Refusal::NoThread),
            // The leftmost action counts.
            ThreadId::One(_) if default.is_some() => {}
            ThreadId::One(thread) => add(action.kind, thread),
            ThreadId::All | ThreadId::Any => default = default.or(Some(action)),
        }
    }
    match default {
        Some(action) if action.continues() => packet.extend([b";", action.kind].concat()),
        Some(action) => threads.iter().for_each(|thread| add(action.kind, *thread)),
        None => {}
    }
    if packet == b"vCont" { Err(Refusal::NoThread) } else { Ok(packet) }
}

/// `vCont`'s actions for `c`, `s`, `Csig` or `Ssig`, as gdbserver understands them: `chosen` is the thread of `Hc`,
/// which then runs alone; else `current` is the one that steps, and the others run.
pub(super) fn actions_of(packet: &[u8], chosen: Option<u64>, current: Option<u64>) -> Option<Vec<u8>> {
    let action = Action::parse(packet).filter(|_| !packet.contains(&b':'))?;
    let kind = String::from_utf8_lossy(action.kind);
    let text = match (chosen, current) {
        (Some(thread), _) => format!("{kind}:{thread:x}"),
        (None, Some(thread)) if !action.continues() => format!("{kind}:{thread:x};c"),
        _ => kind.into_owned(),
    };
    Some(text.into_bytes())
}
