//! One client's session: bytes come through the filter to gdbstub, stops of the engine go back. The socket and the
//! engine are waited for together; nothing is polled.

use std::os::fd::AsFd;
use std::sync::Arc;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use super::address::{Client, Listener};
use super::filter::{Event, Filter, Session as FilterSession, ThreadEntry};
use super::policy::{Decision, Policy};
use super::registers::core_register;
use super::stub::{Fed, PACKET_SIZE, Stub};
use super::target::{GdbTarget, Reason, Request};
use crate::debug::engine::{End, KICK_AGAIN, Plan, Status};
use crate::debug::stop::{Stop, StopReason};
use crate::error::Result;
use crate::registers::RegisterId;
use crate::vm::Machine;

/// The most that waits to be read by a client that does not read.
const MOST_UNSENT: usize = 8 << 20;

/// How a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The client detached; the guest runs on.
    Detached,
    /// The client killed the VM, or the VM is over.
    Over,
    /// The connection is gone.
    Lost,
    /// The server is closed.
    Closed,
}

/// A session at work.
pub struct Session<'a> {
    client: &'a Client,
    listener: &'a mut Listener,
    closing: &'a EventFd,
    wake: &'a Arc<EventFd>,
    policy: Option<Arc<dyn Policy>>,
    target: GdbTarget,
    stub: Stub,
    filter: Filter,
    unsent: Vec<u8>,
    /// The number of the last stop that was dealt with.
    seen: u64,
    is_lost: bool,
    ended: Option<Outcome>,
}

/// The machine after a session (a client may have exchanged it), and how it ended.
pub struct Left {
    /// The VM.
    pub machine: Arc<Machine>,
    /// How the session ended.
    pub outcome: Outcome,
}

impl<'a> Session<'a> {
    /// Serves `client` until it goes.
    pub fn serve(
        machine: Arc<Machine>,
        client: &'a Client,
        listener: &'a mut Listener,
        closing: &'a EventFd,
        wake: &'a Arc<EventFd>,
        policy: Option<Arc<dyn Policy>>,
    ) -> Left {
        machine.set_controller(Some(client.name.clone()));
        machine.engine.gate_stops(policy.as_ref().is_some_and(|p| p.judges()));
        let mut target = GdbTarget::new(machine, policy.clone());
        let stub = Stub::new(&mut target);
        let mut session = Self {
            client,
            listener,
            closing,
            wake,
            policy,
            target,
            stub,
            filter: Filter::new(PACKET_SIZE),
            unsent: Vec::new(),
            seen: 0,
            is_lost: false,
            ended: None,
        };
        let outcome = session.run();
        if !session.target.is_let_go {
            session.leave(outcome);
        }
        session.send();
        Left { machine: session.target.machine.clone(), outcome }
    }

    fn run(&mut self) -> Outcome {
        self.stop_world();
        self.target.refresh_threads();
        self.remember_end();
        self.tell_attached();
        loop {
            while self.turn() {}
            if let Some(outcome) = self.ended {
                // Its answer goes out when it is true: the guest runs, or is dead.
                return outcome;
            }
            self.send();
            if self.is_lost {
                return Outcome::Lost;
            }
            if self.filter.wants_close() && self.unsent.is_empty() {
                return Outcome::Lost;
            }
            if !self.wait() {
                return Outcome::Closed;
            }
        }
    }

    /// One packet, or one stop. False: nothing is there to do.
    fn turn(&mut self) -> bool {
        if self.ended.is_some() {
            return false;
        }
        if self.filter.is_running() && self.look_at_engine() {
            return true;
        }
        let event = self.filter.next(&mut View { target: &mut self.target });
        match event {
            None => false,
            Some(Event::Interrupt) => {
                self.target.machine.engine.interrupt(StopReason::Interrupt);
                true
            }
            Some(Event::Packet { bytes, conditions }) => {
                self.target.conditions = conditions;
                self.packet(&bytes);
                true
            }
        }
    }

    fn tell_attached(&mut self) {
        if let Some(Err(failure)) = self.policy.as_ref().and_then(|p| p.on_attach(&self.client.name)) {
            self.target.failed(failure);
        }
    }

