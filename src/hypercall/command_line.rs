//! Arguments and environment for guests of interface version 1, which ask for the lengths first, allocate, and then
//! give the addresses of buffers. Both answers come from one list, so that counts and contents agree.

use std::mem::offset_of;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use uhyve_interface::v1::MAX_ARGC_ENVC;
use uhyve_interface::v1::parameters::{CmdsizeParams, CmdvalParams};

use super::parameters::{block, field};
use crate::error::{Error, GuestFault, Result};
use crate::memory::GuestMemory;

/// Arguments and environment as C strings.
#[derive(Debug, Clone, Default)]
pub struct CommandLine {
    arguments: Vec<Vec<u8>>,
    environment: Vec<Vec<u8>>,
}

impl CommandLine {
    /// `path` becomes `argv[0]`. More than 128 arguments (with it) or variables, NUL bytes, and names that are empty or
    /// contain `=`, are [`Error::Config`].
    pub fn new(path: &Path, arguments: &[String], environment: &[(String, String)]) -> Result<Self> {
        let mut argv = vec![c_string(path.as_os_str().as_bytes(), "the image's path")?];
        for argument in arguments {
            argv.push(c_string(argument.as_bytes(), "an argument")?);
        }
        let mut envp = Vec::new();
        for (key, value) in environment {
            if key.is_empty() || key.contains('=') {
                return Err(Error::Config(format!("environment variable name {key:?} is empty or contains '='")));
            }
            envp.push(c_string(format!("{key}={value}").as_bytes(), "an environment variable")?);
        }
        for (list, what) in [(&argv, "arguments (with the image's path)"), (&envp, "environment variables")] {
            if list.len() > MAX_ARGC_ENVC {
                let found = list.len();
                return Err(Error::Config(format!(
                    "{found} {what}: the guest interface passes at most {MAX_ARGC_ENVC}"
                )));
            }
        }
        Ok(Self { arguments: argv, environment: envp })
    }

    /// Adds empty strings, which no program takes for a variable, until the environment has `count` entries.
    pub fn pad_environment(&mut self, count: usize) {
        while self.environment.len() < count.min(MAX_ARGC_ENVC) {
            self.environment.push(vec![0]);
        }
    }

    /// Answers Cmdsize: counts and lengths, the terminating NULs included.
    pub(super) fn write_sizes(&self, memory: &GuestMemory, address: u64) -> Result<(), GuestFault> {
        let mut bytes = [0u8; size_of::<CmdsizeParams>()];
        let lists = [
            (&self.arguments, offset_of!(CmdsizeParams, argc), offset_of!(CmdsizeParams, argsz)),
            (&self.environment, offset_of!(CmdsizeParams, envc), offset_of!(CmdsizeParams, envsz)),
        ];
        for (list, count_at, sizes_at) in lists {
            bytes[count_at..count_at + 4].copy_from_slice(&length(list.len()));
            for (string, at) in list.iter().zip((sizes_at..).step_by(4)) {
                bytes[at..at + 4].copy_from_slice(&length(string.len()));
            }
        }
        memory.write(address, &bytes)
    }

    /// Answers Cmdval: writes each string to the buffer that the guest gives for it. Buffers outside of RAM are
    /// skipped; the first of them is returned.
    pub(super) fn write_values(&self, memory: &GuestMemory, address: u64) -> Result<(), GuestFault> {
        let block = block!(memory, address, CmdvalParams)?;
        let argv = field!(block, CmdvalParams, argv as u64);
        let envp = field!(block, CmdvalParams, envp as u64);
        let mut first = Ok(());
        for (list, table) in [(&self.arguments, argv), (&self.environment, envp)] {
            for (string, index) in list.iter().zip(0u64..) {
                let written = write_value(memory, table, index, string);
                if first.is_ok() {
                    first = written;
                }
            }
        }
        first
    }
}

fn write_value(memory: &GuestMemory, table: u64, index: u64, string: &[u8]) -> Result<(), GuestFault> {
    let slot = table.checked_add(index * 8).ok_or(GuestFault { address: table, length: 8, is_virtual: false })?;
    let mut pointer = [0; 8];
    memory.read(slot, &mut pointer)?;
    memory.write(u64::from_le_bytes(pointer), string)
}

fn length(length: usize) -> [u8; 4] {
    i32::try_from(length).expect("strings were checked to be short").to_le_bytes()
}

fn c_string(text: &[u8], what: &str) -> Result<Vec<u8>> {
    if text.contains(&0) {
        return Err(Error::Config(format!("{what} contains a NUL byte")));
    }
    if i32::try_from(text.len() + 1).is_err() {
        return Err(Error::Config(format!("{what} is longer than 2 GiB")));
    }
    Ok([text, &[0]].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_new_over_the_limit_is_a_config_error_that_names_it() {
        let arguments = vec!["a".to_string(); 127];
        assert!(CommandLine::new(Path::new("x"), &arguments, &[]).is_ok());
        let arguments = vec!["a".to_string(); 128];
        let error = CommandLine::new(Path::new("x"), &arguments, &[]).unwrap_err().to_string();
        assert!(error.contains("129") && error.contains("128"), "{error}");
        for (key, value) in [("", "x"), ("a=b", "x"), ("a", "x\0y")] {
            assert!(CommandLine::new(Path::new("x"), &[], &[(key.into(), value.into())]).is_err());
        }
    }
}
