//! The command `uhyve`, for its commonest use: run an image and end with its exit code, as cargo's runner does it. This
//! needs no interpreter, whose start takes longer than a small guest's whole life. Everything else (other flags, a
//! configuration file, the debugger, an error to explain) is done by the package's command line in Python, in place of
//! this process.
//!
//! The entry is C's, not Rust's: what the standard library does before its `main` (the thread's stack looked up in
//! /proc/self/maps, a handler for its overflow) costs more than everything else up to the first instruction of a guest.

#![cfg_attr(not(test), no_main)]

use std::ffi::OsString;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use uhyve_core::boot::Image;
use uhyve_core::debug::engine::{End, Status};
use uhyve_core::devices::serial::Output;
use uhyve_core::error::{Error, Result};
use uhyve_core::isolation::IoMode;
use uhyve_core::isolation::landlock::FileIsolation;
use uhyve_core::memory::Backing;
use uhyve_core::vm::{Config, Machine, SoftConfig};

// The statuses of `uhyve.cli`.
const EXIT_HOST: u8 = 125;
const EXIT_INTERRUPT: u8 = 130;
const EXIT_CRASH: u8 = 134;
const EXIT_PIPE: u8 = 141;

/// What of the flags is handled here.
#[derive(Debug, Default, PartialEq)]
struct Plain {
    memory: Option<u64>,
    cpus: Option<u32>,
    environment: Vec<(String, String)>,
    is_fixed: bool,
    image: String,
    kernel_args: Vec<String>,
    args: Vec<String>,
}

/// Bytes by which the heap grows.
const HEAP_STEP: libc::c_int = 1 << 20;

/// Where the process begins.
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn main(_count: libc::c_int, _words: *const *const libc::c_char) -> libc::c_int {
    // SAFETY: what Rust's own start does; a closed pipe is an error of the write.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    for number in 0..=libc::STDERR_FILENO {
        // SAFETY: it is asked whether the descriptor is open. If not, the next file would take its number, and the
        // guest's console would go there.
        unsafe {
            if libc::fcntl(number, libc::F_GETFD) == -1 {
                libc::open(c"/dev/null".as_ptr(), libc::O_RDWR);
            }
        }
    }
    // SAFETY: no other thread is there. Heaps of single threads grow by a page protection at a time, which other CPUs
    // have to hear of each time; one heap for all grows rarely.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_TOP_PAD, HEAP_STEP);
    }
    // Whatever is left (the memory of the guest, above all), the kernel takes back at once.
    std::process::exit(status().into())
}

/// The exit status.
fn status() -> u8 {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(uhyve_core::DEFAULT_LOG)).init();
    let words: Vec<OsString> = std::env::args_os().skip(1).collect();
    if let Some(plain) = parse(&words).filter(|_| !is_configured())
        && let Ok(machine) = start(plain)
    {
        return run(&machine);
    }
    if INTERRUPTED.load(Ordering::SeqCst) {
        return EXIT_INTERRUPT;
    }
    python(&words)
}

/// The words as a plain run, or `None` for all that Python does.
fn parse(words: &[OsString]) -> Option<Plain> {
    let mut words = words.iter().map(|w| w.to_str());
    let mut plain = Plain::default();
    let mut word = words.next()??;
    if word == "run" {
        word = words.next()??;
    } else if ["debug", "doctor", "demo", "bench"].contains(&word) {
        return None;
    }
    while word.starts_with('-') {
        match word {
            "-m" | "--memory-size" => plain.memory = Some(size(words.next()??)?),
            "-c" | "--cpu-count" => plain.cpus = Some(words.next()??.parse().ok().filter(|n| *n > 0)?),
            "-e" | "--env-vars" => {
                let (name, value) = words.next()??.split_once('=').filter(|(name, _)| !name.is_empty())?;
                plain.environment.retain(|(known, _)| known != name);
                plain.environment.push((name.into(), value.into()));
            }
            "--no-aslr" => plain.is_fixed = true,
            _ => return None,
        }
        word = words.next()??;
    }
    if word.is_empty() {
        return None;
    }
    plain.image = word.into();
    let rest: Vec<String> = words.map(|w| w.map(str::to_owned)).collect::<Option<_>>()?;
    let rest = if rest.first().is_some_and(|w| w == "--") { &rest[1..] } else { &rest[..] };
    match rest.iter().position(|w| w == "--") {
        Some(at) => (plain.kernel_args, plain.args) = (rest[..at].to_vec(), rest[at + 1..].to_vec()),
        None => plain.args = rest.to_vec(),
    }
    Some(plain)
}

/// `64MiB` and `1GiB`.
fn size(text: &str) -> Option<u64> {
    let (digits, shift) = text.strip_suffix("MiB").map(|d| (d, 20)).or(text.strip_suffix("GiB").map(|d| (d, 30)))?;
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// The environment variable that takes the place of "auto".
const BACKEND: &str = "UHYVE_BACKEND";

fn chosen_backend() -> String {
    std::env::var(BACKEND).ok().filter(|name| !name.is_empty()).unwrap_or_else(|| "auto".into())
}

/// Whether a configuration file has a say, or an environment variable other than [`BACKEND`].
fn is_configured() -> bool {
    let is_ours = |name: &std::ffi::OsStr| {
        name != BACKEND && ["HERMIT_", "UHYVE_", "RUST_LOG"].iter().any(|p| name.as_bytes().starts_with(p.as_bytes()))
    };
    let home = std::env::var_os("XDG_CONFIG_HOME")
        .filter(|h| !h.is_empty())
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".config")));
    std::env::vars_os().any(|(name, _)| is_ours(&name))
        || Path::new("uhyve.toml").exists()
        || home.is_none_or(|home| home.join("uhyve/uhyve.toml").exists())
}

