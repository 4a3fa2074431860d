"""The traces that come with the package. Where they are from: ../data/traces/README.md."""

from __future__ import annotations

from pathlib import Path

from .csv_trace import read_csv_trace, with_blocks
from .mooncake import BLOCK_TOKENS
from .trace import Trace

FOLDER = Path(__file__).resolve().parent.parent / "data" / "traces"

# Name -> file, and the file of its prompt blocks, if it has one.
TRACES: dict[str, tuple[str, str | None]] = {
    "azure-conv": ("azure_conv.csv.gz", None),
    "mooncake-conversation": ("mooncake_conversation.csv.gz", "mooncake_conversation_blocks.csv.gz"),
}
# Lengths without arrivals.
LENGTHS = {"arxiv-summarization": "arxiv_summarization.csv.gz"}


def trace_names() -> list[str]:
    return sorted([*TRACES, *LENGTHS])


def packaged_file(name: str) -> Path:
    return FOLDER / (LENGTHS[name] if name in LENGTHS else TRACES[name][0])


def read_packaged(name: str) -> Trace:
    """A trace with arrivals, as recorded. Raises KeyError for any other name."""
    file, blocks = TRACES[name]
    trace = read_csv_trace(FOLDER / file, name)
    return with_blocks(trace, FOLDER / blocks, BLOCK_TOKENS) if blocks else trace
