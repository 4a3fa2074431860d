"""Limits from a model of the step, with the tail of its error held below an ITL target.

A step may take A = (1 - m) S trim / rho99 by the model: S is the ITL target, rho99 the
measured 99th percentile of time over model, m a margin that shrinks as samples arrive. `trim` closes
the loop: rho99 pools the errors of all steps, and those of the steps that fill A may be smaller or
larger, so it follows the share of tokens that were late in fact, never to where A > (1 - m) S.

Two things are drawn from A. `max_running` is the largest n that, at the KV length requests have and
are growing to, leaves room for the prompt tokens that TTFT slack asks for. The token budget is what
fills the step to A with the n decoding now, so that a step is never longer than it may be and, while
prompts wait, never shorter. What the KV cache holds is the scheduler's to predict, request by request.
"""

from __future__ import annotations

from .autoscaler_inputs import EngineCapacity
from .limits import Limits, Shrink
from .step_costs import StepCosts
from .step_model import StepModel
from .step_stats import StepStats
from .step_tail import TRUSTED, StepTail

WINDOW_STEPS = 16
"""Steps between looks at the limits, unless a step shows them to be off."""
DEAD_BAND = 0.03
OVERRUN_BAND = 0.01
"""Share of the allowance by which a full step may exceed it before the token budget is lowered."""
RUNNING_GROWTH = 2.0
PROMPT_GROWTH = 1.5
"""Beyond what was tried the model is a guess: limits grow to so many times themselves in a window."""
LARGEST_MARGIN = 0.05
SMALLEST_MARGIN = 0.001

LATE_SHARE = 0.0005
"""Share of tokens beyond the target that trim settles at. The SLO allows 1 % of each request's gaps,
so one of the first hundred: were 1 % of all tokens late, a quarter of such requests would have two."""
TRIM_GAIN = 0.25
"""Change of trim in a window for a share of late tokens of 1."""
MOST_TRIMMED = 0.01
"""Largest fall of trim in a window: late steps come in bursts, one after another."""
LEAST_TRIM = 0.8
HOPELESS_ALLOWANCE = 2.0
"""Of a step with one request, what steps may take where even that misses the target: to serve one at
a time would keep no promise either, and let the queue grow without bound."""
WELL_ON_TIME = 0.9
"""Share of the target that every step of a window keeps."""
BUSY = 0.8
"""Share of A that steps take on average where A is what holds them back."""
NEAR = 0.9
"""Share of A from which a step counts in the tail, once that has samples enough."""

STEPS_TO_TAKE_OVER = 3
"""The step under way, the one that evicts, and one to fill the batch again."""

WARM_UP_STEPS = 16
"""Steps that a model without a prior sees before its errors count."""
FIRST_RUNNING = 4
FIRST_PROMPT_BLOCKS = 8
"""Limits to start with where there is no prior."""
FIRST_KV_PER_REQUEST = 512

SMOOTHING = 0.05
"""Weight of a window in the running means."""
LEAST_PROMPT_SHARE = 0.1
"""Share of A that a block of prompt tokens may take for a step to have room for it always."""
NEED_KEPT = 0.8
"""Share of the prompt tokens needed that a window later still counts as needed."""


