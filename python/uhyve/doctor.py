"""What of this machine matters for running and debugging guests, and what to do where something is missing."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from uhyve import __version__, _core
from uhyve.errors import UhyveError

__all__ = ["Diagnosis", "Finding", "Kind", "Level", "diagnose"]

Kind = Literal["hardware", "PVM", "emulated", "none"]
"""What is behind KVM: the CPU's own virtualisation, PVM, another one that emulates ring 0, or nothing usable."""
Level = Literal["ok", "note", "warning", "error"]
"""``error``: guests can't run. ``warning``: something is missing or slow. ``note``: good to know."""

_MODULES = ("kvm_intel", "kvm_amd", "kvm_pvm")
_INT3 = {
    "debug exit": "debug exit",
    "internal error": "emulation failure at the int3",
    "not intercepted": "not intercepted",
}


@dataclass(frozen=True)
class Finding:
    """One fact, and what follows from it."""

    name: str
    """What was looked at."""
    value: str
    """What was found."""
    level: Level = "ok"
    """Whether that is a shortcoming."""
    advice: str = ""
    """What it means and what to do; empty if all is well."""


@dataclass(frozen=True)
class Diagnosis:
    """All that ``uhyve doctor`` shows."""

    version: str
    """The version of this package."""
    kind: Kind
    """What is behind KVM."""
    capabilities: dict[str, Any] = field(default_factory=dict)
    """What the probe found, as ``uhyve._core.probe_kvm`` gives it; empty if nothing could be probed."""
    findings: tuple[Finding, ...] = ()
    """The facts in the order in which they are worth reading."""

    @property
    def usable(self) -> bool:
        """Whether guests can run here."""
        return all(finding.level != "error" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Everything, in the types of JSON."""
        return asdict(self) | {"usable": self.usable}


def diagnose(device: str = "/dev/kvm") -> Diagnosis:
    """Looks at this machine, and runs small guests to find out what its KVM really does. Raises nothing."""
    capabilities, trouble = _probe()
    modules = [name for name in _MODULES if Path("/sys/module", name).is_dir()]
    kind = _kind(capabilities, modules)
    findings = [_kernel(), _cpu(), _back_end(), _device(Path(device)), _modules(modules, kind)]
    if capabilities:
        findings += _debugging(capabilities)
    elif all(finding.level == "ok" for finding in findings[:4]):
        findings.append(Finding("probe guests", "did not run", "warning", trouble))
    findings += [_huge_pages(), _landlock()]
    return Diagnosis(__version__, kind, capabilities, tuple(findings))


def _probe() -> tuple[dict[str, Any], str]:
    try:
        return _core.probe_kvm(), ""
    except (UhyveError, OSError) as error:
        return {}, str(error)


def _kind(capabilities: dict[str, Any], modules: list[str]) -> Kind:
    if not capabilities:
        return "none"
    if capabilities["native_ring0"]:
        return "hardware"
    return "PVM" if "kvm_pvm" in modules or not modules else "emulated"


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def _kernel() -> Finding:
    system = os.uname()
    if system.sysname == "Linux" and system.machine == "x86_64":
        return Finding("system", f"{system.sysname} {system.release} {system.machine}")
    advice = "guests need a Linux host on x86-64"
    return Finding("system", f"{system.sysname} {system.release} {system.machine}", "error", advice)


def _cpu() -> Finding:
    fields = [line.split(":", 1) for line in _read("/proc/cpuinfo").splitlines() if ":" in line]
    facts = {name.strip(): value.strip() for name, value in fields}
    flags = set(facts.get("flags", "").split())
    extension = "vmx" if "vmx" in flags else "svm" if "svm" in flags else "no vmx or svm"
    virtual = ", itself a virtual CPU" if "hypervisor" in flags else ""
    count = len(os.sched_getaffinity(0))
    return Finding("CPU", f"{facts.get('model name', 'unknown')} ({count} usable, {extension}{virtual})")


def _back_end() -> Finding:
    """What ``backend="auto"`` comes to, and why."""
    wanted = os.environ.get("UHYVE_BACKEND") or "auto"
    try:
        name, reason = _core.choose_backend(wanted)
    except UhyveError as error:
        return Finding("back end", f"UHYVE_BACKEND={wanted}", "error", str(error))
    chosen = " (by UHYVE_BACKEND)" if wanted != "auto" else ""
    value = {"kvm": "kvm", "soft": "soft, the software CPU"}[name] + chosen
    if wanted != "auto":
        return Finding("back end", value, "note", "unset UHYVE_BACKEND to have the better one chosen")
    return Finding("back end", value, "ok", reason)


def _device(path: Path) -> Finding:
    name = str(path)
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            return Finding(name, "no permission", "warning", _permission_advice(path))
        if error.errno == errno.ENOENT:
            advice = (
                "load the kernel module (modprobe kvm_intel or kvm_amd), turn virtualisation on in the firmware, "
                "or give the container the device (--device /dev/kvm)"
            )
            return Finding(name, "does not exist", "warning", advice)
        advice = "load kvm_intel or kvm_amd, or turn virtualisation on in the firmware"
        return Finding(name, f"can't be opened: {error.strerror}", "warning", advice)
    return Finding(name, "can be opened")


def _permission_advice(path: Path) -> str:
    import grp

    entry = path.stat()
    try:
        group = grp.getgrgid(entry.st_gid).gr_name
    except KeyError:
        group = str(entry.st_gid)
    if entry.st_mode & stat.S_IRGRP and entry.st_mode & stat.S_IWGRP and entry.st_gid:
        return f"add yourself to its group: sudo usermod -aG {group} $USER, then log in again"
    return (
        f"its mode is {stat.filemode(entry.st_mode)}, its group {group}: "
        f"sudo chgrp kvm {path} && sudo chmod 660 {path}, and join the group kvm"
    )


def _modules(modules: list[str], kind: Kind) -> Finding:
    loaded = ", ".join(modules) or "no module seen"
    value = f"{kind} ({loaded})"
    if kind == "hardware":
        return Finding("KVM", value)
    if kind == "none":
        return Finding("KVM", loaded, "note", "what it can do is unknown: no guest could be run")
    advice = (
        "guest kernel code is emulated, at about 1 M instructions/s; SSE and some other instructions go through a "
        "fallback in user space: backend='soft' is faster, a machine with VMX or SVM much faster"
    )
    return Finding("KVM", value, "warning", advice)


def _debugging(found: dict[str, Any]) -> list[Finding]:
    """What the probe says about breakpoints and steps."""
    works = bool(found["single_step"])
    step = Finding("single-step", "works") if works else Finding("single-step", "missing", "warning", "no step()")
    quiet = bool(found["block_interrupts"])
    return [
        step,
        Finding("interrupts while stepping", "kept out (BLOCKIRQ)")
        if quiet
        else Finding(
            "interrupts while stepping", "can't be kept out", "note", "a step may end in an interrupt handler"
        ),
        _int3(found),
        _debug_registers(found),
        Finding("watchpoints", "work")
        if found["watchpoints"]
        else Finding("watchpoints", "never fire", "note", "debug registers do not see data accesses on this KVM"),
    ]


def _int3(found: dict[str, Any]) -> Finding:
    value = _INT3.get(found["int3"], str(found["int3"]))
    if found["int3"] != "not intercepted":
        return Finding("int3", value)
    slots = found["hardware_breakpoints"]
    advice = (
        f"{slots} breakpoints are held in debug registers; beyond these every instruction is stepped, which is slow"
    )
    return Finding("int3", value, "warning", advice)


def _debug_registers(found: dict[str, Any]) -> Finding:
    count = found["hardware_breakpoints"]
    if count == 4:
        return Finding("debug registers", "4 of 4 work")
    advice = "hardware breakpoints beyond these are stepped, which is slow"
    return Finding("debug registers", f"{count} of 4 work", "warning", advice)


def _huge_pages() -> Finding:
    enabled = _read("/sys/kernel/mm/transparent_hugepage/enabled")
    mode = enabled.partition("[")[2].partition("]")[0]
    if mode in ("always", "madvise"):
        return Finding("transparent huge pages", mode)
    advice = "thp=True has no effect; echo madvise > /sys/kernel/mm/transparent_hugepage/enabled turns them on"
    return Finding("transparent huge pages", mode or "not in this kernel", "note", advice)


def _landlock() -> Finding:
    import ctypes

    # landlock_create_ruleset(NULL, 0, LANDLOCK_CREATE_RULESET_VERSION) gives the version of the interface.
    version = ctypes.CDLL(None, use_errno=True).syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if version >= 3:
        return Finding("Landlock", f"version {version}")
    value = f"version {version}" if version > 0 else "not in this kernel, or off"
    return Finding("Landlock", value, "note", "file_isolation='strict' needs version 3 (Linux 6.2)")
