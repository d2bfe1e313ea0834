//! Extended mode: the server outlives the VM. `run` makes a fresh one, `kill` ends it.

use std::convert::Infallible;

use gdbstub::common::Pid;
use gdbstub::target::TargetResult;
use gdbstub::target::ext::extended_mode::{
    Args, AttachKind, CurrentActivePid, CurrentActivePidOps, ExtendedMode, ShouldTerminate,
};
use gdbstub::target::{TargetError, ext};

use super::{ESRCH, GdbTarget, Request};

/// The one process that a VM is.
const PID: Pid = Pid::MIN;

impl ExtendedMode for GdbTarget {
    fn run(&mut self, _filename: Option<&[u8]>, args: Args<'_, '_>) -> TargetResult<Pid, Self> {
        let arguments: Vec<String> = args.map(|word| String::from_utf8_lossy(word).into_owned()).collect();
        self.restart_with((!arguments.is_empty()).then_some(arguments))?;
        Ok(PID)
    }

    fn attach(&mut self, _pid: Pid) -> TargetResult<(), Self> {
        self.refresh_threads();
        if self.threads.is_empty() { Err(TargetError::Errno(ESRCH)) } else { Ok(()) }
    }

    fn query_if_attached(&mut self, _pid: Pid) -> TargetResult<AttachKind, Self> {
        Ok(if self.was_run { AttachKind::Run } else { AttachKind::Attach })
    }

    fn kill(&mut self, _pid: Option<Pid>) -> TargetResult<ShouldTerminate, Self> {
        self.request = Some(Request::Kill);
        Ok(ShouldTerminate::No)
    }

    fn restart(&mut self) -> Result<(), Infallible> {
        if let Err(error) = self.restart_with(None) {
            let _: TargetError<Infallible> = error;
            self.say("uhyve: the VM can't be started again");
        }
        Ok(())
    }

    fn support_current_active_pid(&mut self) -> Option<CurrentActivePidOps<'_, Self>> {
        Some(self)
    }

    fn support_configure_aslr(&mut self) -> Option<ext::extended_mode::ConfigureAslrOps<'_, Self>> {
        None
    }
}

impl CurrentActivePid for GdbTarget {
    fn current_active_pid(&mut self) -> Result<Pid, Infallible> {
        Ok(PID)
    }
}

impl GdbTarget {
    fn restart_with(&mut self, arguments: Option<Vec<String>>) -> TargetResult<(), Self> {
        let Some(policy) = self.policy.clone() else {
            self.say("uhyve: this server has no way to make a fresh VM");
            return Err(TargetError::NonFatal);
        };
        self.clear_breakpoints();
        match policy.restart(arguments.clone()) {
            Ok(machine) => {
                self.replace_machine(machine);
                self.request = Some(Request::Restart(arguments));
                self.refresh_threads();
                Ok(())
            }
            Err(failure) => {
                self.failed(failure);
                Err(TargetError::NonFatal)
            }
        }
    }
}