class LimitController:
    """Keeps one ITL target. `shrink` says how a lower limit takes effect."""

    def __init__(
        self, capacity: EngineCapacity, target_s: float, shrink: Shrink, prior: StepCosts | None = None
    ) -> None:
        self._capacity = capacity
        self._target_s = target_s
        self._shrink = shrink
        self._model = StepModel(capacity, prior)
        self._tail = StepTail()
        self._trim = 1.0
        self._allowance_s = 0.0
        self._warm_up = 0 if prior is not None else WARM_UP_STEPS
        self._needed_prompt = float(capacity.block_size)
        self._chunk_end = float(FIRST_KV_PER_REQUEST)
        """Mean KV length that the chunks of the next step with any will end at."""
        self._kv_mean = float(FIRST_KV_PER_REQUEST)
        self._n = 0
        self._kv_tokens = 0
        """Decoding requests of the last step, and the sum of their KV lengths."""
        self._interactive_requests = 0
        self._steps_to_skip = 0
        """Steps to come that were planned under other limits, or carry out the change to these."""
        self._steps_left = WINDOW_STEPS
        self._window_seconds = 0.0
        self._window_tokens = 0
        self._window_late = 0
        self._window_worst_s = 0.0
        self._may_try_more = False
        """The last window was well on time, with requests waiting for a place."""
        self._mean_s = 0.0
        self._throughput = 0.0
        self.throughput_backpressure = 0.0
        self.limits = self._first_limits()
        self._bound_growth()

    @property
    def latency_backpressure(self) -> float:
        """LBP, taking for ITL the time that 99 % of steps like those of the last window keep."""
        return self._mean_s * self._tail.rho99 / self._target_s

    # What it is told.

    def on_step(self, stats: StepStats, now: float) -> Limits | None:
        seconds = stats.itl_s or stats.device_s
        if seconds <= 0.0:
            return None
        n, prompt = stats.decode_requests, stats.prefill_tokens
        self._n, self._kv_tokens = n, stats.kv_tokens
        if self._steps_to_skip:
            self._steps_to_skip -= 1
            return None
        expected = self._learn(stats, seconds)
        self._window_seconds += seconds
        self._window_tokens += n
        self._window_worst_s = max(self._window_worst_s, seconds)
        if seconds > self._target_s:
            self._window_late += n
        self._steps_left -= 1
        self._interactive_requests = max(stats.interactive_requests, stats.itl_interactive)
        if prompt:
            # A prompt that the budget cut off goes on further up its context.
            is_full = n + prompt >= self.limits.token_budget
            self._chunk_end = stats.prefill_context / prompt + (prompt if is_full else 0)
        if self._steps_left <= 0:
            self._end_window(stats, now)
            return self._renew()
        is_over = prompt > self._least_prompt() and self._overruns(expected, stats)
        return self._renew() if is_over else None

    def resume(self, n: int, kv_tokens: int, interactive_requests: int) -> Limits | None:
        """Take over with so many requests decoding. Steps that were planned before do not count."""
        self._n, self._kv_tokens = n, kv_tokens
        self._interactive_requests = interactive_requests
        self._steps_to_skip = STEPS_TO_TAKE_OVER
        return self._renew()

    def set_target(self, target_s: float) -> Limits | None:
        self._target_s = target_s
        self._update_allowance()
        return self._renew()

    def _learn(self, stats: StepStats, seconds: float) -> float:
        """Seconds that the step was expected to take, 0 where that is not known."""
        if stats.swap_in_blocks or stats.swap_out_blocks or stats.drafted_tokens:
            return 0.0
        tail = self._tail
        expected = self._model.observe(stats, seconds)
        if expected and stats.decode_requests and self._model.steps > self._warm_up:
            # Errors of steps that are far from A say nothing of those that could be late.
            near = NEAR * self._allowance_s
            if tail.samples < TRUSTED or seconds > near or expected > near:
                tail.observe(seconds / expected)
        return expected

    def _overruns(self, expected: float, stats: StepStats) -> bool:
        """Whether a step like this one, its chunks where they are now, would exceed the allowance."""
        further = stats.prefill_tokens * self._chunk_end - stats.prefill_context
        seconds = expected + self._model.per_prompt_context_s * further
        return seconds > self._allowance_s * (1.0 + OVERRUN_BAND)

    def _end_window(self, stats: StepStats, now: float) -> None:
        steps = WINDOW_STEPS - self._steps_left
        self._mean_s = self._window_seconds / steps
        throughput = self._window_tokens / self._window_seconds
        self.throughput_backpressure = self._throughput / throughput if throughput else 0.0
        self._throughput = throughput
        self._update_trim()
        self._update_allowance()
        self._steps_left = WINDOW_STEPS
        is_full = stats.queued_tokens > 0 and stats.running + 1 >= self.limits.max_running
        self._may_try_more = is_full and self._window_worst_s <= WELL_ON_TIME * self._target_s
        self._window_seconds, self._window_tokens, self._window_late = 0.0, 0, 0
        self._window_worst_s = 0.0
        self._bound_growth()
        if stats.decode_requests:
            kv_mean = stats.kv_tokens / stats.decode_requests
            self._kv_mean += SMOOTHING * (kv_mean - self._kv_mean)
        self._update_needed_prompt(stats, now)

    # The allowance of a step.

    def _update_allowance(self) -> None:
        """A = (1 - m) S trim / rho99, but where one request alone misses S."""
        known = min(1.0, self._tail.samples / TRUSTED)
        margin = LARGEST_MARGIN + (SMALLEST_MARGIN - LARGEST_MARGIN) * known
        alone_s = self._model.alone_s(self._kv_mean)
        if self._target_s < min(alone_s, self._mean_s):
            self._allowance_s = HOPELESS_ALLOWANCE * alone_s
            return
        self._allowance_s = (1.0 - margin) * self._target_s * min(1.0, self._trim / self._tail.rho99)

    def _update_trim(self) -> None:
        """Where A holds the engine back, move trim towards the late share wanted."""
        if self._tail.samples < TRUSTED or not self._window_tokens:
            return
        late = self._window_late / self._window_tokens
        if late or self._mean_s > BUSY * self._allowance_s:
            change = max(-MOST_TRIMMED, TRIM_GAIN * (LATE_SHARE - late))
            self._trim = min(self._tail.rho99, max(LEAST_TRIM, self._trim + change))

    def _bound_growth(self) -> None:
        prompt = max(self.limits.token_budget - self._n, FIRST_PROMPT_BLOCKS * self._capacity.block_size)
        self._most_running = int(RUNNING_GROWTH * self.limits.max_running)
        self._most_prompt = int(PROMPT_GROWTH * prompt)

    def _update_needed_prompt(self, stats: StepStats, now: float) -> None:
        """P: prompt tokens a step with which the most urgent first token comes in time."""
        allowance = self._allowance_s
        slack = max(stats.first_token_due - now, allowance)
        needed = stats.queued_interactive_tokens * allowance / slack
        self._needed_prompt = max(self._least_prompt(), needed, NEED_KEPT * self._needed_prompt)

    def _least_prompt(self) -> int:
        """Prompt tokens that a step always has room for: a block, or less where those would take much of
        it, as on a CPU."""
        block = self._capacity.block_size
        block_s = self._model.prompt_tokens_s(self._n, block)
        if block_s <= LEAST_PROMPT_SHARE * self._allowance_s:
            return block
        return max(1, int(block * LEAST_PROMPT_SHARE * self._allowance_s / block_s))

    # Limits.

    def _first_limits(self) -> Limits:
        capacity = self._capacity
        n, tokens = capacity.max_slots, capacity.max_step_tokens
        if not self._model.is_ready:
            n = min(n, FIRST_RUNNING)
            tokens = min(tokens, FIRST_RUNNING + FIRST_PROMPT_BLOCKS * capacity.block_size)
        self.limits = Limits(n, tokens, self._shrink)
        self._most_running, self._most_prompt = n, tokens
        self._update_allowance()
        self._renew()
        return self.limits

    def _renew(self) -> Limits | None:
        """Limits as they should be, None where those in force are near enough: from A, which
        `_update_allowance` keeps, first n, then the tokens of a step with the n that decode now."""
        if not self._model.is_ready:
            return None
        old = self.limits
        running = self._max_running(old.max_running)
        n = min(self._n, running) if self._shrink == "preempt" else self._n
        tokens = self._token_budget(n, old)
        running = min(running, tokens)
        if running == old.max_running and tokens == old.token_budget:
            return None
        self.limits = Limits(running, tokens, self._shrink)
        return self.limits

    def _max_running(self, old: int) -> int:
        """The largest n that A has room for; the one in force where the difference is within the dead
        band. Where step times hardly rise with n a small excess would ask for a much smaller n."""
        wanted = self._largest_n(self._allowance_s)
        if self._may_try_more:
            # What the model fears of one more it has not seen, where all were as many for long.
            self._may_try_more = False
            wanted = max(wanted, min(old + max(1, int(DEAD_BAND * old)), self._capacity.max_slots))
        if wanted < old:
            return min(old, self._largest_n(self._allowance_s * (1.0 + OVERRUN_BAND)))
        return wanted if wanted >= old + max(1.0, DEAD_BAND * old) else old

    def _largest_n(self, allowance_s: float) -> int:
        """The largest n whose step takes no longer than that while it decodes and, but for the one
        request that is then computing its prompt, with the prompt tokens needed."""
        most = min(self._capacity.max_slots, self._most_running)
        n = self._largest_n_beside(self._needed_prompt, allowance_s, most)
        # Prompts cannot push out interactive requests, whose slots they wait for.
        most = min(most, self._interactive_requests)
        if n < most:
            n = max(n, self._largest_n_beside(self._least_prompt(), allowance_s, most))
        return max(1, n)

    def _largest_n_beside(self, prompt: float, allowance_s: float, most: int) -> int:
        model = self._model
        each = model.per_request_s + model.per_kv_token_s * self._kv_mean
        beside = int(min(prompt, self._capacity.max_step_tokens - 1))
        room = allowance_s - model.prompt_step_s - model.per_prompt_context_s * self._chunk_end * beside
        # One of them is computing its prompt.
        tokens = min(most - 1 + beside, self._capacity.max_step_tokens)
        return min(tokens, model.most_tokens(room + each * beside, each, tokens)) - beside + 1

    def _token_budget(self, n: int, old: Limits) -> int:
        """n decodes and the prompt tokens that fill the step; the one in force where the difference is
        within the dead band."""
        model, capacity = self._model, self._capacity
        kv_tokens = (self._kv_tokens / self._n if self._n else self._kv_mean) * n + n
        each = model.per_prompt_context_s * self._chunk_end
        room = self._allowance_s - model.prompt_step_s + each * n
        room -= model.per_request_s * n + model.per_kv_token_s * kv_tokens
        most = min(capacity.max_step_tokens, n + self._most_prompt)
        least = min(capacity.max_step_tokens, n + self._least_prompt())
        tokens = max(least, model.most_tokens(room, each, most))
        in_force = old.token_budget
        if least <= in_force <= tokens < in_force + max(1.0, DEAD_BAND * in_force):
            return in_force
        return tokens
