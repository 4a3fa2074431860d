"""Least work of requests, and traces scaled to the demand of a number of instances."""

from __future__ import annotations

import numpy as np
import pytest

from chiron_engine.policy.iteration.request import SloClass
from chiron_engine.policy.iteration.step_costs import StepCosts
from chiron_engine.sim.load_scaling import mean_demand, scale_to_load, superpose
from chiron_engine.sim.profiles import load_profile
from chiron_engine.sim.step_prices import SHARE
from chiron_engine.sim.traces.columns import make_trace
from chiron_engine.sim.traces.dispersion import dispersion, index_of_dispersion
from chiron_engine.sim.traces.load import load_trace
from chiron_engine.sim.work import amounts_of, cached_prefixes, least_work, work_s
from chiron_engine.sim.workload import BATCH_SLO, INTERACTIVE_SLO, Stream, capped_outputs, make_workload
from tests.sim.linear_profile import linear_profile

H100 = "h100/llama-3.1-8b/tp1/bf16"


def test_amounts_of_an_interactive_request() -> None:
    """10 prompt tokens, 4 outputs: decodes at contexts 10, 11, 12, of which one may be late."""
    trace = make_trace("t", [0.0], [10], [4])
    found = amounts_of(Stream(SloClass.INTERACTIVE, trace, INTERACTIVE_SLO, 0)).columns[:, 0]
    assert list(found) == [2, 21, 1, 12, 10, 55]
    batch = amounts_of(Stream(SloClass.BATCH, trace, BATCH_SLO, 0)).columns[:, 0]
    assert list(batch) == [0, 0, 3, 33, 10, 55]


def test_prefixes_of_earlier_rows_are_not_computed_again() -> None:
    blocks = [[1, 2], [1, 2], [1, 3, 2], [4], [1]]
    trace = make_trace("t", [0, 1, 2, 3, 4], [20, 16, 25, 5, 10], [1] * 5, blocks, prefix_block_tokens=10)
    assert list(cached_prefixes(trace)) == [0, 15, 10, 0, 9]
    amounts = amounts_of(Stream(SloClass.BATCH, trace, BATCH_SLO, 0)).columns
    assert list(amounts[4]) == [20, 1, 15, 5, 1]
    assert amounts[5][2] == sum(range(11, 26))


def test_prefix_reuse_of_the_packaged_trace() -> None:
    trace = load_trace("mooncake-conversation", seed=1)
    assert cached_prefixes(trace).sum() / sum(trace.prompt_tokens) == pytest.approx(0.374, abs=0.003)


def test_work_of_prompts_alone_is_their_marginal_time() -> None:
    costs = StepCosts(1e-6, 1e-6, 1e-9, 0.01)
    found = least_work(make_workload(None, make_trace("t", [0, 1], [100, 50], [1, 1])), linear_profile(costs))
    assert list(found.by_stream[0]) == pytest.approx([SHARE * 1.0, SHARE * 0.5], rel=1e-4)


def test_work_of_one_request_is_what_a_full_instance_spends_on_it() -> None:
    profile = load_profile(H100)
    interactive, batch = work_s(1155, 211, profile), work_s(1155, 211, profile, batch=True)
    assert batch <= interactive < 0.06
    assert batch > 0.03


@pytest.mark.parametrize("load", [0.05, 2.5])
@pytest.mark.parametrize("name", ["azure-conv", "mooncake-conversation"])
def test_the_scaled_trace_has_the_demand_asked_for(name: str, load: float) -> None:
    profile, trace = load_profile(H100), load_trace(name)
    scaled = scale_to_load(trace, load, SloClass.INTERACTIVE, INTERACTIVE_SLO, profile, seed=3)
    assert scaled.demand == pytest.approx(load, rel=0.03)
    measured = mean_demand(scaled.trace, SloClass.INTERACTIVE, INTERACTIVE_SLO, profile, trace.span_s)
    assert measured == pytest.approx(scaled.demand, rel=1e-3)
    assert len(scaled.trace) == pytest.approx(scaled.copies * len(trace), abs=1)
    assert list(scaled.trace.arrival_s) == sorted(scaled.trace.arrival_s)
    assert scaled.trace.span_s <= trace.span_s * 1.001


