"""Parameters of the wrong type are refused, not carried into the engine."""

from __future__ import annotations

import numpy as np
import pytest

from chiron_engine.policy.iteration.sampling_params import SamplingParams


@pytest.mark.parametrize("name", ["max_tokens", "seed", "top_k", "min_tokens"])
@pytest.mark.parametrize("value", [1.5, 2.0, "3", True])
def test_counts_must_be_whole_numbers(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} is .* whole number"):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"])
@pytest.mark.parametrize("value", ["0.5", None, True])
def test_shares_must_be_numbers(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} is .* a number"):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


def test_numbers_of_numpy_will_do() -> None:
    params = SamplingParams(
        temperature=np.float32(0.5), top_p=1, top_k=np.int64(3), seed=np.uint64(7), max_tokens=np.int32(2)
    )
    assert (params.top_k, params.seed, params.max_tokens) == (3, 7, 2)
