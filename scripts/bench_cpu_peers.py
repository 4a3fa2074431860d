#!/usr/bin/env python3
"""Offline throughput on the CPU beside other engines, which take turns with this one in one run.

    PYTHONPATH=.:kernels .venv/bin/python scripts/bench_cpu_peers.py --json out.json

Every engine runs the same model on the same prompts in a process of its own, all requests at once,
greedy, ends of sequence ignored; processes that wait are stopped. Each peer is installed into an
environment of its own under build/ at first use. Prints a table in Markdown; the JSON has every pass,
medians in output tokens/s, and `ratios.PEER.REQUESTS`: how many times the peer's figure ours is.
Exits with 1 where an engine could not be measured; the others are.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from chiron_engine.model.directory import read_json
from chiron_engine.model.source import resolve_model
from scripts.bench_throughput import random_prompts
from scripts.cpu_peers import machine
from scripts.cpu_peers.environments import ROOT
from scripts.cpu_peers.peers import CHIRON, OURS, PEERS, Load, Peer, parse_option
from scripts.cpu_peers.report import medians, ratios, table
from scripts.cpu_peers.turns import WARM_UP_TOKENS, Contestant, measure_load

PASSES = 3
PROMPTS = (
    "random token ids, the same for every engine, others for every pass, so that no prefix cache can help; "
    "prefix caching is off in the peers as well"
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--peers", type=known_peers, default=list(PEERS), help=",".join(PEERS))
    parser.add_argument("--requests", type=counts, default=[1, 8, 32, 64], help="at once: 1,8,32,64")
    parser.add_argument(
        "--passes", type=int, default=PASSES, help="of each engine at each load, after a short one"
    )
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="auto", help="of this engine")
    parser.add_argument("--threads", type=int, help="compute threads of every engine; all cores if not given")
    parser.add_argument("--max-num-batched-tokens", type=int, default=512)
    parser.add_argument(
        "--set",
        dest="options",
        action="append",
        type=option,
        default=[],
        metavar="PEER.NAME=VALUE",
        help="run a peer in another way: " + ", ".join(f"{p}.{n}" for p in PEERS for n in PEERS[p].options),
    )
    parser.add_argument("--json", metavar="FILE", help="- is standard output; the table then goes to stderr")
    arguments = parser.parse_args()
    for name in ("passes", "prompt_tokens", "output_tokens", "threads", "max_num_batched_tokens"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if arguments.json not in (None, "-") and not Path(arguments.json).absolute().parent.is_dir():
        parser.error(f"--json: the folder of {arguments.json!r} does not exist")
    return arguments


def known_peers(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in PEERS:
            raise argparse.ArgumentTypeError(f"no peer {name!r}; there are {', '.join(PEERS)}")
    return names


def counts(text: str) -> list[int]:
    found = [int(word) for word in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError("a load has at least one request")
    return found


def option(text: str) -> tuple[str, str, Any]:
    try:
        return parse_option(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def engines_of(arguments: argparse.Namespace) -> dict[str, tuple[Peer, dict[str, Any]]]:
    """Ours first, then the peers, each with what was set for it."""
    engines: dict[str, tuple[Peer, dict[str, Any]]] = {OURS: (CHIRON, {"dtype": arguments.dtype})}
    for peer in arguments.peers:
        engines[peer] = (PEERS[peer], {name: value for of, name, value in arguments.options if of == peer})
    return engines


def start(name: str, peer: Peer, load: Load, options: dict[str, Any]) -> tuple[Contestant, dict[str, Any]]:
    """An engine that is ready and stopped, or why it is not; and what the report says of it."""
    about: dict[str, Any] = {"title": peer.title, "options": {**peer.options, **options}}
    say(f"starting {name}")
    contestant = Contestant(name, None)
    try:
        settings = peer.settings(load, options)
        worker = contestant.runner = peer.worker(name)
        worker.start(settings)
    except Exception as error:  # of an engine that is not ours, anything may be wrong
        contestant.fail(error)
        return contestant, about
    except BaseException:
        contestant.close()
        raise
    about |= {"versions": worker.versions, "configuration": worker.configuration}
    return contestant, about


def load_of(arguments: argparse.Namespace) -> Load:
    return Load(
        model=arguments.model,
        threads=arguments.threads or len(os.sched_getaffinity(0)),
        max_num_seqs=max(arguments.requests),
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        tokens_per_request=arguments.prompt_tokens + arguments.output_tokens,
    )


def compare(arguments: argparse.Namespace, write: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The report; `write` gets what there is of it after each load."""
    load = load_of(arguments)
    result = heading(arguments, load)
    vocabulary = vocabulary_of(arguments.model)

    def prompts(count: int, seed: int) -> list[list[int]]:
        return random_prompts(count, arguments.prompt_tokens, vocabulary, seed)

    contestants: list[Contestant] = []
    try:
        for name, (peer, options) in engines_of(arguments).items():
            contestant, result["engines"][name] = start(name, peer, load, options)
            contestants.append(contestant)
        for requests in arguments.requests:
            measure_load(contestants, requests, arguments.passes, arguments.output_tokens, prompts, say)
            add_figures(result, contestants)
            write(result)
    finally:
        for contestant in contestants:
            contestant.close()
    return result


