"""Requests of every kind that an engine may be asked for, through its core: short and long prompts, alone and
in batches up to the largest, with every parameter, beginning alike or not, preempted and resumed."""

from __future__ import annotations

import random
from typing import Any

from chiron_engine.core.engine_core import EngineCore
from chiron_engine.core.requests import build_request
from chiron_engine.policy.iteration.request import Slo, SloClass
from chiron_engine.policy.iteration.sampling_params import SamplingParams

CHOICES: dict[str, list[Any]] = {
    "temperature": [0.0, 0.0, 0.7, 1.3],
    "top_k": [0, 0, 1, 40],
    "top_p": [1.0, 1.0, 0.9],
    "min_p": [0.0, 0.05],
    "repetition_penalty": [1.0, 1.0, 1.2],
    "presence_penalty": [0.0, 0.0, 0.5],
    "frequency_penalty": [0.0, 0.0, 0.5],
    "logit_bias": [{}, {}, {3: 1.0}, {1: -1.0, 2: 2.0}],
    "min_tokens": [0, 0, 2],
    "logprobs": [None, None, 0, 1, 5],
    "prompt_logprobs": [None, None, 0, 2],
}
MOST_OUTPUTS = 20
PLAIN = SamplingParams(temperature=0.0, max_tokens=1)


class ServingMix:
    """seed: of all that is drawn."""

    def __init__(self, core: EngineCore, seed: int) -> None:
        self._core, self._random, self._number = core, random.Random(seed), 0

    def run(self, rounds: int) -> None:
        """Every length of prompt up to a step's tokens alone, the longest ones, then `rounds` of batches of
        random sizes."""
        shape = self._core.shape
        longest = shape.max_model_len - 1
        for length in sorted({*range(1, 70), *range(70, shape.max_step_tokens, 41), longest}):
            if length <= longest:
                self._add(length, PLAIN)
                self._finish()
        for _ in range(rounds):
            for _ in range(self._random.choice([1, 2, 3, 7, shape.max_slots // 2, shape.max_slots])):
                length = self._length()
                self._add(length, self._parameters(length))
            self._serve()
        self._finish()

    def _length(self) -> int:
        room = max(self._core.shape.max_model_len - MOST_OUTPUTS, 1)
        return self._random.randint(1, min(room, self._random.choice([8, 60, 60, 300, room])))

    def _parameters(self, length: int) -> SamplingParams:
        room = min(MOST_OUTPUTS, self._core.shape.max_model_len - length)
        if self._random.random() < 0.3:
            return SamplingParams(temperature=self._random.choice([0.0, 1.0]), max_tokens=min(4, room))
        drawn = {name: self._random.choice(values) for name, values in CHOICES.items()}
        drawn["min_tokens"] = min(drawn["min_tokens"], room)
        return SamplingParams(max_tokens=self._random.randint(max(drawn["min_tokens"], 1), room), **drawn)

    def _add(self, length: int, sampling: SamplingParams) -> None:
        self._number += 1
        shape = self._core.shape
        tokens = [self._random.randrange(shape.vocab_size) for _ in range(length)]
        if self._random.random() < 0.5:
            alike = self._random.randrange(length)
            tokens[:alike] = [number % shape.vocab_size for number in range(alike)]
        self._core.add(
            build_request(
                self._number,
                tokens,
                sampling,
                shape=shape,
                eos_token_ids=(5,),
                draw_seed=lambda: 7,
                arrival=0.0,
                slo=Slo(self._random.choice([SloClass.BATCH, SloClass.INTERACTIVE])),
            )
        )

    def _serve(self) -> None:
        """Some steps under limits that change: fewer requests at a time, and shorter chunks."""
        shape = self._core.shape
        for _ in range(self._random.randint(1, 12)):
            if not self._core.has_work:
                return
            if self._random.random() < 0.2:
                running = self._random.randint(1, shape.max_slots)
                budget = self._random.randint(running, shape.max_step_tokens)
                self._core.set_limits(running, budget, self._random.choice(["drain", "preempt"]))
            self._core.step()
        self._core.set_limits(shape.max_slots, shape.max_step_tokens)

    def _finish(self) -> None:
        while self._core.has_work:
            self._core.step()
