"""Cases that the compile gate cannot tell apart, for its tests."""

from __future__ import annotations

from chiron_kernels.gpu.launch import Launch

from scripts.kernel_gate.case import Case


def _launch() -> Launch:
    raise NotImplementedError("the gate stops before it compiles")


def cases() -> list[Case]:
    """The first two may have one name, as no architecture is in both."""
    return [
        Case("norm", _launch, architectures=(80,)),
        Case("norm", _launch, architectures=(90, 100)),
        Case("norm", _launch, architectures=(90,)),
    ]
