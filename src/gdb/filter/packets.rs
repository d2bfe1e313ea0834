//! What each packet gets: an answer of the filter's own, or gdbstub, in a form that it takes.

use std::sync::Arc;

use super::breakpoint::BreakpointPacket;
use super::check::{Transfer, Verdict, check};
use super::frame::{escape, frame, hex, number, split_once};
use super::resume::{self, Refusal};
use super::threads::{self, ThreadId, thread_name};
use super::{Asked, Event, Filter, MALFORMED, Session, features_request, is_end};
use crate::debug::agent::AgentProgram;

/// Reply: no such thread (ESRCH).
const NO_THREAD: &[u8] = b"E03";
/// Reply to a malformed request for a file (EINVAL).
const MALFORMED_FILE: &[u8] = b"F-1,16";

impl Filter {
    /// Handles a packet; an event if it is for gdbstub.
    pub(super) fn packet(&mut self, payload: &[u8], session: &mut dyn Session) -> Option<Event> {
        match payload {
            b"?" => match self.last_stop.clone() {
                Some(stop) => self.say(stop),
                None => self.pass(payload, Asked::Ordinary),
            },
            b"QStartNoAckMode" => {
                self.no_ack = true;
                self.say("OK")
            }
            b"qC" => {
                let current = self.current(session);
                self.say(
                    current.map_or(String::new(), |thread| format!("QC{}", thread_name(thread, self.multiprocess))),
                )
            }
            b"qfThreadInfo" => self.list_threads(session),
            b"qsThreadInfo" => self.say("l"),
            [b'm', range @ ..] => self.read_memory(range),
            [b'Z' | b'z', ..] => self.breakpoint(payload, session),
            [b'H', operation @ (b'g' | b'c'), thread @ ..] => self.select(*operation, thread, session),
            [b'T', thread @ ..] => self.is_alive(thread, session),
            [b'c' | b's' | b'C' | b'S', ..] => {
                let current = self.current(session);
                match resume::actions_of(payload, self.resumed, current) {
                    Some(actions) => self.resume(&actions, session),
                    None => self.say(MALFORMED),
                }
            }
            b"vCont" => self.say(MALFORMED),
            [b'v', b'C', b'o', b'n', b't', b';', actions @ ..] => self.resume(actions, session),
            b"qSupported" => self.features(b""),
            _ => self.query(payload, session),
        }
    }

    fn query(&mut self, payload: &[u8], session: &mut dyn Session) -> Option<Event> {
        if let Some(features) = payload.strip_prefix(b"qSupported:") {
            return self.features(features);
        }
        if let Some(thread) = payload.strip_prefix(b"qThreadExtraInfo,") {
            return self.describe_thread(thread, session);
        }
        if let Some(transfer) = payload.strip_prefix(b"qXfer:").and_then(Transfer::parse)
            && transfer.object == b"threads"
        {
            return self.transfer_threads(&transfer, session);
        }
        match check(payload) {
            Verdict::Pass => self.checked(payload),
            Verdict::Unknown => self.say(""),
            Verdict::Refuse => self.say(MALFORMED),
            Verdict::RefuseFile => self.say(MALFORMED_FILE),
        }
    }

    fn checked(&mut self, payload: &[u8]) -> Option<Event> {
        match payload {
            b"!" => self.extended = true,
            [b'R', ..] => self.forget_stop(),
            [b'X' | b'M', ..] if writes_nothing(payload) => return self.say("OK"),
            _ => {}
        }
        let asked = match payload {
            // gdb reads no reply to these. LLDB, which kills by `k`, is content with the end of the connection.
            [b'R', ..] | b"k" => Asked::Silence,
            payload if is_end(payload) => Asked::End,
            _ => Asked::Ordinary,
        };
        if payload == b"k" {
            self.forget_stop();
            self.closing |= !self.extended;
        }
        self.pass(payload, asked)
    }

    fn features(&mut self, features: &[u8]) -> Option<Event> {
        let has = |name: &[u8]| features.split(|byte| *byte == b';').any(|feature| feature == name);
        self.multiprocess = has(b"multiprocess+");
        self.reads_errors = has(b"error-message+");
        self.reasons = [has(b"swbreak+"), has(b"hwbreak+")];
        self.pass(&features_request(self.multiprocess), Asked::Features)
    }

    /// `m`: as much as fits a reply and the address space.
    fn read_memory(&mut self, range: &[u8]) -> Option<Event> {
        let range = split_once(range, b',').and_then(|(address, length)| number(address).zip(number(length)));
        let Some((address, length)) = range else { return self.say(MALFORMED) };
        if length == 0 {
            return self.say("");
        }
        let room = (self.packet_size / 2).saturating_sub(16) as u64;
        let last = (u64::MAX - address).min(length - 1).min(room.max(1) - 1);
        self.pass(format!("m{address:x},{:x}", last + 1).as_bytes(), Asked::Ordinary)
    }

