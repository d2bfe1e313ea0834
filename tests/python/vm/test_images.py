"""Images: gzip'd archives with their wishes, and broken files of every kind, whose error says which and why."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from uhyve import ConfigError, GuestCrashError, Image, ImageError, TimeoutExpired, Vm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LIMIT = 60
KIB = 1 << 10
PT_LOAD, PT_DYNAMIC, PT_NOTE, PT_TLS = 1, 2, 4, 7


# Archives.


def archive(members: dict[str, bytes], path: Path) -> Path:
    """A gzip'd tar archive."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


INPUT = "[input]\nkernel_args = []\napp_args = []\nenv_vars = []\n"


def configuration(kernel: str = "kernel", more: str = "") -> bytes:
    text = more if "[input]" in more else INPUT + more
    return f'version = "1"\nkernel = "{kernel}"\n{text}'.encode()


@pytest.mark.vm
@pytest.mark.parametrize("kernel", ["kernel", "./kernel", "bin/kernel", "/bin/kernel"])
def test_archive_runs_its_kernel(guest: Callable[..., Path], tmp_path: Path, kernel: str) -> None:
    members = {"hermit.toml": configuration(kernel), kernel.lstrip("./"): guest("hello").read_bytes()}

    result = Vm(archive(members, tmp_path / "image.hermit")).run(LIMIT)

    assert (result.code, result.output[:23]) == (0, "Hello from a test guest")


@pytest.mark.vm
@pytest.mark.parametrize("interface", [1, 3])
def test_archive_passes_its_arguments_and_environment(
    guest: Callable[..., Path], tmp_path: Path, interface: int
) -> None:
    more = '[input]\nkernel_args = ["-k"]\napp_args = ["one", "two words"]\nenv_vars = ["A=1", "B=2=3"]\n'
    kernel = guest("args", interface=interface).read_bytes()
    path = archive({"hermit.toml": configuration(more=more), "kernel": kernel}, tmp_path / "image")

    output = Vm(path).run(LIMIT).output
    replaced = Vm(path, args=["other"], env={"B": "new", "C": "4"}).run(LIMIT).output

    if interface == 1:
        assert f"argv[0]={path}\nargv[1]=one\nargv[2]=two words\nenvc=2\nenv[0]=A=1\nenv[1]=B=2=3\n" in output
        assert "argc=2\n" in replaced
        assert "argv[1]=other\nenvc=3\nenv[0]=A=1\nenv[1]=B=new\nenv[2]=C=4\n" in replaced
    else:
        assert "fdt /chosen bootargs: -k env=A=1 env=B=2=3 -- one 'two words'\n" in output
        assert "fdt /chosen bootargs: -k env=A=1 env=B=new env=C=4 -- other\n" in replaced


@pytest.mark.vm
def test_archive_gives_its_files_to_the_guest(guest: Callable[..., Path], tmp_path: Path) -> None:
    kernel = guest("readpath", interface=3, defines=['FILE_PATH="/etc/motd"']).read_bytes()
    members = {"hermit.toml": configuration(), "kernel": kernel, "etc/motd": b"of the image\n"}
    path = archive(members, tmp_path / "image")

    own, mapped = Vm(path), Vm(path, files={"/etc/motd": b"of the user\n"})

    assert own.image.files == ["/etc/motd", "/hermit.toml", "/kernel"]
    assert own.run(LIMIT).output == "opened\nof the image\nend of file\n"
    assert mapped.run(LIMIT).output == "opened\nof the user\nend of file\n"


