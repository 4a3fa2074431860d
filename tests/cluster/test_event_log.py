"""What the event log writes: everything comes back as it was, whatever end its process had."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiron_engine.cluster.event_fields import EFFECTS, EVENTS, decoder, encoder, schema
from chiron_engine.cluster.event_log import EventLog, _as_json
from chiron_engine.policy.fleet.config import FleetConfig
from chiron_engine.policy.fleet.messages import (
    FleetRequest,
    InstanceSpec,
    RequestArrived,
    RequestFinished,
    Route,
    Tick,
)
from chiron_engine.policy.iteration.request import Slo
from chiron_engine.policy.iteration.step_costs import StepCosts

SPEC = InstanceSpec(StepCosts(5e-3, 1e-5, 1e-8, 2e-6), 4096, 16, 2048)
CONFIG = FleetConfig(max_gpus=3, itl_targets_s=(0.05, 0.2))

st.register_type_strategy(float, st.floats(allow_nan=False))
requests = st.builds(FleetRequest, prefix=st.none() | st.text())


def messages(kind: type) -> st.SearchStrategy[Any]:
    if kind is RequestArrived:
        return st.builds(RequestArrived, requests)
    return st.builds(kind)


def plain(message: Any) -> Any:
    """FleetRequest compares by identity."""
    return type(message), asdict(message)


@pytest.mark.parametrize("kind", [*EVENTS.values(), *EFFECTS.values()])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_message_comes_back_with_every_bit(kind: type, data: st.DataObject) -> None:
    message = data.draw(messages(kind))
    names = json.loads(json.dumps(schema(kind)))
    decoded = decoder(kind, names)(json.loads(_as_json(encoder(kind)(message))))
    assert plain(decoded) == plain(message)
    assert repr(decoded) == repr(message)


def test_the_schema_names_what_is_inside() -> None:
    names = schema(*EVENTS.values())
    assert set(names) == {*EVENTS, "FleetRequest", "Slo", "MeasuredStep"}
    assert all(is_dataclass(kind) for kind in EVENTS.values())


def test_fields_of_another_version_are_told_apart() -> None:
    names = schema(Route)
    assert decoder(Route, {"Route": ["instance_id", "request_id"]})([7, 8]) == Route(8, 7)
    with pytest.raises(ValueError, match="Route has colour, which this version does not know"):
        decoder(Route, {"Route": [*names["Route"], "colour"]})
    with pytest.raises(ValueError, match="Route lacks instance_id"):
        decoder(Route, {"Route": ["request_id"]})


def begun(path: Path) -> EventLog:
    log = EventLog(path)
    log.begin("chiron", SPEC, CONFIG, 1, 10.0)
    return log


def tick(log: EventLog, now: float) -> None:
    log.event(Tick(), now)
    log.effects([])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_event_is_written_as_it_was_before_the_policy_changed_it(tmp_path: Path) -> None:
    request = FleetRequest(1, Slo(), 10.0, 5, 6)
    with begun(tmp_path / "log") as log:
        log.event(RequestArrived(request), 10.5)
        request.produced = 99
        log.effects([Route(1, 0)])
    _, event = lines(tmp_path / "log")
    assert event["fields"][0][6] == 0
    assert (event["event"], event["time"], event["effects"]) == (1, 10.5, [["Route", [1, 0, 0]]])


def test_an_event_that_the_policy_failed_at_is_written_too(tmp_path: Path) -> None:
    with begun(tmp_path / "log") as log:
        log.event(Tick(), 11.0)
        log.event(RequestFinished(3, 4), 12.0)
    assert [line["effects"] for line in lines(tmp_path / "log")[1:]] == [None, None]


def test_a_second_life_goes_on_in_the_same_file_after_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with begun(path) as log:
        tick(log, 11.0)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with begun(path) as log:
        tick(log, 21.0)
    header, cut, *second = path.read_bytes().splitlines(keepends=True)
    assert cut == whole.splitlines()[1][:-8] + b"\n"
    assert header.startswith(b'{"recording":"fleet events"') and second[0].startswith(b'{"recording"')
    assert json.loads(second[1])["event"] == 1


def test_what_is_no_event_log_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("buy milk\n")
    with pytest.raises(OSError, match="it exists and holds something else"):
        EventLog(path)
    assert path.read_text() == "buy milk\n"


def test_two_coordinators_do_not_share_a_file(tmp_path: Path) -> None:
    with begun(tmp_path / "log"), pytest.raises(OSError, match="another process writes it"):
        EventLog(tmp_path / "log")
    with EventLog(tmp_path / "log"):
        pass


FULL_DISK = """
import logging, resource, sys
from pathlib import Path
from tests.cluster.test_event_log import begun, tick
logging.basicConfig()
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
log = begun(Path(sys.argv[1]))
for _ in range(100):
    tick(log, 11.0)
log._writer._thread.join(10)
tick(log, 12.0)
log.close()
print("goes on")
"""


def test_a_full_disk_ends_the_log_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "log")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.stdout == "goes on\n", run.stderr
    assert f"nothing more is written to {tmp_path / 'log'}: File too large" in run.stderr


WRITER = """
import sys, time
from pathlib import Path
from tests.cluster.test_event_log import begun, tick
log = begun(Path(sys.argv[1]))
while True:
    now = time.monotonic()
    tick(log, now)
    print(now, flush=True)
    time.sleep(0.001)
"""


def test_a_kill_loses_less_than_a_second(tmp_path: Path) -> None:
    path = tmp_path / "log"
    command = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        first = float(writer.stdout.readline())
        said = next(now for now in map(float, writer.stdout) if now > first + 1.1)
        os.kill(writer.pid, signal.SIGKILL)
    whole = path.read_bytes().rpartition(b"\n")[0].splitlines()
    assert json.loads(whole[-1])["time"] > said - 1.0
