"""Everything that needs a GPU, in one run of under nine minutes. Started by scripts/gpu_suite.sh."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from chiron_engine.config import GIB, EngineConfig
from chiron_engine.model.kv_cache_dtype import ADA
from chiron_engine.runtime.build import build_executor
from chiron_engine.runtime.torch_executor import TorchExecutor
from chiron_engine.runtime.trial_steps import measure_swap_costs
from scripts.bench_throughput import random_prompts, run_once
from scripts.gpu_suite.bandwidth import measure_bandwidth, measure_matmul
from scripts.gpu_suite.parts import PARTS, run_parts
from scripts.gpu_suite.random_llama import SHAPES, write_random_llama
from scripts.gpu_suite.report import folder_name, write_report
from scripts.gpu_suite.step_grid import COEFFICIENTS, GridPoint, fit_step_time, measure_grid

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "kernels" / "benchmarks" / "results"
GPU_MODELS = ("smollm2-135m", "llama-3.1-8b")
TRIAL_MODELS = ("tiny",)


class PhaseTimer:
    """A progress callback that notes how long each phase took. The time until a phase reports its
    end counts for it, so nothing between two phases is lost."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.messages: list[str] = []
        self._last = time.monotonic()

    def __call__(self, phase: str, fraction: float) -> None:
        if fraction < 1.0:
            return
        now = time.monotonic()
        name = phase.split(" of ")[0]
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self.messages.append(phase)
        self._last = now


def describe_device(device: torch.device) -> dict[str, Any]:
    facts = {"torch": torch.__version__, "python": sys.version.split()[0], "cpus": os.cpu_count()}
    if device.type == "cpu":
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return {"name": "cpu-trial", "memory_gib": memory / GIB, **facts}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_gib": properties.total_memory / GIB,
        "multiprocessors": properties.multi_processor_count,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        **facts,
    }


def engine_config(path: Path, device: torch.device) -> EngineConfig:
    if device.type == "cpu":
        return EngineConfig(
            str(path),
            device="cpu",
            dtype="float32",
            kv_cache_memory=4 << 20,
            swap_space=1 << 20,
            max_num_seqs=8,
            threads=1,
        )
    return EngineConfig(
        str(path),
        device="cuda",
        dtype="bfloat16",
        swap_space=4 * GIB,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
    )


