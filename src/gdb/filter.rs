//! What stands between a client's connection and gdbstub. gdbstub ends a session at the first byte, packet or number that
//! it does not expect, and knows no conditions that the target evaluates; a client may send anything. The filter owns the
//! wire (frames, checksums, acknowledgements, Ctrl-C), hands gdbstub only packets that it takes, one at a time, answers
//! the others itself, and takes the conditions out of breakpoint packets.
//!
//! It is logic over bytes, without a socket: [`Filter::receive`] takes what the client sent, [`Filter::next`] says what to
//! do until there is nothing left, [`Filter::outgoing`] takes gdbstub's output, [`Filter::output`] gives what to send.

mod breakpoint;
mod check;
mod frame;
mod packets;
mod resume;
#[cfg(test)]
mod tests;
mod threads;

use std::collections::VecDeque;
use std::sync::Arc;

use self::check::{Verdict, check};
use self::frame::{Deframer, Item, frame, hex};
use self::threads::ThreadId;
use crate::debug::agent::AgentProgram;
use crate::registers::RegisterId;

/// Reply: the packet is malformed, or nothing that this target can do (EINVAL).
const MALFORMED: &[u8] = b"E16";
/// Reply: it failed within (EIO).
const FAILED: &[u8] = b"E05";

/// What this target can do beyond what gdbstub says.
const FEATURES: &[u8] = b";ConditionalBreakpoints+;qXfer:threads:read+";

/// The most bytes of packets that wait while the guest runs. A well-behaved client sends none.
const MAX_WAITING: usize = 1 << 20;

/// How often a client may ask for a packet again.
const MAX_NACKS: u32 = 8;

/// A thread as a client sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ThreadEntry {
    /// Its id, from 1.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// What it is doing.
    pub extra: String,
    /// The number of its vCPU.
    pub core: Option<u32>,
}

/// What the filter asks the server.
pub trait Session {
    /// The threads' ids, the one that stopped first; none if the guest is gone.
    fn thread_ids(&mut self) -> Vec<u64>;
    /// The threads, in the same order.
    fn threads(&mut self) -> Vec<ThreadEntry>;
    /// The register with that number in the target description, if a condition may use it.
    fn register(&self, number: u16) -> Option<RegisterId>;
}

/// What the server is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Feed a packet to gdbstub, and its output to [`Filter::outgoing`].
    Packet {
        /// The whole frame.
        bytes: Vec<u8>,
        /// For a packet that inserts a breakpoint: its conditions. None: it stops always.
        conditions: Vec<Arc<AgentProgram>>,
    },
    /// Stop the guest: Ctrl-C.
    Interrupt,
}

/// What gdbstub's next reply belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    Nothing,
    Ordinary,
    Features,
    Resume,
    /// To be let go or killed.
    End,
    /// Something that has no reply in the protocol, but in gdbstub.
    Silence,
}

/// The filter of one connection.
pub struct Filter {
    packet_size: usize,
    incoming: Deframer,
    waiting: VecDeque<Item>,
    waiting_bytes: usize,
    replies: Deframer,
    output: Vec<u8>,
    /// The last frame sent, for a client that did not get it.
    last_sent: Vec<u8>,
    nacks: u32,
    no_ack: bool,
    asked: Asked,
    running: bool,
    extended: bool,
    closing: bool,
    multiprocess: bool,
    /// The client takes errors in words.
    reads_errors: bool,
    /// Which of `swbreak:;` and `hwbreak:;` the client understands.
    reasons: [bool; 2],
    last_stop: Option<Vec<u8>>,
    /// The thread that `g`, `m` and `s` are about: chosen by the client, or the one that stopped.
    general: Option<u64>,
    /// The thread of `Hc`, if it is a single one.
    resumed: Option<u64>,
    threads_document: Vec<u8>,
}

