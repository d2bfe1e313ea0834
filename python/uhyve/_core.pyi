"""The Rust core. The package's ``Vm`` and ``Debugger`` are made of this; use those."""

from collections.abc import Callable
from os import PathLike
from typing import Any, Final, Literal, TypeAlias, final

from typing_extensions import Buffer

__all__ = [
    "CONDITION_OPCODES",
    "CONDITION_REGISTERS",
    "Breakpoint",
    "GdbServer",
    "Hit",
    "Image",
    "Machine",
    "Memory",
    "Registers",
    "__version__",
    "bench_clock",
    "bench_crowd",
    "bench_floor",
    "choose_backend",
    "evaluate_condition",
    "probe_kvm",
    "probe_soft",
]

_CompiledParts: TypeAlias = tuple[str, bytes, list[int]]
_FrameParts: TypeAlias = tuple[int, int | None, str | None, tuple[str, int] | None, tuple[str, int] | None, bool]
"""Source, bytecode and constants of a condition."""

__version__: Final[str]
CONDITION_OPCODES: Final[dict[str, int]]
"""The opcodes of conditions by name."""
CONDITION_REGISTERS: Final[dict[str, int]]
"""The registers of conditions by name, with the numbers that bytecode uses."""

def bench_clock() -> dict[str, Any]:
    """The clock of all measurements: ``source``, ``invariant``, ``tried``, ``kernel``, ``ticks_per_ns``, its cost."""

def bench_crowd(cpus: int, rounds: int) -> list[float]:
    """Kicks threads in bare KVM_RUN loops together; nanoseconds until the caller is told that all are out."""

def bench_floor(backend: str, kind: str, count: int, skip: int, cpu: int | None = None) -> list[tuple[float, int]]:
    """Times exits without any VMM; nanoseconds and how often each was seen. ``cpu``: the host CPU to do it on."""

def choose_backend(name: str) -> tuple[str, str]:
    """The back end that a VM with ``backend=name`` gets, ``"kvm"`` or ``"soft"``, and why, in words.

    Raises ``ConfigError`` for an unknown name.
    """

def probe_soft() -> dict[str, Any]:
    """What the software CPU can do, in the form of ``probe_kvm``."""

def probe_kvm() -> dict[str, Any]:
    """What KVM on this machine really does, found out with small guests; once in a process.

    ``native_ring0`` (bool), ``single_step`` (bool), ``block_interrupts`` (bool), ``int3`` (``"debug exit"``,
    ``"internal error"`` or ``"not intercepted"``), ``hardware_breakpoints`` (how many of the four work),
    ``watchpoints`` (bool). Raises ``HypervisorUnavailableError``, with advice, where there is none.
    """

def evaluate_condition(
    code: bytes,
    constants: list[int],
    registers: dict[str, int],
    memory: dict[int, bytes],
    *,
    vcpu: int = 0,
    hits: int = 0,
    reached: int = 0,
) -> bool:
    """Runs a compiled condition on given registers (0 where not given) and memory (pieces by address)."""

@final
class Image:
    """A parsed and checked Hermit image: an ELF file, or a gzip'd archive with a kernel, files and a configuration."""

    @staticmethod
    def open(path: str | PathLike[str]) -> Image:
        """Reads an image file. Raises ``ImageError``."""
    @staticmethod
    def from_bytes(name: str, data: bytes) -> Image:
        """Parses an image in memory. Raises ``ImageError``, with that name."""
    @staticmethod
    def demo() -> Image:
        """The guest that is part of the package."""
    @staticmethod
    def bench() -> Image:
        """The guest of ``uhyve bench``."""
    @property
    def name(self) -> str:
        """Its path, or the name that it was given."""
    @property
    def interface(self) -> int:
        """The version of the hypercall interface that it announces: 1, 2 or 3."""
    @property
    def entry_version(self) -> int:
        """The version of its entry: 3 or 4."""
    @property
    def hermit_version(self) -> str | None:
        """The version of the Hermit kernel, if the image says."""
    @property
    def relocatable(self) -> bool:
        """Whether it can be loaded at another address than it was linked at."""
    @property
    def files(self) -> list[str]:
        """Guest paths of the files in the archive; empty for an ELF file."""

