"""A client's request as the fleet policy sees it: lengths and promises, no tokens."""

from __future__ import annotations

from dataclasses import dataclass

from chiron_engine.policy.fleet.config import FleetConfig
from chiron_engine.policy.fleet.messages import FleetRequest
from chiron_engine.policy.iteration.request import Slo, SloClass
from chiron_engine.rpc.prompt_prefix import prompt_prefix
from chiron_engine.rpc.token_stream import TokenStream
from chiron_engine.rpc.v1 import types_pb2
from chiron_engine.rpc.wire import slo_fields


@dataclass(frozen=True, slots=True)
class AskedRequest:
    """What a client asked for. max_tokens: None for as many as the context holds. prefix: equal where
    prompts begin alike. produced: output tokens that it has already."""

    slo: types_pb2.Slo
    prompt_tokens: int
    max_tokens: int | None
    prefix: str | None
    produced: int = 0


def asked_by(stream: TokenStream) -> AskedRequest:
    return AskedRequest(
        stream.slo,
        len(stream.prompt_ids),
        stream.sampling.max_tokens if stream.sampling.HasField("max_tokens") else None,
        prompt_prefix(stream.prompt_ids),
    )


def fleet_request(
    key: int, asked: AskedRequest, received: float, max_model_len: int, config: FleetConfig
) -> FleetRequest:
    """received: on the coordinator's clock. An interactive request that asks for no ITL has the default,
    or the loosest target on offer where that is looser. Raises ValueError for an SLO that is none."""
    fields = slo_fields(asked.slo)
    itl_s = fields["itl_s"]
    if not (fields["batch"] or asked.slo.HasField("itl_slo_ms")):
        itl_s = max(itl_s, config.itl_targets_s[-1])
    deadline_s = fields["deadline_s"]
    room = max_model_len - asked.prompt_tokens
    return FleetRequest(
        request_id=key,
        slo=Slo(
            SloClass.BATCH if fields["batch"] else SloClass.INTERACTIVE,
            fields["ttft_s"],
            itl_s,
            None if deadline_s is None else received + deadline_s,
        ),
        arrival=received,
        prompt_tokens=asked.prompt_tokens,
        max_tokens=room if asked.max_tokens is None else asked.max_tokens,
        prefix=asked.prefix,
        produced=asked.produced,
    )
