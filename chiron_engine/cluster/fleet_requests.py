"""A client's request as the fleet policy sees it: lengths and promises, no tokens."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from chiron_engine.policy.fleet.config import FleetConfig
from chiron_engine.policy.fleet.messages import FleetRequest
from chiron_engine.policy.iteration.request import Slo, SloClass
from chiron_engine.rpc.token_stream import TokenStream
from chiron_engine.rpc.v1 import engine_pb2
from chiron_engine.rpc.wire import slo_fields

PREFIX_TOKENS = 128
"""Requests whose prompts begin with the same tokens, so many, gain from the same engine."""


def fleet_request(
    stream: TokenStream, received: float, hello: engine_pb2.Hello, config: FleetConfig
) -> FleetRequest:
    """received: on the coordinator's clock. An interactive request that asks for no ITL has the default,
    or the loosest target on offer where that is looser. Raises ValueError for an SLO that is none."""
    fields = slo_fields(stream.slo)
    itl_s = fields["itl_s"]
    if not (fields["batch"] or stream.slo.HasField("itl_slo_ms")):
        itl_s = max(itl_s, config.itl_targets_s[-1])
    deadline_s = fields["deadline_s"]
    prompt = len(stream.prompt_ids)
    room = hello.max_model_len - prompt
    asked = stream.sampling.max_tokens if stream.sampling.HasField("max_tokens") else room
    return FleetRequest(
        request_id=stream.key,
        slo=Slo(
            SloClass.BATCH if fields["batch"] else SloClass.INTERACTIVE,
            fields["ttft_s"],
            itl_s,
            None if deadline_s is None else received + deadline_s,
        ),
        arrival=received,
        prompt_tokens=prompt,
        max_tokens=asked,
        prefix=_prefix(stream.prompt_ids),
    )


def _prefix(prompt_ids: Sequence[int]) -> str | None:
    if len(prompt_ids) < PREFIX_TOKENS:
        return None
    return hashlib.blake2b(array("I", prompt_ids[:PREFIX_TOKENS]).tobytes(), digest_size=8).hexdigest()