@final
class Machine:
    """A running VM, from its start to its end."""

    def __new__(cls, image: Image, arguments: dict[str, object]) -> Machine:
        """Builds a machine and starts it. ``arguments`` has a key for each field of the configuration."""
    def status(self) -> dict[str, Any] | None:
        """The current state: None while running, otherwise what ``wait`` returns."""
    def wait(self, timeout: float | None = None) -> dict[str, Any] | None:
        """Waits for a stop or the end; None: ``timeout`` seconds are over.

        A stop has ``reason``, ``vcpu``, ``pc``, ``number``, ``symbol``, and what belongs to its reason; an end has
        ``ended``, the exit code, or None if the machine was closed. Raises ``GuestCrashError`` or the host's failure.
        """
    def resume(self, step: int | None = None, range: tuple[int, int] | None = None) -> None:
        """Starts the world; with ``step``, that vCPU executes one instruction while the others hold."""
    def interrupt(self, timed_out: bool = False) -> bool:
        """Asks for a stop. False if there is nothing to stop."""
    def end(self) -> None:
        """Ends the VM without waiting for its threads."""
    def detach(self) -> None:
        """Lets go of all breakpoints and runs on; the guest's end is then the VM's."""
    def close(self) -> None:
        """Ends the VM and waits for its threads."""
    def add_breakpoint(
        self,
        addresses: list[int],
        *,
        location: str,
        compiled: _CompiledParts | None,
        predicate: Callable[[Hit], object] | None,
        ignore: int,
        temporary: bool,
        vcpu: int | None,
        enabled: bool,
        name: str | None,
        hardware: bool,
    ) -> Breakpoint:
        """Sets a breakpoint. From the moment that this returns it holds on every vCPU."""
    def add_watchpoint(
        self,
        address: int,
        size: int,
        access: str,
        *,
        location: str,
        compiled: _CompiledParts | None,
        predicate: Callable[[Hit], object] | None,
        ignore: int,
        temporary: bool,
        vcpu: int | None,
        enabled: bool,
        name: str | None,
    ) -> Breakpoint:
        """Sets a watchpoint. From the moment that this returns it holds on every vCPU."""
    def set_condition(
        self,
        breakpoint: Breakpoint,
        compiled: _CompiledParts | None,
        predicate: Callable[[Hit], object] | None,
    ) -> None:
        """Replaces a breakpoint's condition."""
    def breakpoints(self) -> list[Breakpoint]:
        """All breakpoints, by number."""
    def instructions(self, vcpu: int) -> int | None:
        """How many instructions a vCPU has executed, where the back end counts them; while the world is stopped."""
    def halted(self, vcpu: int) -> bool:
        """Whether a vCPU waits for an interrupt in HLT; while the world is stopped."""
    def registers(self, vcpu: int) -> Registers:
        """A vCPU's registers, to be used while the world is stopped."""
    def memory(self, vcpu: int) -> Memory:
        """Memory as a vCPU sees it, to be used while the world is stopped."""
    def resolve(self, location: str) -> int:
        """The address of ``symbol``, ``symbol+0x10``, ``0x1234`` or ``*0x1234``. Raises ``BreakpointError``."""
    def resolve_place(self, place: str) -> list[int]:
        """The addresses of a source line, ``file.c:123``, or the one that ``resolve`` gives."""
    def backtrace(self, vcpu: int, limit: int) -> list[_FrameParts]:
        """The frames of a stopped vCPU, the innermost first."""
    def describe(self, pc: int) -> list[_FrameParts]:
        """The functions that an address lies in, the innermost first, as frames without CFA."""
    def caller(self, vcpu: int) -> tuple[int, int] | None:
        """The canonical frame address of a stopped vCPU's innermost frame, and where that returns to."""
    def line_range(self, address: int) -> tuple[int, int] | None:
        """The first address of the source line around an address, and the first behind it."""
    def stop_at(self, vcpu: int, addresses: list[int], stack: int) -> Breakpoint:
        """Makes a vCPU stop, as after a step, at one of these addresses with a stack pointer of at least ``stack``."""
    def symbolize(self, address: int) -> tuple[str, int] | None:
        """The symbol that covers an address, and the offset from its start."""
    def output(self) -> tuple[bytes, bool]:
        """What was captured of the console, and whether the limit cut it."""
    def stats(self) -> list[dict[str, dict[str, int]]]:
        """Each vCPU's ``exits`` and ``hypercalls`` by kind, those that aren't 0."""
    def latencies(self) -> list[dict[str, dict[str, dict[str, float]]]]:
        """How long each vCPU's timed exits took: reason, part, and its numbers in nanoseconds."""
    def latency_buckets(self) -> list[dict[str, dict[str, list[tuple[float, int]]]]]:
        """The same as nanoseconds and how often each was seen."""
    def restart_sampling(self, every: int, skip: int = 0) -> None:
        """Forgets what was timed, and times one exit in ``every`` from each vCPU's next resume on."""
    def time_stops(self, rounds: int, seconds: float) -> list[tuple[float, float, float, float]]:
        """Resumes and stops the stopped world.

        Nanoseconds to the first and the last vCPU's park, to the caller's wake-up, and for the resume before.
        """
    @property
    def cpus(self) -> int:
        """The number of vCPUs."""
    @property
    def backend(self) -> str:
        """The name of the back end."""
    @property
    def load_bias(self) -> int:
        """What to add to an address of the image's file to get its address in the guest."""
    @property
    def ram(self) -> tuple[int, int]:
        """Guest-physical start and size of RAM in bytes."""
    @property
    def elapsed(self) -> float:
        """Seconds from the start to now, or to the end."""

