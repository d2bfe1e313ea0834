"""The package as such: what an import costs, what it exports, and that the stub tells the truth."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import uhyve
from uhyve import _core

PACKAGE = Path(uhyve.__file__).parent


def milliseconds(code: str, compiled: Path) -> float:
    """What an interpreter costs that runs the code, in processor time, which other processes don't change much."""
    # As of an installed package, whose modules pip has compiled; the environment here may forbid writing that.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(compiled)
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0
    return 1000 * (usage.ru_utime + usage.ru_stime)


def test_import_takes_less_than_30_milliseconds(tmp_path: Path) -> None:
    milliseconds("import uhyve", tmp_path)

    pairs = [(milliseconds("import uhyve", tmp_path), milliseconds("pass", tmp_path)) for _ in range(9)]

    # The least of each: what other processes do at the same time only adds to it.
    cost = min(with_it for with_it, _ in pairs) - min(bare for _, bare in pairs)
    assert cost < 30, pairs


def test_import_needs_no_other_package_and_no_cli() -> None:
    code = "import sys; before = set(sys.modules); import uhyve; print(*set(sys.modules) - before)"

    modules = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()

    assert not {"click", "rich", "asyncio", "dataclasses", "inspect", "subprocess"} & set(modules)


def test_exports_exist_and_are_documented() -> None:
    for name in uhyve.__all__:
        value = getattr(uhyve, name)
        assert isinstance(value, str) or inspect.getdoc(value), name


def test_exceptions_derive_from_one_and_from_the_fitting_built_in() -> None:
    parents = {
        "ConfigError": ValueError,
        "ImageError": ValueError,
        "HypervisorError": OSError,
        "HypervisorUnavailableError": OSError,
        "VmStateError": RuntimeError,
        "ConditionError": ValueError,
        "GdbConnectionError": ConnectionError,
        "TimeoutExpired": TimeoutError,
    }
    for name in uhyve.errors.__all__:
        error = getattr(uhyve, name)
        assert issubclass(error, uhyve.UhyveError)
        assert issubclass(error, parents.get(name, Exception))


def test_version_is_that_of_the_installed_distribution() -> None:
    from importlib.metadata import version

    assert uhyve.__version__ == version("uhyve") == _core.__version__


def test_package_is_marked_as_typed() -> None:
    assert (PACKAGE / "py.typed").exists()


def stub() -> dict[str, ast.stmt]:
    """What the stub declares: names, and ``Class.name`` for what classes have."""
    found: dict[str, ast.stmt] = {}
    for node in ast.parse((PACKAGE / "_core.pyi").read_text()).body:
        names = [node.name] if isinstance(node, ast.ClassDef | ast.FunctionDef) else []
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        for name in names:
            found[name] = node
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    found[f"{node.name}.{member.name}"] = member
                elif isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
                    found[f"{node.name}.{member.target.id}"] = member
    return found


def test_stub_and_binary_have_the_same_names() -> None:
    declared = {name for name in stub() if name[0] != "_" and "TypeAlias" not in name and name != "StopReason"}
    exported: set[str] = set()
    for name in dir(_core):
        if name.startswith("_"):
            continue
        value = getattr(_core, name)
        exported.add(name)
        if inspect.isclass(value):
            exported |= {f"{name}.{member}" for member in vars(value) if not member.startswith("_")}

    # A register is looked up by its name when it is touched; the class has no attribute for it.
    registers = {
        name for name, node in stub().items() if name.startswith("Registers.") and isinstance(node, ast.AnnAssign)
    }
    public = {name for name in declared if "._" not in name} - registers
    assert public == exported


def test_stub_and_binary_have_the_same_parameters() -> None:
    for name, node in stub().items():
        if not isinstance(node, ast.FunctionDef) or ".__" in name:
            continue
        holder, _, member = name.rpartition(".")
        value = vars(getattr(_core, holder))[member] if holder else getattr(_core, name)
        if isinstance(value, staticmethod):
            value = value.__func__
        try:
            parameters = list(inspect.signature(value).parameters)
        except (TypeError, ValueError):
            continue
        arguments = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        assert parameters == arguments, name


def test_core_classes_cant_be_made_or_subclassed_by_hand() -> None:
    for name in ("Breakpoint", "Hit", "Registers", "Memory"):
        with pytest.raises(TypeError):
            getattr(_core, name)()
        with pytest.raises(TypeError):
            type("Mine", (getattr(_core, name),), {})
