"""Engine cores over the null executor, as the tests of policy, core and serving want them."""

from __future__ import annotations

from chiron_engine.core.clocks import VirtualClock
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.core.executor import ExecutorShape
from chiron_engine.core.null_executor import NullExecutor
from chiron_engine.policy.iteration.limits import Limits
from chiron_engine.policy.iteration.request import Request, Slo, SloClass
from chiron_engine.policy.iteration.sampling_params import SamplingParams


def null_core(
    *,
    blocks: int = 64,
    host_blocks: int = 0,
    block_size: int = 4,
    slots: int = 8,
    budget: int = 32,
    depth: int = 1,
    **settings: object,
) -> EngineCore:
    shape = ExecutorShape(
        block_size=block_size,
        num_device_blocks=blocks,
        num_host_blocks=host_blocks,
        max_slots=slots,
        max_step_tokens=budget,
        max_model_len=blocks * block_size,
        vocab_size=1000,
        pipeline_depth=depth,
    )
    return EngineCore(NullExecutor(shape), clock=VirtualClock(), limits=Limits(slots, budget), **settings)  # type: ignore[arg-type]


def make_request(
    request_id: int,
    prompt: list[int] | int = 10,
    max_tokens: int = 8,
    *,
    batch: bool = False,
    arrival: float | None = None,
    stop_ids: frozenset[int] = frozenset(),
) -> Request:
    """A request for an engine of `null_core`; an integer prompt is that many tokens of its own."""
    tokens = prompt if isinstance(prompt, list) else [(request_id * 17 + i) % 1000 for i in range(prompt)]
    return Request(
        request_id=request_id,
        prompt_ids=tokens,
        sampling=SamplingParams(temperature=0.0),
        max_tokens=max_tokens,
        stop_ids=stop_ids,
        slo=Slo(SloClass.BATCH if batch else SloClass.INTERACTIVE),
        seed=request_id,
        arrival=float(request_id) if arrival is None else arrival,
    )