@final
class GdbServer:
    """A server for gdb. The package's ``GdbServer`` is made of this."""

    def __new__(cls, machine: Machine, address: str, bridge: object, overridden: set[str]) -> GdbServer:
        """Listens at ``address``. ``bridge`` answers for the policy; it is asked the ``overridden`` methods."""
    @property
    def address(self) -> str:
        """Where it listens: "HOST:PORT", a path, or "-"."""
    @property
    def client(self) -> str | None:
        """The client that is attached."""
    def wait(self, timeout: float | None = None) -> bool:
        """Waits until the guest has ended and no client is attached, or the server is closed. False: time is over."""
    def take_failure(self) -> tuple[BaseException, int | None] | None:
        """The oldest exception that nobody has seen, and the number of the stop that raises it too, if any."""
    def close(self) -> None:
        """Stops listening and drops the client."""

@final
class Breakpoint:
    """A breakpoint or watchpoint of a machine."""

    @property
    def id(self) -> int:
        """Its number, from 1."""
    @property
    def address(self) -> int:
        """The guest-virtual address."""
    @property
    def addresses(self) -> list[int]:
        """All addresses that it is at."""
    @property
    def location(self) -> str:
        """The place as it was given."""
    @property
    def name(self) -> str | None:
        """A name for messages."""
    @property
    def temporary(self) -> bool:
        """Whether it is deleted when it has stopped the world once."""
    @property
    def vcpu(self) -> int | None:
        """The only vCPU that it is for; None: all."""
    @property
    def reached(self) -> int:
        """How many times a vCPU that it is for has met it."""
    @property
    def hits(self) -> int:
        """How many of these times its conditions let through."""
    @property
    def ignore(self) -> int:
        """How many arrivals will pass before the conditions are asked. Can be set."""
    @ignore.setter
    def ignore(self, count: int, /) -> None: ...
    @property
    def enabled(self) -> bool:
        """Whether it is looked at. Can be set."""
    @enabled.setter
    def enabled(self, enabled: bool, /) -> None: ...
    @property
    def deleted(self) -> bool:
        """Whether it is gone."""
    def delete(self) -> None:
        """Deletes it; the guest's code is as it was."""
    @property
    def size(self) -> int | None:
        """Bytes that a watchpoint watches; None for a breakpoint."""
    @property
    def access(self) -> Literal["write", "read", "access"] | None:
        """What fires a watchpoint; None for a breakpoint."""
    @property
    def kind(self) -> Literal["int3", "debug register", "single-step"] | None:
        """How the guest is made to leave there; None while disabled."""
    @property
    def condition(self) -> str | Callable[[Hit], object] | None:
        """The condition as it was given."""
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class Hit:
    """A vCPU that met a breakpoint, or has touched what is watched. Usable only inside the callback that got it."""

    @property
    def vcpu(self) -> int:
        """The number of the vCPU."""
    @property
    def pc(self) -> int:
        """Where it is."""
    @property
    def breakpoint(self) -> Breakpoint:
        """The breakpoint or watchpoint."""
    @property
    def address(self) -> int | None:
        """Of a watchpoint: the first watched byte that was accessed, as far as that is known. Else None."""
    @property
    def access(self) -> Literal["write", "read"] | None:
        """Of a watchpoint: what was done. Else None."""
    @property
    def old(self) -> int | bytes | None:
        """Of a watchpoint: what was there before; a number of up to 8 bytes, else bytes; None if it was not mapped."""
    @property
    def new(self) -> int | bytes | None:
        """Of a watchpoint: what is there now, as ``old``."""
    @property
    def symbol(self) -> str | None:
        """``"symbol+0x10"`` for ``pc``, if known."""
    @property
    def registers(self) -> Registers:
        """The registers of the vCPU."""
    @property
    def memory(self) -> Memory:
        """Guest memory as the vCPU sees it."""
    def arg(self, n: int) -> int:
        """The n-th integer argument, 0 to 5, of the System V calling convention. Raises ``IndexError`` beyond."""