@pytest.mark.vm
def test_archive_that_asks_for_a_machine_gets_it_or_says_so(guest: Callable[..., Path], tmp_path: Path) -> None:
    more = '[requirements]\nmemory = "128 MiB"\ncpus = 2\n'
    kernel = guest("args", interface=3).read_bytes()
    path = archive({"hermit.toml": configuration(more=more), "kernel": kernel}, tmp_path / "image")

    output = Vm(path).run(LIMIT).output

    assert "fdt cpus: 2\n" in output
    assert f"reg: 0x{int(output.split('memory@')[1].split()[0], 16):x} {128 * KIB * KIB:#x}" in output
    with pytest.raises(ConfigError, match="needs 128 MiB of memory, 64 MiB were given"):
        Vm(path, memory="64MiB").run(LIMIT)
    with pytest.raises(ConfigError, match="needs 2 vCPUs, 1 were given"):
        Vm(path, cpus=1).run(LIMIT)
    assert Vm(path, cpus=3, memory="256MiB").run(LIMIT).code == 0


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ({}, "it has no hermit.toml"),
        ({"kernel": b"x"}, "it has no hermit.toml"),
        ({"hermit.toml": b"\xff"}, "not UTF-8"),
        ({"hermit.toml": b"version = "}, "hermit.toml, line 1"),
        ({"hermit.toml": b'version = "2"\nkernel = "kernel"\n'}, r"hermit.toml.*unknown variant `2`"),
        ({"hermit.toml": b'version = "1"\n' + INPUT.encode()}, "missing field `kernel`"),
        ({"hermit.toml": b'version = "1"\nkernel = "kernel"\n'}, "missing field `input`"),
        ({"hermit.toml": configuration()}, "the kernel /kernel is not one of its regular files"),
        ({"hermit.toml": configuration("../kernel"), "kernel": b"x"}, r"leaves the archive"),
        ({"hermit.toml": configuration(""), "kernel": b"x"}, "is no name of a file"),
        ({"hermit.toml": configuration(), "kernel": b"#!/bin/sh"}, "the kernel /kernel is not an ELF file"),
        ({"hermit.toml": configuration("dir/../kernel"), "kernel": b"x"}, "leaves the archive"),
        ({"hermit.toml": configuration(), "../kernel": b"x"}, "leaves the archive"),
        (
            {"hermit.toml": configuration(more=INPUT.replace("env_vars = []", 'env_vars = ["A"]'))},
            '"A" is not of the form',
        ),
        ({"hermit.toml": configuration(more='[requirements]\nmemory = "much"\n')}, "hermit.toml: .*not a number"),
        ({"hermit.toml": configuration(more="[requirements]\ncpus = -1\n")}, "hermit.toml: .*`-1`"),
    ],
)
def test_archive_that_is_broken_says_why(members: dict[str, bytes], why: str, tmp_path: Path) -> None:
    path = archive(members, tmp_path / "image.hermit")

    with pytest.raises(ImageError, match=why) as caught:
        Image.open(path)

    assert str(path) in str(caught.value)


def test_archive_with_a_broken_kernel_names_the_fault(guest: Callable[..., Path], tmp_path: Path) -> None:
    kernel = bytearray(guest("hello").read_bytes())
    struct.pack_into("<H", kernel, 18, 183)

    with pytest.raises(ImageError, match="AArch64"):
        Image.open(archive({"hermit.toml": configuration(), "kernel": bytes(kernel)}, tmp_path / "image"))


def test_archive_that_is_a_bomb_is_refused_at_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "bomb"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        info = tarfile.TarInfo("zeros")
        info.size = 2 << 30
        stream.write(info.tobuf())
        for _ in range(8):
            stream.write(bytes(1 << 20))

    with pytest.raises(ImageError, match="more than 1073741824 bytes"):
        Image.open(path)


@pytest.mark.parametrize("keep", [3, 10, 100, 0.5, 0.9, -20, -9, -8, -4, -1])
def test_archive_that_is_cut_off_is_refused(guest: Callable[..., Path], tmp_path: Path, keep: float) -> None:
    members = {"hermit.toml": configuration(), "kernel": guest("hello").read_bytes()}
    whole = archive(members, tmp_path / "image").read_bytes()
    length = int(len(whole) * keep) if 0 < keep < 1 else int(keep)

    with pytest.raises(ImageError, match="image archive: it can't be unpacked"):
        Image.from_bytes("cut", whole[:length])


@pytest.mark.parametrize("at", [0.2, 0.5, 0.8])
def test_archive_with_a_changed_byte_is_refused(guest: Callable[..., Path], tmp_path: Path, at: float) -> None:
    members = {"hermit.toml": configuration(), "kernel": guest("hello").read_bytes()}
    whole = bytearray(archive(members, tmp_path / "image").read_bytes())
    whole[int(len(whole) * at)] ^= 0x55

    with pytest.raises(ImageError, match="image archive"):
        Image.from_bytes("changed", bytes(whole))