    fn packet(&mut self, bytes: &[u8]) {
        if self.target.is_let_go {
            if needs_process(bytes) {
                return self.filter.outgoing(NO_PROCESS);
            }
            if bytes.starts_with(b"$vAttach;") {
                self.take_up();
            }
        }
        let fed = self.stub.feed(&mut self.target, bytes);
        if fed == Fed::Failed {
            let packets = self.filter.recover();
            self.stub.prime(&mut self.target, &packets);
            return;
        }
        if let Some(resumed) = self.target.take_resumed()
            && let Err(error) = resumed
        {
            let reason = self.target.reason_of_refusal(&error);
            self.report(reason);
        }
        let output = self.stub.take_output();
        match self.target.refusal.take() {
            Some(text) if self.filter.refuse(&text) => {}
            refusal => {
                refusal.into_iter().for_each(|text| self.target.say(&text));
                self.filter.outgoing(&output);
            }
        }
        match self.target.request.take() {
            Some(Request::Kill) => self.kill(),
            Some(Request::Restart(_)) => self.adopt(),
            None => {}
        }
        match fed {
            Fed::Detached if self.filter.is_extended() => self.let_go(),
            Fed::Detached => self.ended = Some(Outcome::Detached),
            Fed::Killed => self.kill(),
            _ => {}
        }
    }

    fn kill(&mut self) {
        self.target.machine.kill();
        self.target.refresh_threads();
        if !self.filter.is_extended() {
            self.ended = Some(Outcome::Over);
        }
    }

    /// A fresh VM has taken the place of the old one.
    fn adopt(&mut self) {
        self.target.machine.engine.add_waiter(self.wake);
        self.seen = 0;
        self.control();
    }

    /// The client of extended mode detaches: the guest runs on, nobody's, and the connection stays.
    fn let_go(&mut self) {
        self.leave(Outcome::Detached);
        self.target.is_let_go = true;
        self.target.refresh_threads();
    }

    /// It attaches again.
    fn take_up(&mut self) {
        self.target.is_let_go = false;
        self.control();
        self.remember_end();
        self.tell_attached();
    }

    /// The client controls the VM from here on, which stands still.
    fn control(&mut self) {
        let machine = self.target.machine.clone();
        machine.set_controller(Some(self.client.name.clone()));
        machine.engine.gate_stops(self.policy.as_ref().is_some_and(|p| p.judges()));
        self.stop_world();
        self.target.refresh_threads();
    }

    /// Whether the engine had something to say to a client that waits for it.
    fn look_at_engine(&mut self) -> bool {
        match self.target.machine.engine.status() {
            Status::Running => false,
            Status::Stopped(stop) if stop.number == self.seen => false,
            Status::Stopped(stop) => {
                self.seen = stop.number;
                self.stopped(stop);
                true
            }
            Status::Ended(end) => {
                let reason = match &*end {
                    End::Exit(code) => Reason::Exited(code.to_le_bytes()[0]),
                    _ => Reason::Terminated(gdbstub::common::Signal::SIGKILL),
                };
                if let End::Failed(error) = &*end {
                    self.target.say(&format!("uhyve: {error}"));
                }
                self.report(reason);
                self.target.refresh_threads();
                true
            }
        }
    }

    /// The world stands still: the policy decides, and the client may be told.
    fn stopped(&mut self, stop: Stop) {
        self.target.machine.after_stop(&stop);
        self.target.refresh_threads();
        let decision = match self.policy.as_ref().and_then(|policy| policy.on_stop(&stop)) {
            None => Decision::Report,
            Some(Ok(decision)) => decision,
            Some(Err(failure)) => {
                self.target.failed(failure);
                Decision::Report
            }
        };
        let result: Result<()> = match decision {
            Decision::Resume if !stop.reason.is_final() => self.target.run(self.target.last_plan.clone()),
            Decision::Step if !stop.reason.is_final() => {
                let kept = self.target.last_plan.clone();
                let mut plan = kept.clone();
                if let Some(chosen) = plan.get_mut(stop.vcpu as usize) {
                    *chosen = Plan::Step;
                }
                let result = self.target.run(plan);
                self.target.last_plan = kept;
                result
            }
            Decision::End => {
                self.target.machine.kill();
                Ok(())
            }
            _ => {
                self.target.machine.engine.approve();
                let reason = self.target.reason_of(&stop);
                self.report(reason);
                Ok(())
            }
        };
        if let Err(error) = result {
            self.target.machine.engine.approve();
            let reason = self.target.reason_of_refusal(&error);
            self.report(reason);
        }
    }

