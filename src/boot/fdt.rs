//! The flattened device tree, by which kernels learn their memory, arguments, environment and mounts.

use std::ops::Range;

use vm_fdt::FdtWriter;

use super::load::BootParameters;
use crate::error::{Error, Result};

/// The largest device tree that these parameters can lead to, for [`Layout::plan`](super::Layout::plan). It does not
/// depend on the frequency, which is often known later.
///
/// # Errors
/// [`Error::Config`] if a string can't be passed to a guest.
pub fn device_tree_size(parameters: &BootParameters<'_>) -> Result<u64> {
    let memory = u64::MAX - 1..u64::MAX;
    let tree = build(memory, &BootParameters { tsc_khz: u32::MAX, ..*parameters })?;
    Ok(tree.len() as u64)
}

/// The device tree of a VM with that RAM.
pub(super) fn build(memory: Range<u64>, parameters: &BootParameters<'_>) -> Result<Vec<u8>> {
    let bootargs = bootargs(parameters)?;
    parameters.mounts.iter().try_for_each(|mount| check(mount, "mount"))?;
    write(memory, parameters, &bootargs).map_err(|e| Error::Config(format!("the device tree can't be built: {e}")))
}

fn write(memory: Range<u64>, parameters: &BootParameters<'_>, bootargs: &str) -> Result<Vec<u8>, vm_fdt::Error> {
    let mut fdt = FdtWriter::new()?;
    let root = fdt.begin_node("")?;
    fdt.property_string("compatible", "hermit,uhyve")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;

    let node = fdt.begin_node(&format!("memory@{:x}", memory.start))?;
    fdt.property_string("device_type", "memory")?;
    fdt.property_array_u64("reg", &[memory.start, memory.end - memory.start])?;
    fdt.end_node(node)?;

    if parameters.tsc_khz != 0 {
        let node = fdt.begin_node("hermit,tsc")?;
        fdt.property_u32("khz", parameters.tsc_khz)?;
        fdt.end_node(node)?;
    }
    if !parameters.mounts.is_empty() {
        let node = fdt.begin_node("uhyve,mounts")?;
        fdt.property_string_list("mounts", parameters.mounts.to_vec())?;
        fdt.end_node(node)?;
    }
    write_cpus(&mut fdt, parameters.cpus)?;

    let node = fdt.begin_node("chosen")?;
    fdt.property_string("bootargs", bootargs)?;
    fdt.end_node(node)?;
    fdt.end_node(root)?;
    fdt.finish()
}

fn write_cpus(fdt: &mut FdtWriter, count: u32) -> Result<(), vm_fdt::Error> {
    let cpus = fdt.begin_node("cpus")?;
    fdt.property_u32("#address-cells", 1)?;
    fdt.property_u32("#size-cells", 0)?;
    for number in 0..count {
        let node = fdt.begin_node(&format!("cpu@{number:x}"))?;
        fdt.property_string("device_type", "cpu")?;
        fdt.property_u32("reg", number)?;
        fdt.end_node(node)?;
    }
    fdt.end_node(cpus)
}

/// `KERNEL_ARGS env=K=V … -- APP_ARGS`, in words that a shell, and the kernel, would split into these again.
fn bootargs(parameters: &BootParameters<'_>) -> Result<String> {
    let mut words = Vec::new();
    for argument in parameters.kernel_args {
        check(argument, "kernel argument")?;
        if argument == "--" {
            return Err(Error::Config(
                "kernel argument \"--\": what follows it are arguments of the application, pass them as such".into(),
            ));
        }
        words.push(quote(argument));
    }
    for (name, value) in parameters.environment {
        check(name, "name of an environment variable")?;
        check(value, "value of an environment variable")?;
        if name.is_empty() || name.contains('=') {
            return Err(Error::Config(format!("environment variable {name:?}: the name is empty or contains \"=\"")));
        }
        words.push(format!("env={}={}", quote(name), quote(value)));
    }
    if !parameters.app_args.is_empty() {
        words.push("--".into());
    }
    for argument in parameters.app_args {
        check(argument, "argument")?;
        words.push(quote(argument));
    }
    Ok(words.join(" "))
}

/// Strings in a device tree end with a NUL.
fn check(text: &str, what: &str) -> Result<()> {
    if text.contains('\0') {
        return Err(Error::Config(format!("{what} {text:?} contains a NUL character")));
    }
    Ok(())
}