impl Filter {
    /// A filter for a gdbstub whose packet buffer has that size.
    pub fn new(packet_size: usize) -> Self {
        Self {
            packet_size,
            incoming: Deframer::new(packet_size.saturating_sub(4)),
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            replies: Deframer::new(usize::MAX),
            output: Vec::new(),
            last_sent: Vec::new(),
            nacks: 0,
            no_ack: false,
            asked: Asked::Nothing,
            running: false,
            extended: false,
            closing: false,
            multiprocess: false,
            reads_errors: false,
            reasons: [false; 2],
            last_stop: None,
            general: None,
            resumed: None,
            threads_document: Vec::new(),
        }
    }

    /// Whether the guest runs as the client knows it: it was resumed, and no stop was reported since.
    pub fn is_running(&self) -> bool {
        self.running
    }

    /// What a client that asks is told of a stop that came before it: a guest that has ended, or crashed.
    pub fn remember(&mut self, stop: &str) {
        self.last_stop = Some(stop.as_bytes().to_vec());
    }

    /// Whether the client asked for extended mode, in which a connection outlives its guest.
    pub fn is_extended(&self) -> bool {
        self.extended
    }

    /// Whether the connection is of no more use, once [`Filter::output`] is sent.
    pub fn wants_close(&self) -> bool {
        self.closing
    }