def vocabulary_of(model: str) -> int:
    size: int = read_json(resolve_model(model) / "config.json")["vocab_size"]
    return size


def heading(arguments: argparse.Namespace, load: Load) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "commit": commit(),
        "machine": machine.describe(),
        "model": arguments.model,
        "threads": load.threads,
        "prompt_tokens": arguments.prompt_tokens,
        "output_tokens": arguments.output_tokens,
        "warm_up_tokens": WARM_UP_TOKENS,
        "passes": arguments.passes,
        "prompts": PROMPTS,
        "engines": {},
        "ratios": {},
        "errors": {},
    }


def commit() -> str | None:
    """The checkout's, with `+` where files differ from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True
    )
    return described.stdout.strip() or None


def add_figures(result: dict[str, Any], contestants: Iterable[Contestant]) -> None:
    """Passes, medians, ratios and errors so far."""
    rates: dict[str, dict[int, float]] = {}
    for contestant in contestants:
        name = contestant.name
        rates[name] = medians(contestant.rates())
        result["engines"][name]["output_tokens_per_s"] = rates[name]
        result["engines"][name]["passes"] = contestant.passes
        if contestant.error is not None:
            result["errors"][name] = contestant.error
    result["ratios"] = ratios(rates.pop(OURS), rates)


def table_of(result: dict[str, Any], loads: list[int]) -> str:
    engines = result["engines"]
    titles = {name: heading_of(name, about) for name, about in engines.items()}
    rates = {name: about["output_tokens_per_s"] for name, about in engines.items()}
    return table(titles, rates, OURS, loads)


def heading_of(name: str, about: dict[str, Any]) -> str:
    """An engine's title, version and number format."""
    versions = about.get("versions", {})
    version = next(iter(versions.values()), "") if name != OURS else ""
    kind = about["options"].get("dtype") or about["options"].get("weights")
    return " ".join(filter(None, [about["title"], version, f"({kind})"]))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def write_json(result: dict[str, Any], target: str | None) -> None:
    if target is None:
        return
    text = json.dumps(result, indent=2) + "\n"
    if target == "-":
        sys.stdout.write(text)
    else:
        Path(target).write_text(text, encoding="utf-8")


def main() -> int:
    arguments = parse_arguments()
    # So that the engines are ended; stopped ones would stay.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    to_file = arguments.json not in (None, "-")
    write = partial(write_json, target=arguments.json if to_file else None)
    result = compare(arguments, write)
    write_json(result, arguments.json)
    print(table_of(result, arguments.requests), file=sys.stderr if arguments.json == "-" else sys.stdout)
    for name, error in result["errors"].items():
        say(f"{name} failed: {error}")
    return 1 if result["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