/// The text as one word of a shell.
fn quote(text: &str) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || "-_=+:,./@%^".contains(c);
    if !text.is_empty() && text.chars().all(is_plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::boot::testing::PLAIN;

    fn word(bytes: &[u8], at: usize) -> usize {
        u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
    }

    fn text(bytes: &[u8], at: usize) -> String {
        bytes[at..].iter().take_while(|b| **b != 0).map(|b| char::from(*b)).collect()
    }

    /// Properties by path.
    fn parse(fdt: &[u8]) -> BTreeMap<String, Vec<u8>> {
        assert_eq!((word(fdt, 0), word(fdt, 4)), (0xd00d_feed, fdt.len()));
        let (mut at, strings) = (word(fdt, 8), word(fdt, 12));
        let (mut path, mut found) = (Vec::new(), BTreeMap::new());
        loop {
            let token = word(fdt, at);
            at += 4;
            match token {
                1 => {
                    path.push(text(fdt, at));
                    at = (at + path.last().unwrap().len() + 1).next_multiple_of(4);
                }
                2 => drop(path.pop()),
                3 => {
                    let (length, name) = (word(fdt, at), text(fdt, strings + word(fdt, at + 4)));
                    found.insert(format!("{}/{name}", path.join("/")), fdt[at + 8..at + 8 + length].to_vec());
                    at = (at + 8 + length).next_multiple_of(4);
                }
                _ => return found,
            }
        }
    }

    fn strings(list: &[&str]) -> Vec<String> {
        list.iter().map(|s| (*s).to_owned()).collect()
    }

    /// The words of bootargs, as the kernel's shlex splits them.
    fn split(text: &str) -> Vec<String> {
        let (mut words, mut word, mut chars, mut quoted) = (Vec::new(), None::<String>, text.chars(), false);
        while let Some(c) = chars.next() {
            match c {
                '\'' => {
                    quoted = !quoted;
                    word.get_or_insert_default();
                }
                '\\' if !quoted => word.get_or_insert_default().push(chars.next().unwrap()),
                ' ' if !quoted => words.extend(word.take()),
                c => word.get_or_insert_default().push(c),
            }
        }
        words.extend(word);
        words
    }

    #[test]
    fn test_device_tree_has_all_nodes() {
        let (mounts, kernel, app) = (strings(&["/root", "/data"]), strings(&["-freq", "1000"]), strings(&["-v"]));
        let parameters = BootParameters {
            cpus: 17,
            tsc_khz: 3_000_000,
            mounts: &mounts,
            kernel_args: &kernel,
            app_args: &app,
            ..PLAIN
        };
        let tree = parse(&build(0x1_0000_0000..0x1_0400_0000, &parameters).unwrap());
        assert_eq!(tree["/compatible"], b"hermit,uhyve\0");
        assert_eq!((&tree["/#address-cells"][..], &tree["/#size-cells"][..]), (&[0, 0, 0, 2][..], &[0, 0, 0, 2][..]));
        assert_eq!(tree["/memory@100000000/device_type"], b"memory\0");
        assert_eq!(tree["/memory@100000000/reg"], [0x1_0000_0000u64, 0x400_0000].map(u64::to_be_bytes).concat());
        assert_eq!(tree["/hermit,tsc/khz"], 3_000_000u32.to_be_bytes());
        assert_eq!(tree["/uhyve,mounts/mounts"], b"/root\0/data\0");
        assert_eq!(tree["/chosen/bootargs"], b"-freq 1000 -- -v\0");
        assert_eq!(
            (&tree["/cpus/cpu@10/reg"][..], &tree["/cpus/cpu@0/device_type"][..]),
            (&[0, 0, 0, 16][..], &b"cpu\0"[..])
        );
        assert!(!tree.contains_key("/cpus/cpu@11/reg"));
    }

    #[test]
    fn test_device_tree_leaves_out_what_is_not_there() {
        let tree = parse(&build(0..0x400_0000, &PLAIN).unwrap());
        assert!(tree.contains_key("/memory@0/reg"));
        assert!(!tree.keys().any(|key| key.contains("tsc") || key.contains("mounts")));
        assert_eq!(tree["/chosen/bootargs"], b"\0");
    }

    #[test]
    fn test_device_tree_size_is_an_upper_bound() {
        let environment: Vec<_> = (0..900).map(|i| (format!("NAME{i}"), "a value".repeat(4))).collect();
        for parameters in [PLAIN, BootParameters { cpus: 64, tsc_khz: 7, environment: &environment, ..PLAIN }] {
            let size = device_tree_size(&parameters).unwrap();
            for start in [0, 0x20_0000, 1 << 40] {
                assert!(build(start..start + 0x400_0000, &parameters).unwrap().len() as u64 <= size);
            }
        }
    }

    #[test]
    fn test_bootargs_split_into_the_words_that_went_in() {
        let words = strings(&["-v", "a b", "", "it's", "--", "x=1", "#no", "\\", "\"q\"", "tab\tnewline\n", "$HOME;ü"]);
        let environment = vec![("K".to_owned(), "v w'".to_owned()), ("E".to_owned(), String::new())];
        let parameters =
            BootParameters { kernel_args: &words[..2], environment: &environment, app_args: &words, ..PLAIN };
        let found = split(&bootargs(&parameters).unwrap());
        let expected = [strings(&["-v", "a b", "env=K=v w'", "env=E=", "--"]), words.clone()].concat();
        assert_eq!(found, expected);
        assert_eq!(bootargs(&BootParameters { app_args: &words[..1], ..PLAIN }).unwrap(), "-- -v");
    }

    #[test]
    fn test_strings_that_a_guest_cannot_get_are_refused() {
        let (nul, dashes) = (strings(&["a\0b"]), strings(&["--"]));
        let variables =
            [("", "v"), ("A=B", "v"), ("A\0", "v"), ("A", "v\0")].map(|(n, v)| vec![(n.to_owned(), v.to_owned())]);
        let mut all = vec![
            BootParameters { kernel_args: &nul, ..PLAIN },
            BootParameters { kernel_args: &dashes, ..PLAIN },
            BootParameters { app_args: &nul, ..PLAIN },
            BootParameters { mounts: &nul, ..PLAIN },
        ];
        all.extend(variables.iter().map(|environment| BootParameters { environment, ..PLAIN }));
        for parameters in all {
            assert!(matches!(device_tree_size(&parameters).unwrap_err(), Error::Config(_)), "{parameters:?}");
        }
    }
}
