"""Prompt and output lengths of generated requests."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .checks import MAX_TOKENS, TraceError
from .columns import Ints, outputs_of, prompts_of
from .csv_trace import read_csv_lengths
from .mooncake import read_mooncake
from .packaged import LENGTHS, TRACES, packaged_file, trace_names

_CONSTANT = re.compile(r"(\d+)/(\d+)")


@dataclass(frozen=True, slots=True)
class Lengths:
    """Pairs to draw from, each as likely as any other. name: what they are called in a spec."""

    name: str
    prompt_tokens: Ints
    output_tokens: Ints

    def draw(self, count: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
        """`count` pairs with replacement; a request keeps its prompt and output together."""
        if len(self.prompt_tokens) == 1:
            return np.repeat(self.prompt_tokens, count), np.repeat(self.output_tokens, count)
        rows = rng.integers(0, len(self.prompt_tokens), count)
        return self.prompt_tokens[rows], self.output_tokens[rows]


def load_lengths(spec: str) -> Lengths:
    """`512/128` (every prompt 512 tokens, every output 128), a packaged name, or a file with columns of
    lengths (CSV, or JSON lines as Mooncake's). Raises TraceError; an unknown name lists what exists."""
    constant = _CONSTANT.fullmatch(spec)
    if constant:
        return _constant(spec, int(constant[1]), int(constant[2]))
    if spec in TRACES or spec in LENGTHS:
        return Lengths(spec, *read_csv_lengths(packaged_file(spec)))
    path = Path(spec)
    if not path.is_file():
        raise TraceError(
            f"unknown lengths {spec!r}; there are {', '.join(trace_names())},"
            " PROMPT/OUTPUT as in 512/128, or the path of a file"
        )
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        trace = read_mooncake(path)
        return Lengths(spec, prompts_of(trace), outputs_of(trace))
    return Lengths(spec, *read_csv_lengths(path))


def _constant(spec: str, prompt: int, output: int) -> Lengths:
    if not (0 < prompt <= MAX_TOKENS and 0 < output <= MAX_TOKENS):
        raise TraceError(f"lengths {spec}: both prompt and output must be from 1 to {MAX_TOKENS} tokens")
    return Lengths(spec, np.array([prompt]), np.array([output]))
