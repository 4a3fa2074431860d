"""The store against a plain model of it, through crashes that lose what was not committed."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from chiron_engine.cluster.batch_records import LineState, NewBatch, Progress
from chiron_engine.cluster.batch_store import BatchStore
from tests.cluster.batch_store_cases import NOW, new_line, recovered, results_of

WAITING = (LineState.QUEUED, LineState.EVICTED)
State = LineState


class Interrupted(Exception):
    pass


@dataclass(slots=True)
class ModelLine:
    batch_id: str
    line_no: int
    due: float
    expires_at: float | None
    state: LineState = State.QUEUED
    ending: LineState | None = None
    attempt: int = 0
    produced: list[int] = field(default_factory=list)
    output: bytes = b""

    def end(self, state: LineState, output: bytes = b"") -> None:
        self.state, self.output, self.ending, self.produced = state, output, None, []

    def hand_back(self, state: LineState, produced: list[int]) -> LineState:
        if self.ending is not None:
            self.end(self.ending)
        else:
            self.state = state
            self.produced = max(self.produced, produced, key=len)
        return self.state

    def withdraw(self, state: LineState) -> None:
        if self.state in WAITING:
            self.end(state)
        elif self.state is State.RUNNING and not (self.ending and state is State.EXPIRED):
            self.ending = state


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="batch-store-"))
        self.incarnation = 0
        self.store = BatchStore(self.root / "0")
        self.now = NOW
        self.model: dict[int, ModelLine] = {}
        self.batches = 0

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.root)

    def pick(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.model)))

    def attempt_of(self, line_id: int, data: st.DataObject) -> tuple[int, bool]:
        """An attempt to report, and whether it is the one that runs."""
        line = self.model[line_id]
        attempt = max(0, line.attempt - data.draw(st.sampled_from([0, 0, 0, 1])))
        return attempt, line.state is State.RUNNING and attempt == line.attempt

    @rule(seconds=st.sampled_from([0.0, 1.0, 30.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(
        deadlines=st.lists(st.sampled_from([None, 5.0, 50.0, 500.0]), min_size=1, max_size=4),
        window=st.sampled_from([None, 20.0, 70.0]),
    )
    def submit(self, deadlines: list[float | None], window: float | None) -> None:
        batch_id = f"b{self.batches}"
        self.batches += 1
        expires_at = None if window is None else self.now + window
        lines = [
            new_line(f"c{i}", deadline=None if seconds is None else self.now + seconds)
            for i, seconds in enumerate(deadlines)
        ]
        submitted = self.store.submit(NewBatch(batch_id, expires_at=expires_at), lines, self.now)
        again = self.store.submit(NewBatch(batch_id, expires_at=expires_at), lines, self.now)
        assert submitted.is_new and not again.is_new
        for line in submitted.lines:
            due = self.now + line.ttft_slo_s if line.deadline is None else line.deadline
            assert line.line_id not in self.model
            self.model[line.line_id] = ModelLine(batch_id, line.line_no, due, expires_at)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def claim(self, data: st.DataObject) -> None:
        wanted = data.draw(st.lists(st.sampled_from(sorted(self.model)), max_size=4))
        expected = []
        for line_id in wanted:
            line = self.model[line_id]
            if line.state in WAITING:
                line.state, line.attempt = State.RUNNING, line.attempt + 1
                expected.append((line_id, line.attempt, line.produced))
        claims = self.store.claim(wanted, self.now)
        assert [(c.line_id, c.attempt, list(c.produced)) for c in claims] == expected

    @precondition(lambda self: self.model)
    @rule(data=st.data(), count=st.integers(0, 5))
    def checkpoint(self, data: st.DataObject, count: int) -> None:
        line_id = self.pick(data)
        attempt, is_current = self.attempt_of(line_id, data)
        self.store.checkpoint([Progress(line_id, attempt, range(count))])
        if is_current:
            line = self.model[line_id]
            line.produced = max(line.produced, list(range(count)), key=len)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), count=st.integers(0, 5), lost=st.booleans())
    def hand_back(self, data: st.DataObject, count: int, lost: bool) -> None:
        line_id = self.pick(data)
        attempt, is_current = self.attempt_of(line_id, data)
        if lost:
            found = self.store.requeue(line_id, attempt, self.now, range(count))
        else:
            found = self.store.evict(line_id, attempt, range(count), self.now)
        state = State.QUEUED if lost else State.EVICTED
        expected = self.model[line_id].hand_back(state, list(range(count))) if is_current else None
        assert found is expected

    @precondition(lambda self: self.model)
    @rule(data=st.data(), output=st.binary(max_size=9), fails=st.booleans())
    def end(self, data: st.DataObject, output: bytes, fails: bool) -> None:
        line_id = self.pick(data)
        attempt, is_current = self.attempt_of(line_id, data)
        if fails:
            assert self.store.fail(line_id, attempt, "code", "why", self.now) is is_current
        else:
            assert self.store.finish(line_id, attempt, output, self.now) is is_current
        if is_current:
            self.model[line_id].end(State.FAILED if fails else State.DONE, b"" if fails else output)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def stopped(self, data: st.DataObject) -> None:
        line_id = self.pick(data)
        attempt, is_current = self.attempt_of(line_id, data)
        line = self.model[line_id]
        expected = line.ending if is_current else None
        assert self.store.stopped(line_id, attempt, self.now) is expected
        if expected is not None:
            line.end(expected)

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        batch_id = f"b{data.draw(st.integers(0, self.batches - 1))}"
        lines = {i: line for i, line in self.model.items() if line.batch_id == batch_id}
        withdrawn = self.store.cancel(batch_id, self.now)
        assert set(withdrawn.ended) == {i for i, line in lines.items() if line.state in WAITING}
        to_stop = {(line.line_id, line.attempt) for line in withdrawn.to_stop}
        assert to_stop == {(i, line.attempt) for i, line in lines.items() if line.state is State.RUNNING}
        for line in lines.values():
            line.withdraw(State.CANCELLED)

    @rule()
    def expire(self) -> None:
        lines = {i: x for i, x in self.model.items() if x.expires_at is not None and x.expires_at <= self.now}
        withdrawn = self.store.expire(self.now)
        assert set(withdrawn.ended) == {i for i, line in lines.items() if line.state in WAITING}
        assert {(line.line_id, line.attempt) for line in withdrawn.to_stop} == {
            (i, x.attempt) for i, x in lines.items() if x.state is State.RUNNING and x.ending is None
        }
        for line in lines.values():
            line.withdraw(State.EXPIRED)

    @rule()
    def abandoned_transaction(self) -> None:
        with contextlib.suppress(Interrupted), self.store.transaction():
            self.store.submit(NewBatch("abandoned"), [new_line()], self.now)
            for line_id, line in self.model.items():
                self.store.claim([line_id], self.now)
                self.store.finish(line_id, line.attempt, b"abandoned", self.now)
            raise Interrupted

    @rule(in_transaction=st.booleans())
    def crash(self, in_transaction: bool) -> None:
        """What is on the disk now is all that the next store has."""
        old = self.root / str(self.incarnation)
        self.incarnation += 1
        new = self.root / str(self.incarnation)
        with contextlib.suppress(Interrupted), self.store.transaction():
            if in_transaction:
                self.store.submit(NewBatch("uncommitted"), [new_line()], self.now)
                for line_id in self.model:
                    self.store.claim([line_id], self.now)
            shutil.copytree(old, new)
            raise Interrupted
        self.store.close()
        shutil.rmtree(old)
        self.store = BatchStore(new)
        waiting = [(line.line_id, line.state, line.produced) for line in recovered(self.store, self.now, 2)]
        for line in self.model.values():
            if line.state is State.RUNNING:
                line.hand_back(State.QUEUED, [])
        assert waiting == [
            (line_id, line.state, len(line.produced))
            for line_id, line in sorted(self.model.items(), key=lambda item: (item[1].due, item[0]))
            if line.state in WAITING
        ]

    @rule(data=st.data())
    @precondition(lambda self: self.batches)
    def results(self, data: st.DataObject) -> None:
        batch_id = f"b{data.draw(st.integers(0, self.batches - 1))}"
        found = results_of(self.store, batch_id, limit=data.draw(st.integers(1, 3))).results
        lines = sorted(
            (line for line in self.model.values() if line.batch_id == batch_id), key=lambda line: line.line_no
        )
        assert [(r.line_no, r.state, r.output) for r in found] == [
            (line.line_no, line.state, line.output) for line in lines if line.state.is_end
        ]

    @invariant()
    def counts_agree(self) -> None:
        for batch in self.store.list(1000):
            lines = [line for line in self.model.values() if line.batch_id == batch.batch_id]
            assert batch.total == len(lines)
            for state in LineState:
                assert batch.counts[state] == sum(line.state is state for line in lines)
            assert (batch.finished_at is not None) == all(line.state.is_end for line in lines)
        assert len(self.store.list(1000)) == self.batches


TestBatchStore = StoreMachine.TestCase
TestBatchStore.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