def measure_model(shape: str, device: torch.device, deadline: float, skipped: list[str]) -> dict[str, Any]:
    """Write random weights, load them, then time loading, copies, throughput and the grid of steps."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / shape
        began = time.monotonic()
        weight_bytes = write_random_llama(path, shape, device)
        write_s = time.monotonic() - began
        began, timer = time.monotonic(), PhaseTimer()
        executor, _ = build_executor(engine_config(path, device), timer)
        ready_s = time.monotonic() - began
        kernels = executor.model.kernels.value
        try:
            measured = measure_executor(executor, deadline, skipped)
        finally:
            executor.close()
        fp8 = measure_fp8(path, device, deadline, skipped)
    return {
        "name": shape,
        "dtype": "float32" if device.type == "cpu" else "bfloat16",
        "kernels": kernels,
        "weight_bytes": weight_bytes,
        "write_random_weights_s": write_s,
        "ready_s": ready_s,
        "load_phases_s": timer.seconds,
        "kv": kv_sizes(timer),
        "fp8_kv": fp8,
        **measured,
    }


def kv_sizes(timer: PhaseTimer) -> str:
    return next(message for message in timer.messages if message.startswith("KV cache"))


def measure_fp8(
    path: Path, device: torch.device, deadline: float, skipped: list[str]
) -> dict[str, Any] | None:
    """The same model over KV of 8 bits: its room and its throughput. None where the device has no such
    floats, and where the time is over."""
    if device.type == "cpu" or torch.cuda.get_device_capability(device) < ADA:
        return None
    if time.monotonic() > deadline:
        skipped.append(f"{path.name} with KV of 8 bits: out of time")
        return None
    timer = PhaseTimer()
    executor, _ = build_executor(replace(engine_config(path, device), kv_cache_dtype="fp8"), timer)
    try:
        return {"kv": kv_sizes(timer), "throughput": measure_throughput(executor)}
    finally:
        executor.close()


def measure_executor(executor: TorchExecutor, deadline: float, skipped: list[str]) -> dict[str, Any]:
    costs = measure_swap_costs(executor)
    block_bytes = executor.device_pool.bytes_per_block
    swap = {
        "block_bytes": block_bytes,
        "copy_out_gb_per_s": block_bytes / costs.copy_out_s / 1e9,
        "copy_in_gb_per_s": block_bytes / costs.copy_in_s / 1e9,
        **asdict(costs),
    }
    throughput = measure_throughput(executor)
    points = measure_grid(executor, deadline, skipped)
    return {
        "swap": swap,
        "throughput": throughput,
        "grid": [asdict(point) for point in points],
        "step_time_model": fitted(points),
    }


def fitted(points: list[GridPoint]) -> dict[str, float] | None:
    """The linear model of step times; None where the grid has fewer points than it coefficients."""
    if len(points) < COEFFICIENTS:
        return None
    model, error = fit_step_time(points)
    return {**asdict(model), "mean_abs_relative_error": error}


def measure_throughput(executor: TorchExecutor) -> dict[str, Any]:
    """The whole engine, in process: all slots but at most 64, 128 tokens in and 64 out."""
    count, length, output = min(executor.shape.max_slots, 64), 128, 64
    prompts = random_prompts(count, length, executor.shape.vocab_size, seed=0)
    run_once(executor, prompts[:2], 4)
    run = run_once(executor, prompts, output)
    return {"requests": count, "prompt_tokens": length, "output_tokens_each": output, **asdict(run)}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_suite.sh", description=__doc__)
    parser.add_argument("--cpu-trial", action="store_true", help="try the script on the CPU, tiny model")
    parser.add_argument("--model", action="append", choices=sorted(SHAPES), help="in place of the usual ones")
    parser.add_argument("--seconds", type=float, default=480, help="stop starting new work after this long")
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    parser.add_argument("--out", type=Path, help="folder of the results, in place of the device's own")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if not arguments.cpu_trial and not torch.cuda.is_available():
        print("no CUDA device here; --cpu-trial tries the script without one", file=sys.stderr)
        return 2
    began = time.monotonic()
    deadline = began + arguments.seconds
    device = torch.device("cpu") if arguments.cpu_trial else torch.device("cuda", 0)
    facts = describe_device(device)
    large = device.type == "cuda"
    skipped: list[str] = []
    folder = arguments.out or RESULTS / folder_name(facts["name"])
    results: dict[str, Any] = {
        "suite": 1,
        "is_gpu": large,
        "device": facts,
        **run_parts(not arguments.no_tests, large, folder),
        "bandwidth": measure_bandwidth(device, GIB if large else 1 << 24),
        "matmul": measure_matmul(device, 8192 if large else 256, torch.bfloat16 if large else torch.float32),
        "models": [],
        "skipped": skipped,
    }
    names = arguments.model or (GPU_MODELS if large else TRIAL_MODELS)
    for number, name in enumerate(names, 1):
        # The first models must leave time for the later ones; what is saved is saved after each.
        share = time.monotonic() + (deadline - time.monotonic()) * number / len(names)
        try:
            results["models"].append(measure_model(name, device, share, skipped))
        except (RuntimeError, MemoryError) as error:
            skipped.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
        results["seconds"] = time.monotonic() - began
        write_report(results, folder)
    print(f"{results['seconds']:.0f} s; results in {folder}", file=sys.stderr)
    failed = any(results[part].get("failed", 0) for part in PARTS) or len(results["models"]) < len(names)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