    fn report(&mut self, reason: Reason) {
        let messages = std::mem::take(&mut self.target.messages);
        if !messages.is_empty() {
            self.filter.console(messages.as_bytes());
        }
        self.stub.report(&mut self.target, reason);
        let output = self.stub.take_output();
        self.filter.outgoing(&output);
    }

    /// A client that comes after the guest's end hears of it when it asks.
    fn remember_end(&mut self) {
        let Some(stop) = self.target.stop() else { return };
        match stop.reason {
            StopReason::Exit { code } => self.filter.remember(&format!("W{:02x}", code.to_le_bytes()[0])),
            StopReason::Crash(_) => {
                let tid = self.target.tid_of(stop.vcpu);
                self.filter.remember(&format!("T0bthread:{tid:x};"));
            }
            _ => {}
        }
    }

    /// Brings a guest that runs to a stop before its client is served.
    fn stop_world(&mut self) {
        let engine = &self.target.machine.engine;
        loop {
            match engine.status() {
                Status::Running => {
                    engine.interrupt(StopReason::Interrupt);
                }
                Status::Stopped(stop) => {
                    self.seen = stop.number;
                    engine.approve();
                    return;
                }
                Status::Ended(_) => return,
            }
            let timeout = PollTimeout::try_from(KICK_AGAIN).unwrap_or(PollTimeout::ZERO);
            let _ = poll(&mut [PollFd::new(self.wake.as_fd(), PollFlags::POLLIN)], timeout);
            let _ = self.wake.read();
            engine.kick_late();
        }
    }

    /// Sleeps until the client, the engine, another client or the server's owner has something. False: close.
    fn wait(&mut self) -> bool {
        // A hang-up counts as readable.
        let flags = PollFlags::POLLIN;
        let stopping = self.target.machine.engine.is_stopping();
        let timeout = if stopping { PollTimeout::try_from(KICK_AGAIN).ok() } else { None };
        let reads_client = self.unsent.len() < MOST_UNSENT;
        let writer = self.client.writer();
        let mut fds = vec![
            PollFd::new(self.closing.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.wake.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.client.reader(), if reads_client { flags } else { PollFlags::empty() }),
        ];
        if !self.unsent.is_empty() {
            fds.push(PollFd::new(writer, PollFlags::POLLOUT));
        }
        let at_listener = self.listener.descriptor().map(|fd| {
            fds.push(PollFd::new(fd, PollFlags::POLLIN));
            fds.len() - 1
        });
        match poll(&mut fds, timeout.unwrap_or(PollTimeout::NONE)) {
            Ok(0) => self.target.machine.engine.kick_late(),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => {
                log::error!("gdb: poll: {error}");
                return false;
            }
        }
        let ready = |index: usize| fds[index].any().unwrap_or(false);
        let (close, woken, readable) = (ready(0), ready(1), ready(2));
        let second = at_listener.is_some_and(ready);
        drop(fds);
        if woken {
            let _ = self.wake.read();
        }
        if readable {
            self.receive();
        }
        if second {
            // The next one may have come because this one is gone.
            self.receive_all();
            if !self.is_lost
                && let Some(other) = self.listener.accept()
            {
                self.refuse(&other);
            }
        }
        !close
    }

    /// Takes all that the client has sent, to see whether it is still there.
    fn receive_all(&mut self) {
        const MOST_READS: usize = 64;
        for _ in 0..MOST_READS {
            let mut fds = [PollFd::new(self.client.reader(), PollFlags::POLLIN)];
            let is_readable = matches!(poll(&mut fds, PollTimeout::ZERO), Ok(n) if n > 0);
            if self.is_lost || !is_readable {
                return;
            }
            self.receive();
        }
    }