    /// Takes what the client sent, cut anywhere.
    pub fn receive(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if let Some(item) = self.incoming.push(*byte) {
                self.arrive(item);
            }
        }
    }

    fn arrive(&mut self, item: Item) {
        if item == Item::Ack {
            return;
        }
        self.waiting_bytes += weight(&item);
        self.waiting.push_back(item);
        if self.waiting_bytes > MAX_WAITING {
            self.closing = true;
            self.waiting.clear();
            self.waiting_bytes = 0;
        }
    }

    fn send_again(&mut self) {
        self.nacks += 1;
        if self.nacks > MAX_NACKS {
            self.closing = true;
        } else {
            self.output.extend_from_slice(&self.last_sent);
        }
    }

    /// What to do next; `None`: nothing, until the client has sent more or the guest has stopped.
    pub fn next(&mut self, session: &mut dyn Session) -> Option<Event> {
        loop {
            let item = self.take()?;
            if !self.no_ack && matches!(item, Item::Packet(_) | Item::TooLong) {
                self.output.push(b'+');
            }
            let event = match item {
                // What it asks for is so already: the client has its stop, or will find it.
                Item::Interrupt => self.running.then_some(Event::Interrupt),
                Item::Packet(payload) => self.packet(&payload, session),
                item => {
                    self.handle_failure(&item);
                    None
                }
            };
            if event.is_some() {
                return event;
            }
        }
    }

    fn handle_failure(&mut self, item: &Item) {
        match item {
            Item::Nack if self.no_ack => {}
            Item::Nack => self.send_again(),
            Item::Damaged if !self.no_ack => self.output.push(b'-'),
            _ => self.reply(MALFORMED),
        }
    }

    fn take(&mut self) -> Option<Item> {
        let at = if self.running { self.urgent()? } else { 0 };
        let item = self.waiting.remove(at)?;
        self.waiting_bytes -= weight(&item);
        Some(item)
    }

    /// The first thing that does not wait for the guest to stop: it overtakes all that does.
    fn urgent(&self) -> Option<usize> {
        self.waiting.iter().position(|item| match item {
            Item::Interrupt => true,
            Item::Packet(payload) => is_end(payload) && check(payload) == Verdict::Pass,
            _ => false,
        })
    }

    /// Takes gdbstub's output.
    pub fn outgoing(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if let Some(Item::Packet(payload)) = self.replies.push(*byte) {
                self.answer(payload);
            }
        }
    }

    fn answer(&mut self, mut payload: Vec<u8>) {
        // Text for the client's console comes before the reply proper.
        if payload.starts_with(b"O") && payload != b"OK" {
            return self.reply(&payload);
        }
        let asked = std::mem::replace(&mut self.asked, Asked::Nothing);
        let succeeded = !payload.starts_with(b"E");
        match asked {
            Asked::Silence => return,
            Asked::Features => payload.extend_from_slice(FEATURES),
            Asked::End if succeeded => self.forget_stop(),
            _ if is_stop(&payload) => payload = self.note_stop(payload),
            _ if self.running && asked == Asked::Resume => self.running = false,
            _ => {}
        }
        self.reply(&payload);
    }

    fn forget_stop(&mut self) {
        self.running = false;
        self.last_stop = None;
        self.general = None;
        self.resumed = None;
    }

    /// Notes that the guest has stopped; gives the stop reply as this client understands it.
    fn note_stop(&mut self, payload: Vec<u8>) -> Vec<u8> {
        let mut text = payload;
        if let [b'W' | b'X', ..] = text.as_slice() {
            self.forget_stop();
            if self.multiprocess && !text.contains(&b';') {
                text.extend_from_slice(b";process:1");
            }
        } else {
            let fields: Vec<&[u8]> = text.split(|byte| *byte == b';').collect();
            let thread = fields.iter().find_map(|field| {
                let at = field.windows(7).position(|name| name == b"thread:")?;
                ThreadId::parse(&field[at + 7..])
            });
            if let Some(ThreadId::One(thread)) = thread {
                self.general = Some(thread);
            }
            for (name, known) in [(&b"swbreak:;"[..], self.reasons[0]), (b"hwbreak:;", self.reasons[1])] {
                if let (Some(at), false) = (text.windows(name.len()).position(|part| part == name), known) {
                    text.drain(at..at + name.len());
                }
            }
        }
        self.running = false;
        self.last_stop = Some(text.clone());
        text
    }

    /// What goes to the client now.
    pub fn output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// Shows text on the client's console; false while the guest is stopped, when a client expects none.
    pub fn console(&mut self, text: &[u8]) -> bool {
        if self.running {
            for part in text.chunks(1024) {
                self.reply(format!("O{}", hex(part)).as_bytes());
            }
        }
        self.running
    }

    /// Answers the packet that is being handled with an error in words, in gdbstub's place. False: the client does not
    /// read such.
    pub fn refuse(&mut self, text: &str) -> bool {
        if self.reads_errors {
            self.asked = Asked::Nothing;
            let is_plain = |c: &char| (' '..='~').contains(c) && !"#$}*".contains(*c);
            let words: String = text.chars().map(|c| if is_plain(&c) { c } else { '?' }).collect();
            self.reply(format!("E.{words}").as_bytes());
        }
        self.reads_errors
    }

    /// After gdbstub has failed: answers what it was asked, and gives the packets that bring a new one to where the old
    /// one was. Their replies are nobody's.
    pub fn recover(&mut self) -> Vec<Vec<u8>> {
        self.replies = Deframer::new(usize::MAX);
        if !matches!(std::mem::replace(&mut self.asked, Asked::Nothing), Asked::Nothing | Asked::Silence) {
            self.reply(FAILED);
        }
        self.running = false;
        let general = self.general.map(|thread| format!("Hg{thread:x}").into_bytes());
        [Some(features_request(self.multiprocess)), general]
            .into_iter()
            .flatten()
            .map(|packet| frame(&packet))
            .collect()
    }

    fn reply(&mut self, payload: &[u8]) {
        let frame = frame(payload);
        self.output.extend_from_slice(&frame);
        if !self.no_ack {
            self.last_sent = frame;
            self.nacks = 0;
        }
    }
}

/// What an item that waits costs, about.
fn weight(item: &Item) -> usize {
    size_of::<Item>() + if let Item::Packet(payload) = item { payload.len() } else { 0 }
}

/// Whether a reply tells of a stop or an end: a letter and a number, unlike `TextSeg=…`.
fn is_stop(payload: &[u8]) -> bool {
    matches!(payload, [b'T' | b'S' | b'W' | b'X', high, low, ..] if high.is_ascii_hexdigit() && low.is_ascii_hexdigit())
}

/// Whether a packet asks for the session's end.
fn is_end(payload: &[u8]) -> bool {
    matches!(payload, b"k" | b"D" | [b'D', b';', ..]) || payload.starts_with(b"vKill;")
}

/// The one feature that matters to gdbstub. It takes no request without any.
fn features_request(multiprocess: bool) -> Vec<u8> {
    format!("qSupported:multiprocess{}", if multiprocess { '+' } else { '-' }).into_bytes()
}
