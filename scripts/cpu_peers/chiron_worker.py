"""This engine, offline: the engine core in process, as scripts/bench_throughput.py has it."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from chiron_engine import __version__
from chiron_engine.config import EngineConfig
from chiron_engine.runtime.torch_environment import prepare_environment
from scripts.bench_throughput import offline_core, submit
from scripts.cpu_peers.worker_loop import Started, serve

if TYPE_CHECKING:
    from chiron_engine.runtime.torch_executor import TorchExecutor


class ChironEngine:
    def __init__(self, executor: TorchExecutor) -> None:
        self._executor = executor

    def generate(self, prompts: list[list[int]], output_tokens: int) -> list[list[int]]:
        core = offline_core(self._executor, len(prompts))
        requests = submit(core, prompts, output_tokens)
        while core.has_work:
            core.step()
        return [list(request.output_ids) for request in requests]


def start(settings: dict[str, Any]) -> Started:
    prepare_environment()
    from chiron_engine.runtime.build import build_executor  # loads torch

    config = EngineConfig(
        settings["model"],
        dtype=settings["dtype"],
        device="cpu",
        max_num_seqs=settings["max_num_seqs"],
        max_num_batched_tokens=settings["max_num_batched_tokens"],
        threads=settings["threads"],
        swap_space=0,
    )
    executor, _ = build_executor(config)
    dtype = str(executor.model.precision.name).removeprefix("torch.")
    versions = {"chiron-engine": __version__, "torch": version("torch")}
    return Started(ChironEngine(executor), versions, {"dtype": settings["dtype"], "computes_in": dtype})


if __name__ == "__main__":
    serve(start)
