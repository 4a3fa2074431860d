"""A short name for how a prompt begins, so that those that begin alike can be sent to one engine."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

PREFIX_TOKENS = 128
"""Requests whose prompts begin with the same tokens, so many, gain from the same engine."""


def prompt_prefix(prompt_ids: Sequence[int]) -> str | None:
    """None for a prompt too short to gain anything."""
    if len(prompt_ids) < PREFIX_TOKENS:
        return None
    return hashlib.blake2b(array("I", prompt_ids[:PREFIX_TOKENS]).tobytes(), digest_size=8).hexdigest()
