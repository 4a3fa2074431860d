"""Where the prompts of `chiron generate` come from."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from .exits import usage_error


def read_prompts(words: list[str], file: Path | None) -> list[str]:
    """Prompts from the command line, or from a file, or from standard input: one per line, empty
    lines left out. Raises CommandError (usage)."""
    if words and file:
        raise usage_error("give prompts on the command line or in --file, not both")
    prompts = words or [line for line in _read_lines(file) if line.strip()]
    if not prompts:
        raise usage_error("no prompt: give one on the command line, in --file, or on standard input")
    check_texts("prompt", prompts)
    return prompts


def check_texts(what: str, texts: Iterable[str]) -> None:
    """Raises CommandError (usage) where bytes on the command line were no UTF-8: these come in as
    lone surrogates."""
    for number, text in enumerate(texts, 1):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise usage_error(
                f"{what} {number} is no valid text: {error.reason} at character {error.start}"
            ) from None


def _read_lines(file: Path | None) -> list[str]:
    try:
        if file is not None:
            return file.read_text(encoding="utf-8").splitlines()
        return [] if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise usage_error(f"cannot read {file or 'standard input'}: {error}") from error
