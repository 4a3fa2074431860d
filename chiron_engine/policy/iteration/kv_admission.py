"""Whether the KV cache has room for another request, now and later."""

from __future__ import annotations

from .kv_forecast import KvForecast
from .kv_tiers import KvTiers, Placement
from .output_lengths import OutputLengths
from .request import Request

WATERMARK = 0.01
"""Share of the device's blocks that a newcomer must leave free, for those that run to grow into."""


class KvAdmission:
    """Free blocks over the watermark, and a predicted peak that fits.

    Blocks promised are a bound of the peak that costs O(1): every running request at its predicted
    end at once. Only where that bound does not hold, the forecast says what the peak is.
    """

    __slots__ = ("_forecast", "_output_lengths", "_promised", "_tiers", "watermark")

    def __init__(self, tiers: KvTiers, output_lengths: OutputLengths) -> None:
        self._tiers = tiers
        self.watermark = int(tiers.device.num_blocks * WATERMARK)
        self._output_lengths = output_lengths
        self._forecast = KvForecast(tiers.block_size, self.tokens_to_come)
        self._promised = 0

    def fits(
        self, request: Request, known: int, placement: Placement, running: dict[Request, None], step: int
    ) -> bool:
        """Whether `request`, with `known` tokens placed so, fits beside those running at `step`."""
        tiers = self._tiers
        request.promised_blocks = tiers.blocks_for(known + self.tokens_to_come(request, step))
        spare = tiers.device.num_free - placement.free_needed
        if not running:
            return spare >= 0
        if spare < self.watermark:
            return False
        capacity = tiers.device.num_blocks
        if self._promised + request.promised_blocks <= capacity:
            return True
        return self._forecast.fits(request, running, step, capacity * tiers.block_size)

    def join(self, request: Request, step: int) -> None:
        """It runs from now on, as `fits` last saw it."""
        self._promised += request.promised_blocks
        self._forecast.join(request, step)

    def leave(self, request: Request) -> None:
        self._promised -= request.promised_blocks
        self._forecast.leave(request)

    def renew(self, request: Request, step: int) -> None:
        """It came further than a token a step."""
        self._forecast.leave(request)
        self._forecast.join(request, step)

    def tokens_to_come(self, request: Request, step: int) -> int:
        """How many more tokens the request is predicted to produce from `step` on."""
        produced = request.outputs_at(step)
        return self._output_lengths.remaining(produced, request.max_tokens - produced)

    def is_idle(self) -> bool:
        """Nothing is promised to anybody. For tests."""
        return self._promised == 0
