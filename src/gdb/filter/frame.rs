//! The frames of GDB's remote protocol, `$payload#checksum`, and the single bytes between them. A stream may be cut
//! anywhere and hold anything.

/// What a stream consists of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Item {
    /// A packet's payload, escapes included.
    Packet(Vec<u8>),
    /// A packet with a wrong checksum.
    Damaged,
    /// A packet that exceeds the limit; its bytes are gone.
    TooLong,
    /// `+`
    Ack,
    /// `-`
    Nack,
    /// Ctrl-C.
    Interrupt,
}

enum State {
    Between,
    Payload,
    /// After `#`.
    Checksum,
    /// After the checksum's first digit; `None` where that was none.
    LastDigit(Option<u8>),
}

/// Takes a stream apart, a byte at a time.
pub(super) struct Deframer {
    state: State,
    payload: Vec<u8>,
    limit: usize,
    too_long: bool,
    sum: u8,
}

impl Deframer {
    /// Payloads of up to `limit` bytes.
    pub(super) fn new(limit: usize) -> Self {
        Self { state: State::Between, payload: Vec::new(), limit, too_long: false, sum: 0 }
    }

    /// The item that ends with this byte. Bytes between packets that mean nothing are skipped.
    pub(super) fn push(&mut self, byte: u8) -> Option<Item> {
        match self.state {
            State::Between => match byte {
                b'$' => self.start(),
                b'+' => return Some(Item::Ack),
                b'-' => return Some(Item::Nack),
                0x03 => return Some(Item::Interrupt),
                _ => {}
            },
            State::Payload => match byte {
                // A payload holds none: the packet before was cut off.
                b'$' => self.start(),
                b'#' => self.state = State::Checksum,
                _ => self.take(byte),
            },
            State::Checksum => self.state = State::LastDigit(digit(byte)),
            State::LastDigit(first) => {
                self.state = State::Between;
                return Some(self.finish(first.zip(digit(byte)).map(|(high, low)| high << 4 | low)));
            }
        }
        None
    }

    fn start(&mut self) {
        self.state = State::Payload;
        self.payload.clear();
        self.too_long = false;
        self.sum = 0;
    }

    fn take(&mut self, byte: u8) {
        self.sum = self.sum.wrapping_add(byte);
        if self.payload.len() < self.limit {
            self.payload.push(byte);
        } else {
            self.too_long = true;
        }
    }

    fn finish(&mut self, checksum: Option<u8>) -> Item {
        let payload = std::mem::take(&mut self.payload);
        if checksum != Some(self.sum) {
            Item::Damaged
        } else if self.too_long {
            Item::TooLong
        } else {
            Item::Packet(payload)
        }
    }
}

fn digit(byte: u8) -> Option<u8> {
    match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        b'A'..=b'F' => Some(byte - b'A' + 10),
        _ => None,
    }
}

/// A payload, escaped already where it needs to be, as it goes over the wire.
pub(super) fn frame(payload: &[u8]) -> Vec<u8> {
    let sum = payload.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    [b"$", payload, format!("#{sum:02x}").as_bytes()].concat()
}

/// Binary data as a payload holds it.
pub(super) fn escape(data: &[u8]) -> Vec<u8> {
    let mut escaped = Vec::with_capacity(data.len());
    for byte in data {
        match byte {
            b'#' | b'$' | b'}' | b'*' => escaped.extend([b'}', byte ^ 0x20]),
            _ => escaped.push(*byte),
        }
    }
    escaped
}

/// How many bytes escaped data stands for; `None` where it ends within an escape.
pub(super) fn unescaped_length(data: &[u8]) -> Option<usize> {
    let mut bytes = data.iter();
    let mut length = 0;
    while let Some(byte) = bytes.next() {
        if *byte == b'}' {
            bytes.next()?;
        }
        length += 1;
    }
    Some(length)
}

/// A number of one to sixteen hexadecimal digits.
pub(super) fn number(text: &[u8]) -> Option<u64> {
    if text.is_empty() || text.len() > 16 {
        return None;
    }
    text.iter().try_fold(0, |value, byte| Some(value << 4 | u64::from(digit(*byte)?)))
}

/// Bytes of two hexadecimal digits each.
pub(super) fn bytes(text: &[u8]) -> Option<Vec<u8>> {
    let (pairs, []) = text.as_chunks() else { return None };
    pairs.iter().map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?)).collect()
}

/// Bytes in hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What stands before and after the first `separator`.
pub(super) fn split_once(text: &[u8], separator: u8) -> Option<(&[u8], &[u8])> {
    let at = text.iter().position(|byte| *byte == separator)?;
    Some((&text[..at], &text[at + 1..]))
}
