"""A step in the load: how soon the fleet has it in hand, and what it orders on the way."""

from __future__ import annotations

import math

import pytest

from chiron_engine.policy.fleet.config import FleetConfig
from chiron_engine.policy.fleet.demand import InteractiveDemand
from chiron_engine.policy.fleet.fleet_view import BatchView, FleetView, PoolView
from chiron_engine.policy.fleet.global_autoscaler import ChironAutoscaler
from chiron_engine.policy.fleet.waiting_time import Throughput

LOAD_S = 45.0
LEAD_S = LOAD_S + 1.0
SERVICE_S = 10.0
REQUEST_S = 0.04
NO_BATCH = BatchView((), Throughput(1.0, 1.0), 0)


class PackedFleet:
    """Instances full of equal requests, as a fluid: `present` is the u of all that came and did not end;
    what does not fit on ready instances waits. Launches are ready after LOAD_S."""

    def __init__(self, demand: float, instances: int) -> None:
        """`instances` are kept at any load."""
        self.demand = demand
        self.ready = instances
        self.present = demand
        self.loading: list[float] = []
        self.totals: list[int] = []
        self.waiting: list[float] = []
        self.now = 0.0
        self._least = instances
        self._autoscaler = ChironAutoscaler(FleetConfig(max_gpus=500))

    def second(self) -> None:
        self.now += 1.0
        self.present += (self.demand - min(self.present, self.ready)) / SERVICE_S
        while self.loading and self.loading[0] <= self.now:
            self.loading.pop(0)
            self.ready += 1
        self.waiting.append(max(0.0, self.present - self.ready))
        view = FleetView(self.now, LEAD_S, 500, (self._view(),), NO_BATCH, self._least)
        decision = self._autoscaler.decide(view)
        total = decision.pools[0].total
        missing = total - self.ready - len(self.loading)
        self.loading += [self.now + LOAD_S] * missing
        self.ready += min(0, missing)
        self.totals.append(total)

    def run(self, seconds: int) -> None:
        for _ in range(seconds):
            self.second()

    def _view(self) -> PoolView:
        fits = min(self.present, self.ready)
        return PoolView(
            target_s=0.2,
            instances=self.ready + len(self.loading),
            busy_instances=self.ready,
            load=fits,
            arrived_work_s=self.demand,
            arrived_squares=self.demand * REQUEST_S,
            backlog=min(self.present - fits, 0.5 * fits),
            arrived_load=self.demand / SERVICE_S,
            loading=len(self.loading),
            next_ready_s=self.loading[0] - self.now if self.loading else LEAD_S,
        )


def after_a_step(demand: float, instances: int, seconds: int) -> PackedFleet:
    """Half as much again after 1,800 s, on at least so many instances."""
    fleet = PackedFleet(demand, instances)
    fleet.run(1800)
    assert fleet.totals[-1] == instances
    fleet.totals, fleet.waiting = [], []
    fleet.demand *= 1.5
    fleet.run(seconds)
    return fleet


@pytest.mark.parametrize("demand, instances", [(9.5, 13), (24.0, 33), (95.0, 130)])
def test_half_as_much_again_is_in_hand_after_a_load_time_and_two_ticks(demand: float, instances: int) -> None:
    """Also what waited meanwhile: it is ordered for in the first two ticks, not as it grows."""
    fleet = after_a_step(demand, instances, 200)
    assert max(fleet.waiting[int(LOAD_S) + 1 :]) == 0.0
    assert max(fleet.totals[: int(LOAD_S)]) <= 1.02 * fleet.totals[1], "no second wave"


def test_a_step_is_no_larger_a_spike_for_what_waited() -> None:
    """Theta becomes 1 / 1.5, the size of the step, though u is more while the backlog is worked off."""
    fleet = after_a_step(9.5, 13, 600)
    assert max(fleet.totals) <= math.ceil(1.5 * fleet.demand)
    assert fleet.totals[-1] == max(fleet.totals), "another step like it would be met at once"


def test_a_backlog_being_worked_off_is_no_rate() -> None:
    demand = InteractiveDemand(1.0)
    for second in range(200):
        load = 9.0 if 100 <= second < 130 else 5.0
        backlog = 4.0 if 95 <= second < 100 else 0.0
        demand.observe(PoolView(0.2, 12, 12, load, 5.0, 0.1, backlog))
    assert demand.mean == demand.smooth == pytest.approx(5.0)


def test_work_that_stays_over_the_flow_counts() -> None:
    """The step model says half of what requests really take: the sum of u tells."""
    demand = InteractiveDemand(1.0)
    for _ in range(200):
        demand.observe(PoolView(0.2, 12, 12, 10.0, 5.0, 0.1))
    assert demand.mean == pytest.approx(10.0)
