"""The model's own chat template, rendered in a sandbox with a limit on time and output.

Templates come from the model's directory only, never from a request. The environment follows what
templates on the Hugging Face Hub are written for: trimmed blocks, loop controls, `tojson` without
HTML escapes, `raise_exception`, `strftime_now` and the `generation` block.
"""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_RENDER_S = 1.0
MAX_OUTPUT_CHARS = 32 << 20
MAX_REPEATED_CHARS = 1 << 20


class TemplateFailure(ValueError):
    """The chat template does not compile, refuses the messages, or goes over its limits."""


class ChatTemplate:
    def __init__(self, source: str) -> None:
        """Raises TemplateFailure for a template that does not compile."""
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise TemplateFailure(f"the model's chat template does not compile: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        special_tokens: Mapping[str, str],
        *,
        max_seconds: float = MAX_RENDER_S,
    ) -> str:
        """The prompt for these messages, ending where the assistant is to speak. Blocks the caller
        for `max_seconds` at most. Raises TemplateFailure."""
        variables = {
            **special_tokens,
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
        }
        return _Rendering(self._template, variables).run(max_seconds)


class _RenderTimeout(BaseException):
    """Raised inside the rendering thread by the one that waits for it."""


class _Rendering:
    """One rendering in a thread of its own, which is the only kind that can be cut off."""

    def __init__(self, template: jinja2.Template, variables: Mapping[str, Any]) -> None:
        self._template = template
        self._variables = variables
        self._result: str | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._render, name="chat-template", daemon=True)

    def run(self, max_seconds: float) -> str:
        self._thread.start()
        self._thread.join(max_seconds)
        if self._thread.is_alive():
            self._interrupt()
            raise TemplateFailure(f"the chat template took over {max_seconds:g} s for these messages")
        if self._error is not None:
            raise _failure(self._error)
        assert self._result is not None
        return self._result

    def _render(self) -> None:
        try:
            pieces, size = [], 0
            for piece in self._template.generate(**self._variables):
                size += len(piece)
                if size > MAX_OUTPUT_CHARS:
                    raise TemplateFailure(f"the chat template made over {MAX_OUTPUT_CHARS} characters")
                pieces.append(piece)
            self._result = "".join(pieces)
        except Exception as error:
            self._error = error
        except _RenderTimeout:
            pass

    def _interrupt(self) -> None:
        """Takes effect at the thread's next bytecode, so also in loops that print nothing."""
        identity = ctypes.c_ulong(self._thread.ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(identity, ctypes.py_object(_RenderTimeout))


def _failure(error: Exception) -> TemplateFailure:
    if isinstance(error, TemplateFailure):
        return error
    if isinstance(error, jinja2.TemplateError):  # raise_exception and sandbox violations too
        return TemplateFailure(f"the chat template refused the messages: {error.message}")
    return TemplateFailure("the chat template failed on these messages")


class _Sandbox(ImmutableSandboxedEnvironment):
    """Also refuses to repeat a string or list millions of times, which no time limit interrupts."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise jinja2.exceptions.SecurityError("powers are not allowed in chat templates")
        for repeated, times in ((left, right), (right, left)):
            size = len(repeated) if hasattr(repeated, "__len__") else 0
            if isinstance(times, int) and size * times > MAX_REPEATED_CHARS:
                raise jinja2.exceptions.SecurityError("a repetition in the chat template is too long")
        return super().call_binop(context, operator, left, right)


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is just text."""

    tags = {"generation"}  # noqa: RUF012 - the name and type jinja2 asks for

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
