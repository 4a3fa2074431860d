"""Packaged profiles: step times inside their tables, models beside them, and refusals."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from chiron_engine.sim.profile import Profile
from chiron_engine.sim.profile_file import InvalidProfile
from chiron_engine.sim.profiles import load_profile, profile_names
from chiron_engine.sim.table_step_times import StepTables, TableStepTimes

NAME = "h100/llama-3.1-8b/tp1/bf16"
PROFILES = {name: load_profile(name) for name in profile_names()}
ROOT = Path(__file__).resolve().parents[2]


def test_all_configurations_are_packaged() -> None:
    assert len(PROFILES) == 18
    assert {"h100/llama-3.1-8b/tp1/bf16", "a100/llama-3.1-70b/tp8/bf16", "h100/llama-3.1-70b/tp4/fp8"} <= set(
        PROFILES
    )
    for name, profile in PROFILES.items():
        assert profile.name == name and profile.gpus == int(name.split("/")[2][2:])
        assert "Apache-2.0" in profile.source


@pytest.mark.parametrize(
    ("requests", "context", "milliseconds"),
    [(1, 1024, 6.2), (16, 1024, 7.6), (64, 1024, 10.5), (128, 1024, 12.6), (256, 1024, 19.2)],
)
def test_decode_steps_are_those_measured(requests: int, context: int, milliseconds: float) -> None:
    """The table's own totals, which were added up separately."""
    times = PROFILES[NAME].step_times
    assert times.seconds(requests, requests * context, 0, 0) * 1e3 == pytest.approx(milliseconds, abs=0.06)


@pytest.mark.parametrize(("tokens", "milliseconds"), [(2048, 43.2), (4096, 88.9), (8192, 201.6)])
def test_a_prompt_alone_takes_what_was_measured(tokens: int, milliseconds: float) -> None:
    times = PROFILES[NAME].step_times
    assert times.seconds(0, 0, tokens, tokens * tokens) * 1e3 == pytest.approx(milliseconds, rel=0.01)


def small_tables() -> StepTables:
    return StepTables(
        base=[(1, 1.0), (100, 10.0)],
        lm_head=[(1, 0.5), (4, 0.8)],
        decode_attention=[(1, [1.0, 2.0, 4.0]), (4, [3.0, 5.0])],
        prefill_attention=[(16, 0.1), (64, 0.4), (128, 1.0)],
    )


def small(capacity: int = 2000) -> TableStepTimes:
    return TableStepTimes(small_tables(), capacity, max_slots=4, max_model_len=1000)


def test_interpolation_by_hand() -> None:
    times = small()
    base = 1.0 + 9.0 / 99
    attention_1, attention_4 = 1.0 + 64 / 128, 3.0 + 2.0 * 64 / 128
    expected = base + 0.6 + (attention_1 + (attention_4 - attention_1) / 3)
    assert times.seconds(2, 2 * 192, 0, 0) * 1e3 == pytest.approx(expected)
    assert times.seconds(1, 5, 0, 0) * 1e3 == pytest.approx(1.0 + 0.5 + 1.0), (
        "short contexts cost what 128 cost"
    )
    assert times.extrapolated == 0


def test_a_chunk_costs_the_attention_of_its_own_rows() -> None:
    times = small()
    whole = times.seconds(0, 0, 64, 64 * 64)
    rest = times.seconds(0, 0, 64, 64 * 128)
    base = (1.0 + 9.0 * 63 / 99 + 0.5) / 1e3
    assert whole == pytest.approx(base + 0.4e-3)
    assert rest == pytest.approx(base + (0.1 + 1.0 - 0.4) * 1e-3)
    two_prompts = times.seconds(0, 0, 64, 2 * 32 * 32)
    assert two_prompts == pytest.approx(base + (0.1 + 2 * 0.1) * 1e-3)


def test_beyond_the_tables_is_counted_and_beyond_the_capacity_refused() -> None:
    times = small()
    end = times.seconds(4, 4 * 256, 0, 0)
    assert times.extrapolated == 0
    beyond = times.seconds(4, 4 * 384, 0, 0)
    assert times.extrapolated == 1
    assert beyond - end == pytest.approx(2e-3), "the last slope goes on"
    times.seconds(0, 0, 10, 10 * 200)
    assert times.extrapolated == 2
    with pytest.raises(ValueError, match="5 requests with 100 KV tokens"):
        times.seconds(5, 100, 0, 0)
    with pytest.raises(ValueError, match="4004 KV tokens; this profile holds 4 requests of 1000 tokens"):
        times.seconds(4, 4004, 0, 0)
    with pytest.raises(ValueError, match="101 tokens in a step; this profile takes 100"):
        times.seconds(1, 10, 100, 100 * 100)
    with pytest.raises(ValueError, match="a context of 1001 tokens"):
        times.seconds(1, 10, 10, 10 * 1001)


