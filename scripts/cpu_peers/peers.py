"""The engines that are compared: where each is installed, and in what it is run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chiron_engine.model.smollm2 import smollm2_gguf
from chiron_engine.model.source import is_gguf_file, resolve_model
from scripts.cpu_peers import environments
from scripts.cpu_peers.environments import BUILD, Environment
from scripts.cpu_peers.worker import Worker, this_python

OURS = "chiron"
EXPORTS = BUILD / "peer-models"


@dataclass(frozen=True, slots=True)
class Load:
    """What every engine is told. model: as this engine takes it. threads: compute threads.
    max_num_seqs: the most requests at once. tokens_per_request: of prompt and output, at most."""

    model: str
    threads: int
    max_num_seqs: int
    max_num_batched_tokens: int
    tokens_per_request: int


@dataclass(frozen=True, slots=True)
class Peer:
    """environment: None is this program's own. options: what `--set PEER.NAME=VALUE` may change."""

    title: str
    environment: Environment | None
    module: str
    options: Mapping[str, Any] = field(default_factory=dict)
    needs_gguf: bool = False

    def worker(self, name: str) -> Worker:
        """Its process, its environment installed now if need be. Raises InstallError."""
        ours = self.environment is None
        python = this_python() if self.environment is None else self.environment.ensure()
        return Worker.of_module(name, python, self.module, ours=ours)

    def settings(self, load: Load, options: Mapping[str, Any]) -> dict[str, Any]:
        """Raises ModelError where there is no such model, ValueError where this engine cannot take it."""
        settings: dict[str, Any] = {
            "model": str(resolve_model(load.model)),
            "threads": load.threads,
            "max_num_seqs": load.max_num_seqs,
            "max_num_batched_tokens": load.max_num_batched_tokens,
            "tokens_per_request": load.tokens_per_request,
            "exports": str(EXPORTS),
        }
        if self.needs_gguf:
            settings["gguf"] = str(gguf_file(load.model))
        return {**settings, **self.options, **options}


CHIRON = Peer("this engine", None, "chiron_worker", {"dtype": "auto"})
PEERS = {
    "openvino": Peer(
        "OpenVINO GenAI",
        environments.OPENVINO,
        "openvino_worker",
        {"weights": "int8", "cache_gib": 2, "properties": {}},
    ),
    "vllm": Peer("vLLM", environments.VLLM, "vllm_worker", {"dtype": "bfloat16"}),
    "llamacpp": Peer(
        "llama.cpp",
        environments.LLAMACPP,
        "llamacpp_worker",
        {"weights": "as-is", "flash_attention": "auto", "unified_kv": False},
        needs_gguf=True,
    ),
}


def gguf_file(model: str) -> Path:
    """Raises ValueError where the model is not made from a GGUF file."""
    found = smollm2_gguf() if model == "smollm2" else Path(model).expanduser()
    if found is None or not is_gguf_file(str(found)):
        raise ValueError(f"llama.cpp takes a GGUF file, and {model} is not made from one that is here")
    return found


def parse_option(text: str) -> tuple[str, str, Any]:
    """`PEER.NAME=VALUE`, the value as JSON where it is that. Raises ValueError for what is not known."""
    place, equals, value = text.partition("=")
    peer, _, name = place.partition(".")
    if not equals or peer not in PEERS:
        raise ValueError(f"{text!r} is not PEER.NAME=VALUE with a peer of {', '.join(PEERS)}")
    known = (*PEERS[peer].options, "max_num_batched_tokens")
    if name not in known:
        raise ValueError(f"{peer} has no option {name!r}; it has {', '.join(known)}")
    try:
        return peer, name, json.loads(value)
    except json.JSONDecodeError:
        return peer, name, value
