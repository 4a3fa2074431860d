"""Recording the decode steps of an executor as CUDA graphs before its first request, and trying them out."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress

import torch

from chiron_engine.config import EngineConfig
from chiron_engine.model.loader import CausalLM

from .decode_graphs import Capture, DecodeGraphs, Work
from .torch_executor import TorchExecutor
from .trial_steps import TrialRequests

logger = logging.getLogger(__name__)

WARM_UP_PASSES = 2
CHECKED_TOKENS = 8
"""Of the requests that graphs are tried out with, whose lengths are 1 up to this."""

TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Of logits, as shares of the largest: the size of a batch decides in which order products are summed up, and
the difference grows from layer to layer. Logits of other rows or of an earlier step are off by far more."""


class CudaCapture:
    """Captures work as CUDA graphs that share one memory pool. They are to be replayed one at a time, and
    what one leaves in the pool is lost with the next."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        # A capture that fails leaves its stream current. The outer context does not.
        with torch.cuda.stream(torch.cuda.current_stream(self._stream.device)):
            self._warm_up(work)
            # Other threads may use the device meanwhile: only this one's calls can break the capture.
            try:
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    work()
            except Exception:
                self._end_allocations()
                raise
        return graph.replay

    def _end_allocations(self) -> None:
        """Up to torch 2.12 the allocator takes a capture that failed to be going on still, and never gives
        memory back. Later ones know that it ended, and say so."""
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self._stream.device.index, self._pool)

    def _warm_up(self, work: Work) -> None:
        """Kernels are compiled and loaded, and libraries take their workspaces, at first use: none of which
        may happen inside a capture."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP_PASSES):
                work()
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


class GraphCapture:
    """What records the decode steps of an engine's executors, one after another, until it fails once.

    make_capture: makes what records those of one executor; None for an engine without graphs.
    """

    def __init__(self, make_capture: Callable[[], Capture] | None) -> None:
        self._make_capture = make_capture

    def __bool__(self) -> bool:
        """Whether it records anything."""
        return self._make_capture is not None

    def apply(self, executor: TorchExecutor) -> None:
        """Have the executor's decode steps replayed. Should that not work, one error is logged, and they are
        launched kernel by kernel. Overwrites KV blocks, so only for an executor not yet in use."""
        if self._make_capture is None:
            return
        try:
            with torch.inference_mode(), _on(executor.device):
                executor.decode_graphs = _tried_graphs(executor, self._make_capture())
            return
        except Exception as error:  # whatever it is: an engine without graphs is slower, and right
            self._make_capture = None
            _log_failure(error)
        # The frames of the error hold the graphs, and with them memory that is wanted for KV.
        gc.collect()


def graph_capture_for(config: EngineConfig, model: CausalLM, device: torch.device) -> GraphCapture:
    """Of CUDA graphs where the device has them, the model can be captured and the configuration lets it."""
    if device.type != "cuda" or config.enforce_eager or not model.capturable:
        return GraphCapture(None)
    return GraphCapture(lambda: CudaCapture(device))


def _log_failure(error: BaseException) -> None:
    first = _first_cause(error)
    logger.error(
        "decode steps are launched kernel by kernel, as capturing them in CUDA graphs failed: %s: %s",
        type(first).__name__,
        str(first),  # a record that is kept must not keep the error, and with it the graphs
    )


def _first_cause(error: BaseException) -> BaseException:
    """What broke a capture: ending it then fails as well, without saying why."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Captures are of the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _tried_graphs(executor: TorchExecutor, capture: Capture) -> DecodeGraphs:
    graphs = executor.make_decode_graphs()
    graphs.capture(capture)
    _try_out(executor, graphs)
    return graphs


def _try_out(executor: TorchExecutor, graphs: DecodeGraphs) -> None:
    """Compare a replay of every size with the same pass launched kernel by kernel. Raises RuntimeError where
    they differ."""
    shape = executor.shape
    longest = min(shape.max_model_len, shape.num_device_blocks * shape.block_size) - 1
    known = max(min(CHECKED_TOKENS, longest, shape.max_step_tokens // graphs.largest), 1)
    blocks = -(-(known + 1) // shape.block_size)
    count = min(graphs.largest, shape.num_device_blocks // blocks)
    trial = TrialRequests(executor, count, known, 1)
    trial.prefill()
    slots = torch.arange(count, device=executor.device)
    found = [_difference(executor, graphs, slots[:size], slots[:size] % known + 1) for size in graphs.sizes]
    trial.leave()
    if differences := [difference for difference in found if difference is not None]:
        raise RuntimeError(differences[0])


def _difference(
    executor: TorchExecutor, graphs: DecodeGraphs, slots: torch.Tensor, lens: torch.Tensor
) -> str | None:
    """How the logits of a replay differ from those of its launches one by one, if by more than allowed."""
    # Replayed first: it then finds none of the keys and values that it is to write itself.
    replayed = graphs.logits(slots, lens)
    eager = graphs.eager_logits(slots, lens)
    largest = float(eager.nan_to_num().abs().max())
    allowed = TOLERANCES[executor.model.precision.compute] * largest
    if torch.allclose(replayed, eager, rtol=0.0, atol=allowed, equal_nan=True):
        return None
    return (
        f"with {len(slots)} rows the logits, up to {largest:.3g}, differ by up to "
        f"{float((replayed - eager).abs().max()):.3g} from those of launches one by one; "
        f"{allowed:.3g} is allowed"
    )
