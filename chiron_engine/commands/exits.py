"""How a command ends: exit codes, and the error that carries one."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum


class ExitCode(IntEnum):
    OK = 0
    RUNTIME = 1
    USAGE = 2  # also a port in use
    MODEL = 3  # the model cannot be loaded
    MEMORY = 4
    INTERRUPT = 130


class CommandError(Exception):
    """Ends the command with `code`; `message` is one line for standard error."""

    def __init__(self, message: str, code: ExitCode = ExitCode.RUNTIME) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


def stop_code(number: int | None) -> ExitCode:
    """How a service ends after this signal: Ctrl-C interrupts it, SIGTERM is the way to stop it."""
    return ExitCode.INTERRUPT if number == signal.SIGINT else ExitCode.OK


def usage_error(message: str) -> CommandError:
    return CommandError(message, ExitCode.USAGE)


@contextmanager
def usage_errors() -> Iterator[None]:
    """A ValueError in here is about what the user asked for."""
    try:
        yield
    except ValueError as error:
        raise usage_error(str(error)) from error


@contextmanager
def port_errors() -> Iterator[None]:
    """A port that cannot be had is a usage error; the message names who holds it."""
    from chiron_engine.rpc.port import BindError

    try:
        yield
    except BindError as error:
        raise usage_error(str(error)) from error


@contextmanager
def load_errors() -> Iterator[None]:
    """What goes wrong in here is about loading a model: 3, 4 where memory is short, or 2 for a
    setting that this machine or model cannot have."""
    from chiron_engine.model.errors import ModelError

    try:
        yield
    except ModelError as error:
        raise CommandError(str(error), ExitCode.MODEL) from error
    except ValueError as error:
        code = ExitCode.MODEL if is_about_model_files(error) else ExitCode.USAGE
        raise CommandError(str(error), code) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        message = (str(error).splitlines() or ["out of memory"])[0]
        raise CommandError(message, ExitCode.MEMORY) from error


def is_about_model_files(error: ValueError) -> bool:
    """Whether a tokenizer or chat template is at fault. Does not load what reads them: an engine
    without text is smaller by it."""
    text = sys.modules.get("chiron_engine.gateway.text")
    return text is not None and isinstance(error, text.ModelFilesError)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch says that host or device memory ran out. It raises a plain RuntimeError for
    host memory, so the text decides."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
