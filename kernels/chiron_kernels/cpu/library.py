"""Compiles the C kernels once per machine and loads them.

They share torch's OpenMP threads: the calls that gcc makes for `#pragma omp` are left open in the
library and found in the libgomp that torch has loaded, so that there is one pool of threads.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

SOURCE = Path(__file__).resolve().parent / "source"
# What the kernels use, no more: the library then runs on every CPU that has these.
FEATURES = ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl")
TARGET = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma")
FLAGS = ("-std=c11", "-O3", "-fopenmp", "-fPIC", *TARGET)
# What one file needs beside; its kernels are called only where `has_vnni`. Redundancy elimination across
# loops makes gcc copy the sums of a tile, which then no longer fit into the registers: half the speed.
MORE_FLAGS = {"int8_linear.c": ("-mavx512vnni", "-fno-tree-pre")}
COMPILE_TIMEOUT_S = 120
# At the end of the library, of all before it; the loader does not look there.
DIGEST_BYTES = hashlib.sha256().digest_size

Pointer = ctypes.c_void_p
Size = ctypes.c_int64
Real = ctypes.c_float

SIGNATURES: dict[str, tuple[type, ...]] = {
    "chiron_int8_linear": (Pointer, Size, Size, Size, Size, *[Pointer] * 7),
    "chiron_pack_int8": (Pointer, Size, Size, Pointer, Pointer),
    "chiron_add_rms_norm": (Pointer, Pointer, Pointer, Pointer, Size, Size, Real),
    "chiron_silu_multiply": (Pointer, Pointer, Size, Size),
    "chiron_rotate": (Pointer, Size, Size, Size, Size, Pointer, Pointer),
    "chiron_paged_attention": (
        *(Pointer, Size, Pointer, Size, Pointer, Size),
        *(Pointer, Size, Size, Size, Size, Size, Size),
        *(Pointer, Pointer, Size, Pointer, Size),
        *(Real, Real, Size, Pointer, Pointer),
    ),
    "chiron_row_maxima": (Pointer, Size, Size, Size, Pointer, Pointer),
    "chiron_draw": (Pointer, Size, Size, Pointer, Pointer, Size, *[Pointer] * 8, Size),
    "chiron_forbid": (Pointer, Size, Size, Pointer, Size, Pointer, Size),
    "chiron_token_logprobs": (Pointer, Size, Size, Pointer, Size, Pointer, Size, *[Pointer] * 3),
}
COUNTS: dict[str, tuple[type, ...]] = {"chiron_max_run": (Size,), "chiron_draw_room": (Size,)}


class KernelsUnavailable(RuntimeError):
    """The compiled kernels cannot run here; the message says why."""


def has_vnni() -> bool:
    """Whether 8-bit products are summed in 32 bits; without it sums would saturate."""
    return bool(torch.cpu.get_capabilities().get("avx512_vnni", False))


class MachineUnsuited(KernelsUnavailable):
    """The CPU has not what they need, or there is no compiler: nothing is broken."""


@functools.cache
def open_library(cache: Path) -> ctypes.CDLL:
    """The kernels, compiled into folder `cache` at first use. Raises KernelsUnavailable."""
    _check_machine()
    built = cache / f"chiron-cpu-{_fingerprint()}.so"
    library = _load(built) if built.exists() else None
    if library is None:  # not there, or damaged
        _compile(_compiler(), built)
        library = _load(built)
    if library is None:
        raise KernelsUnavailable(
            f"cannot load {built}, which was just compiled: is CC or gcc a GNU compiler?"
        )
    for name, arguments in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    for name, arguments in COUNTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, Size
    return library


def _check_machine() -> None:
    if platform.machine() not in ("x86_64", "AMD64"):
        raise MachineUnsuited(f"the compiled kernels are for x86-64, not {platform.machine()}")
    capabilities = torch.cpu.get_capabilities()
    lacking = [name for name in FEATURES if not capabilities.get(name, False)]
    if lacking:
        raise MachineUnsuited(f"the CPU lacks {', '.join(lacking)}")


def _compiler() -> str:
    for name in (os.environ.get("CC"), "gcc", "cc"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise MachineUnsuited("there is no C compiler (gcc) on the PATH")


def _load(built: Path) -> ctypes.CDLL | None:
    """None for a library that is not as it was written: to load half of one may end the process."""
    content = built.read_bytes()
    if hashlib.sha256(content[:-DIGEST_BYTES]).digest() != content[-DIGEST_BYTES:]:
        return None
    try:
        return ctypes.CDLL(str(built))
    except OSError:
        return None


def _fingerprint() -> str:
    """Of what the library is made from."""
    digest = hashlib.sha256(f"{FLAGS} {MORE_FLAGS} {platform.machine()}".encode())
    for file in sorted(SOURCE.iterdir()):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _compile(compiler: str, built: Path) -> None:
    """Into a folder of its own, then renamed: another process sees the whole library or none."""
    try:
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent, prefix="compiling-") as folder:
            with ThreadPoolExecutor() as compilers:
                compile_file = functools.partial(_compile_file, compiler, Path(folder))
                objects = list(compilers.map(compile_file, sorted(SOURCE.glob("*.c"))))
            # Without -fopenmp here: that would load a second OpenMP beside torch's.
            linked = Path(folder) / built.name
            _run([compiler, "-shared", *map(str, objects), "-lm", "-o", str(linked)])
            content = linked.read_bytes()
            linked.write_bytes(content + hashlib.sha256(content).digest())
            linked.replace(built)
    except OSError as error:
        raise KernelsUnavailable(f"cannot write {built}: {error}") from error


def _compile_file(compiler: str, folder: Path, file: Path) -> Path:
    out = folder / f"{file.stem}.o"
    _run([compiler, *FLAGS, *MORE_FLAGS.get(file.name, ()), "-c", str(file), "-o", str(out)])
    return out


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsUnavailable(f"{command[0]} did not compile the kernels: {error}") from error
    if done.returncode:
        raise KernelsUnavailable(f"{command[0]} did not compile the kernels: {done.stderr.strip()[:500]}")
