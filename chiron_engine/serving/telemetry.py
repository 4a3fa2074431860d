"""What an engine tells its coordinator of itself, several times a second."""

from __future__ import annotations

from chiron_engine.core.engine_core import EngineCore
from chiron_engine.core.step_stats import StepStats
from chiron_engine.rpc.v1 import coordinator_pb2

from .engine_loop import EngineLoop, LoopState


class Telemetry:
    """Counts steps on the engine loop's thread; `snapshot` may be called from any other. Its numbers
    may then be of two neighbouring steps, which harms nobody who reads them as of now."""

    def __init__(self, core: EngineCore, loop: EngineLoop, boot_id: str) -> None:
        self._loop = loop
        self._boot_id = boot_id
        self._autoscaler = core.local_autoscaler
        self._last: StepStats | None = None
        self._last_decode: StepStats | None = None
        self._output_tokens = 0
        self._batch_tokens = 0
        core.add_step_hook(self._on_step)

    def snapshot(self) -> coordinator_pb2.Telemetry:
        load, last, autoscaler = self._loop.load, self._last, self._autoscaler
        message = coordinator_pb2.Telemetry(
            boot_id=self._boot_id,
            step=load.step,
            running_interactive=load.running - load.running_batch,
            running_batch=load.running_batch,
            waiting=load.waiting,
            max_running=load.max_running,
            batch_tokens_total=self._batch_tokens,
            output_tokens_total=self._output_tokens,
            preemptions_total=load.preemptions,
            last_step=self._measured_step(),
            free_blocks=load.free_blocks,
            total_blocks=load.total_blocks,
            free_host_blocks=load.free_host_blocks,
            total_host_blocks=load.total_host_blocks,
            prefix_hit_tokens=load.prefix_hit_tokens,
            prefix_query_tokens=load.prefix_query_tokens,
            drafted_tokens=load.drafted_tokens,
            accepted_tokens=load.accepted_tokens,
            phase="ready" if self._loop.state is LoopState.RUNNING else self._loop.state.value,
        )
        if last is not None and load.running:
            message.kv_tokens = last.kv_tokens
            message.itl_s = last.itl_s
        if last is not None:
            message.token_budget = last.token_budget
        if autoscaler is not None:
            message.latency_backpressure = autoscaler.latency_backpressure
            message.throughput_backpressure = autoscaler.throughput_backpressure
        return message

    def _on_step(self, stats: StepStats) -> None:
        self._last = stats
        self._output_tokens += stats.itl_interactive + stats.itl_batch + stats.accepted_tokens
        self._batch_tokens += stats.itl_batch + stats.accepted_batch_tokens
        if stats.decode_requests and not (stats.swap_in_blocks or stats.swap_out_blocks):
            self._last_decode = stats

    def _measured_step(self) -> coordinator_pb2.MeasuredStep | None:
        step = self._last_decode
        if step is None:
            return None
        guesses = step.drafted_tokens  # they cost about what prompt tokens do
        return coordinator_pb2.MeasuredStep(
            seconds=step.itl_s or step.device_s,
            requests=step.decode_requests,
            kv_tokens=step.kv_tokens,
            prompt_tokens=step.prefill_tokens + guesses,
            prompt_context=step.prefill_context + guesses * step.kv_tokens // step.decode_requests,
        )
