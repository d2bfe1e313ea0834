//! `monitor` commands: what a stock gdb can say to the engine beyond its own protocol. Breakpoints that are set here are
//! the engine's own: they stay when the client goes, and their conditions are evaluated in the target.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::sync::Arc;

use gdbstub::target::ext::monitor_cmd::{ConsoleOutput, MonitorCmd};

use super::policy::Policy;
use super::target::GdbTarget;
use crate::debug::breakpoints::{Breakpoint, BreakpointOptions, Condition};

/// How much goes into one packet of console text.
const PIECE: usize = 2048;

type Output = Result<String, String>;

struct Command {
    name: &'static str,
    usage: &'static str,
    help: &'static str,
    run: fn(&mut GdbTarget, &str) -> Output,
}

const COMMANDS: [Command; 12] = [
    Command { name: "help", usage: "", help: "show this", run: |target, _| Ok(help(target)) },
    Command {
        name: "break",
        usage: "LOCATION [if CONDITION]",
        help: "stop there; LOCATION is symbol, symbol+OFFSET or address",
        run: |target, text| set_break(target, text, false),
    },
    Command {
        name: "hbreak",
        usage: "LOCATION [if CONDITION]",
        help: "the same by a debug register, which holds when the guest overwrites its code",
        run: |target, text| set_break(target, text, true),
    },
    Command {
        name: "condition",
        usage: "N [CONDITION]",
        help: "stop at breakpoint N only where CONDITION is true",
        run: set_condition,
    },
    Command {
        name: "python",
        usage: "NAME [N]",
        help: "let the Python function NAME decide at breakpoint N (the last one, if not given)",
        run: set_callable,
    },
    Command { name: "ignore", usage: "N COUNT", help: "let COUNT hits of breakpoint N pass", run: set_ignore },
    Command {
        name: "enable",
        usage: "N",
        help: "enable breakpoint N",
        run: |target, text| set_enabled(target, text, true),
    },
    Command {
        name: "disable",
        usage: "N",
        help: "disable breakpoint N",
        run: |target, text| set_enabled(target, text, false),
    },
    Command { name: "delete", usage: "N", help: "delete breakpoint N", run: delete },
    Command {
        name: "breakpoints",
        usage: "",
        help: "list the breakpoints of everybody",
        run: |target, _| Ok(list(target)),
    },
    Command {
        name: "stats",
        usage: "",
        help: "count exits and hypercalls of each vCPU",
        run: |target, _| Ok(stats(target)),
    },
    Command { name: "vm", usage: "", help: "tell of the image and the machine", run: |target, _| Ok(describe(target)) },
];

impl MonitorCmd for GdbTarget {
    fn handle_monitor_cmd(&mut self, cmd: &[u8], mut out: ConsoleOutput<'_>) -> Result<(), Infallible> {
        let line = String::from_utf8_lossy(cmd).into_owned();
        // What waits to be said since a stop, which is the only time that a client listens otherwise.
        let mut text = std::mem::take(&mut self.messages);
        match execute(self, line.trim()) {
            Ok(answer) => text.push_str(&answer),
            Err(error) => {
                let _ = writeln!(text, "error: {error}");
            }
        }
        for piece in text.as_bytes().chunks(PIECE) {
            out.write_raw(piece);
            out.flush();
        }
        Ok(())
    }
}

fn execute(target: &mut GdbTarget, line: &str) -> Output {
    let (name, arguments) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    let arguments = arguments.trim();
    if let Some(answer) = target.policy().and_then(|policy| policy.monitor(name, arguments)) {
        return match answer {
            Ok(text) => Ok(with_newline(text)),
            Err(failure) => {
                let text = failure.text.clone();
                target.keep(failure);
                Err(text)
            }
        };
    }
    let matching: Vec<&Command> = COMMANDS.iter().filter(|c| c.name.starts_with(name)).collect();
    let exact = matching.iter().find(|c| c.name == name);
    match (exact, matching.as_slice()) {
        _ if name.is_empty() => Ok(help(target)),
        (Some(command), _) | (None, [command]) => (command.run)(target, arguments),
        (None, []) => Err(format!("there is no command {name:?}; \"monitor help\" lists them")),
        (None, several) => {
            let names: Vec<&str> = several.iter().map(|c| c.name).collect();
            Err(format!("{name:?} may be {}", names.join(", ")))
        }
    }
}

fn with_newline(mut text: String) -> String {
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    text
}

fn help(target: &GdbTarget) -> String {
    let mut lines: Vec<(String, String)> =
        COMMANDS.iter().map(|c| (format!("{} {}", c.name, c.usage), c.help.to_owned())).collect();
    lines.extend(target.policy().map(|policy| policy.monitor_commands()).unwrap_or_default());
    lines.iter().fold(String::new(), |mut text, (usage, help)| {
        let _ = writeln!(text, "{usage:<30} {help}");
        text
    })
}

fn front_end(target: &GdbTarget) -> Result<Arc<dyn Policy>, String> {
    target.policy().cloned().ok_or_else(|| "this server has no front end that compiles conditions".to_owned())
}

fn condition(target: &GdbTarget, text: &str) -> Result<Condition, String> {
    let program = front_end(target)?.compile(text)?;
    Ok(Condition { compiled: Some((text.to_owned(), Arc::new(program))), ..Condition::default() })
}

/// Splits at the word `if`.
fn split_condition(text: &str) -> (&str, Option<&str>) {
    let at = text.match_indices("if").map(|(at, _)| at).find(|at| {
        let before = text[..*at].chars().next_back();
        let after = text[at + 2..].chars().next();
        before.is_none_or(char::is_whitespace) && after.is_none_or(|c| c.is_whitespace() || c == '(')
    });
    match at {
        Some(at) => (text[..at].trim(), Some(text[at + 2..].trim())),
        None => (text, None),
    }
}

