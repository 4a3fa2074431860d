"""The run: undisturbed, with engines killed, with the coordinator killed, and its replay."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chiron_engine.commands.simulated_engine import VOCABULARY_WITHOUT_TOKENIZER as VOCABULARY
from chiron_engine.core.simulated_tokens import SimulatedTokens

from .checks import Checks
from .kills import Kill, kill_coordinator, kill_engines
from .server import ENGINES, Server
from .traffic import Batches, Stream, Traffic, ask
from .workload import Asked, make_workload

if TYPE_CHECKING:
    from .judge import LogitJudge

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
TEXT_TOKENS = 4000
OUTPUT_TOKENS = {"torch": (16, 48), "simulated": (40, 120)}
"""The fewest and the most: a second or two of a stream, so that none loses three engines in a row."""
BATCH_END_S = 600.0


async def run(options: Namespace, folder: Path) -> dict[str, Any]:
    """What was seen. Raises RuntimeError, TimeoutError and AioRpcError where it cannot go on."""
    return await Chaos(options, folder).run()


class Chaos:
    """Made and run on one event loop."""

    def __init__(self, options: Namespace, folder: Path) -> None:
        self._options = options
        self._chance = random.Random(options.seed)
        self._server = Server(server_arguments(options), folder)
        self._workload: list[Asked] = []
        self._checks = Checks([])
        self._judge: LogitJudge | None = None
        self._began = time.monotonic()

    async def run(self) -> dict[str, Any]:
        try:
            await self._server.start()
            await self._server.wait_engines(_are_all_there)
            return await self._run()
        finally:
            await self._server.close()

    async def _run(self) -> dict[str, Any]:
        self._note("undisturbed")
        self._workload = make_workload(
            self._options.requests,
            OUTPUT_TOKENS[self._options.executor],
            await self._text_ids(),
            self._chance,
        )
        phases = {"undisturbed": await self._undisturbed()}
        self._note("killing engines")
        phases["engines killed"] = await self._engines_killed()
        self._note("killing the coordinator")
        phases["coordinator killed"] = await self._coordinator_killed()
        self._note("stopping")
        await self._stop()
        self._note("replaying")
        replay = await asyncio.to_thread(self._server.replay)
        if replay["code"] != 0:
            self._checks.found("replay", "chiron replay", f"code {replay['code']} {replay['errors']}")
        self._checks.finish()
        return self._summary(phases, replay)

    async def _undisturbed(self) -> dict[str, Any]:
        """Every request once, and as a batch: what to expect from now on."""
        streams = await asyncio.gather(*(ask(self._server, asked) for asked in self._workload))
        if self._options.executor == "simulated":
            tokens = SimulatedTokens(VOCABULARY, VOCABULARY - 1, 1)
            self._checks = Checks(
                [tokens.output(asked.prompt_ids, asked.seed, asked.max_tokens) for asked in self._workload]
            )
        else:
            self._checks = await self._judged([stream.tokens for stream in streams])
        self._checks.streams("undisturbed", streams)
        batches = Batches(self._server, self._workload, len(self._workload), "undisturbed")
        await batches.submit()
        lines = await self._check_batches("undisturbed", batches)
        return {"kills": [], "streams": _counted(streams), "batch_lines": lines}

    async def _judged(self, outputs: list[list[int]]) -> Checks:
        """The outputs are to be expected where the judge, too, finds them."""
        from chiron_engine.model.source import resolve_model

        from .judge import TIE, LogitJudge

        directory = resolve_model(self._options.model, None)
        self._judge = judge = await asyncio.to_thread(LogitJudge, directory)
        checks = Checks(outputs, partial(judge.ties, outputs))
        for asked, tokens in zip(self._workload, outputs, strict=True):
            if len(tokens) != asked.max_tokens:
                checks.found("lost", f"undisturbed, request {asked.number}", f"{len(tokens)} tokens")
            elif max(judge.shortfalls(asked, tokens)) > TIE:
                checks.found(
                    "differs", f"undisturbed, request {asked.number}", "the judge finds other tokens"
                )
        return checks

    async def _engines_killed(self) -> dict[str, Any]:
        options, server = self._options, self._server
        batches = Batches(server, self._workload, options.lines, "engines")
        await batches.submit()
        traffic = Traffic(server, self._workload, options.streams, self._chance)
        kills = await kill_engines(server, options.kills, options.kill_within, self._chance)
        return await self._phase("engines killed", kills, traffic, batches)

    async def _coordinator_killed(self) -> dict[str, Any]:
        options, server = self._options, self._server
        before = {engine.pid for engine in await server.wait_engines(_are_all_there)}
        batches = Batches(server, self._workload, options.lines, "coordinator")
        await batches.submit()
        traffic = Traffic(server, self._workload, options.streams, self._chance)
        kills = await kill_coordinator(server, batches, options.kills, options.kill_within, self._chance)
        after = {engine.pid for engine in await server.wait_engines(_are_all_there)}
        if before != after:
            self._checks.found("lost", "engines", f"processes {sorted(before - after)} were not taken over")
        return await self._phase("coordinator killed", kills, traffic, batches)

    async def _phase(
        self, name: str, kills: Sequence[Kill], traffic: Traffic, batches: Batches
    ) -> dict[str, Any]:
        """What came of it, checked, once the last kill is over."""
        streams = await traffic.stop()
        self._checks.streams(name, streams)
        lines = await self._check_batches(name, batches)
        return {
            "kills": [asdict(kill) for kill in kills],
            "streams": _counted(streams),
            "batch_lines": lines,
        }

    async def _check_batches(self, phase: str, batches: Batches) -> int:
        lines = 0
        for batch in batches.batches:
            self._checks.batch(phase, batch, await batches.results(batch, BATCH_END_S))
            lines += len(batch.lines)
        return lines

    async def _stop(self) -> None:
        code = await self._server.stop()
        if code != 0:
            self._checks.found("failed", "server", f"it ended with code {code} after SIGTERM")
        if left := self._server.engines_left():
            self._checks.found("failed", "engines", f"processes {left} outlive the server's orderly end")

    async def _text_ids(self) -> Sequence[int]:
        if self._options.executor == "simulated":
            return [self._chance.randrange(VOCABULARY - 1) for _ in range(TEXT_TOKENS)]
        text = "".join(path.read_text() for path in sorted(DOCS.glob("*.md")))
        return (await self._server.inference.tokenize(text))[:TEXT_TOKENS]

    def _summary(self, phases: dict[str, Any], replay: dict[str, Any]) -> dict[str, Any]:
        options, checks = self._options, self._checks
        differing = [told["file"] for told in replay["files"] if told["difference"]]
        return {
            "model": options.model,
            "executor": options.executor,
            "precision": options.profile if options.executor == "simulated" else options.dtype,
            "seed": options.seed,
            "phases": phases,
            "positions": checks.positions,
            "ties": checks.ties,
            "outputs_with_ties": checks.outputs_with_ties,
            "widest_shortfall": None if self._judge is None else self._judge.widest,
            "violations": dict(Counter(kind for kind, _ in checks.violations)),
            "violations_told": [f"{kind}: {told}" for kind, told in checks.violations],
            "replayed_files": len(replay["files"]),
            "replayed_sections": sum(len(told["sections"]) for told in replay["files"]),
            "differing_files": differing,
            "seconds": time.monotonic() - self._began,
        }

    def _note(self, what: str) -> None:
        print(f"{time.monotonic() - self._began:6.1f} s  {what}", file=sys.stderr, flush=True)


def server_arguments(options: Namespace) -> list[str]:
    """One engine has not enough places for all streams, which also evict batch lines."""
    places = max(2, options.streams * 2 // 3)
    common = [options.model, "--max-num-seqs", str(places), "--executor", options.executor]
    if options.executor == "simulated":
        return [*common, "--profile", options.profile, "--time-scale", str(options.time_scale)]
    small = ["--kv-cache-memory", "256MiB", "--swap-space", "64MiB", "--threads", "1", "--itl-slo", "300ms"]
    return [*common, "--dtype", options.dtype, *small]


def _are_all_there(engines: Sequence[object]) -> bool:
    return len(engines) == ENGINES


def _counted(streams: Sequence[Stream]) -> dict[str, int]:
    return {
        "whole": sum(stream.finished for stream in streams),
        "cut": sum(stream.cut and not stream.finished for stream in streams),
        "tokens": sum(len(stream.tokens) for stream in streams),
    }
