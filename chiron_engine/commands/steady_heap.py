"""Keeps the garbage collector from walking over what stays until the process ends. For a process that serves
for the rest of its life: what is frozen is never collected again."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


def freeze_heap() -> None:
    """Leave everything there is now out of later collections: modules, tokenizer and weights stay anyway,
    and walking over them held up steps and streams for tens of milliseconds. Once it is ready."""
    gc.collect()
    gc.freeze()


@contextmanager
def loading_heap() -> Iterator[None]:
    """Around what loads: nothing is collected while it grows, and what is there then is frozen as it is.
    Hardly any of it is garbage, and walking over torch's modules again and again took 0.2 s of a start."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
