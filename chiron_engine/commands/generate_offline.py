"""Prompts answered by a model loaded into this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from chiron_engine.policy.iteration.sampling_params import SamplingParams
from chiron_engine.serving.llm import LLM


def generate_offline(
    llm: LLM, prompts: list[str], sampling: SamplingParams, *, stop: Sequence[str], chat: bool, as_json: bool
) -> None:
    """All prompts in one batch; outputs in the order of the prompts. Raises ValueError for a prompt
    the model cannot take."""
    progress = sys.stderr.isatty()
    if chat:
        conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
        outputs = llm.chat(conversations, sampling, stop=stop, progress=progress)
    else:
        outputs = llm.generate(prompts, sampling, stop=stop, progress=progress)
    for output in outputs:
        print(json.dumps(asdict(output), ensure_ascii=False) if as_json else output.text, flush=True)
