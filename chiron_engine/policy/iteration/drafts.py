"""What becomes of guesses: which requests may have any, and which tokens hold.

Sampling is a function of (seed, position) and of the logits, and the logits of a row are those of
decoding one by one as long as every token before it is right. So the token sampled after a right guess is
the right one, drawn or greedy, and the first guess that differs from what was sampled there ends
the run: exact by construction, not in distribution only.
"""

from __future__ import annotations

from collections.abc import Sequence

from .plan import StepPlan
from .request import ENDED, FinishReason, Request
from .sampling_params import SamplingParams

WITHOUT_DRAFTS = SamplingParams(logprobs=0)
"""Stands for what `may_draft` refuses."""


def may_draft(request: Request) -> bool:
    """Whether its tokens may be guessed. Penalties and guides make the logits of a row depend on tokens
    that are guesses themselves, and logprobs are told once a step; what depends on the position alone
    (min_tokens, logit_bias) is no hindrance."""
    sampling = request.sampling
    plain = not sampling.has_penalties and sampling.logprobs is None
    return plain and sampling.guide is None and request.guide is None


def num_verified(tokens: Sequence[int], sampled: Sequence[int]) -> int:
    """How many of the sampled tokens hold, at least 1. tokens: the last known one, then the guesses.
    sampled: after each of them."""
    held = 1
    while held < len(tokens) and tokens[held] == sampled[held - 1]:
        held += 1
    return held


def take_verified(plan: StepPlan, sampled: Sequence[int]) -> tuple[list[Request], list[int]]:
    """Append to each request with a draft the tokens that hold, up to one that ends it. sampled: after
    every row of the drafts. Returns requests and tokens, one by one."""
    requests: list[Request] = []
    tokens: list[int] = []
    row = 0
    for draft, request in zip(plan.drafts, plan.draft_requests, strict=True):
        brought = sampled[row : row + draft.count]
        row += draft.count
        if request.state in ENDED:
            continue
        for token in brought[: num_verified(draft.tokens, brought)]:
            request.output_ids.append(token)
            requests.append(request)
            tokens.append(token)
            if end_of(request) is not None:
                break
    return requests, tokens


def end_of(request: Request) -> FinishReason | None:
    """Why a request whose tokens are known ends with its last one; None where it goes on."""
    if request.output_ids[-1] in request.stop_ids:
        return FinishReason.STOP
    return FinishReason.LENGTH if len(request.output_ids) == request.max_tokens else None
