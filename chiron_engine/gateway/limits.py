"""What a request to the gateway may hold. Checked before an engine sees it; the engine checks again.

Every function raises RpcFailure with INVALID_ARGUMENT, a message that names the field, the value
and what would be right, or returns the checked value.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence

from chiron_engine.policy.iteration.sampling_params import SamplingParams
from chiron_engine.rpc.errors import RpcFailure, invalid_argument
from chiron_engine.rpc.v1 import inference_pb2, types_pb2
from chiron_engine.rpc.wire import sampling_fields, slo_fields

MAX_STOPS = 4
MAX_STOP_BYTES = 256
MAX_MESSAGES = 2048
MAX_CHOICES = 16
REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
REQUEST_ID_RULE = "it must be 1 to 128 letters, digits or any of _ . : -"


def check_request_id(request_id: str) -> str:
    """The id, or a fresh one for the empty string."""
    if not request_id:
        return uuid.uuid4().hex
    if not REQUEST_ID.fullmatch(request_id):
        raise invalid_argument(f"request_id is {_shown(request_id)}; {REQUEST_ID_RULE}")
    return request_id


def check_stops(stops: Sequence[str]) -> list[str]:
    if len(stops) > MAX_STOPS:
        raise invalid_argument(f"stop has {len(stops)} strings; at most {MAX_STOPS} are allowed")
    for place, stop in enumerate(stops):
        size = len(stop.encode())
        if not 1 <= size <= MAX_STOP_BYTES:
            raise invalid_argument(f"stop[{place}] has {size} bytes; 1 to {MAX_STOP_BYTES} are allowed")
    return list(stops)


def check_messages(chat: inference_pb2.ChatMessages) -> list[dict[str, str]]:
    """Messages as a chat template wants them."""
    count = len(chat.messages)
    if not 1 <= count <= MAX_MESSAGES:
        raise invalid_argument(f"chat has {count} messages; 1 to {MAX_MESSAGES} are allowed")
    for place, message in enumerate(chat.messages):
        if not message.role:
            raise invalid_argument(f"chat.messages[{place}].role is empty; use system, user or assistant")
    return [{"role": message.role, "content": message.content} for message in chat.messages]


def check_sampling(message: types_pb2.SamplingParams, vocab_size: int) -> SamplingParams:
    for name, token_ids in (("stop_token_ids", message.stop_token_ids), ("logit_bias", message.logit_bias)):
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                raise invalid_argument(f"{name} has {token_id}; {_vocabulary_rule(vocab_size)}")
    try:
        return SamplingParams(**sampling_fields(message))
    except ValueError as error:
        raise invalid_argument(str(error)) from None


def check_choices(n: int, sampling: SamplingParams) -> None:
    if n > MAX_CHOICES:
        raise invalid_argument(f"n is {n}; it must be between 1 and {MAX_CHOICES}")
    if n > 1 and sampling.temperature == 0.0:
        raise invalid_argument(f"n is {n} and temperature 0: all outputs would be the same; ask for one")


def check_slo(message: types_pb2.Slo) -> None:
    try:
        slo_fields(message)
    except ValueError as error:
        raise invalid_argument(str(error)) from None


def check_token_ids(token_ids: Sequence[int], vocab_size: int, name: str = "token_ids") -> list[int]:
    ids = list(token_ids)
    if ids and max(ids) >= vocab_size:
        place, token_id = next((i, t) for i, t in enumerate(ids) if t >= vocab_size)
        raise invalid_argument(f"{name}[{place}] is {token_id}; {_vocabulary_rule(vocab_size)}")
    return ids


def check_length(prompt_tokens: int, sampling: SamplingParams, max_model_len: int) -> None:
    """A prompt must leave room for one token, or for all of max_tokens or min_tokens where given."""
    if prompt_tokens == 0:
        raise invalid_argument("the prompt is empty; it must hold at least one token")
    if prompt_tokens >= max_model_len:
        raise over_context(f"the prompt has {prompt_tokens} tokens", max_model_len)
    for name in ("max_tokens", "min_tokens"):
        asked = getattr(sampling, name) or 0
        if prompt_tokens + asked > max_model_len:
            what = f"the prompt has {prompt_tokens} tokens and {name} is {asked}"
            raise over_context(what, max_model_len)
    try:
        sampling.check_prompt_length(prompt_tokens)
    except ValueError as error:
        raise invalid_argument(str(error)) from None


def over_context(what: str, max_model_len: int) -> RpcFailure:
    return invalid_argument(
        f"{what}; the context holds {max_model_len} tokens, prompt and output together",
        "context_length_exceeded",
    )


def _vocabulary_rule(vocab_size: int) -> str:
    return f"it must be in the vocabulary [0, {vocab_size})"


def _shown(value: str) -> str:
    """A short, printable form of what a client sent."""
    text = value if len(value) <= 40 else value[:40] + "..."
    return ascii(text)