    fn receive(&mut self) {
        let mut buffer = [0; 16 << 10];
        match self.client.read(&mut buffer) {
            Ok(0) => self.is_lost = true,
            Ok(length) => self.filter.receive(&buffer[..length]),
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            Err(_) => self.is_lost = true,
        }
    }

    /// Writes what there is room for; a whole batch of answers at once.
    fn send(&mut self) {
        self.unsent.extend(self.filter.output());
        let mut done = 0;
        while done < self.unsent.len() {
            let mut fds = [PollFd::new(self.client.writer(), PollFlags::POLLOUT)];
            if !matches!(poll(&mut fds, PollTimeout::ZERO), Ok(n) if n > 0) {
                break;
            }
            match self.client.write(&self.unsent[done..]) {
                Ok(length) => done += length,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => break,
                Err(_) => {
                    self.is_lost = true;
                    break;
                }
            }
        }
        self.unsent.drain(..done);
    }

    /// Another client came: it is told who is there, and goes.
    fn refuse(&self, other: &Client) {
        let text = format!("E.another client ({}) is attached to this guest", self.client.name);
        let sum = text.bytes().fold(0u8, |sum, byte| sum.wrapping_add(byte));
        let _ = other.write(format!("+${text}#{sum:02x}").as_bytes());
        log::warn!("gdb: {} was refused: {} is attached", other.name, self.client.name);
    }

    /// What becomes of the guest when its client is gone.
    fn leave(&mut self, outcome: Outcome) {
        let machine = self.target.machine.clone();
        let name = &self.client.name;
        let decision = match outcome {
            Outcome::Detached => match self.policy.as_ref().and_then(|p| p.on_detach(name)) {
                Some(Err(failure)) => {
                    self.target.failed(failure);
                    Decision::Report
                }
                _ => Decision::Resume,
            },
            Outcome::Lost => match self.policy.as_ref().and_then(|p| p.on_disconnect(name)) {
                Some(Ok(decision)) => decision,
                Some(Err(failure)) => {
                    self.target.failed(failure);
                    Decision::Report
                }
                None => Decision::Report,
            },
            Outcome::Over | Outcome::Closed => Decision::Report,
        };
        let goes_on = matches!(outcome, Outcome::Lost | Outcome::Detached) && decision != Decision::End;
        if goes_on {
            // A client that goes while its guest runs may have left vCPUs that hold.
            self.stop_world();
        }
        machine.catch_hypercalls(None);
        self.target.clear_breakpoints();
        machine.engine.gate_stops(false);
        machine.set_controller(None);
        match decision {
            Decision::End => machine.kill(),
            Decision::Resume => {
                let is_stopped = matches!(machine.engine.status(), Status::Stopped(stop) if !stop.reason.is_final());
                if is_stopped && let Err(error) = machine.resume(|_| Plan::Run) {
                    log::warn!("gdb: the guest does not run on: {error}");
                }
            }
            _ => {}
        }
    }
}

/// Reply: no such process (ESRCH).
const NO_PROCESS: &[u8] = b"$E03#a8";

/// Whether a packet, framed, is about a process that the client has: not one that is to be attached or run, nor what the
/// server knows without.
fn needs_process(packet: &[u8]) -> bool {
    let free = ["vAttach;", "vRun;", "vFile:", "vCont?", "R", "q", "Q", "!", "?"];
    let payload = packet.get(1..).unwrap_or_default();
    payload.starts_with(b"QCatchSyscalls") || !free.iter().any(|start| payload.starts_with(start.as_bytes()))
}

/// What the filter asks of the session.
struct View<'a> {
    target: &'a mut GdbTarget,
}

impl FilterSession for View<'_> {
    fn thread_ids(&mut self) -> Vec<u64> {
        self.target.threads().iter().map(|thread| thread.id.into()).collect()
    }

    fn threads(&mut self) -> Vec<ThreadEntry> {
        let entry = |t: &super::policy::ThreadInfo| ThreadEntry {
            id: t.id.into(),
            name: t.name.clone(),
            core: Some(t.vcpu),
            extra: t.extra.clone(),
        };
        self.target.threads().iter().map(entry).collect()
    }

    fn register(&self, number: u16) -> Option<RegisterId> {
        core_register(number)
    }
}
