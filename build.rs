//! Builds the guests that are part of the package, small Hermit-style images: the demo, and what `uhyve bench` runs.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// `e_ident[EI_OSABI]` and the value that Hermit images carry there (ELFOSABI_STANDALONE).
const EI_OSABI: usize = 7;
const STANDALONE: u8 = 255;

fn main() {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let folder = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    for name in ["demo.c", "bench.c", "demo.ld"] {
        println!("cargo::rerun-if-changed=guests/{name}");
    }
    for name in ["demo", "bench"] {
        let out = folder.join(name);
        build(&root.join("guests"), name, &out);
        let mut image = fs::read(&out).expect("the compiler has just written it");
        image[EI_OSABI] = STANDALONE;
        fs::write(&out, image).expect("the build folder is writable");
    }
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

fn build(guests: &Path, name: &str, out: &Path) {
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
        .arg("-Wl,-T,demo.ld")
        .arg(format!("{name}.c"))
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("{} could not build the guest {name}: {status}", compiler.path().display()),
        Err(error) => panic!("a C compiler is needed to build the guests (install gcc or clang): {error}"),
    }
}
