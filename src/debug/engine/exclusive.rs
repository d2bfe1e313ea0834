//! The *exclusive section*: one vCPU thread, or a front end, does something that no other vCPU may run beside (lifting a
//! planted byte, say). The others are held at their safe points; nobody is told.

use super::{Engine, KICK_AGAIN, Phase, State};

/// Who holds the exclusive section: a vCPU's thread, or a front end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// The thread of this vCPU.
    Vcpu(u32),
    /// A thread that is no vCPU's.
    FrontEnd,
}

impl Engine {
    /// Enters the exclusive section: no vCPU but the owner's runs until the guard is dropped. `None` if the VM is over.
    /// The calling thread holds no vCPU locked.
    pub fn exclusive(&self, owner: Owner) -> Option<Exclusive<'_>> {
        let own = if let Owner::Vcpu(n) = owner { Some(n) } else { None };
        let mut state = self.lock();
        let was_outside = own.map(|n| state.seats[n as usize].outside);
        while state.phase != Phase::Ended && state.exclusive.is_some() {
            // Another one is inside, and may wait for this vCPU.
            self.set_outside(&mut state, own, true);
            state = self.wait(&self.freed, state);
        }
        self.set_outside(&mut state, own, was_outside == Some(true));
        if state.phase == Phase::Ended {
            return None;
        }
        state.exclusive = Some(owner);
        while state.phase != Phase::Ended && !state.stands_still_but(owner) {
            let kicks = self.request(&state, |n, seat| !seat.stands_still() && own.map(|o| o as usize) != Some(n));
            drop(state);
            self.kick(kicks);
            let moving = |state: &mut State| state.phase != Phase::Ended && !state.stands_still_but(owner);
            let waited = self.still.wait_timeout_while(self.lock(), KICK_AGAIN, moving);
            state = waited.unwrap_or_else(|e| e.into_inner()).0;
        }
        let exclusive = Exclusive { engine: self, stopped: state.phase == Phase::Stopped };
        let is_over = state.phase == Phase::Ended;
        drop(state);
        (!is_over).then_some(exclusive)
    }

    fn set_outside(&self, state: &mut State, vcpu: Option<u32>, outside: bool) {
        if let Some(n) = vcpu
            && state.seats[n as usize].outside != outside
        {
            state.seats[n as usize].outside = outside;
            if outside {
                self.has_come(state);
            }
        }
    }

    /// Runs `f`, which uses neither the guest nor the vCPU's context, on the vCPU's thread. Meanwhile others may enter
    /// the exclusive section, whatever `f` waits for; this returns when they have left it. No stop is reported before.
    pub fn outside<T>(&self, vcpu: u32, f: impl FnOnce() -> T) -> T {
        struct Return<'a>(&'a Engine, u32);
        impl Drop for Return<'_> {
            fn drop(&mut self) {
                let mut state = self.0.lock();
                while state.phase != Phase::Ended && state.exclusive.is_some() {
                    state = self.0.wait(&self.0.freed, state);
                }
                self.0.set_outside(&mut state, Some(self.1), false);
            }
        }
        self.set_outside(&mut self.lock(), Some(vcpu), true);
        let _return = Return(self, vcpu);
        f()
    }
}

/// The exclusive section, left on drop.
pub struct Exclusive<'a> {
    engine: &'a Engine,
    /// The world was stopped meanwhile: the owner may look and change, but not execute.
    pub stopped: bool,
}

impl Drop for Exclusive<'_> {
    fn drop(&mut self) {
        let mut state = self.engine.lock();
        state.exclusive = None;
        self.engine.settle(&mut state);
        self.engine.let_go(state);
        self.engine.freed.notify_all();
    }
}
