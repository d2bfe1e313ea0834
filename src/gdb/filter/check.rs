//! Which packets gdbstub takes as they are. It ends the session at a packet that it knows by its first letters but can't
//! parse, so that each is checked here in full; everything else is answered as unknown.

use super::frame::{bytes, number, split_once, unescaped_length};

/// What is to be done with a packet that needs no more than a look at itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// gdbstub is to answer it.
    Pass,
    /// It is none that this target knows.
    Unknown,
    /// It is malformed.
    Refuse,
    /// It is a malformed request for a file.
    RefuseFile,
}

/// The flags of `vFile:open` that exist in the protocol, and the bits of a mode.
const OPEN_FLAGS: u64 = 0xe0b;
const OPEN_MODES: u64 = 0o140_777;

/// Judges a packet.
pub(super) fn check(packet: &[u8]) -> Verdict {
    let valid = match packet {
        b"g" | b"!" | b"k" | b"D" | b"vCont?" | b"qOffsets" | b"qHostInfo" | b"qProcessInfo" | b"qAttached"
        | b"QEnvironmentReset" => true,
        [b'G', values @ ..] => !values.is_empty() && bytes(values).is_some(),
        [b'p', register @ ..] => is_small(register),
        [b'P', rest @ ..] => is_register_write(rest),
        [b'M', rest @ ..] => {
            write_length(rest).is_some_and(|(length, data)| bytes(data).is_some_and(|d| d.len() == length))
        }
        [b'X', rest @ ..] => write_length(rest).is_some_and(|(length, data)| unescaped_length(data) == Some(length)),
        [b'R', rest @ ..] => rest.len() == 2 && number(rest).is_some(),
        [b'D', b';', process @ ..] => is_process(process),
        [b'v', rest @ ..] => return check_v(rest),
        [b'q', rest @ ..] => return check_q(rest),
        [b'Q', rest @ ..] => return check_q_upper(rest),
        [b'g' | b'k' | b'D' | b'!', ..] => false,
        _ => return Verdict::Unknown,
    };
    verdict(valid)
}

fn verdict(valid: bool) -> Verdict {
    if valid { Verdict::Pass } else { Verdict::Refuse }
}

fn check_v(rest: &[u8]) -> Verdict {
    if let Some(request) = rest.strip_prefix(b"File:") {
        return check_file(request);
    }
    let Some((name, rest)) = split_once(rest, b';') else { return Verdict::Unknown };
    match name {
        b"Kill" | b"Attach" => verdict(is_process(rest)),
        b"Run" => verdict(rest.split(|byte| *byte == b';').all(|part| bytes(part).is_some())),
        _ => Verdict::Unknown,
    }
}

fn check_file(request: &[u8]) -> Verdict {
    let Some((operation, rest)) = split_once(request, b':') else { return Verdict::Unknown };
    let fields: Vec<&[u8]> = rest.splitn(3, |byte| *byte == b',').collect();
    let valid = match (operation, fields.as_slice()) {
        (b"open", [name, flags, mode]) => {
            let within = |text, bits: u64| number(text).is_some_and(|value| value & !bits == 0);
            bytes(name).is_some() && within(flags, OPEN_FLAGS) && within(mode, OPEN_MODES)
        }
        (b"close" | b"fstat", [file]) => is_small(file),
        (b"pread", [file, count, offset]) => is_small(file) && number(count).is_some() && number(offset).is_some(),
        (b"pwrite", [file, offset, data]) => {
            is_small(file) && number(offset).is_some() && unescaped_length(data).is_some()
        }
        (b"unlink" | b"readlink", [name]) => bytes(name).is_some(),
        (b"setfs", [process]) => number(process).is_some(),
        (b"open" | b"close" | b"fstat" | b"pread" | b"pwrite" | b"unlink" | b"readlink" | b"setfs", _) => false,
        _ => return Verdict::Unknown,
    };
    if valid { Verdict::Pass } else { Verdict::RefuseFile }
}

fn check_q(rest: &[u8]) -> Verdict {
    if let Some(request) = rest.strip_prefix(b"Xfer:") {
        return check_transfer(request);
    }
    if let Some(command) = rest.strip_prefix(b"Rcmd,") {
        return verdict(bytes(command).is_some());
    }
    if let Some(process) = rest.strip_prefix(b"Attached:") {
        return verdict(is_process(process));
    }
    match rest.strip_prefix(b"RegisterInfo") {
        Some(register) => verdict(is_small(register)),
        None => Verdict::Unknown,
    }
}

fn check_transfer(request: &[u8]) -> Verdict {
    let Some(transfer) = Transfer::parse(request) else { return Verdict::Unknown };
    if transfer.range.is_none() {
        return Verdict::Refuse;
    }
    match transfer.object {
        b"features" | b"memory-map" | b"auxv" | b"libraries" | b"libraries-svr4" => Verdict::Pass,
        b"exec-file" => verdict(transfer.annex.is_empty() || is_process(transfer.annex)),
        _ => Verdict::Unknown,
    }
}

/// `object:read:annex:offset,length`
pub(super) struct Transfer<'a> {
    pub(super) object: &'a [u8],
    pub(super) annex: &'a [u8],
    /// Offset and length; `None` if malformed.
    pub(super) range: Option<(u64, u64)>,
}

impl<'a> Transfer<'a> {
    /// `None` for anything but reading.
    pub(super) fn parse(request: &'a [u8]) -> Option<Self> {
        let mut fields = request.split(|byte| *byte == b':');
        let (object, b"read") = (fields.next()?, fields.next()?) else { return None };
        let annex = fields.next()?;
        let range = fields.next().and_then(|range| {
            let (offset, length) = split_once(range, b',')?;
            Some((number(offset)?, number(length)?))
        });
        Some(Self { object, annex, range: range.filter(|_| fields.next().is_none()) })
    }
}

fn check_q_upper(rest: &[u8]) -> Verdict {
    let Some((name, value)) = split_once(rest, b':') else { return Verdict::Unknown };
    let valid = match name {
        b"DisableRandomization" | b"StartupWithShell" => matches!(value, b"0" | b"1"),
        b"EnvironmentHexEncoded" => bytes(value).is_some_and(|value| value.contains(&b'=')),
        b"EnvironmentUnset" | b"SetWorkingDir" => bytes(value).is_some(),
        b"CatchSyscalls" => match value {
            b"0" | b"1" => true,
            [b'1', b';', numbers @ ..] => numbers.split(|byte| *byte == b';').all(|text| number(text).is_some()),
            _ => false,
        },
        _ => return Verdict::Unknown,
    };
    verdict(valid)
}

/// A process id: not 0.
fn is_process(text: &[u8]) -> bool {
    number(text).is_some_and(|process| process != 0)
}

fn is_small(text: &[u8]) -> bool {
    number(text).is_some_and(|value| u32::try_from(value).is_ok())
}

fn is_register_write(rest: &[u8]) -> bool {
    split_once(rest, b'=')
        .is_some_and(|(register, value)| is_small(register) && !value.is_empty() && bytes(value).is_some())
}

/// The length that `address,length:data` claims, and the data.
fn write_length(rest: &[u8]) -> Option<(usize, &[u8])> {
    let (range, data) = split_once(rest, b':')?;
    let (address, length) = split_once(range, b',')?;
    number(address)?;
    Some((usize::try_from(number(length)?).ok()?, data))
}
