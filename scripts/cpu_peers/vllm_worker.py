"""vLLM's CPU build, offline. Runs in the environment of that."""

from __future__ import annotations

import os
from typing import Any

from scripts.cpu_peers.worker_loop import Started, serve

KV_CACHE_GIB = "2"
MAX_MODEL_LEN = 2048


class VllmEngine:
    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def generate(self, prompts: list[list[int]], output_tokens: int) -> list[list[int]]:
        import vllm  # type: ignore[import-not-found]

        sampling = vllm.SamplingParams(
            temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False
        )
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = self._engine.generate(asked, sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


def start(settings: dict[str, Any]) -> Started:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", KV_CACHE_GIB)
    # A thread on each of these cores; vLLM pins them.
    cores = sorted(os.sched_getaffinity(0))[: settings["threads"]]
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    import torch
    import vllm

    engine = vllm.LLM(
        settings["model"],
        dtype=settings["dtype"],
        max_num_batched_tokens=settings["max_num_batched_tokens"],
        max_num_seqs=settings["max_num_seqs"],
        max_model_len=max(MAX_MODEL_LEN, settings["tokens_per_request"]),
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        seed=0,
    )
    versions = {"vllm": vllm.__version__, "torch": torch.__version__}
    return Started(VllmEngine(engine), versions, {"dtype": settings["dtype"]})


if __name__ == "__main__":
    serve(start)
