"""What is asked of the server: greedy requests of mixed lengths, some of which share a beginning."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from chiron_engine.rpc.client import sampling
from chiron_engine.rpc.v1 import batch_pb2, inference_pb2, types_pb2

SHORTEST_PROMPT, LONGEST_PROMPT = 4, 160
SHARED_TOKENS = 64
"""Four blocks: what every third request begins with."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request; asked often, its output is the same each time."""

    number: int
    prompt_ids: tuple[int, ...]
    max_tokens: int

    @property
    def seed(self) -> int:
        """Greedy sampling draws nothing; simulated tokens are a function of it."""
        return self.number + 1

    def request(self) -> inference_pb2.GenerateRequest:
        """Of class interactive; a batch makes it one of class batch."""
        return inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=self.prompt_ids),
            sampling=sampling(temperature=0.0, seed=self.seed, max_tokens=self.max_tokens, ignore_eos=True),
            slo=types_pb2.Slo(slo_class=types_pb2.SLO_CLASS_INTERACTIVE),
        )

    def line(self, line_no: int) -> batch_pb2.BatchLine:
        request = self.request()
        request.slo.slo_class = types_pb2.SLO_CLASS_BATCH
        return batch_pb2.BatchLine(custom_id=str(line_no), request=request)


def make_workload(
    count: int, output_tokens: tuple[int, int], text_ids: Sequence[int], chance: random.Random
) -> list[Asked]:
    """output_tokens: the fewest and the most. text_ids: prompts are stretches of it."""
    shared = tuple(text_ids[:SHARED_TOKENS])
    workload = []
    for number in range(count):
        length = chance.randint(SHORTEST_PROMPT, LONGEST_PROMPT)
        start = chance.randrange(len(text_ids) - length)
        prompt = tuple(text_ids[start : start + length])
        if number % 3 == 0:
            prompt = (shared + prompt)[: max(length, SHARED_TOKENS + SHORTEST_PROMPT)]
        workload.append(Asked(number, prompt, chance.randint(*output_tokens)))
    return workload
