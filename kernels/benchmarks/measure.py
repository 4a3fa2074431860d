"""Running cases: timed on a GPU, or tried in a tiny shape where there is none."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch

from benchmarks.attention import AttentionCase
from benchmarks.case import Case, Prepared
from benchmarks.peers import Peer, Unsupported, is_installed
from benchmarks.results import CaseResult, PeerResult
from benchmarks.timing import Ceilings, copies_for, time_calls

TRIAL_COPIES = 2


class WrongResult(Exception):
    """A kernel is not timed if it is wrong."""


def missing_kernels(case: Case) -> list[str]:
    return [name for name in case.kernels if importlib.util.find_spec(f"chiron_kernels.gpu.{name}") is None]


def missing_floats(case: Case, device: torch.device) -> str:
    """The type that the case is over and the GPU does not have; empty if there is none."""
    if device.type != "cuda" or not isinstance(case, AttentionCase):
        return ""
    has_8_bits = torch.cuda.get_device_capability(device) >= (8, 9)
    return "" if has_8_bits or case.kv_dtype != torch.float8_e4m3fn else "float8_e4m3fn"


def measure(case: Case, device: torch.device, ceilings: Ceilings, peers: Sequence[Peer]) -> CaseResult:
    """Raises WrongResult, and whatever a kernel raises."""
    work = case.work()
    prepared = case.prepare(device, copies_for(work.bytes, device))
    error = checked(prepared)
    timing = time_calls(prepared.calls)
    compared = measure_alternatives(prepared)
    if prepared.peers is not None:
        compared += [measure_peer(peer, prepared) for peer in peers]
    return CaseResult(case, work, timing, error, ceilings, compared)


def try_out(case: Case, device: torch.device) -> float:
    """Every call of the case in a tiny shape; the largest relative error. Raises as `measure` does."""
    prepared = case.tiny().prepare(device, TRIAL_COPIES)
    tried = [prepared, *alternatives(prepared).values()]
    return max(checked(each, number) for each in tried for number in range(len(each.calls)))


def alternatives(prepared: Prepared) -> dict[str, Prepared]:
    """Each to be held to the same limit."""
    return {
        name: Prepared(calls, prepared.error, prepared.limit) for name, calls in prepared.alternatives.items()
    }


def measure_alternatives(prepared: Prepared) -> list[PeerResult]:
    """They are ours: one that is wrong is an error, as the case itself would be."""
    found = []
    for name, each in alternatives(prepared).items():
        checked(each)
        found.append(PeerResult(name, time_calls(each.calls).median))
    return found


def checked(prepared: Prepared, number: int = 0) -> float:
    """The error of a call's result."""
    error = prepared.error(number, prepared.calls[number]())
    if not error <= prepared.limit:
        raise WrongResult(f"relative error {error:.1e}, limit {prepared.limit:.1e}")
    return error


def measure_peer(peer: Peer, prepared: Prepared) -> PeerResult:
    """Whatever a peer raises is why it has no time: ours does not depend on it."""
    inputs = prepared.peers
    assert inputs is not None
    if not is_installed(peer):
        return PeerResult(peer.NAME, reason=f"{peer.PACKAGE} is not installed")
    try:
        calls = peer.prepare(inputs)
        checked(Prepared(calls, inputs.error, prepared.limit))
        return PeerResult(peer.NAME, time_calls(calls).median)
    except Unsupported as limit:
        return PeerResult(peer.NAME, reason=f"does not do {limit}")
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return PeerResult(peer.NAME, reason=f"{type(error).__name__}: {lines[0][:200]}")