# ELF files.


def header(image: bytes, kind: int) -> int:
    """The offset of the first program header of a type."""
    offset, count = struct.unpack_from("<Q", image, 32)[0], struct.unpack_from("<H", image, 56)[0]
    for at in range(offset, offset + 56 * count, 56):
        if struct.unpack_from("<I", image, at)[0] == kind:
            return at
    raise AssertionError(f"no program header of type {kind}")


def changed(image: bytes, *changes: tuple[int, str, int]) -> bytes:
    """The image with numbers written at offsets."""
    result = bytearray(image)
    for offset, form, value in changes:
        struct.pack_into(f"<{form}", result, offset, value)
    return bytes(result)


ELF_CHANGES = {
    "32-bit": (4, "B", 1, "the ELF class is 32-bit"),
    "big endian": (5, "B", 2, "the byte order is big endian"),
    "ARM": (18, "H", 40, "the machine is ARM"),
    "AArch64": (18, "H", 183, "the machine is AArch64"),
    "i386": (18, "H", 3, "the machine is i386"),
    "object": (16, "H", 1, "the ELF type is a relocatable object"),
    "core": (16, "H", 4, "the ELF type is a core dump"),
    "entry": (24, "Q", 0x7000_0000, "the entry 0x70000000 lies in no executable segment"),
    "header table": (32, "Q", 1 << 40, "truncated: the table of program headers"),
    "header size": (54, "H", 32, "the program headers have 32 bytes each"),
    "header count": (56, "H", 65535, "truncated: the table of program headers"),
    "no headers": (56, "H", 0, "no segment to load"),
}


@pytest.mark.parametrize("name", ELF_CHANGES)
def test_elf_header_that_is_wrong_is_refused_with_its_reason(guest: Callable[..., Path], name: str) -> None:
    offset, form, value, why = ELF_CHANGES[name]
    broken = changed(guest("hello").read_bytes(), (offset, form, value))

    with pytest.raises(ImageError, match=why) as caught:
        Image.from_bytes("the name", broken)

    assert str(caught.value).startswith("the name: ")


SEGMENT_CHANGES = {
    "past the file": (PT_LOAD, 8, "Q", 1 << 40, "truncated: a segment needs"),
    "more in the file": (PT_LOAD, 40, "Q", 1, "bytes in the file, but 0x1 in memory"),
    "huge": (PT_LOAD, 40, "Q", 1 << 45, r"overlap|span"),
    "wraps": (PT_LOAD, 16, "Q", 2**64 - 8, "ends past the address space"),
    "alignment": (PT_LOAD, 48, "Q", 3, "has alignment 0x3, not a power of two"),
    "huge alignment": (PT_LOAD, 48, "Q", 1 << 40, "not a power of two up to 1 GiB"),
    "note past the file": (PT_NOTE, 8, "Q", 1 << 40, "truncated: a note segment"),
    "note too long": (PT_NOTE, 32, "Q", 1 << 62, "truncated: a note segment"),
    "tls size": (PT_TLS, 40, "Q", 0, "thread-local storage"),
    "tls place": (PT_TLS, 16, "Q", 1 << 40, "thread-local storage"),
    "tls alignment": (PT_TLS, 48, "Q", 6, "thread-local storage has alignment 0x6"),
}


@pytest.mark.parametrize("name", SEGMENT_CHANGES)
def test_elf_segment_that_is_wrong_is_refused_with_its_reason(guest: Callable[..., Path], name: str) -> None:
    kind, offset, form, value, why = SEGMENT_CHANGES[name]
    image = guest("bootinfo").read_bytes()
    broken = changed(image, (header(image, kind) + offset, form, value))

    with pytest.raises(ImageError, match=why):
        Image.from_bytes("broken", broken)