@final
class Registers:
    """A vCPU's registers as attributes: each is fetched when it is touched, and written when it is set.

    All are unsigned. Setting one to a number that doesn't fit it raises ``OverflowError``. ``dir()`` lists them:
    those of AVX-512 (``xmm16`` and up, ``zmm``, ``k``) and ``pkru`` only where the vCPU has them.
    """

    rax: int
    rcx: int
    rdx: int
    rbx: int
    rsp: int
    rbp: int
    rsi: int
    rdi: int
    r8: int
    r9: int
    r10: int
    r11: int
    r12: int
    r13: int
    r14: int
    r15: int
    rip: int
    pc: int
    sp: int
    rflags: int
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    cr8: int
    efer: int
    apic_base: int
    cs: int
    cs_base: int
    cs_limit: int
    cs_attributes: int
    ds: int
    ds_base: int
    ds_limit: int
    ds_attributes: int
    es: int
    es_base: int
    es_limit: int
    es_attributes: int
    fs: int
    fs_base: int
    fs_limit: int
    fs_attributes: int
    gs: int
    gs_base: int
    gs_limit: int
    gs_attributes: int
    ss: int
    ss_base: int
    ss_limit: int
    ss_attributes: int
    tr: int
    tr_base: int
    tr_limit: int
    tr_attributes: int
    ldt: int
    ldt_base: int
    ldt_limit: int
    ldt_attributes: int
    gdt_base: int
    gdt_limit: int
    idt_base: int
    idt_limit: int
    xmm0: int
    xmm1: int
    xmm2: int
    xmm3: int
    xmm4: int
    xmm5: int
    xmm6: int
    xmm7: int
    xmm8: int
    xmm9: int
    xmm10: int
    xmm11: int
    xmm12: int
    xmm13: int
    xmm14: int
    xmm15: int
    st0: int
    st1: int
    st2: int
    st3: int
    st4: int
    st5: int
    st6: int
    st7: int
    fcw: int
    fsw: int
    ftw: int
    fop: int
    fip: int
    fdp: int
    mxcsr: int
    kernel_gs_base: int
    xmm16: int
    xmm17: int
    xmm18: int
    xmm19: int
    xmm20: int
    xmm21: int
    xmm22: int
    xmm23: int
    xmm24: int
    xmm25: int
    xmm26: int
    xmm27: int
    xmm28: int
    xmm29: int
    xmm30: int
    xmm31: int
    ymm0: int
    ymm1: int
    ymm2: int
    ymm3: int
    ymm4: int
    ymm5: int
    ymm6: int
    ymm7: int
    ymm8: int
    ymm9: int
    ymm10: int
    ymm11: int
    ymm12: int
    ymm13: int
    ymm14: int
    ymm15: int
    ymm16: int
    ymm17: int
    ymm18: int
    ymm19: int
    ymm20: int
    ymm21: int
    ymm22: int
    ymm23: int
    ymm24: int
    ymm25: int
    ymm26: int
    ymm27: int
    ymm28: int
    ymm29: int
    ymm30: int
    ymm31: int
    zmm0: int
    zmm1: int
    zmm2: int
    zmm3: int
    zmm4: int
    zmm5: int
    zmm6: int
    zmm7: int
    zmm8: int
    zmm9: int
    zmm10: int
    zmm11: int
    zmm12: int
    zmm13: int
    zmm14: int
    zmm15: int
    zmm16: int
    zmm17: int
    zmm18: int
    zmm19: int
    zmm20: int
    zmm21: int
    zmm22: int
    zmm23: int
    zmm24: int
    zmm25: int
    zmm26: int
    zmm27: int
    zmm28: int
    zmm29: int
    zmm30: int
    zmm31: int
    k0: int
    k1: int
    k2: int
    k3: int
    k4: int
    k5: int
    k6: int
    k7: int
    pkru: int

    def to_dict(self) -> dict[str, int]:
        """All registers by name."""

