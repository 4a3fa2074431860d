"""How many instances: Chiron's closed form and deadlines, and each pathology of the naive rules."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
from fleet_driver import SPEC, FleetDriver

from chiron_engine.policy.fleet.autoscalers import make_global_autoscaler
from chiron_engine.policy.fleet.config import FleetConfig
from chiron_engine.policy.fleet.demand import InteractiveDemand
from chiron_engine.policy.fleet.fleet_view import BatchView, FleetView, GlobalAutoscaler, PoolView
from chiron_engine.policy.fleet.global_autoscaler import ChironAutoscaler
from chiron_engine.policy.fleet.paper_autoscaler import PaperAutoscaler, step_by_one
from chiron_engine.policy.fleet.request_groups import GroupWork
from chiron_engine.policy.fleet.waiting_time import Throughput

LEAD_S = 46.0
NO_BATCH = BatchView((), Throughput(1.0, 1.0), 0)
CONFIG = FleetConfig()


def view(now: float, pool: PoolView, batch: BatchView = NO_BATCH, most: int = 50) -> FleetView:
    return FleetView(now, LEAD_S, most, (pool,), batch)


def pool(instances: int, load: float, work: float = 0.0, squares: float = 0.0, busy: int = 0) -> PoolView:
    return PoolView(0.2, instances, busy, load, work, squares)


class Poisson:
    """Requests of exponential work, `per_s` of them a second; load in instances is half the flow,
    as packed instances show it."""

    def __init__(self, demand: float, per_s: float = 50.0, seed: int = 1) -> None:
        self.demand = demand
        self.per_s = per_s
        self.rng = random.Random(seed)

    def second(self, instances: int) -> PoolView:
        count = sum(1 for _ in range(2000) if self.rng.random() < self.per_s / 2000)
        works = [self.rng.expovariate(self.per_s / self.demand) for _ in range(count)]
        return pool(instances, 0.5 * self.demand, sum(works), sum(work * work for work in works))


def follow(autoscaler: GlobalAutoscaler, load: Poisson, start: int, first: int, last: int) -> list[int]:
    """Totals decided second by second, each decision obeyed."""
    totals, instances = [], start
    for now in range(first, last):
        instances = autoscaler.decide(view(float(now), load.second(instances))).pools[0].total
        totals.append(instances)
    return totals


# Interactive: Theta.


def test_plus_or_minus_one_flips_for_ever_unless_theta_is_one_over_k() -> None:
    def run(busy: int, theta: float) -> list[int]:
        totals = [6]
        for _ in range(60):
            totals.append(step_by_one(busy, totals[-1], theta))
        return totals[-20:]

    assert set(run(2, 1 / 3)) == {6}
    assert set(run(2, 0.4)) == {5}
    flipping = run(2, 0.35)
    assert len(set(flipping)) == 2 and all(a != b for a, b in pairwise(flipping))


def test_the_closed_form_stands_still() -> None:
    autoscaler = PaperAutoscaler()
    totals = []
    instances = 4
    for now in range(60):
        instances = autoscaler.decide(view(now, pool(instances, 1.7, busy=2))).pools[0].total
        totals.append(instances)
    assert set(totals) == {6}


def spread(total_load: float, instances: int) -> int:
    """Busy instances when every instance is given some of the load."""
    return instances if total_load > 0 else 0


def test_counting_busy_instances_under_spreading_climbs_to_the_cap() -> None:
    totals = {}
    for name in ("paper-literal", "paper", "chiron"):
        autoscaler = make_global_autoscaler(name, CONFIG, SPEC)
        totals[name] = 3
        for now in range(200):
            seen = pool(totals[name], 1.0, busy=spread(1.0, totals[name]))
            totals[name] = min(50, autoscaler.decide(view(now, seen)).pools[0].total)
    assert totals == {"paper-literal": 50, "paper": 3, "chiron": 3}


def test_a_load_about_a_whole_number_does_not_flip() -> None:
    """Without a dead band downwards three instances would come and go each tick."""
    autoscaler = PaperAutoscaler()
    instances, totals = 6, []
    for now in range(60):
        instances = autoscaler.decide(view(now, pool(instances, 1.9 + 0.2 * (now % 2)))).pools[0].total
        totals.append(instances)
    assert totals == [6] + [9] * 59
    assert autoscaler.decide(view(60, pool(9, 1.7))).pools[0].total == 6


def test_target_is_d_over_theta_and_a_spare_instance() -> None:
    autoscaler = ChironAutoscaler(CONFIG)
    for now in range(70):
        decision = autoscaler.decide(view(now, pool(4, 6.0)))
    assert decision.theta == 0.5
    assert decision.pools[0].total == 12
    idle = ChironAutoscaler(CONFIG)
    assert idle.decide(view(0, pool(0, 0.0))).pools[0].mixed == 1


def test_steady_load_no_scaling_action_in_an_hour() -> None:
    """After 20 load leads Theta is known; then nothing moves."""
    for demand, per_s in ((4.0, 22.0), (10.0, 55.0)):
        load = Poisson(demand, per_s)
        autoscaler = ChironAutoscaler(CONFIG)
        settled = follow(autoscaler, load, 8, 0, 1800)[-1]
        assert set(follow(autoscaler, load, settled, 1800, 5400)) == {settled}
        assert demand + 1 <= settled <= 2 * demand


def test_without_the_window_a_steady_load_would_flap() -> None:
    load = Poisson(10.0, 55.0)
    demand = InteractiveDemand(1.0)
    naive = []
    for _ in range(1800):
        seen = load.second(1)
        demand.observe(seen)
        naive.append(math.ceil(demand.smooth / 0.75))
    assert sum(a != b for a, b in pairwise(naive[60:])) > 200


def test_half_as_much_again_is_ordered_within_two_ticks() -> None:
    load = Poisson(10.0, 55.0)
    autoscaler = ChironAutoscaler(CONFIG)
    settled = follow(autoscaler, load, 14, 0, 1800)[-1]
    load.demand, load.per_s = 20.0, 110.0
    totals = follow(autoscaler, load, settled, 1800, 1900)
    assert totals[2] >= 20
    assert max(totals[:60]) <= 2.2 * load.demand, "the step is a spike seen: Theta follows"


def test_a_decrease_waits_for_the_window() -> None:
    autoscaler = ChironAutoscaler(CONFIG)
    for now in range(300):
        autoscaler.decide(view(now, pool(12, 6.0)))
    totals = [autoscaler.decide(view(now, pool(12, 1.0))).pools[0].total for now in range(300, 1100)]
    assert set(totals[:200]) == {12} and totals[-1] <= 3


def test_a_backlog_asks_for_instances_but_for_no_headroom() -> None:
    calm, behind = ChironAutoscaler(CONFIG), ChironAutoscaler(CONFIG)
    for now in range(400):
        calm.decide(view(now, pool(12, 6.0)))
        backlog = 3.0 if 200 <= now < 260 else 0.0
        decision = behind.decide(view(now, PoolView(0.2, 12, 6, 6.0, backlog=backlog)))
        if now == 200:
            assert decision.pools[0].total >= calm.decide(view(now, pool(12, 6.0))).pools[0].total
            assert behind.decide(view(now, PoolView(0.2, 6, 6, 6.0, backlog=9.0))).pools[0].total >= 15
    assert behind.decide(view(400, pool(12, 6.0))).theta == calm.decide(view(400, pool(12, 6.0))).theta


def test_an_idle_pool_falls_to_what_is_kept() -> None:
    """And one of a tighter ITL target than most requests have, to nothing."""
    config = FleetConfig(max_gpus=50, itl_targets_s=(0.05, 0.2))
    autoscaler = ChironAutoscaler(config)
    totals = (0, 0)
    for now in range(1200):
        load = 3.0 if now < 100 else 0.0
        pools = (PoolView(0.05, totals[0], 0, load), PoolView(0.2, totals[1], 0, load))
        decision = autoscaler.decide(FleetView(float(now), LEAD_S, 50, pools, NO_BATCH))
        totals = (decision.pools[0].total, decision.pools[1].total)
        if now == 99:
            assert min(totals) >= 4
    assert totals == (0, 1)


def test_loading_instances_count() -> None:
    """A slow start causes no second launch."""
    driver = FleetDriver("chiron", FleetConfig(max_gpus=20, min_instances=4)).start(1)
    driver.run_ticks(300, load_s=200.0)
    assert len(driver.launches) == 3
    assert driver.drains == []


def test_interactive_only_are_those_always_full() -> None:
    autoscaler = ChironAutoscaler(CONFIG)
    for now in range(700):
        target = autoscaler.decide(view(now, pool(8, 3.7 if now % 50 else 2.2))).pools[0]
    assert target.interactive == 2 and target.mixed == target.total - 2


# Batch: deadlines.


def batch(due: float, work: float, instances: int = 0, spare: float = 0.0) -> BatchView:
    throughput = Throughput(spare, 1.0, (0.0,) * instances)
    return BatchView((GroupWork(due, work, 0.0, 10.0),), throughput, 100)


def decide_batch(autoscaler: GlobalAutoscaler, now: float, seen: BatchView, most: int = 50) -> int:
    return autoscaler.decide(view(now, pool(1, 0.0), seen, most)).batch


def test_nothing_is_launched_while_the_deadline_is_far() -> None:
    autoscaler = ChironAutoscaler(CONFIG)
    assert decide_batch(autoscaler, 0.0, batch(10_000.0, 500.0)) == 0
    assert autoscaler.decide(view(1.0, pool(1, 0.0), batch(10_000.0, 500.0))).batch_backpressure == 0


def test_pressure_asks_for_the_least_that_is_in_time() -> None:
    autoscaler = ChironAutoscaler(CONFIG)
    # 36,000 s of work in an hour: ten would be late, eleven are not, and waiting would take twelve.
    decision = autoscaler.decide(view(0.0, pool(1, 0.0), batch(3600.0, 38_500.0)))
    assert decision.batch == 11 and decision.batch_backpressure == 1


def test_waiting_never_costs_a_group_that_could_be_saved() -> None:
    """Due before an instance launched one load time later could help: launch now, and no more later."""
    autoscaler = ChironAutoscaler(CONFIG)
    launched: list[float] = []
    for now in range(80):
        ready_in = tuple(max(0.0, at + LEAD_S - now) for at in launched)
        seen = BatchView((GroupWork(95.0, 100.0, 0.0, 10.0),), Throughput(0.0, 1.0, ready_in), 10)
        launched += [float(now)] * (decide_batch(autoscaler, float(now), seen) - len(launched))
    assert launched == [0.0] * 3


def test_groups_that_are_late_whatever_is_done_show_in_the_pressure() -> None:
    groups = tuple(GroupWork(100.0 + 100.0 * place, 1000.0, 1.0, 10.0) for place in range(10))
    seen = BatchView(groups, Throughput(0.0, 1.0, (0.0,) * 4), 100)
    decision = ChironAutoscaler(CONFIG).decide(view(0.0, pool(1, 0.0), seen, most=5))
    assert decision.batch == 4 and decision.batch_backpressure == 10


def test_spare_throughput_of_mixed_instances_comes_first() -> None:
    autoscaler = ChironAutoscaler(CONFIG)
    assert decide_batch(autoscaler, 0.0, batch(3600.0, 6500.0, spare=2.0)) == 0


def test_the_cap_leaves_interactive_instances_their_devices() -> None:
    autoscaler = ChironAutoscaler(CONFIG)
    assert decide_batch(autoscaler, 0.0, batch(3600.0, 1e6), most=8) == 7


def test_batch_instances_go_two_ticks_and_the_hold_after_the_last_request() -> None:
    autoscaler = ChironAutoscaler(CONFIG)
    for now in range(10):
        decide_batch(autoscaler, now, batch(100.0, 200.0, instances=3))
    empty = BatchView((), Throughput(0.0, 1.0, (0.0,) * 3), 0)
    kept = [decide_batch(autoscaler, float(now), empty) for now in range(10, 80)]
    gone = kept.index(0)
    assert LEAD_S - 1 <= gone <= LEAD_S + 2
    assert set(kept[gone:]) == {0}


def test_a_need_that_comes_and_goes_moves_nothing() -> None:
    """Ski rental: within the hold an instance is not retired and launched again."""
    autoscaler = ChironAutoscaler(CONFIG)
    counts = []
    for now in range(200):
        work = 280.0 if now % 10 < 5 else 150.0
        counts.append(decide_batch(autoscaler, now, batch(now + 120.0, work, instances=3)))
    assert set(counts) == {3}


def test_a_launch_that_is_needed_no_more_is_not_made() -> None:
    autoscaler = ChironAutoscaler(CONFIG)
    assert decide_batch(autoscaler, 0.0, batch(3600.0, 38_500.0)) == 11
    assert decide_batch(autoscaler, 1.0, batch(3600.0, 100.0)) == 0


# Baselines and names.


def test_the_paper_adds_batch_instances_until_none_is_late_and_drops_all_when_empty() -> None:
    autoscaler = PaperAutoscaler()
    assert decide_batch(autoscaler, 0.0, batch(1000.0, 5000.0, instances=2)) == 3
    assert decide_batch(autoscaler, 0.0, batch(1000.0, 500.0, instances=2)) == 2
    assert decide_batch(autoscaler, 0.0, BatchView((), Throughput(0.0, 1.0, (0.0,)), 0)) == 0


def test_static_stays() -> None:
    autoscaler = make_global_autoscaler("static:3", CONFIG, SPEC)
    for load in (0.0, 10.0):
        decision = autoscaler.decide(view(0.0, pool(3, load), batch(10.0, 1e6)))
        assert (decision.pools[0].total, decision.batch) == (3, 0)


@pytest.mark.parametrize("name", ["llumnix", "static", "static:", "static:x", "static:0", "static:51"])
def test_unknown_names_are_told_what_exists(name: str) -> None:
    with pytest.raises(ValueError, match=r"chiron, paper, paper-literal, static:N|from 1 to 50"):
        make_global_autoscaler(name, CONFIG, SPEC)
