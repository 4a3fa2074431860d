"""Steps an instance can take, all over what it can hold."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from .profile import Profile

Step = tuple[int, float, int, int, float]
"""Decoding requests n, sum of their contexts K, prompt tokens P, prompt context C, seconds."""


@dataclass(frozen=True, slots=True)
class RequestSizes:
    """Extremes of a workload. shortest: least context of a decoding request; longest: most tokens of
    one request, prompt and output. shares_prefixes: whether running requests can hold the same KV, so
    that contexts in a step may add up to more than the KV capacity."""

    shortest: int
    longest: int
    shares_prefixes: bool = False


class StepGrid:
    """Steps at round numbers of requests, contexts and prompt tokens, and at the edges of what is
    possible. Looking at them leaves the plant's count of extrapolations as it was."""

    def __init__(self, profile: Profile, sizes: RequestSizes) -> None:
        self._profile = profile
        self._sizes = sizes
        self._times = profile.step_times

    def steps(self, within_s: float | None = None) -> Iterator[Step]:
        """All of them, or those that take at most `within_s`, with those at the edge of it."""
        extrapolated = self._times.extrapolated
        numbers = _round_numbers(self._profile.max_slots, finer=16)
        for total, end in self._prompts():
            inside = False
            for requests in numbers:
                prompt = max(0, total - requests)
                if (total and not prompt) or not (requests or prompt):
                    continue
                limit, outside = self._limit(requests, prompt, prompt * end, within_s)
                if inside or not outside:
                    yield from self._line(requests, prompt, prompt * end, limit)
                inside = not outside
        self._times.extrapolated = extrapolated

    def _limit(self, requests: int, prompt: int, context: int, within_s: float | None) -> tuple[float, bool]:
        """Seconds that steps may take, and whether even the least KV takes longer. Between the last
        number of requests that can be within the limit and the first that cannot, steps are bounded by
        the quickest of the latter."""
        if within_s is None:
            return math.inf, False
        lengths = self._kv_lengths(requests)
        quickest = self._step(requests, lengths[0], prompt, context)[4] if lengths else math.inf
        return max(within_s, quickest), quickest > within_s

    def _line(self, requests: int, prompt: int, context: int, limit_s: float) -> Iterator[Step]:
        """From the least KV to the most, the rest of the step given."""
        before: Step | None = None
        for kv_tokens in self._kv_lengths(requests):
            step = self._step(requests, kv_tokens, prompt, context)
            if step[4] > limit_s:
                if before is not None:
                    yield self._just_within(before, int(kv_tokens), limit_s)
                return
            yield step
            before = step

    def _just_within(self, step: Step, beyond: int, within_s: float) -> Step:
        """The step with as much KV as still takes at most `within_s`, at which it is counted in full."""
        low, high = int(step[1]), beyond
        while high - low > 1:
            middle = (low + high) // 2
            if self._step(step[0], middle, step[2], step[3])[4] <= within_s:
                low = middle
            else:
                high = middle
        return (step[0], float(high), step[2], step[3], self._step(step[0], high, step[2], step[3])[4])

    def _step(self, requests: int, kv_tokens: float, prompt: int, context: int) -> Step:
        """Beyond the KV capacity, where only shared prefixes lead, with the slope at the capacity."""
        most = self._profile.kv_capacity_tokens
        inside = min(int(kv_tokens), most)
        seconds = self._times.seconds(requests, inside, prompt, context)
        if kv_tokens > most:
            below = most - most // 10
            slope = (seconds - self._times.seconds(requests, below, prompt, context)) / (most - below)
            seconds += slope * (kv_tokens - most)
        return requests, kv_tokens, prompt, context, seconds

    def _kv_lengths(self, requests: int) -> list[float]:
        if not requests:
            return [0.0]
        least = requests * self._sizes.shortest
        most = requests * min(self._sizes.longest, self._profile.max_model_len)
        if not self._sizes.shares_prefixes:
            most = min(most, self._profile.kv_capacity_tokens)
        inner = [requests * 2**power for power in range(17)]
        if least > most:
            return []
        return [float(least), *(float(kv) for kv in inner if least < kv < most), float(most)]

    def _prompts(self) -> Iterator[tuple[int, int]]:
        """Tokens of a step in all, and contexts at the ends of its prompt chunks: chunks with all that
        may come before them, and many short prompts at once."""
        yield 0, 0
        longest = min(self._sizes.longest, self._profile.max_model_len)
        for total in _round_numbers(self._profile.max_step_tokens, finer=0):
            ends = {min(total, longest), longest} | {
                2**power for power in range(4, 17, 2) if 2**power < longest
            }
            yield from ((total, end) for end in sorted(ends) if total)


def _round_numbers(most: int, finer: int) -> list[int]:
    """0, powers of two and what lies halfway between them, up to `most`, and multiples of `finer`."""
    numbers = {0, most}
    for power in range(most.bit_length()):
        numbers |= {2**power, 3 * 2**power // 2}
    if finer:
        numbers |= set(range(finer, most, finer))
    return sorted(number for number in numbers if number <= most)
