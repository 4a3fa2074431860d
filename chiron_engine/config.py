"""Settings that cross process and layer boundaries. Plain data: parsing lives in the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from numbers import Integral

GIB = 1 << 30
DEVICE_NUMBER = re.compile(r"(?<=^cuda:)\d+$", re.ASCII)
DTYPES = ("auto", "float32", "bfloat16", "float16", "int8")
KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3")
DEVICES = ("auto", "cpu", "cuda", "cuda:N")
KERNELS = ("auto", "compiled", "triton", "torch")
EXECUTORS = ("torch", "simulated")
BLOCK_SIZE = 16
BLOCK_SIZE_OF_TRITON = 64
MOST_GUESSES = 15
"""Of one request in a step: rows of a forward pass come in tiles of 16."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One engine. Names follow vLLM's flags where the meaning is the same.

    model: a Hugging Face directory or id, a .gguf file, or `smollm2`. dtype: auto, float32, bfloat16,
    float16 (CUDA) or int8 (CPU). kv_cache_dtype: auto, which is dtype's (bfloat16 with int8), or fp8 and
    fp8_e4m3, which are the same: 8 bits, for Triton's kernels and GPUs of compute capability 8.9 or more.
    device: auto, cpu, cuda or cuda:N. kernels: compiled (CPU), triton (CUDA), torch (either), or auto for the
    quickest the device has. block_size: tokens a KV block holds; None takes 64 with Triton's kernels, which
    read a block at a time, and 16 elsewhere.
    kv_cache_memory: bytes of the device KV pool; None takes a share of what is free
    (`gpu_memory_utilization` of the device on CUDA). swap_space: bytes of the host KV tier.
    max_model_len: None takes the model's own context length.
    threads: compute threads on the CPU; None takes all cores.
    max_queued_requests, max_queued_tokens: bounds of the waiting queue.
    disable_cascade_attn: never read a prefix that decoding requests share once for all of them, as Triton's
    kernels do where that is found to pay; cascade_min_tokens: of the shortest prefix that is, for two
    requests or more; None goes by what it saves.
    num_speculative_tokens: tokens of one request that are guessed from its text for one step, at most; 0
    guesses none. Only where one step is under way at a time, as on the CPU.
    enforce_eager: launch the kernels of decode steps one by one; else CUDA graphs of them are replayed.
    step_log: a file that gets one JSON line per step; None writes none.
    record_steps: a folder that gets a file to replay every plan from; None writes none.
    local_autoscaler: what resizes the running batch, by name; it keeps the inter-token latencies
    itl_slo_s while interactive requests are there, and batch_itl_slo_s otherwise.
    executor: torch, or simulated: no model, steps that take the time `profile` says, times `time_scale`.

    Raises ValueError for a value outside its range.
    """

    model: str
    served_model_name: str | None = None
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    device: str = "auto"
    kernels: str = "auto"
    block_size: int | None = None
    kv_cache_memory: int | None = None
    swap_space: int = GIB // 2
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    seed: int = 0
    threads: int | None = None
    max_queued_requests: int = 1024
    max_queued_tokens: int = 1 << 20
    enable_prefix_caching: bool = True
    disable_cascade_attn: bool = False
    cascade_min_tokens: int | None = None
    num_speculative_tokens: int = 0
    enforce_eager: bool = False
    step_log: str | None = None
    record_steps: str | None = None
    local_autoscaler: str = "adaptive"
    itl_slo_s: float = 0.2
    batch_itl_slo_s: float = 2.0
    executor: str = "torch"
    profile: str | None = None
    time_scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model is empty; it must be a directory, a model id, a .gguf file or smollm2")
        _one_of("executor", self.executor, EXECUTORS)
        self._check_simulated()
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        _one_of("kernels", self.kernels, KERNELS)
        _one_of("device", DEVICE_NUMBER.sub("N", self.device), DEVICES)
        for name in WHOLE:
            object.__setattr__(self, name, _whole(name, getattr(self, name)))
        if self.block_size is not None:
            _within("block_size", self.block_size, 1, 4096)
        _at_least("kv_cache_memory", self.kv_cache_memory, 1)
        _at_least("swap_space", self.swap_space, 0)
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ValueError(
                f"gpu_memory_utilization is {self.gpu_memory_utilization}; it must be over 0 and at most 1"
            )
        _within("seed", self.seed, 0, 2**64 - 1)
        _within("num_speculative_tokens", self.num_speculative_tokens, 0, MOST_GUESSES)
        for name in POSITIVE:
            _at_least(name, getattr(self, name), 1)
        off = "disable_cascade_attn" if self.disable_cascade_attn else "prefix caching off"
        if self.cascade_min_tokens is not None and (
            self.disable_cascade_attn or not self.enable_prefix_caching
        ):
            raise ValueError(f"cascade_min_tokens is {self.cascade_min_tokens}; with {off} it must be None")

    def _check_simulated(self) -> None:
        if self.executor == "simulated":
            if self.profile is None:
                raise ValueError("a simulated executor needs a profile: --profile NAME")
        elif self.profile is not None or self.time_scale != 1.0:
            raise ValueError("profile and time_scale are for a simulated executor: --executor simulated")
        if not 0.0 < self.time_scale < float("inf"):
            raise ValueError(f"time_scale is {self.time_scale}; it must be a positive finite number")


POSITIVE = (
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "threads",
    "max_queued_requests",
    "max_queued_tokens",
    "cascade_min_tokens",
)
WHOLE = (*POSITIVE, "block_size", "kv_cache_memory", "swap_space", "seed", "num_speculative_tokens")


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """The client face. port 0 lets the system choose. max_queued_requests bounds requests that
    wait for a first token over all engines. Raises ValueError for a value outside its range."""

    host: str = "127.0.0.1"
    grpc_port: int = 50051
    max_queued_requests: int = 1024
    max_message_bytes: int = 16 << 20
    reflection: bool = False
    drain_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        _within("grpc_port", self.grpc_port, 0, 65535)
        _at_least("max_queued_requests", self.max_queued_requests, 1)
        _within("max_message_bytes", self.max_message_bytes, 1024, 2**31 - 1)
        if not 0.0 <= self.drain_timeout_s < float("inf"):
            raise ValueError(f"drain_timeout_s is {self.drain_timeout_s}; it must be 0 or more")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}")


def _within(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; it must be between {low} and {high}")


def _at_least(name: str, value: int | None, low: int) -> None:
    if value is not None and value < low:
        raise ValueError(f"{name} is {value}; it must be at least {low}")


def _whole(name: str, value: object) -> int | None:
    """A whole number of any type as Python's own, or None. Sizes with units, as `256MiB`, are the command
    line's: here they are bytes."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} is {value!r}; it must be a whole number")
    return int(value)
