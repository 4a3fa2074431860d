"""How many KV blocks an engine gets on the device and on the host, and how long a request may be."""

from __future__ import annotations

from dataclasses import dataclass

from chiron_engine.config import BLOCK_SIZE, BLOCK_SIZE_OF_TRITON, GIB, EngineConfig
from chiron_engine.model.kernel_choice import Kernels

from .errors import OutOfMemory

DEFAULT_CPU_POOL = 2 * GIB


@dataclass(frozen=True, slots=True)
class KvSizes:
    """Blocks on either side and the longest request, in tokens."""

    device_blocks: int
    host_blocks: int
    max_model_len: int
    block_size: int

    @property
    def tokens(self) -> int:
        return self.device_blocks * self.block_size

    def describe(self) -> str:
        full = self.tokens / self.max_model_len
        return (
            f"KV cache of {self.device_blocks:,} blocks = {self.tokens:,} tokens = "
            f"{full:.1f} requests of {self.max_model_len:,} tokens, {self.host_blocks:,} blocks on the host"
        )


def default_cpu_pool(available: int) -> int:
    """Bytes of the device pool on the CPU where none are given: 2 GiB, or a quarter of what is free."""
    return min(DEFAULT_CPU_POOL, available // 4)


def choose_block_size(config: EngineConfig, kernels: Kernels) -> int:
    """Tokens of a block. Raises ValueError for what the kernels do not take."""
    size, triton = config.block_size, kernels is Kernels.TRITON
    if size is None:
        return BLOCK_SIZE_OF_TRITON if triton else BLOCK_SIZE
    if triton and size & (size - 1):
        raise ValueError(f"block_size is {size}; for Triton's kernels it must be a power of two")
    return size


def size_kv(
    config: EngineConfig, block_size: int, model_len: int, block_bytes: int, pool_bytes: int
) -> KvSizes:
    """Divide `pool_bytes` into blocks of block_size tokens.

    model_len: the context the model was made for. Without a max_model_len in the configuration
    the context shrinks to what the pool holds; one that was asked for and does not fit is refused.
    A pool whose size was not asked for is no larger than max_num_seqs requests can use.
    Raises ValueError for a context longer than the model's, OutOfMemory for a pool too small.
    """
    wanted = config.max_model_len if config.max_model_len is not None else model_len
    if wanted > model_len:
        raise ValueError(f"max_model_len is {wanted}; the model was made for at most {model_len} tokens")
    blocks = pool_bytes // block_bytes
    needed = -(-wanted // block_size)
    if blocks < 2 or (blocks < needed and config.max_model_len is not None):
        raise OutOfMemory(
            f"a KV pool for one request of {wanted} tokens ({needed} blocks of {block_bytes:,} bytes)",
            needed * block_bytes,
            pool_bytes,
            "lower max_model_len or raise kv_cache_memory",
        )
    max_len = min(wanted, blocks * block_size)
    if config.kv_cache_memory is None:
        blocks = min(blocks, max(needed * config.max_num_seqs, needed))
    return KvSizes(blocks, config.swap_space // block_bytes, max_len, block_size)


def check_config(config: EngineConfig) -> None:
    """Raise ValueError for capacities that cannot be."""
    for name in ("max_num_seqs", "max_num_batched_tokens"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 1")
    if config.max_num_batched_tokens < config.max_num_seqs:
        raise ValueError(
            f"max_num_batched_tokens is {config.max_num_batched_tokens} and max_num_seqs "
            f"{config.max_num_seqs}; a step must have room for a token of every request"
        )
    if config.max_model_len is not None and config.max_model_len < 2:
        raise ValueError(f"max_model_len is {config.max_model_len}; it must be at least 2")
    if config.kv_cache_memory is not None and config.kv_cache_memory < 1:
        raise ValueError(f"kv_cache_memory is {config.kv_cache_memory} bytes; it must be positive")
    if config.swap_space < 0:
        raise ValueError(f"swap_space is {config.swap_space} bytes; it must be 0 (none) or positive")
    if not 0.0 < config.gpu_memory_utilization <= 1.0:
        raise ValueError(
            f"gpu_memory_utilization is {config.gpu_memory_utilization}; it must be over 0 and at most 1"
        )
    if config.threads is not None and config.threads < 1:
        raise ValueError(f"threads is {config.threads}; it must be at least 1")
