//! Builds the demo guest, a small Hermit-style image that is part of the package.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// `e_ident[EI_OSABI]` and the value that Hermit images carry there (ELFOSABI_STANDALONE).
const EI_OSABI: usize = 7;
const STANDALONE: u8 = 255;

fn main() {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it")).join("demo");
    for name in ["demo.c", "demo.ld"] {
        println!("cargo::rerun-if-changed=guests/{name}");
    }
    build(&root.join("guests"), &out);
    let mut image = fs::read(&out).expect("the compiler has just written it");
    image[EI_OSABI] = STANDALONE;
    fs::write(&out, image).expect("the build folder is writable");
}

const FLAGS: &[&str] = &[
    "-std=gnu11",
    "-ffreestanding",
    "-fpie",
    "-mgeneral-regs-only",
    "-mno-red-zone",
    "-fno-stack-protector",
    "-fcf-protection=none",
    "-fasynchronous-unwind-tables",
    "-fno-omit-frame-pointer",
    "-fno-optimize-sibling-calls",
    "-g",
    "-gdwarf-4",
    "-O1",
    "-Wall",
    "-Wextra",
    "-nostdlib",
    "-static-pie",
    "-Wl,--build-id=none",
    "-Wl,--hash-style=sysv",
    "-Wl,-z,noexecstack",
    "-Wl,-z,norelro",
    "-Wl,-z,max-page-size=4096",
];

fn build(guests: &Path, out: &Path) {
    let compiler = cc::Build::new()
        .target("x86_64-unknown-linux-gnu")
        .host("x86_64-unknown-linux-gnu")
        .opt_level(1)
        .get_compiler();
    let status = Command::new(compiler.path())
        .current_dir(guests)
        .args(FLAGS)
        .arg("-o")
        .arg(out)
        .arg(format!("-ffile-prefix-map={}=guests", guests.display()))
        .args(["-Wl,-T,demo.ld", "demo.c"])
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("{} could not build the demo guest: {status}", compiler.path().display()),
        Err(error) => panic!("a C compiler is needed to build the demo guest (install gcc or clang): {error}"),
    }
}