fn start(plain: Plain) -> Result<Arc<Machine>> {
    let some = |list: Vec<String>| Some(list).filter(|l| !l.is_empty());
    let image = Arc::new(Image::open(plain.image.as_ref())?);
    // Not earlier, so that a file that is never read to its end can be left, and not later: the guest is about to run.
    catch_interrupts();
    Machine::start(Config {
        image,
        memory: plain.memory,
        cpus: plain.cpus,
        kernel_args: some(plain.kernel_args),
        args: some(plain.args),
        environment: plain.environment,
        files: Vec::new(),
        output: Output::Stdout,
        backend: chosen_backend(),
        aslr: !plain.is_fixed,
        backing: Backing::default(),
        pit: false,
        cpu_pm: false,
        affinity: Vec::new(),
        tempdir: None,
        isolation: FileIsolation::Normal,
        io_mode: IoMode::default(),
        soft: SoftConfig::default(),
        debugging: false,
        wrapper: None,
        measure: Default::default(),
    })
}

fn run(machine: &Arc<Machine>) -> u8 {
    let mut check =
        || if INTERRUPTED.load(Ordering::SeqCst) { Err(Error::VmState("interrupted".into())) } else { Ok(()) };
    let status = machine.wait(None, &mut check);
    machine.close();
    match status {
        Ok(Some(Status::Ended(end))) => ended(&end),
        Err(error) if !INTERRUPTED.load(Ordering::SeqCst) => complain(&error, EXIT_HOST),
        _ => EXIT_INTERRUPT,
    }
}

fn ended(end: &End) -> u8 {
    match end {
        // The operating system takes the lowest eight bits.
        End::Exit(code) => code.to_le_bytes()[0],
        End::Crash(crash) => {
            say(&format!("the guest has crashed: {crash}"));
            EXIT_CRASH
        }
        End::Failed(error) => complain(error, EXIT_HOST),
        End::Killed => EXIT_INTERRUPT,
    }
}

fn complain(error: &Error, status: u8) -> u8 {
    let source = match error {
        Error::Host { source, .. } | Error::Hypervisor { source, .. } => Some(source),
        _ => None,
    };
    if source.is_some_and(|s| s.kind() == std::io::ErrorKind::BrokenPipe) {
        return EXIT_PIPE;
    }
    say(&error.to_string());
    status
}

/// A line about an error. Where it can't be written, the exit status is what is left to say.
fn say(error: &str) {
    let _ = writeln!(std::io::stderr(), "uhyve: error: {error}");
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Ctrl-C and a polite kill end the guest, so that what it printed comes out and its scratch directory goes.
fn catch_interrupts() {
    extern "C" fn interrupted(_: libc::c_int) {
        INTERRUPTED.store(true, Ordering::SeqCst);
    }
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // SAFETY: a zeroed sigaction is valid, and the handler only sets an atomic.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = interrupted as *const () as usize;
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    }
}

/// The same command in Python: the interpreter beside this file, or the first in PATH.
fn python(words: &[OsString]) -> u8 {
    let folder = std::env::current_exe().ok().and_then(|exe| exe.parent().map(Path::to_path_buf)).unwrap_or_default();
    let beside = ["python", "python3"].map(|name| folder.join(name)).into_iter().find(|path| path.exists());
    let interpreter = beside.unwrap_or_else(|| "python3".into());
    let error = Command::new(&interpreter).args(["-P", "-m", "uhyve"]).args(words).exec();
    say(&format!("can't start {}: {error}", interpreter.display()));
    EXIT_HOST
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<OsString> {
        text.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn test_plain_run_is_parsed_as_python_parses_it() {
        let plain = parse(&words("-c 2 -m 128MiB -e A=1 -e A=2=3 --no-aslr app k -- -v --")).unwrap();
        let expected = Plain {
            memory: Some(128 << 20),
            cpus: Some(2),
            environment: vec![("A".into(), "2=3".into())],
            is_fixed: true,
            image: "app".into(),
            kernel_args: vec!["k".into()],
            args: vec!["-v".into(), "--".into()],
        };
        assert_eq!(plain, expected);
        assert_eq!(parse(&words("run app -- -- x=y")).unwrap().args, ["x=y"]);
        assert_eq!(parse(&words("app -- -v")).unwrap().args, ["-v"]);
    }

    #[test]
    fn test_everything_else_is_left_to_python() {
        for text in ["", "debug app", "doctor", "--stats app", "-m 12 app", "-c 0 app", "-e host app", "--help", "-c"] {
            assert_eq!(parse(&words(text)), None, "{text}");
        }
    }
}
