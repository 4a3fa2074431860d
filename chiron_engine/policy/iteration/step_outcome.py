"""What a step brought once its result is there: tokens, and who ends with them."""

from __future__ import annotations

from collections.abc import Sequence

from .drafts import end_of, take_verified
from .plan import StepOutput, StepPlan, StepResult, TokenLogprobs
from .request import ENDED, FinishReason, Request, RequestState

Ending = tuple[Request, FinishReason, int]
"""Who ends, why, and with how many output tokens in all."""


def outcome(plan: StepPlan, result: StepResult, now: float) -> tuple[StepOutput, list[Ending]]:
    """Take in the tokens of a step. A request that ended or left after the step was planned takes no
    more of them."""
    requests: Sequence[Request] = plan.decode.requests
    if plan.chunks:
        sampled = plan.sampled_requests
        requests = (*requests, *sampled)
        for request in sampled:
            if request.first_token is None and request.state is not RequestState.LEFT:
                request.first_token = now
    tokens = result.tokens
    output = StepOutput(plan.step, requests, tokens)
    if plan.drafts and tokens is not None:
        output.tokens = tokens[: len(requests)]
    if result.logprobs:
        output.logprobs = {requests[row].request_id: found for row, found in result.logprobs.items()}
    if result.prompt_logprobs:
        _note_prompts(plan, result)
    if plan.chunks:
        output.prompt_logprobs = _told_prompts(requests[len(plan.decode.requests) :])
    ended: list[Ending] = []
    if output.tokens is not None:
        ended = _append(output, output.tokens)
    elif result.stopped:
        ended = _named(result.stopped, plan.step)
    if plan.final:
        ended += _final(plan.final, ended)
    if plan.drafts and tokens is not None:
        ended += _verify(plan, tokens[len(requests) :], output)
    output.finished = [ending[0] for ending in ended]
    return output, ended


def _note_prompts(plan: StepPlan, result: StepResult) -> None:
    for number, found in result.prompt_logprobs.items():
        request = plan.chunk_requests[number]
        if request.prompt_logprobs is None:
            request.prompt_logprobs = []
        request.prompt_logprobs += found


def _told_prompts(sampled: Sequence[Request]) -> dict[int, list[TokenLogprobs]]:
    """Of requests that get their first token."""
    told = {}
    for request in sampled:
        if request.prompt_logprobs is not None:
            told[request.request_id] = request.prompt_logprobs
            request.prompt_logprobs = None
    return told


def _append(output: StepOutput, tokens: Sequence[int]) -> list[Ending]:
    """Append each request's token; returns those that it stops."""
    stopped: list[Ending] = []
    stale = False
    for request, token in zip(output.requests, tokens, strict=True):
        if request.state in ENDED:
            stale = True
            continue
        request.output_ids.append(token)
        if token in request.stop_ids:
            stopped.append((request, FinishReason.STOP, len(request.output_ids)))
    if stale:
        live = [(r, t) for r, t in zip(output.requests, tokens, strict=True) if r.state not in ENDED]
        output.requests = tuple(r for r, _ in live)
        output.tokens = [t for _, t in live]
    return stopped


def _verify(plan: StepPlan, sampled: Sequence[int], output: StepOutput) -> list[Ending]:
    """Append the tokens of drafts that hold; returns those that end with one of them."""
    requests, tokens = take_verified(plan, sampled)
    live = [request for request in plan.draft_requests if request.state not in ENDED]
    for request in requests:
        output.accepted[request.slo.slo_class] += 1
    for request in live:
        output.accepted[request.slo.slo_class] -= 1
    output.requests = (*output.requests, *requests)
    output.tokens = [*(output.tokens or ()), *tokens]
    return [(r, reason, len(r.output_ids)) for r in live if (reason := end_of(r)) is not None]


def _named(stopped: Sequence[Request], step: int) -> list[Ending]:
    """Those that an executor without token values says `step` stopped."""
    live = [request for request in stopped if request.state not in ENDED]
    return [(request, FinishReason.STOP, request.outputs_at(step + 1)) for request in live]


def _final(final: Sequence[Request], stopped: Sequence[Ending]) -> list[Ending]:
    """Those at max_tokens whose last token does not stop them as well."""
    already = [ending[0] for ending in stopped]
    live = [request for request in final if request.state not in ENDED and request not in already]
    return [(request, FinishReason.LENGTH, request.max_tokens) for request in live]
