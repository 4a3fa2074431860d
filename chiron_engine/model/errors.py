"""Why a model cannot be served."""

from __future__ import annotations


class ModelError(Exception):
    """A model cannot be found, read or run. The message is one line: the cause, then the remedy."""


class UncheckedModel(ModelError):
    """A model class raised something of its own while it was checked: neither right nor wrong."""