def test_the_same_seed_scales_alike() -> None:
    trace = load_trace("azure-conv")
    first, again, other = (superpose(trace, 2.5, seed) for seed in (1, 1, 2))
    assert (first.arrival_s, first.prompt_tokens) == (again.arrival_s, again.prompt_tokens)
    assert first.arrival_s != other.arrival_s


def test_whole_copies_keep_every_row() -> None:
    trace = make_trace("t", [0.0, 50.0, 100.0], [1, 2, 3], [4, 5, 6], [[0], [0], [1]])
    tripled = superpose(trace, 3, seed=0)
    assert sorted(tripled.prompt_tokens) == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert tripled.prefix_blocks is not None
    by_prompt = sorted(
        (prompt, tuple(ids)) for prompt, ids in zip(tripled.prompt_tokens, tripled.prefix_blocks, strict=True)
    )
    assert by_prompt == [
        (p, (i,)) for p, ids in ((1, (0, 2, 4)), (2, (0, 2, 4)), (3, (1, 3, 5))) for i in ids
    ]


def test_thinning_keeps_some_rows_where_they_were() -> None:
    trace = load_trace("azure-conv")
    thinned = superpose(trace, 0.1, seed=0)
    assert len(thinned) == 1937
    rows = set(zip(trace.arrival_s, trace.prompt_tokens, trace.output_tokens, strict=True))
    assert rows.issuperset(zip(thinned.arrival_s, thinned.prompt_tokens, thinned.output_tokens, strict=True))


def test_loads_that_cannot_be() -> None:
    profile, trace = load_profile(H100), load_trace("azure-conv")
    for load in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="over 0"):
            scale_to_load(trace, load, SloClass.INTERACTIVE, INTERACTIVE_SLO, profile, 0)
    with pytest.raises(ValueError, match="at most 20,000,000"):
        scale_to_load(trace, 1e6, SloClass.INTERACTIVE, INTERACTIVE_SLO, profile, 0)
    burst = load_trace("burst:count=10,lengths=8/8")
    with pytest.raises(ValueError, match="arrive at once"):
        scale_to_load(burst, 1.0, SloClass.BATCH, BATCH_SLO, profile, 0)


def test_dispersion_is_1_for_poisson_and_more_for_bursts() -> None:
    assert dispersion(load_trace("azure-conv")) == pytest.approx(
        {"1s": 1.39, "10s": 3.86, "60s": 16.1}, rel=0.01
    )
    poisson = load_trace("poisson:rate=50,duration=2000,lengths=1/1")
    assert index_of_dispersion(poisson, 1.0) == pytest.approx(1.0, abs=0.1)
    bursty = index_of_dispersion(load_trace("gamma:rate=50,cv=4,duration=2000,lengths=1/1"), 10.0)
    assert bursty is not None and bursty > 8
    assert index_of_dispersion(make_trace("t", np.zeros(3), [1] * 3, [1] * 3), 1.0) is None


def test_capped_outputs_take_less_work_by_the_same_deadline() -> None:
    trace = load_trace("azure-conv")
    workload = make_workload(trace, trace)
    capped = capped_outputs(workload, 100)
    assert capped.interactive is not None and capped.batch is not None and workload.batch is not None
    assert max(capped.interactive.trace.output_tokens) == max(capped.batch.trace.output_tokens) == 100
    assert capped.batch.completion_s == workload.batch.completion_s
    assert capped.batch.first_id == workload.batch.first_id
    profile = load_profile(H100)
    assert least_work(capped, profile).total_s < least_work(workload, profile).total_s
