"""`chiron generate`: text for prompts, from a model loaded here or from a running server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from chiron_engine.config import EngineConfig

from .engine_options import ENGINE_OPTIONS, engine_config, with_engine_options
from .exits import ExitCode, load_errors, usage_error, usage_errors
from .option_tables import refuse_given, with_options
from .prompts import check_texts, read_prompts
from .request_options import REMOTE_OPTIONS, SAMPLING_OPTIONS, RequestOptions, request_options

NOT_REMOTE = {name: option for name, option in ENGINE_OPTIONS.items() if name not in SAMPLING_OPTIONS}


@with_engine_options
@with_options("remote", REMOTE_OPTIONS, "With --server")
@with_options("sampling", SAMPLING_OPTIONS, "Sampling")
def generate(
    context: typer.Context,
    engine: dict[str, Any],
    sampling: dict[str, Any],
    remote: dict[str, Any],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL] [PROMPTS]...", help="No MODEL with --server.")
    ] = None,
    server: Annotated[
        str | None, Option(metavar="HOST:PORT", help="Ask a running server instead of loading a model.")
    ] = None,
    file: Annotated[Path | None, Option(help="Read prompts from a file, one per line.")] = None,
    chat: Annotated[bool, Option("--chat", help="Apply the model's chat template to each prompt.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON line per prompt.")] = False,
) -> None:
    """Generate text offline with MODEL, or with a running server (--server).

    Prompts come from the command line, a file or standard input. Text goes to standard output,
    progress to standard error.
    """
    words = list(arguments or [])
    request = request_options(sampling, remote)
    check_texts("stop string", request.stop)
    if server is not None:
        refuse_given(context, NOT_REMOTE, "with --server the server decides it")
        _remote(server, read_prompts(words, file), request, chat, as_json)
        return
    refuse_given(context, REMOTE_OPTIONS, "it needs --server")
    if not words:
        raise usage_error("name a model (chiron generate MODEL PROMPT) or a server (--server HOST:PORT)")
    config = engine_config(words.pop(0), {**engine, "local_autoscaler": "fixed"})
    _offline(config, read_prompts(words, file), request, chat, as_json)


def _remote(server: str, prompts: list[str], request: RequestOptions, chat: bool, as_json: bool) -> None:
    import asyncio

    from .generate_remote import RemoteGenerator

    with usage_errors():
        request.sampling_params()  # the server checks again; this names a mistake at once
    failed = asyncio.run(RemoteGenerator(server, request, chat).run(prompts, as_json))
    if failed:
        sys.exit(ExitCode.RUNTIME)


def _offline(
    config: EngineConfig, prompts: list[str], request: RequestOptions, chat: bool, as_json: bool
) -> None:
    from chiron_engine.model.source import resolve_model

    from .console import LoadPhases

    with usage_errors():
        sampling = request.sampling_params()
    phases = LoadPhases()
    with load_errors():
        resolve_model(config.model, phases)  # says what is wrong before torch is imported
        from chiron_engine.serving.llm import LLM

        llm = LLM(config, progress=phases)
    phases.done()
    from .generate_offline import generate_offline

    with llm, usage_errors():
        generate_offline(llm, prompts, sampling, stop=request.stop, chat=chat, as_json=as_json)
