//! `Z` and `z` packets with what gdb puts behind them: conditions as agent expressions, commands for the target.

use super::frame::{bytes, number, split_once};

/// A breakpoint as a packet asks for it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct BreakpointPacket {
    /// `Z0,address,kind` without what follows.
    pub(super) plain: Vec<u8>,
    pub(super) address: u64,
    /// The bytecode of each condition.
    pub(super) conditions: Vec<Vec<u8>>,
}

impl BreakpointPacket {
    /// `None`: malformed, or with something that this target never said it takes.
    pub(super) fn parse(packet: &[u8]) -> Option<Self> {
        let (plain, tail) = split_once(packet, b';').unwrap_or((packet, b""));
        let mut fields = plain.get(1..)?.split(|byte| *byte == b',');
        let [kind] = fields.next()? else { return None };
        let address = number(fields.next()?)?;
        number(fields.next()?)?;
        if fields.next().is_some() || !kind.is_ascii_digit() {
            return None;
        }
        let conditions = parse_conditions(tail)?;
        let takes_conditions = packet[0] == b'Z' && matches!(kind, b'0' | b'1');
        (takes_conditions || conditions.is_empty()).then(|| Self { plain: plain.to_vec(), address, conditions })
    }
}

/// `Xlength,bytecode` any number of times; semicolons may separate them.
fn parse_conditions(mut tail: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut conditions = Vec::new();
    while !tail.is_empty() {
        tail = tail.strip_prefix(b";").unwrap_or(tail).strip_prefix(b"X")?;
        let (length, rest) = split_once(tail, b',')?;
        let digits = usize::try_from(number(length)?).ok()?.checked_mul(2)?;
        conditions.push(bytes(rest.get(..digits)?)?);
        tail = &rest[digits..];
    }
    Some(conditions)
}
