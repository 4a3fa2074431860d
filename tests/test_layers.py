"""Imports go one way. Read from the syntax tree, so that lazy and type-only imports count too."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "chiron_engine"
KERNELS = ROOT / "kernels" / "chiron_kernels"

# The modules of the gateway that turn text into ids and back.
GATEWAY_TEXT = {
    "gateway.text",
    "gateway.chat_template",
    "gateway.detokenizer",
    "gateway.stop_strings",
    "gateway.output_text",
}
# The simulator's traces, and how it counts: one definition of attainment for both.
SIM_ACCOUNTING = {
    "sim.traces",
    "sim.workload",
    "sim.run_result",
    "sim.token_gaps",
    "sim.attainment",
    "sim.summary",
    "sim.report",
    "sim.plot",
}
# What each layer may import besides itself. A longer name is a narrower permission.
ALLOWED: dict[str, set[str]] = {
    "policy": set(),
    "core": {"policy", "config"},
    "model": {"core", "policy", "config", "chiron_kernels"},
    "runtime": {"core", "model", "policy", "config", "chiron_kernels"},
    "serving": {"core", "runtime", "rpc", "policy", "config", *GATEWAY_TEXT},
    "rpc": {"config"},
    "gateway": {"rpc", "policy", "config"},
    "cluster": {"policy", "rpc", "config"},
    "sim": {"policy", "core", "config"},
    "bench": {"rpc", *SIM_ACCOUNTING, "policy.iteration.request", "config"},
    "config": set(),
    "chiron_kernels": set(),
}
# These tie the layers together.
UNRESTRICTED = {"cli", "commands", "__main__", "__init__"}

POLICY_MUST_NOT_IMPORT = {"torch", "time", "asyncio", "threading", "os", "logging", "random"}
LOADS_NO_TORCH = ("policy", "core", "cluster", "gateway", "sim", "bench")
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "joblib.load"}


def python_files() -> list[Path]:
    found = [path for folder in (PACKAGE, KERNELS) for path in sorted(folder.rglob("*.py"))]
    return [path for path in found if not path.name.endswith(("_pb2.py", "_pb2_grpc.py"))]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def layer_of(path: Path) -> str:
    if path.is_relative_to(KERNELS):
        return "chiron_kernels"
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_modules(tree: ast.AST, package: str) -> Iterator[str]:
    """Dotted names a file imports: `from a.b import c` yields `a.b.c`; relative names are resolved
    against `package`, the package that holds the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")
                parent = parent[: len(parent) - (node.level - 1)]
                base = ".".join([*parent, base] if base else parent)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def package_of(path: Path) -> str:
    root = ROOT / "kernels" if path.is_relative_to(KERNELS) else ROOT
    return ".".join(path.parent.relative_to(root).parts)


def imports_of(path: Path) -> list[str]:
    return list(imported_modules(ast.parse(path.read_text(encoding="utf-8")), package_of(path)))


def ours(module: str) -> str | None:
    """A module of this project, without the leading package name; None for anything else."""
    if module.split(".")[0] == "chiron_kernels":
        return module
    if module.startswith("chiron_engine.") and module != "chiron_engine.__version__":
        return module.removeprefix("chiron_engine.")
    return None


def is_allowed(layer: str, module: str) -> bool:
    permissions = ALLOWED[layer] | {layer}
    return any(module == allowed or module.startswith(allowed + ".") for allowed in permissions)


@pytest.mark.parametrize("path", python_files(), ids=relative)
def test_imports_go_one_way(path: Path) -> None:
    layer = layer_of(path)
    if layer in UNRESTRICTED:
        return
    assert layer in ALLOWED, f"{relative(path)} is in no known layer"
    mine = [name for module in imports_of(path) if (name := ours(module)) is not None]
    wrong = [name for name in mine if not is_allowed(layer, name)]
    assert not wrong, f"{relative(path)} may not import {wrong}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "policy").rglob("*.py")), ids=relative)
def test_policy_is_pure(path: Path) -> None:
    found = {module.split(".")[0] for module in imports_of(path)} & POLICY_MUST_NOT_IMPORT
    assert not found, f"{relative(path)} imports {sorted(found)}: time, randomness and ids are arguments"


def test_relative_and_nested_imports_are_seen() -> None:
    source = (
        "from .request import Request\nfrom ..x import y\ndef f():\n  import torch.nn\n  from . import z\n"
    )
    found = list(imported_modules(ast.parse(source), "chiron_engine.policy.iteration"))
    assert found == [
        "chiron_engine.policy.iteration.request.Request",
        "chiron_engine.policy.x.y",
        "torch.nn",
        "chiron_engine.policy.iteration.z",
    ]
    assert not is_allowed("core", "model.loader.load_model")
    assert not is_allowed("serving", "gateway.server.serve")
    assert is_allowed("runtime", "chiron_kernels.decode")


@pytest.mark.parametrize("name", [name for name in LOADS_NO_TORCH if (PACKAGE / name).is_dir()])
def test_loads_no_torch(name: str) -> None:
    """Every module of the package, imported in a fresh interpreter."""
    code = (
        "import importlib, pkgutil, sys\n"
        f"package = importlib.import_module('chiron_engine.{name}')\n"
        "for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "    importlib.import_module(module.name)\n"
        "print(*sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert not result.stdout.strip(), f"importing chiron_engine.{name} loads {result.stdout}"


def dotted_name(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted_name(node.value)}.{node.attr}"
    return ""


def unsafe_uses(source: str) -> Iterator[str]:
    """Ways to run code out of data: unpickling, evaluating, remote model code."""
    tree = ast.parse(source)
    yield from (name for name in imported_modules(tree, "") if name.split(".")[0] in UNSAFE_MODULES)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if dotted_name(node.func) in UNSAFE_CALLS:
            yield dotted_name(node.func)
        for keyword in node.keywords:
            is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg == "trust_remote_code" and not is_false:
                yield "trust_remote_code"


@pytest.mark.parametrize("path", [*python_files(), *sorted((ROOT / "scripts").glob("*.py"))], ids=relative)
def test_no_data_is_run_as_code(path: Path) -> None:
    found = list(unsafe_uses(path.read_text(encoding="utf-8")))
    assert not found, f"{relative(path)} uses {found}"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "eval('1')",
        "import torch\ntorch.load('x')",
        "import yaml\nyaml.load(f)",
        "f(trust_remote_code=flag)",
    ],
)
def test_unsafe_uses_are_seen(source: str) -> None:
    assert list(unsafe_uses(source))


def test_no_packages_that_shadow_others() -> None:
    """transformers looks for a top-level module named `kernels`."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "proto" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()
