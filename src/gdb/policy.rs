//! What a front end's policy may decide of a session with gdb. The server asks; a method whose answer is `None` was not
//! overridden, and the default is taken here, in Rust.

use std::any::Any;
use std::sync::Arc;

use super::breakpoints::Key;
use crate::debug::breakpoints::Predicate;
use crate::debug::condition::Program;
use crate::debug::stop::Stop;
use crate::vm::Machine;

/// What becomes of a stop of the world.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Tell the client.
    Report,
    /// Go on as the client last asked.
    Resume,
    /// One instruction on the vCPU that stopped, then look again.
    Step,
    /// End the VM.
    End,
}

/// What a client sees as a thread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThreadInfo {
    /// Its number: 1 to 2³¹−1.
    pub id: u32,
    /// Its name.
    pub name: String,
    /// What `info threads` adds.
    pub extra: String,
    /// The vCPU whose registers these are, and whose memory it sees.
    pub vcpu: u32,
    /// Registers that differ from that vCPU's, by their position in [`crate::registers::RegisterId::NAMED`]'s order: those
    /// of a task that is not running. Such a thread can be looked at, not stepped.
    pub saved: Vec<(crate::registers::RegisterId, u64)>,
}

/// A breakpoint or watchpoint that a client sets or has taken away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Its kind and place.
    pub key: Key,
    /// It came with a condition that the target evaluates.
    pub is_conditional: bool,
}

/// How a policy wants a client's breakpoint: its conditions must hold beside the client's own.
#[derive(Clone, Default)]
pub struct Wish {
    /// It is not to be, and why.
    pub refusal: Option<String>,
    /// A name for messages.
    pub name: Option<String>,
    /// The source and the program of a condition.
    pub compiled: Option<(String, Arc<Program>)>,
    /// A callback.
    pub predicate: Option<Arc<dyn Predicate>>,
    /// Hits to let pass before the conditions are asked.
    pub ignore: u64,
    /// Only this vCPU.
    pub vcpu: Option<u32>,
}

/// A policy that failed: text for the client's console, and the front end's own error value.
#[derive(Clone)]
pub struct Failure {
    /// For a person.
    pub text: String,
    /// For the front end that made the policy.
    pub error: Arc<dyn Any + Send + Sync>,
}

/// The result of a policy's method; `None`: not overridden.
pub type Answer<T> = Option<Result<T, Failure>>;

/// Decides for a server. Called on the server's thread, with no lock held and, but for `monitor` and the session's
/// events, with the world stopped.
pub trait Policy: Send + Sync {
    /// Whether `on_stop` was overridden: stops are then shown to others only after it has decided.
    fn judges(&self) -> bool;
    /// Once for each stop of the world that comes while a client controls the guest.
    fn on_stop(&self, stop: &Stop) -> Answer<Decision>;
    /// A client sets a breakpoint that is not there yet. A failure refuses it, so that the guest stays stopped.
    fn on_insert(&self, _request: &Request) -> Answer<Wish> {
        None
    }
    /// A client's breakpoint is gone: the guest is about to run without it, or the client is.
    fn on_remove(&self, _request: &Request) -> Answer<()> {
        None
    }
    /// The text of what a callback of this front end failed with; `None`: it is another's.
    fn describe(&self, _error: &Arc<dyn Any + Send + Sync>) -> Option<String> {
        None
    }
    /// The threads that the client sees.
    fn threads(&self) -> Answer<Vec<ThreadInfo>>;
    /// A client has attached.
    fn on_attach(&self, client: &str) -> Answer<()>;
    /// A client has detached; the guest runs on.
    fn on_detach(&self, client: &str) -> Answer<()>;
    /// The connection to a client is lost. `Report` and `Step` leave the guest stopped.
    fn on_disconnect(&self, client: &str) -> Answer<Decision>;
    /// A monitor command of the policy's own; `None` if it has none of that name.
    fn monitor(&self, command: &str, arguments: &str) -> Answer<String>;
    /// Its monitor commands, each with a line of help.
    fn monitor_commands(&self) -> Vec<(String, String)>;
    /// Sets the named callable of the front end as a condition of a breakpoint; the error says which names there are.
    fn bind(&self, breakpoint: &Arc<crate::debug::breakpoints::Breakpoint>, name: &str) -> Result<(), String>;
    /// Compiles a condition's text for this VM.
    fn compile(&self, text: &str) -> Result<Program, String>;
    /// Makes a fresh VM of the same configuration, stopped at its entry; with `arguments`, those of the application.
    fn restart(&self, arguments: Option<Vec<String>>) -> Result<Arc<Machine>, Failure>;
    /// Keeps a failure for the front end's next call.
    fn keep(&self, failure: Failure);
    /// Keeps what a callback failed with; the front end may see it in the stop of that number, too.
    fn keep_of_stop(&self, failure: Failure, _stop: u64) {
        self.keep(failure);
    }
}
