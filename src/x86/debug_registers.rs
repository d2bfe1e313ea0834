//! The guest's own debug registers: its breakpoints and watchpoints, which raise #DB (Intel SDM volume 3, chapter 18.2).

use super::core::Core;
use super::hooks::{WatchKind, Watchpoint};
use crate::registers::RFLAGS_RF;

/// What a debug register looks out for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Execute,
    Write,
    ReadWrite,
    /// Ports are not looked at.
    Port,
}

impl Core {
    /// The enabled registers among DR0 to DR3: number, kind and length.
    fn enabled(&self) -> impl Iterator<Item = (usize, Kind, u64)> + use<> {
        let control = self.state.debug[7];
        (0..4).filter(move |n| control >> (2 * n) & 3 != 0).map(move |n| {
            let kind = match control >> (16 + 4 * n) & 3 {
                0 => Kind::Execute,
                1 => Kind::Write,
                2 => Kind::Port,
                _ => Kind::ReadWrite,
            };
            let length = match control >> (18 + 4 * n) & 3 {
                0 => 1,
                1 => 2,
                2 => 8,
                _ => 4,
            };
            (n, kind, length)
        })
    }

    /// DR6 bits of the guest's breakpoints at RIP.
    pub fn guest_breakpoint(&self) -> Option<u64> {
        if self.state.debug[7] & 0xff == 0 || self.state.core.registers.rflags & RFLAGS_RF != 0 {
            return None;
        }
        let rip = self.state.core.registers.rip;
        let hits = self.enabled().filter(|(n, kind, _)| *kind == Kind::Execute && self.state.debug[*n] == rip);
        let bits = hits.fold(0, |bits, (n, ..)| bits | 1 << n);
        (bits != 0).then_some(bits)
    }

    /// The guest's watchpoints, in the order of their registers.
    pub fn guest_watchpoints(&self) -> Vec<Watchpoint> {
        self.watching().map(|(_, watchpoint)| watchpoint).collect()
    }

    fn watching(&self) -> impl Iterator<Item = (usize, Watchpoint)> {
        self.enabled().filter_map(|(n, kind, length)| {
            let kind = match kind {
                Kind::Write => WatchKind::Write,
                Kind::ReadWrite => WatchKind::ReadWrite,
                Kind::Execute | Kind::Port => return None,
            };
            Some((n, Watchpoint { address: self.state.debug[n] & !(length - 1), length, kind }))
        })
    }

    /// DR6 bits of the `index`-th of [`Core::guest_watchpoints`].
    pub fn guest_watch_reason(&self, index: usize) -> u64 {
        self.watching().nth(index).map_or(0, |(n, _)| 1 << n)
    }
}