def test_elf_with_overlapping_segments_is_refused(guest: Callable[..., Path]) -> None:
    image = guest("hello").read_bytes()
    first = header(image, PT_LOAD)
    size = struct.unpack_from("<Q", image, first + 40)[0]
    broken = changed(image, (first + 40, "Q", size + 0x10_0000))

    with pytest.raises(ImageError, match="overlap"):
        Image.from_bytes("broken", broken)


@pytest.mark.parametrize("version", [0, 1, 2, 5, 255])
def test_elf_with_an_unknown_entry_version_is_refused(guest: Callable[..., Path], version: int) -> None:
    advice = "newer" if version < 3 else "older"

    with pytest.raises(ImageError, match=f"entry version {version} is not supported.*{advice} kernel"):
        Image.open(guest("hello", entry_version=version))


@pytest.mark.parametrize("version", [0, 4, 99])
def test_elf_with_an_unknown_interface_is_refused(guest: Callable[..., Path], version: int) -> None:
    with pytest.raises(ImageError, match=f"interface version {version} is not supported"):
        Image.open(guest("hello", interface=3, announced_interface=version))


def test_elf_with_a_relocation_outside_is_refused(guest: Callable[..., Path]) -> None:
    image = guest("bootinfo").read_bytes()
    dynamic = header(image, PT_DYNAMIC)
    offset, length = struct.unpack_from("<Q", image, dynamic + 8)[0], struct.unpack_from("<Q", image, dynamic + 32)[0]
    entries = dict(struct.iter_unpack("<QQ", image[offset : offset + length]))
    broken = changed(image, (entries[7], "Q", 1 << 40))

    with pytest.raises(ImageError, match=r"relocation 0 .*0x10000000000"):
        Vm(broken).run(LIMIT)


@pytest.mark.parametrize("content", [b"", b"\x7f", b"\x7fELF", b"MZ\0\0", b"#!/bin/sh\n", b"\x1f\x8b", b"\0" * 100])
def test_file_that_is_no_image_is_refused(content: bytes) -> None:
    with pytest.raises(ImageError, match=r"^thing: (not an ELF file|truncated|image archive)"):
        Image.from_bytes("thing", content)


def test_program_of_the_host_is_no_hermit_image() -> None:
    with pytest.raises(ImageError, match="no HERMIT entry-version note: this is not a Hermit image"):
        Image.open("/bin/true")


@pytest.mark.parametrize(
    ("name", "why"), [("missing", "No such file"), (".", "not a regular file"), ("", "No such file")]
)
def test_image_that_cant_be_read_says_why(tmp_path: Path, name: str, why: str) -> None:
    path = f"{tmp_path}/{name}" if name else ""

    with pytest.raises(ImageError, match=why):
        Image.open(path)


@pytest.mark.parametrize("image", [None, 1, 1.5, object(), ["x"]])
def test_image_of_another_type_is_a_type_error(image: object) -> None:
    with pytest.raises(TypeError, match="an image is a path, bytes or an Image"):
        Vm(image)


def test_truncation_anywhere_is_an_image_error_or_still_an_image(guest: Callable[..., Path]) -> None:
    whole = guest("bootinfo").read_bytes()
    ends = sorted({*range(300), *range(300, len(whole), 97), len(whole) - 1})

    outcomes = set()
    for end in ends:
        try:
            Image.from_bytes("cut", whole[:end])
        except ImageError as error:
            outcomes.add(str(error).split(":")[1].strip().split(" ")[0])
        else:
            # What is missing are sections and symbols, which no loader needs.
            outcomes.add("image")

    assert "truncated" in outcomes
    assert outcomes <= {"truncated", "not", "image"}, outcomes


@pytest.mark.vm
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_image_with_changed_bytes_never_harms_the_host(guest: Callable[..., Path], data: st.DataObject) -> None:
    image = bytearray(guest("bootinfo").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        # Headers, notes, dynamic section and relocations lie in the first pages.
        image[data.draw(st.integers(0, 0x1800))] = data.draw(st.integers(0, 255))

    try:
        result = Vm(bytes(image), memory="32MiB").run(timeout=0.2)
    except (ImageError, ConfigError, GuestCrashError, TimeoutExpired):
        return
    assert isinstance(result.code, int)
