"""From a configuration to an executor that is ready for requests."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import torch

from chiron_engine.config import EngineConfig
from chiron_engine.model.cpu_kernels import why_not_int8
from chiron_engine.model.kernel_choice import Kernels, named_kernels
from chiron_engine.model.kv_cache_dtype import check_kv_cache_dtype, with_kv_cache_dtype
from chiron_engine.model.kv_pool import KvPool
from chiron_engine.model.loader import CausalLM, default_precision, load_model
from chiron_engine.model.precision import PRECISIONS, Precision
from chiron_engine.model.source import resolve_model
from chiron_engine.model.spec import ModelSpec

from .cascade_variants import launch_cascade_variants
from .errors import OutOfMemory
from .graph_capture import GraphCapture, graph_capture_for
from .host_memory import available_bytes, keep_freed_memory
from .kernel_limits import check_capacities, check_model
from .kernel_variants import launch_all_variants
from .kv_sizing import KvSizes, check_config, choose_block_size, default_cpu_pool, size_kv
from .logit_adjustments import penalty_bytes
from .shared_prefixes import PrefixFinder, prefix_finder
from .torch_executor import TorchExecutor
from .trial_steps import run_largest_step, warm_up

Progress = Callable[[str, float], None]

# The torch attention backend gathers the KV of all decoding rows, one layer at a time, padded to
# at most twice their length, and its kernels may copy what it gathered once more.
GATHERED_LAYERS = 4
# How torch names a failed allocation on the CPU, which it raises as a plain RuntimeError.
CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"
# Kept free on a CUDA device for what other libraries allocate outside torch.
CUDA_RESERVE = 256 << 20


def build_executor(config: EngineConfig, progress: Progress | None = None) -> tuple[TorchExecutor, ModelSpec]:
    """Load the model, size the KV pools, warm up.

    progress(phase, fraction of the phase done). Raises ValueError for settings that cannot be,
    ModelError for a model that cannot be served, OutOfMemory.
    """
    report = progress if progress is not None else _no_progress
    check_config(config)
    device = resolve_device(config.device)
    if device.type == "cuda" and config.num_speculative_tokens:
        raise ValueError(
            f"num_speculative_tokens is {config.num_speculative_tokens}; on {device} it must be 0: a step is "
            f"planned before the tokens of the last one are known"
        )
    precision = named_precision(config.dtype, device)
    kernels = named_kernels(config.kernels, device)
    check_capacities(config, kernels)
    check_kv_cache_dtype(config.kv_cache_dtype, kernels, device)
    _check_cascade(config, kernels)
    torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
    if device.type == "cpu":
        keep_freed_memory()
    try:
        path = resolve_model(config.model, progress)
        precision = precision or default_precision(path, device, kernels)
        precision = with_kv_cache_dtype(precision, config.kv_cache_dtype)
        model = _load(path, precision, device, kernels, report)
        check_model(model.spec, model.kernels)
        graphs = graph_capture_for(config, model, device)
        executor = _with_pools(config, model, device, graphs, report)
        report("warm up", 0.0)
        warm_up(executor)
        report("warm up", 1.0)
        if compiles_at_launch(model, device):
            report("compile kernels", 0.0)
            launch_all_variants(executor)
            launch_cascade_variants(executor)
            report("compile kernels", 1.0)
        if graphs:
            report("capture graphs", 0.0)
            graphs.apply(executor)
            report("capture graphs", 1.0)
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise OutOfMemory(
            f"loading {config.model}", total - free, total, "take a smaller model or a larger device"
        ) from error
    except RuntimeError as error:
        if CPU_ALLOCATOR not in str(error):
            raise
        raise OutOfMemory(
            f"loading {config.model}", _bytes_asked(error), available_bytes(), "lower kv_cache_memory"
        ) from error
    return executor, model.spec


def compiles_at_launch(model: CausalLM, device: torch.device) -> bool:
    """Whether kernels are compiled as they are first launched: Triton's, unless they are interpreted."""
    return model.kernels is Kernels.TRITON and device.type == "cuda"


