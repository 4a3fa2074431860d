"""From what a caller asks to a request the engine can take, or a clear refusal."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence

from chiron_engine.core.executor import ExecutorShape
from chiron_engine.policy.iteration.request import Request, Slo
from chiron_engine.policy.iteration.sampling_params import SamplingParams


class InvalidRequest(ValueError):
    """The request can never be served as asked."""


class QueueFull(RuntimeError):
    """The waiting queue is at its bound; `retry_after_s` says when to try again."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


def build_request(
    request_id: int,
    prompt_ids: Iterable[int],
    sampling: SamplingParams,
    *,
    shape: ExecutorShape,
    eos_token_ids: Iterable[int],
    draw_seed: Callable[[], int],
    slo: Slo | None = None,
    arrival: float,
    cache_salt: bytes = b"",
    client: object = None,
    guide: object = None,
    num_prior_outputs: int = 0,
) -> Request:
    """A checked request. Without max_tokens the output may fill what the context leaves.

    guide: compiled from the sampling parameters' one. num_prior_outputs: of the prompt's last tokens, those
    that are its own output. Raises InvalidRequest for an empty prompt, ids outside the vocabulary, a prompt
    (with the max_tokens or min_tokens asked for) over the context length, and what this engine cannot do.
    """
    prompt = _token_array("prompt token id", prompt_ids, shape.vocab_size)
    if not prompt:
        raise InvalidRequest("the prompt is empty; it must hold at least one token")
    if sampling.logprobs is not None and not shape.has_logits:
        raise InvalidRequest(f"logprobs is {sampling.logprobs}; this engine computes no model")
    if sampling.prompt_logprobs is not None:
        if not shape.has_logits:
            raise InvalidRequest(
                f"prompt_logprobs is {sampling.prompt_logprobs}; this engine computes no model"
            )
        try:
            sampling.check_prompt_length(len(prompt))
        except ValueError as error:
            raise InvalidRequest(str(error)) from None
    if sampling.guide is not None and guide is None:
        raise InvalidRequest(f"this engine has no tokenizer to follow a {sampling.guide.kind}")
    stops = set(_token_array("stop token id", sampling.stop_token_ids, shape.vocab_size))
    _token_array("logit_bias token id", sampling.logit_bias, shape.vocab_size)
    if not 0 <= num_prior_outputs < len(prompt):
        raise InvalidRequest(f"{num_prior_outputs} tokens of a prompt of {len(prompt)} cannot be output")
    if not sampling.ignore_eos:
        stops.update(eos_token_ids)
    return Request(
        request_id=request_id,
        prompt_ids=prompt,
        sampling=sampling,
        max_tokens=_max_tokens(len(prompt), sampling, shape),
        stop_ids=frozenset(stops),
        slo=slo if slo is not None else Slo(),
        # An int of its own: numpy's wrap or overflow in the arithmetic of 64-bit patterns.
        seed=int(sampling.seed) if sampling.seed is not None else draw_seed(),
        arrival=arrival,
        cache_salt=cache_salt,
        client=client,
        guide=guide,
        num_prior_outputs=num_prior_outputs,
    )


def _token_array(what: str, ids: Iterable[int], vocab_size: int) -> Sequence[int]:
    try:
        tokens = array("I", ids)
    except (OverflowError, TypeError) as error:
        raise InvalidRequest(f"a {what} is no whole number in [0, {vocab_size})") from error
    if tokens and max(tokens) >= vocab_size:
        raise InvalidRequest(f"{what} {max(tokens)} is outside the vocabulary [0, {vocab_size})")
    return tokens


def _max_tokens(prompt: int, sampling: SamplingParams, shape: ExecutorShape) -> int:
    context = min(shape.max_model_len, shape.num_device_blocks * shape.block_size)
    if prompt >= context:
        raise InvalidRequest(
            f"the prompt has {prompt} tokens; the context of {context} must leave room for one more"
        )
    for name in ("max_tokens", "min_tokens"):
        asked = getattr(sampling, name) or 0
        if prompt + asked > context:
            raise InvalidRequest(
                f"the prompt has {prompt} tokens and {name} is {asked}; together they exceed the "
                f"context of {context}"
            )
    return context - prompt if sampling.max_tokens is None else sampling.max_tokens
