//! How console output comes out: queued port writes, lines, and the thread that looks after both while nobody else does.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use super::Machine;
use crate::backend::Afterwork;
use crate::debug::engine::{End, Status};
use crate::error::{Error, Result};
use crate::hypercall::Kind;
use crate::stats::ExitKind;
use crate::vcpu;

/// How long a line of console output without its end waits for more.
const FLUSH_AFTER: Duration = Duration::from_millis(50);

/// How long a callback gets output of a VM that was ended from outside.
pub(super) const LAST_WORDS: Duration = Duration::from_secs(1);

/// The console's byte port of interface 1: most exits of a booting kernel are its messages, byte by byte.
pub(crate) const CONSOLE_PORT: u16 = uhyve_interface::v1::HypercallAddress::Uart as u16;
/// How often queued port writes are looked for while no exit takes them.
const DRAIN_EVERY: Duration = Duration::from_millis(20);

impl Machine {
    /// Gives the console all output, waiting for it if need be; a signal whose `check` fails ends that. What a callback
    /// on another thread is at is waited for when no more output follows.
    pub(super) fn flush<E: From<Error>>(
        &self,
        is_last: bool,
        check: &mut dyn FnMut() -> Result<(), E>,
    ) -> Result<(), E> {
        let failure = RefCell::new(None);
        let check = RefCell::new(check);
        let cancelled = || match (check.borrow_mut())() {
            Ok(()) => false,
            Err(error) => {
                *failure.borrow_mut() = Some(error);
                true
            }
        };
        let flushed = loop {
            let is_drained = self.drain(0, &|| false)?;
            // What the queue still holds, the console takes when it is empty.
            let waits = is_last || !is_drained;
            let flushed = if waits { self.console.settle(&cancelled) } else { self.console.flush(&cancelled) };
            if is_drained || flushed.is_err() {
                break flushed;
            }
        };
        if let Some(error) = failure.into_inner() {
            return Err(error);
        }
        match flushed {
            Err(source) if source.kind() != std::io::ErrorKind::Interrupted => {
                Err(Error::Host { what: "console output".into(), source }.into())
            }
            _ => Ok(()),
        }
    }

    /// The two marks of that queue, which are equal while nothing waits in it.
    #[inline]
    pub(crate) fn queue(&self) -> Option<(&AtomicU32, &AtomicU32)> {
        self.coalesced.as_ref().map(|queue| queue.marks())
    }

    /// Takes the port writes that wait in the queue; what is counted, is for `vcpu`. While the queue is locked nothing
    /// waits and nobody is called: complete lines go to the sink afterwards. False: the console is full, and some wait still.
    pub(crate) fn drain(&self, vcpu: u32, cancelled: &dyn Fn() -> bool) -> Result<bool> {
        let Some(queue) = self.coalesced.as_ref().filter(|q| !q.is_empty()) else { return Ok(true) };
        let mut is_refused = false;
        queue.drain(&mut |port, data| {
            if port != CONSOLE_PORT {
                let mut value = [0; 4];
                let length = data.len().min(value.len());
                value[..length].copy_from_slice(&data[..length]);
                self.pci.write(port, u8::try_from(length).expect("at most four"), u32::from_le_bytes(value));
                self.stats.count(vcpu, ExitKind::PciWrite);
                return true;
            }
            let taken = self.console.push(&data[..1]);
            if taken {
                self.stats.count_hypercall(vcpu, Kind::SerialWriteByte);
            }
            is_refused = !taken;
            taken
        });
        if !self.console.is_callback() {
            self.deliver(cancelled)?;
        }
        Ok(!is_refused)
    }

    /// The same, and waits for the console. False: `cancelled` became true before it had taken all. Not for the console's
    /// own thread, which callbacks would wait for.
    pub(crate) fn drain_all(&self, vcpu: u32, cancelled: &dyn Fn() -> bool) -> Result<bool> {
        while !self.drain(vcpu, cancelled)? {
            match self.console.await_room(cancelled) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => return Ok(false),
                Err(source) => return Err(Error::Host { what: "console output".into(), source }),
            }
        }
        Ok(true)
    }

    pub(super) fn deliver(&self, cancelled: &dyn Fn() -> bool) -> Result<()> {
        match self.console.deliver(cancelled) {
            Err(source) if source.kind() != std::io::ErrorKind::Interrupted => {
                Err(Error::Host { what: "console output".into(), source })
            }
            _ => Ok(()),
        }
    }

    /// Starts the thread that brings console output out while nobody else does: queued bytes of a guest that makes no
    /// exits, and the beginning of a line that does not end.
    pub(super) fn spawn_pump(self: &Arc<Self>, afterwork: Option<Afterwork>) -> Result<()> {
        let machine = self.clone();
        let every = (self.coalesced.is_some() && !self.has_bursts).then_some(DRAIN_EVERY);
        if every.is_none() || self.console.is_callback() {
            let pump = self.pump.clone();
            self.console.set_notifier(Box::new(move || pump.wake()));
        }
        let body = move || {
            vcpu::enter_thread(&machine, None);
            if let Some(work) = afterwork {
                work();
            }
            // While the world stands still, nothing comes into the queue.
            while machine.pump.sleep(every.filter(|_| matches!(machine.engine.status(), Status::Running))) {
                if let Err(error) = machine.pump_console() {
                    machine.engine.end(End::Failed(error));
                }
            }
        };
        let thread = std::thread::Builder::new().name("uhyve-console".into()).spawn(body);
        let handle = thread.map_err(|source| Error::Host { what: "can't start the console thread".into(), source })?;
        self.threads().push(handle);
        Ok(())
    }

    /// One round of the console's thread.
    fn pump_console(&self) -> Result<()> {
        // A callback gets everything; another sink takes what it can when the VM is over.
        let over = || self.pump.is_over() && !self.console.is_callback();
        self.drain(0, &over)?;
        self.deliver(&over)?;
        if !self.console.has_unflushed() || !self.pump.linger(FLUSH_AFTER) {
            return Ok(());
        }
        match self.console.flush(&|| true) {
            // What the sink does not take now, it takes later.
            Err(source) if source.kind() != std::io::ErrorKind::Interrupted => {
                Err(Error::Host { what: "console output".into(), source })
            }
            _ => Ok(()),
        }
    }
}
