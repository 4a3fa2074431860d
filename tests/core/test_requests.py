from __future__ import annotations

import numpy as np
import pytest

from chiron_engine.core.executor import ExecutorShape
from chiron_engine.core.requests import InvalidRequest, build_request
from chiron_engine.policy.iteration.request import Request
from chiron_engine.policy.iteration.sampling_params import SamplingParams

SHAPE = ExecutorShape(16, 100, 0, 8, 64, 128, 1000)


def build(prompt: list[int], **sampling: object) -> Request:
    return build_request(
        1,
        prompt,
        SamplingParams(**sampling),  # type: ignore[arg-type]
        shape=SHAPE,
        eos_token_ids=(2,),
        draw_seed=lambda: 42,
        arrival=0.0,
    )


def test_defaults_fill_the_context_and_draw_a_seed() -> None:
    request = build([1, 2, 3])
    assert (request.max_tokens, request.seed, request.stop_ids) == (125, 42, {2})
    assert build([1], seed=7, ignore_eos=True, stop_token_ids=(5,)).stop_ids == {5}
    assert build([1], seed=7).seed == 7


def test_a_seed_of_numpy_becomes_an_int() -> None:
    seed = build([1], seed=np.uint64(2**64 - 1)).seed
    assert type(seed) is int
    assert seed == 2**64 - 1


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1, 1000], {}, r"prompt token id 1000 is outside the vocabulary \[0, 1000\)"),
        ([-1], {}, "a prompt token id is no whole number"),
        ([2**63], {}, "a prompt token id is no whole number"),
        ([1.5], {}, "a prompt token id is no whole number"),
        ([1] * 128, {}, "the prompt has 128 tokens; the context of 128 must leave room"),
        ([1] * 100, {"max_tokens": 29}, "together they exceed the context of 128"),
        ([1], {"stop_token_ids": (1000,)}, "stop token id 1000 is outside"),
    ],
)
def test_what_cannot_be_served_is_named(prompt: list[int], sampling: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        build(prompt, **sampling)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", -0.1),
        ("top_p", 0.0),
        ("top_p", float("nan")),
        ("top_k", -1),
        ("seed", -1),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("presence_penalty", -2.5),
        ("frequency_penalty", float("inf")),
        ("logit_bias", {1: 100.5}),
        ("logit_bias", {1.5: 1.0}),
        ("logit_bias", [(1, 2.0)]),
        ("logit_bias", dict.fromkeys(range(1025), 0.0)),
        ("stop_token_ids", tuple(range(129))),
    ],
)
def test_sampling_parameters_are_checked(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})  # type: ignore[arg-type]
