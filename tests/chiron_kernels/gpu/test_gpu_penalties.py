"""Biases, bans and penalties by Triton kernels: what torch computes, bit for bit."""

from __future__ import annotations

import pytest
import torch
from chiron_kernels.gpu.penalties import HISTORY_TILE, adjust, penalise
from chiron_kernels.reference.penalties import adjust as reference_adjust
from chiron_kernels.reference.penalties import penalise as reference_penalise
from torch import Tensor

FOR_EVER = 2**63 - 1


def on(device: torch.device, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: each.to(device) for name, each in tensors.items()}


def entries() -> dict[str, Tensor]:
    """Of 299, so that there are two programs; token 5 of row 2 is both moved and banned."""
    generator = torch.Generator().manual_seed(8)
    places = torch.randperm(3 * 200, generator=generator)[:298]
    rows, tokens = places // 200, places % 200
    own = (rows == 2) & (tokens == 5)
    values = torch.randn(298, generator=generator)
    until = torch.where(torch.arange(298) % 3 == 0, 10, FOR_EVER)
    return {
        "positions": torch.tensor([9, 10, 4]),
        "rows": torch.cat((rows[~own], torch.tensor([2, 2]))),
        "tokens": torch.cat((tokens[~own], torch.tensor([5, 5]))),
        "values": torch.cat((values[~own], torch.tensor([3.0, -torch.inf]))),
        "until": torch.cat((until[~own], torch.tensor([FOR_EVER, 5]))),
    }


def test_entries_are_added(device: torch.device) -> None:
    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(7))
    of = entries()
    expected = logits.clone()
    reference_adjust(expected, *of.values())
    assert expected[2, 5] == -torch.inf
    changed = logits.to(device)
    adjust(changed, *on(device, of).values())
    assert torch.equal(changed.cpu(), expected)


def test_entries_outside_do_nothing(device: torch.device) -> None:
    logits = torch.zeros(2, 9, device=device)
    one = torch.tensor([1, 1], device=device)
    for rows, tokens in ((one + 1, one), (one - 2, one), (one, one + 8), (one, one - 2)):
        adjust(logits, one, rows, tokens, torch.ones(2, device=device), one + 5)
    adjust(logits, one, *(each[:0] for each in (one, one, torch.ones(2, device=device), one)))
    assert not logits.any()


def penalties(longest: int, vocab: int) -> dict[str, Tensor]:
    """Of rows 3, 0, 1, 4 in slots 1, 4, 0, 3; tokens are there many times."""
    generator = torch.Generator().manual_seed(longest)
    return {
        "history": torch.randint(vocab, (5, longest), generator=generator, dtype=torch.int32),
        "positions": torch.tensor([longest, longest // 2 + 1, 1, longest, 1]),
        "rows": torch.tensor([3, 0, 1, 4]),
        "slots": torch.tensor([1, 4, 0, 3]),
        "output_from": torch.tensor([0, longest // 3, longest // 2, 1]),
        "repetition": torch.tensor([1.3, 1.0, 0.6, 3.0]),
        "frequency": torch.tensor([0.1, -0.5, 0.0, 0.25]),
        "presence": torch.tensor([0.7, 0.0, -1.5, 2.0]),
    }


@pytest.mark.parametrize(("longest", "vocab"), [(2, 7), (9, 40), (100, 12), (2 * HISTORY_TILE + 5, 300)])
def test_penalties_are_the_reference_s(longest: int, vocab: int, device: torch.device) -> None:
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(vocab)) * 4
    of = penalties(longest, vocab)
    expected = logits.clone()
    reference_penalise(expected, *of.values())
    assert not torch.equal(expected, logits)
    changed = logits.to(device)
    penalise(changed, *on(device, of).values())
    assert torch.equal(changed.cpu(), expected)


def test_a_part_of_the_history(device: torch.device) -> None:
    """As the engine passes it: columns of a wider table. What lies behind may be anything."""
    of = penalties(9, 40)
    wide = torch.full((5, 30), -7, dtype=torch.int32)
    wide[:, :9] = of["history"]
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(3))
    expected = logits.clone()
    reference_penalise(expected, *of.values())
    changed = logits.to(device)
    penalise(changed, wide.to(device)[:, :12], *list(on(device, of).values())[1:])
    assert torch.equal(changed.cpu(), expected)


def test_what_is_out_of_range_does_nothing(device: torch.device) -> None:
    of = penalties(9, 40)
    of["rows"], of["slots"] = torch.tensor([5, -1, 0, 1]), torch.tensor([0, 0, 5, -1])
    logits = torch.ones(5, 40, device=device)
    penalise(logits, *on(device, of).values())
    of = penalties(9, 40)
    of["history"] = torch.where(of["history"] % 2 == 0, 40, -1).int()
    penalise(logits, *on(device, of).values())
    assert bool((logits == 1).all())


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("logits", lambda x: x.half(), "logits is float16; it must be float32"),
        ("logits", lambda x: x[:1].expand(5, -1), "logits has rows 0 apart"),
        ("history", lambda x: x.long(), "history is int64; it must be int32"),
        ("history", lambda x: x.T.contiguous().T, "history has stride 5"),
        ("history", lambda x: x.to("meta"), "history is on meta"),
        ("positions", lambda x: x[1:], r"positions is \[4\]; it must be \[5\]"),
        ("rows", lambda x: x.int(), "rows is int32; it must be int64"),
        ("slots", lambda x: x[:2], r"slots is \[2\]; it must be \[4\]"),
        ("output_from", lambda x: x.to("meta"), "output_from is on meta"),
        ("repetition", lambda x: x.double(), "repetition is float64; it must be float32"),
        ("frequency", lambda x: x.unsqueeze(1), r"frequency is \[4, 1\]; it must be \[4\]"),
        ("presence", lambda x: x.repeat_interleave(2)[::2], "presence has strides"),
    ],
)
def test_bad_penalties_are_named(name: str, change, says: str, device: torch.device) -> None:
    arguments = {"logits": torch.zeros(5, 40, device=device), **on(device, penalties(9, 40))}
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=says):
        penalise(**arguments)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("logits", lambda x: x[0], r"logits is \[200\]; it must be \[any, any\]"),
        ("positions", lambda x: x.int(), "positions is int32; it must be int64"),
        ("rows", lambda x: x[None], "rows is"),
        ("tokens", lambda x: x[1:], r"tokens is \[298\]; it must be \[299\]"),
        ("values", lambda x: x.half(), "values is float16; it must be float32"),
        ("until", lambda x: x.float(), "until is float32; it must be int64"),
    ],
)
def test_bad_entries_are_named(name: str, change, says: str, device: torch.device) -> None:
    arguments = {"logits": torch.zeros(3, 200, device=device), **on(device, entries())}
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=says):
        adjust(**arguments)