fn set_break(target: &mut GdbTarget, text: &str, hardware: bool) -> Output {
    let (location, wanted) = split_condition(text);
    if location.is_empty() {
        return Err("break where? Give a symbol, symbol+OFFSET or an address".into());
    }
    let condition = wanted.map_or(Ok(Condition::default()), |text| condition(target, text))?;
    let address = target.machine.symbols().resolve(location).map_err(|e| e.to_string())?;
    let options = BreakpointOptions { location: location.to_owned(), hardware, ..BreakpointOptions::default() };
    let set = target.machine.add_breakpoint(address, options, condition).map_err(|e| e.to_string())?;
    Ok(format!("breakpoint {} at {address:#x} ({location})\n", set.id))
}

fn numbered<'t>(target: &GdbTarget, text: &'t str) -> Result<(Arc<Breakpoint>, &'t str), String> {
    let (number, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    let id: u32 = number.parse().map_err(|_| format!("{number:?} is no breakpoint's number"))?;
    let found = target.machine.breakpoints().into_iter().find(|b| b.id == id);
    Ok((found.ok_or_else(|| format!("there is no breakpoint {id}"))?, rest.trim()))
}

fn set_condition(target: &mut GdbTarget, text: &str) -> Output {
    let (breakpoint, text) = numbered(target, text)?;
    let condition = if text.is_empty() { Condition::default() } else { condition(target, text)? };
    // gdb's own stay: it may have asked for the breakpoint.
    breakpoint.set_condition(Condition { agent: breakpoint.condition().agent, ..condition });
    Ok(match text {
        "" => format!("breakpoint {} stops always\n", breakpoint.id),
        text => format!("breakpoint {} stops if {text}\n", breakpoint.id),
    })
}

fn set_callable(target: &mut GdbTarget, text: &str) -> Output {
    let (name, number) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    let breakpoint = match number.trim() {
        "" => target.machine.breakpoints().pop().ok_or("there is no breakpoint yet; set one with \"monitor break\"")?,
        number => numbered(target, number)?.0,
    };
    front_end(target)?.bind(&breakpoint, name)?;
    Ok(format!("breakpoint {} stops if {name}(hit) is true\n", breakpoint.id))
}

fn set_ignore(target: &mut GdbTarget, text: &str) -> Output {
    let (breakpoint, count) = numbered(target, text)?;
    let count = count.parse().map_err(|_| format!("{count:?} is no number of hits"))?;
    breakpoint.set_ignore(count);
    Ok(format!("breakpoint {} lets {count} hits pass\n", breakpoint.id))
}

fn set_enabled(target: &mut GdbTarget, text: &str, enabled: bool) -> Output {
    let (breakpoint, _) = numbered(target, text)?;
    target.machine.enable_breakpoint(&breakpoint, enabled).map_err(|e| e.to_string())?;
    Ok(format!("breakpoint {} is {}\n", breakpoint.id, if enabled { "enabled" } else { "disabled" }))
}

fn delete(target: &mut GdbTarget, text: &str) -> Output {
    let (breakpoint, _) = numbered(target, text)?;
    target.machine.delete_breakpoint(&breakpoint).map_err(|e| e.to_string())?;
    Ok(format!("breakpoint {} is deleted\n", breakpoint.id))
}

fn list(target: &GdbTarget) -> String {
    let mut text = String::new();
    for b in target.machine.breakpoints() {
        let (id, reached, hits) = (b.id, b.reached(), b.hits());
        let state = if b.is_enabled() { "" } else { " disabled" };
        let owner = b.options.name.as_ref().map(|name| format!(" {name}")).unwrap_or_default();
        let condition = b.condition();
        let source = condition.compiled.as_ref().map(|(source, _)| format!(" if {source}")).unwrap_or_default();
        let _ = writeln!(
            text,
            "{id:>4} {:#x} {}{owner}{state}{source}: reached {reached}, hits {hits}",
            b.address, b.options.location
        );
    }
    if text.is_empty() { "no breakpoints\n".into() } else { text }
}

fn stats(target: &GdbTarget) -> String {
    let mut text = String::new();
    for (number, vcpu) in target.machine.stats.snapshot().into_iter().enumerate() {
        let _ = writeln!(text, "vCPU {number}");
        let counted = vcpu.exits.into_iter().chain(vcpu.hypercalls).filter(|(_, count)| *count > 0);
        for (name, count) in counted {
            let _ = writeln!(text, "  {name:<24} {count:>10}");
        }
    }
    text
}

fn describe(target: &GdbTarget) -> String {
    let machine = &target.machine;
    format!(
        "image {} (interface {}), loaded at {:#x}, load bias {:#x}\n{} vCPUs, {} MiB of RAM from {:#x}, back end {}\n",
        machine.image.name(),
        machine.image.interface(),
        machine.layout.kernel_start,
        machine.layout.load_bias(),
        machine.cpus(),
        machine.memory.size() >> 20,
        machine.memory.range().start,
        machine.backend_name(),
    )
}

#[cfg(test)]
mod tests {
    use super::split_condition;

    #[test]
    fn test_condition_begins_at_the_word_if_and_not_inside_a_name() {
        assert_eq!(split_condition("main if rdi > 1"), ("main", Some("rdi > 1")));
        assert_eq!(split_condition("verify"), ("verify", None));
        assert_eq!(split_condition("notify if(rax)"), ("notify", Some("(rax)")));
        assert_eq!(split_condition("if_open"), ("if_open", None));
    }
}