    /// Conditions that can't be taken leave the breakpoint without: it stops always, and gdb, which judges each stop by
    /// its own condition whoever else did, decides.
    fn breakpoint(&mut self, payload: &[u8], session: &mut dyn Session) -> Option<Event> {
        let Some(packet) = BreakpointPacket::parse(payload) else { return self.say(MALFORMED) };
        let register = |number| session.register(number);
        let programs = packet.conditions.iter().map(|code| AgentProgram::verify(code, &register).map(Arc::new));
        let conditions = programs.collect::<Result<Vec<_>, _>>().unwrap_or_else(|error| {
            log::info!("gdb is to judge its condition at {:#x} itself: {error}", packet.address);
            Vec::new()
        });
        self.pass_with(&packet.plain, Asked::Ordinary, conditions)
    }

    fn select(&mut self, operation: u8, thread: &[u8], session: &mut dyn Session) -> Option<Event> {
        let thread = match ThreadId::parse(thread) {
            None => return self.say(MALFORMED),
            Some(ThreadId::One(thread)) if session.thread_ids().contains(&thread) => Some(thread),
            Some(ThreadId::One(_) | ThreadId::Foreign) => return self.say(NO_THREAD),
            Some(ThreadId::All | ThreadId::Any) if operation == b'c' => None,
            // Memory and registers are some thread's.
            Some(ThreadId::All) => return self.say(MALFORMED),
            Some(ThreadId::Any) => match self.current(session) {
                None => return self.say(NO_THREAD),
                current => current,
            },
        };
        if operation == b'c' {
            self.resumed = thread;
            return self.say("OK");
        }
        self.general = thread;
        let text = format!("Hg{:x}", thread.unwrap_or_default());
        self.pass(text.as_bytes(), Asked::Ordinary)
    }

    /// The client's thread, if there is such a one still; else the first.
    fn current(&self, session: &mut dyn Session) -> Option<u64> {
        let threads = session.thread_ids();
        self.general.filter(|thread| threads.contains(thread)).or(threads.first().copied())
    }

    fn is_alive(&mut self, thread: &[u8], session: &mut dyn Session) -> Option<Event> {
        let reply = match ThreadId::parse(thread) {
            Some(ThreadId::One(thread)) if session.thread_ids().contains(&thread) => b"OK",
            Some(ThreadId::One(_) | ThreadId::Foreign) => NO_THREAD,
            _ => MALFORMED,
        };
        self.say(reply)
    }

    fn resume(&mut self, actions: &[u8], session: &mut dyn Session) -> Option<Event> {
        match resume::normalize(actions, &session.thread_ids()) {
            Ok(packet) => {
                self.running = true;
                self.pass(&packet, Asked::Resume)
            }
            Err(Refusal::Malformed) => self.say(MALFORMED),
            Err(Refusal::NoThread) => self.say(NO_THREAD),
        }
    }

    fn list_threads(&mut self, session: &mut dyn Session) -> Option<Event> {
        let names = session.thread_ids().into_iter().map(|thread| thread_name(thread, self.multiprocess));
        let names = names.collect::<Vec<_>>().join(",");
        self.say(if names.is_empty() { "l".to_owned() } else { format!("m{names}") })
    }

    fn describe_thread(&mut self, thread: &[u8], session: &mut dyn Session) -> Option<Event> {
        let Some(ThreadId::One(id)) = ThreadId::parse(thread) else { return self.say(MALFORMED) };
        match session.threads().into_iter().find(|thread| thread.id == id) {
            Some(thread) => self.say(hex(format!("{} ({})", thread.name, thread.extra).as_bytes())),
            None => self.say(NO_THREAD),
        }
    }

    fn transfer_threads(&mut self, transfer: &Transfer<'_>, session: &mut dyn Session) -> Option<Event> {
        let Some((offset, length)) = transfer.range.filter(|_| transfer.annex.is_empty()) else {
            return self.say(MALFORMED);
        };
        // What follows the first part is of the same document.
        if offset == 0 {
            self.threads_document = threads::document(&session.threads(), self.multiprocess).into_bytes();
        }
        let rest =
            usize::try_from(offset).ok().and_then(|offset| self.threads_document.get(offset..)).unwrap_or_default();
        let room = usize::try_from(length).unwrap_or(usize::MAX).min(self.packet_size / 2);
        let part = &rest[..rest.len().min(room)];
        let more = if part.len() < rest.len() { b"m" } else { b"l" };
        let reply = [more, escape(part).as_slice()].concat();
        self.say(reply)
    }

    fn pass(&mut self, payload: &[u8], asked: Asked) -> Option<Event> {
        self.pass_with(payload, asked, Vec::new())
    }

    fn pass_with(&mut self, payload: &[u8], asked: Asked, conditions: Vec<Arc<AgentProgram>>) -> Option<Event> {
        self.asked = asked;
        Some(Event::Packet { bytes: frame(payload), conditions })
    }

    /// Answers by itself.
    fn say(&mut self, payload: impl AsRef<[u8]>) -> Option<Event> {
        self.reply(payload.as_ref());
        None
    }
}

/// Whether an `X` or `M` packet, which is well-formed, has no data.
fn writes_nothing(payload: &[u8]) -> bool {
    split_once(payload, b':').is_some_and(|(_, data)| data.is_empty())
}
