"""Keeps the garbage collector from walking over what stays until the process ends."""

from __future__ import annotations

import gc


def freeze_heap() -> None:
    """Leave everything there is now out of later collections: modules, tokenizer and weights stay anyway,
    and walking over them held up steps and streams for tens of milliseconds. For the process that serves
    for the rest of its life, once it is ready; what is frozen is never collected again."""
    gc.collect()
    gc.freeze()