def test_requests_that_share_a_prefix_may_attend_to_more_than_the_capacity() -> None:
    times = small()
    held, shared = times.seconds(4, 2000, 0, 0), times.seconds(4, 4 * 600, 0, 0)
    assert shared - held == pytest.approx((600 - 500) * 2e-3 / 128), "each reads the prefix for itself"
    assert times.extrapolated == 2


def random_step(profile: Profile, rng: random.Random) -> tuple[int, int, int, int]:
    requests = int(profile.max_slots ** rng.random())
    longest = min(profile.max_model_len, profile.kv_capacity_tokens // requests)
    kv_tokens = requests * int(longest ** rng.random())
    if rng.random() < 0.3:
        kv_tokens = profile.kv_capacity_tokens if longest < profile.max_model_len else requests * longest
    if rng.random() < 0.4:
        return requests, kv_tokens, 0, 0
    tokens = min(int(profile.max_step_tokens ** rng.random()), profile.max_step_tokens - requests)
    end = min(profile.max_model_len, int(tokens * 1.1 ** rng.randrange(80)))
    return requests, kv_tokens, tokens, min(tokens, end) * end if rng.random() < 0.7 else tokens * end


@pytest.mark.parametrize("name", PROFILES)
def test_the_envelope_is_nowhere_above_and_close_where_the_kv_is_full(name: str) -> None:
    profile = PROFILES[name]
    rng = random.Random(1)
    times, envelope = profile.step_times, profile.envelope
    for _ in range(4000):
        step = random_step(profile, rng)
        assert envelope.seconds(*step) <= times.seconds(*step) * (1 + 1e-6), step
    requests = min(profile.max_slots, profile.kv_capacity_tokens // 512)
    full = (requests, profile.kv_capacity_tokens, 0, 0)
    assert envelope.seconds(*full) >= 0.75 * times.seconds(*full)


@pytest.mark.parametrize("name", PROFILES)
def test_the_fit_is_near_the_tables(name: str) -> None:
    profile = PROFILES[name]
    rng = random.Random(2)
    errors = []
    for _ in range(1000):
        requests = rng.randint(1, profile.max_slots)
        kv_tokens = min(profile.kv_capacity_tokens, requests * rng.randint(64, 4096))
        tokens = rng.choice([0, 0, rng.randint(1, 1024)])
        step = (requests, kv_tokens, tokens, tokens * rng.randint(max(1, tokens), 4096))
        plant = profile.step_times.seconds(*step)
        errors.append(abs(profile.fit.seconds(*step) / plant - 1))
    assert sum(errors) / len(errors) < 0.15


def test_unknown_names_are_answered_with_what_exists() -> None:
    with pytest.raises(ValueError, match=r"no profile 'h200/x'.*\n(.*\n)*  h100/llama-3.1-8b/tp1/bf16"):
        load_profile("h200/x")


def broken(**changes: object) -> str:
    packaged = ROOT / "chiron_engine/sim/data/profiles" / f"{NAME}.json"
    fields = json.loads(packaged.read_text(encoding="utf-8"))
    fields.update(changes)
    return json.dumps({name: value for name, value in fields.items() if value is not None})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "one JSON object"),
        ("{", "no usable profile"),
        (broken(kind="x"), "kind is 'x'; it must be one of tables, linear"),
        (broken(gpus=None), "lacks 'gpus'"),
        (broken(max_slots=0), "max_slots is 0"),
        (broken(max_slots=513), "max_slots is 513; the tables go from 1 to 512"),
        (broken(name="h100"), "GPU/MODEL/tpN/precision"),
        (broken(base_ms=[[2, 1.0], [1, 1.0]]), "base must hold rows at ascending"),
        (broken(copy_s_per_kv_token=-1), "copy_s_per_kv_token is -1"),
        (broken(base_ms=[[1, 0.0], [8192, 1.0]]), "base holds 0.0 ms; it must be finite and at least 0.001"),
        (broken(lm_head_ms=[[1, math.nan]]), "lm_head holds nan ms"),
        (broken(prefill_attention_ms=[[1, -2.0]]), "prefill_attention holds -2.0 ms"),
        (broken(kind="linear", costs={"base_s": 0.0}, measured={}), "base_s of costs is 0.0"),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidProfile, match=message) as error:
        load_profile(str(path))
    assert str(path) in str(error.value)


def test_each_load_counts_for_itself() -> None:
    first, second = load_profile(NAME), load_profile(NAME)
    first.step_times.seconds(1, 100_000, 0, 0)
    assert (first.step_times.extrapolated, second.step_times.extrapolated) == (1, 0)
