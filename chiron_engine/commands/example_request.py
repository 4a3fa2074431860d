"""The request that a server prints when it is ready: a line to copy."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chiron_engine.gateway.text import ModelText


def example_request(address: str, text: ModelText) -> str:
    """A command line that works when pasted where this process was started; without a tokenizer, in the
    root of a checkout."""
    if not text.has_tokenizer:
        return (
            "grpcurl -plaintext -import-path proto -proto chiron/v1/inference.proto "
            f"""-d '{{"token_ids": {{"ids": [1, 2, 3]}}}}' {address} chiron.v1.Inference/Generate"""
        )
    chat = text.has_chat_template
    words = [*_chiron(), "generate", "--server", address, "--temperature", "0"]
    words += (
        ["--chat", "What is the capital of Japan?"] if chat else ["--max-tokens", "32", "Once upon a time"]
    )
    return " ".join(shlex.quote(word) if " " not in word else f'"{word}"' for word in words)


def _chiron() -> list[str]:
    """How to call this program: by name if the shell finds this very one, else by its path."""
    own = Path(sys.executable).parent / "chiron"
    found = shutil.which("chiron")
    if found is not None and Path(found).resolve() == own.resolve():
        return ["chiron"]
    if own.exists():
        return [_short(own)]
    return [_short(Path(sys.executable)), "-m", "chiron_engine"]


def _short(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
