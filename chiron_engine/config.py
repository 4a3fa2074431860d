"""Settings that cross process and layer boundaries. Plain data: parsing lives in the command line."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One engine. Names follow vLLM's flags where the meaning is the same.

    model: a Hugging Face directory or id, or `smollm2`. dtype: auto, float32 or bfloat16 (float16
    on CUDA). device: auto, cpu or cuda. block_size: tokens a KV block holds.
    kv_cache_memory: bytes of the device KV pool; None takes a share of what is free
    (`gpu_memory_utilization` of the device on CUDA). swap_space: bytes of the host KV tier.
    max_model_len: None takes the model's own context length.
    threads: compute threads on the CPU; None takes all cores.
    max_queued_requests, max_queued_tokens: bounds of the waiting queue.
    """

    model: str
    served_model_name: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    block_size: int = 16
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
    step_log: str | None = None


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """The client face. port 0 lets the system choose. max_queued_requests bounds requests that
    wait for a first token over all engines."""

    host: str = "127.0.0.1"
    grpc_port: int = 50051
    max_queued_requests: int = 1024
    max_message_bytes: int = 16 << 20
    reflection: bool = False
    drain_timeout_s: float = 30.0