def _bytes_asked(error: RuntimeError) -> int:
    """The size in torch's message of a failed allocation; 0 where it names none."""
    found = re.search(r"you tried to allocate (\d+) bytes", str(error))
    return int(found[1]) if found else 0


def _no_progress(phase: str, fraction: float) -> None:
    """Nobody watches."""


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is a device. Raises ValueError for what is not here."""
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if name == "cpu":
        return torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind != "cuda" or (index and not index.isdecimal()):
        raise ValueError(f"device is {name!r}; it must be auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}; torch {torch.__version__} sees no CUDA device here")
    number = int(index or 0)
    if number >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}; there are {torch.cuda.device_count()} CUDA devices, from 0")
    return torch.device("cuda", number)


def named_precision(name: str, device: torch.device) -> Precision | None:
    """None for `auto`, which depends on the model. Raises ValueError for what this device does not
    compute in."""
    if name == "auto":
        return None
    if name not in PRECISIONS:
        raise ValueError(f"dtype is {name!r}; it must be auto, {', '.join(PRECISIONS)}")
    if name == "float16" and device.type == "cpu":
        raise ValueError("dtype is float16, which is for CUDA; on the CPU take float32, bfloat16 or int8")
    if name == "int8" and (reason := why_not_int8(device)) is not None:
        raise ValueError(f"dtype is int8, which cannot run here: {reason}; take float32 or bfloat16")
    return PRECISIONS[name]


def _load(
    path: Path, precision: Precision, device: torch.device, kernels: Kernels, report: Progress
) -> CausalLM:
    weights = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    if device.type == "cpu" and weights > (available := available_bytes()):
        raise OutOfMemory(f"loading {path.name}", weights, available, "take a smaller model")
    return load_model(path, precision=precision, device=device, kernels=kernels, progress=report)


def _with_pools(
    config: EngineConfig, model: CausalLM, device: torch.device, graphs: GraphCapture, report: Progress
) -> TorchExecutor:
    report("size KV cache", 0.0)
    block_size = choose_block_size(config, model.kernels)
    block_bytes = KvPool.block_bytes(block_size, model.spec.layers, model.precision.kv)
    if device.type == "cuda":
        pool_bytes = _cuda_pool_bytes(config, block_size, model, device, graphs)
    else:
        pool_bytes = _cpu_pool_bytes(config, available_bytes())
    sizes = size_kv(config, block_size, model.spec.max_model_len, block_bytes, pool_bytes)
    if device.type == "cuda":
        _check_swap_space(sizes.host_blocks * block_bytes, available_bytes())
    executor = make_executor(config, model, sizes, device)
    report(f"{sizes.describe()}; dtype {model.precision.describe()}", 1.0)
    return executor


def make_executor(
    config: EngineConfig, model: CausalLM, sizes: KvSizes, device: torch.device
) -> TorchExecutor:
    """Allocate the pools of these sizes."""
    layers, dtype = model.spec.layers, model.precision.kv
    pool = KvPool(sizes.device_blocks, sizes.block_size, layers, dtype, device)
    host = None
    if sizes.host_blocks:
        pinned = device.type == "cuda"
        host = KvPool(sizes.host_blocks, sizes.block_size, layers, dtype, "cpu", pinned=pinned)
    return TorchExecutor(
        model,
        pool,
        host,
        max_slots=config.max_num_seqs,
        max_step_tokens=config.max_num_batched_tokens,
        max_model_len=sizes.max_model_len,
        prefixes=_prefix_finder(config, model, pool),
    )


def _check_cascade(config: EngineConfig, kernels: Kernels) -> None:
    if config.cascade_min_tokens is not None and kernels is not Kernels.TRITON:
        raise ValueError(
            f"cascade_min_tokens is {config.cascade_min_tokens}, which needs Triton's kernels; here kernels "
            f"is {kernels.value!r}, for which it must be None"
        )


def _prefix_finder(config: EngineConfig, model: CausalLM, pool: KvPool) -> PrefixFinder | None:
    """None where no kernel has a use for prefixes that requests share, or no request ever shares one."""
    if model.kernels is not Kernels.TRITON or config.disable_cascade_attn or not config.enable_prefix_caching:
        return None
    return prefix_finder(model.spec, pool.dtype, pool.block_size, config.cascade_min_tokens)


def _cpu_pool_bytes(config: EngineConfig, available: int) -> int:
    asked = config.kv_cache_memory
    pool = asked if asked is not None else default_cpu_pool(available)
    if pool + config.swap_space > available:
        raise OutOfMemory(
            f"a KV cache of {pool:,} bytes with {config.swap_space:,} bytes of swap space",
            pool + config.swap_space,
            available,
            "lower kv_cache_memory or swap_space",
        )
    return pool


def _check_swap_space(swap: int, available: int) -> None:
    if swap > available:
        raise OutOfMemory("the swap space on the host", swap, available, "lower swap_space")


def _cuda_pool_bytes(
    config: EngineConfig, block_size: int, model: CausalLM, device: torch.device, graphs: GraphCapture
) -> int:
    """What `gpu_memory_utilization` of the device leaves beside everything on it now, the largest
    step, penalties of all requests, the graphs of decode steps, and what torch's attention gathers where it
    is in use."""
    gathers = model.kernels is Kernels.TORCH
    step_bytes = _largest_step_bytes(config, block_size, model, device, graphs)
    step_bytes += penalty_bytes(config.max_num_seqs, _longest(config, model), model.kernels)
    if gathers:
        step_bytes += _mask_bytes(config, model)
    free, total = torch.cuda.mem_get_info(device)
    if config.kv_cache_memory is not None:
        left, share = free - step_bytes - CUDA_RESERVE, config.kv_cache_memory
        if share > left:
            raise OutOfMemory("the KV cache", share, left, "lower kv_cache_memory")
        return share
    left = int(total * config.gpu_memory_utilization) - (total - free) - step_bytes - CUDA_RESERVE
    gathered = GATHERED_LAYERS / len(model.spec.layers) if gathers else 0.0
    return int(max(left, 0) / (1 + gathered))


def _longest(config: EngineConfig, model: CausalLM) -> int:
    """Tokens of the longest context there may be, whatever fits the pool."""
    return min(config.max_model_len or model.spec.max_model_len, model.spec.max_model_len)


def _mask_bytes(config: EngineConfig, model: CausalLM) -> int:
    """What the torch attention backend's mask takes for the largest chunk at the end of the longest
    context: an additive mask and two of truth values."""
    longest = _longest(config, model)
    return min(config.max_num_batched_tokens, longest) * longest * (model.precision.compute.itemsize + 2)


def _largest_step_bytes(
    config: EngineConfig, block_size: int, model: CausalLM, device: torch.device, graphs: GraphCapture
) -> int:
    """Peak of a full step, with what the executor keeps of its slots and graphs, by running one on a pool of
    its own, which does not count."""
    tokens = max(config.max_num_batched_tokens // config.max_num_seqs, 1) + 1
    blocks = -(-tokens // block_size) * config.max_num_seqs
    sizes = KvSizes(blocks, 0, _longest(config, model), block_size)
    before = torch.cuda.memory_allocated(device)
    trial = make_executor(config, model, sizes, device)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run_largest_step(trial)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before - trial.device_pool.storage.nbytes
    kept = _graph_bytes(trial, device, graphs)
    trial.close()
    del trial
    torch.cuda.empty_cache()
    return peak + kept


def _graph_bytes(trial: TorchExecutor, device: torch.device, graphs: GraphCapture) -> int:
    """What the graphs of an executor keep of the device: their memory pool, their buffers, and what the
    driver needs to hold them, which torch does not count."""
    if not graphs:
        return 0
    torch.cuda.empty_cache()
    free_before, _ = torch.cuda.mem_get_info(device)
    graphs.apply(trial)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free_after, _ = torch.cuda.mem_get_info(device)
    return max(free_before - free_after, 0)