@final
class Memory:
    """Guest memory, through a vCPU's page tables or by guest-physical address; little endian.

    Bytes that a breakpoint has planted are never seen. Raises ``GuestFaultError`` where nothing is mapped, or no RAM.
    """

    @property
    def physical(self) -> Memory:
        """The same memory by guest-physical address."""
    def read(self, address: int, length: int) -> bytes:
        """``length`` bytes."""
    def write(self, address: int, data: Buffer) -> None:
        """Writes the bytes of whatever has a buffer: ``bytes``, ``array.array("I", …)``, a ``ctypes`` structure."""
    def read_cstring(self, address: int, limit: int = 4096) -> bytes:
        """The bytes up to a NUL, ``limit`` at most."""
    def translate(self, address: int) -> int | None:
        """The guest-physical address that a guest-virtual one is mapped to, or None."""
    def read_u8(self, address: int) -> int: ...
    def read_u16(self, address: int) -> int: ...
    def read_u32(self, address: int) -> int: ...
    def read_u64(self, address: int) -> int: ...
    def read_i8(self, address: int) -> int: ...
    def read_i16(self, address: int) -> int: ...
    def read_i32(self, address: int) -> int: ...
    def read_i64(self, address: int) -> int: ...
    def write_u8(self, address: int, value: int) -> None: ...
    def write_u16(self, address: int, value: int) -> None: ...
    def write_u32(self, address: int, value: int) -> None: ...
    def write_u64(self, address: int, value: int) -> None: ...
    def write_i8(self, address: int, value: int) -> None: ...
    def write_i16(self, address: int, value: int) -> None: ...
    def write_i32(self, address: int, value: int) -> None: ...
    def write_i64(self, address: int, value: int) -> None: ...
