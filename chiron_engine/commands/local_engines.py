"""The engines that a command starts on this machine: their command line, threads and GPUs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from chiron_engine.config import EngineConfig

from .engine_options import to_arguments
from .exits import usage_error

QUEUED_REQUESTS = 1 << 20
QUEUED_TOKENS = 1 << 40


@dataclass(frozen=True, slots=True)
class LocalEngines:
    """command: of an engine, but for what joins it. threads: of each. gpus: one for each engine; none
    on the CPU."""

    command: Sequence[str]
    threads: int
    gpus: Sequence[str]


def local_engines(config: EngineConfig, most: int, gpus: Sequence[str], log_level: str) -> LocalEngines:
    """most: how many there may be. gpus: as `gpus_of` says. Raises CommandError (usage) where they cannot
    be had."""
    if most > 1 and config.step_log is not None:
        raise usage_error("--step-log is for one engine; several would write into the same file")
    if gpus and len(gpus) < most:
        raise usage_error(f"{most} engines take a GPU each and there are {len(gpus)}; or add --device cpu")
    from chiron_engine.cluster.local_launcher import threads_per_engine

    threads = config.threads or threads_per_engine(most)
    return LocalEngines(engine_command(config, threads, log_level), threads, gpus)


def gpus_of(config: EngineConfig) -> list[str]:
    """The GPUs that engines of this configuration run on, one each; none where they run on the CPU."""
    from chiron_engine.cluster.gpus import usable_gpus

    if config.executor == "simulated" or config.device not in ("auto", "cuda"):
        return []
    return usable_gpus()


def engine_command(config: EngineConfig, threads: int, log_level: str) -> list[str]:
    """The command line of an engine of a fleet, which queues whatever it is sent: the gateway bounds
    what waits."""
    config = replace(config, max_queued_requests=QUEUED_REQUESTS, max_queued_tokens=QUEUED_TOKENS)
    if config.executor == "torch":
        config = replace(config, threads=threads)
    # -P: no module of the folder this was started in may take the place of a real one.
    launch = [sys.executable, "-P", "-m", "chiron_engine", "engine", "--headless", "--grpc-port", "0"]
    return [*launch, "--log-level", log_level, *to_arguments(config)]
