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
from .budget_probe import BudgetProbe
from .limit_ceiling import LATE_STEPS, NO_CEILING, LimitCeiling
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
PROMPT_BAND = 1.2
"""The token budget is raised, however little the model finds to gain, for this many times the prompts."""
PROMPT_GROWTH = 1.5
LARGEST_MARGIN = 0.05
SMALLEST_MARGIN = 0.005

LATE_SHARE = 0.0005
"""Share of tokens beyond the target that trim settles at. The SLO allows 1 % of each request's gaps,
so one of the first hundred: were 1 % of all tokens late, a quarter of such requests would have two."""
TRIM_GAIN = 0.12
"""Change of trim in a window for a share of late tokens of 1."""
MOST_TRIMMED = 0.02
"""Largest fall of trim in a window: late steps come in bursts, one after another."""
WINDOWS_TO_HASTE = 16
MOST_HASTE = 64.0
"""Trim rises (1 + w / 16)^2 times as fast after w windows on time: slowly where steps are on the brink
of being late, soon from where they are far."""
MOST_RAISED = 0.002
"""Largest relative growth of trim / rho99 in a window because rho99 falls."""
LEAST_TRIM = 0.8
WELL_ON_TIME = 0.9
"""Share of the target."""
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

SMOOTHING = 0.25
"""Weight of a window in the running means."""
GROWTH_STEPS = 64
"""Steps ahead for which the growth of the mean KV length counts: a limit falls by draining."""
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
        self._warm_up = 0 if prior is not None else WARM_UP_STEPS
        self._needed_prompt = float(capacity.block_size)
        self._chunk_end = float(FIRST_KV_PER_REQUEST)
        """Mean KV length at the end of the chunks of the last step that had any."""
        self._kv_mean = float(FIRST_KV_PER_REQUEST)
        self._kv_growth = 0.0
        """Tokens a step by which the mean KV length grows."""
        self._n = 0
        self._kv_tokens = 0
        """Decoding requests of the last step, and the sum of their KV lengths."""
        self._interactive_requests = 0
        self._steps_left = WINDOW_STEPS
        self._window_seconds = 0.0
        self._window_tokens = 0
        self._window_late = 0
        self._window_worst_s = 0.0
        self._last_worst_s = 0.0
        """Longest step of the window under way, and of the last one."""
        self._waits = False
        self._windows_on_time = 0
        self._rho = self._tail.rho99
        self._trim = 1.0
        self._mean_s = 0.0
        self._throughput = 0.0
        self.throughput_backpressure = 0.0
        self._probe = BudgetProbe(capacity)
        self._budget_ceiling = LimitCeiling()
        self._running_ceiling = LimitCeiling()
        self._late_steps = 0
        """Late ones in a row."""
        self._steps_to_skip = 0
        """Steps to come that were planned under other limits, or carry out the change to these."""
        self._allowance_s = 0.0
        self.limits = self._first_limits()
        self._bound_growth()

    # What it tells.

    @property
    def costs(self) -> StepCosts | None:
        return self._model.costs

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
        expected = self._model.seconds(n, stats.kv_tokens, prompt, stats.prefill_context)
        self._learn(stats, seconds, expected)
        self._window_seconds += seconds
        self._window_tokens += n
        if seconds > self._window_worst_s:
            self._window_worst_s = seconds
        if seconds > self._target_s:
            self._window_late += n
            self._late_steps += 1
        else:
            self._late_steps = 0
        self._steps_left -= 1
        self._interactive_requests = max(stats.interactive_requests, stats.itl_interactive)
        if self._probe.before is not None:
            return self._end_probe(n + prompt, seconds, expected)
        if self._steps_left <= 0:
            self._end_window(stats, now)
            return self._renew()
        if self._late_steps >= LATE_STEPS:
            return self._give_way(n, prompt)
        return self._after_prompts(stats, expected) if prompt else None

    def resume(self, n: int, kv_tokens: int, interactive_requests: int) -> Limits | None:
        """Take over with so many requests decoding. Steps that were planned before do not count."""
        self._n, self._kv_tokens = n, kv_tokens
        self._last_worst_s = 0.0
        self._interactive_requests = interactive_requests
        self._steps_to_skip = STEPS_TO_TAKE_OVER
        self._late_steps = 0
        self.limits = self._probe.cancel() or self.limits
        return self._renew()

    def set_target(self, target_s: float) -> Limits | None:
        self._target_s = target_s
        self.limits = self._probe.cancel() or self.limits
        self._budget_ceiling.lift()
        self._running_ceiling.lift()
        self._update_allowance()
        return self._renew()

    def _learn(self, stats: StepStats, seconds: float, expected: float) -> None:
        if stats.swap_in_blocks or stats.swap_out_blocks:
            return
        model, tail = self._model, self._tail
        if stats.decode_requests and expected > 0.0 and model.steps >= self._warm_up:
            # Errors of steps that are far from A say nothing of those that could be late.
            near = NEAR * self._allowance_s
            if tail.samples < TRUSTED or seconds > near or expected > near:
                tail.observe(seconds / expected)
        model.observe(stats, seconds)

    def _give_way(self, n: int, prompt: int) -> Limits | None:
        """Steps are late one after another: less of what may be too much, and not soon again."""
        self._late_steps = 0
        block = self._capacity.block_size
        if prompt > block:
            self._budget_ceiling.lower(max(n + block, min(self.limits.token_budget, n + prompt) - block))
        elif n > 1:
            self._running_ceiling.lower(min(n, self.limits.max_running) - max(1, n // 32))
        return self._renew()

    def _after_prompts(self, stats: StepStats, expected: float) -> Limits | None:
        """The step computed prompt tokens: was its budget right, and is it time to try more?"""
        prompt = stats.prefill_tokens
        budget = self.limits.token_budget - stats.decode_requests
        is_full = prompt >= budget
        # A prompt that the budget cut off goes on further up its context.
        self._chunk_end = stats.prefill_context / prompt + (prompt if is_full else 0)
        if self._is_off(expected, budget, prompt):
            return self._renew()
        if not is_full:
            return None
        if self._probe.is_due(self.limits, stats.queued_tokens):
            self.limits = self._probe.begin(self.limits)
            return self.limits
        return None

    def _end_probe(self, tokens: int, seconds: float, expected: float) -> Limits | None:
        before = self._probe.before
        assert before is not None
        if not self._probe.is_over(tokens, seconds, expected, self._allowance_s):
            return None
        if self._probe.was_surprised:
            self._model.doubt()
        if self._probe.found_more:
            # A window with the larger budget teaches the model what it costs.
            self._budget_ceiling.lift()
            self._steps_left = WINDOW_STEPS
            return None
        self.limits = before
        return before

    # The allowance of a step, and what it buys.

    def _update_allowance(self) -> None:
        """A = (1 - m) S trim / rho99"""
        known = min(1.0, self._tail.samples / TRUSTED)
        margin = LARGEST_MARGIN + (SMALLEST_MARGIN - LARGEST_MARGIN) * known
        self._allowance_s = (1.0 - margin) * self._target_s * min(1.0, self._trim / self._rho)

    @property
    def _prompt_token_s(self) -> float:
        """Marginal seconds of a prompt token where the chunks are now."""
        return self._model.per_prompt_token_s + self._model.per_prompt_context_s * self._chunk_end

    def _is_off(self, expected: float, budget: int, prompt: int) -> bool:
        """Whether a step with its prompt budget used up would overrun the allowance, or is used up and
        far short of it."""
        allowance = self._allowance_s
        full = expected + (budget - prompt) * self._prompt_token_s
        if full > allowance * (1.0 + OVERRUN_BAND):
            return budget > self._capacity.block_size
        return prompt >= budget and full < allowance * (1.0 - DEAD_BAND)

    def _end_window(self, stats: StepStats, now: float) -> None:
        steps = WINDOW_STEPS - self._steps_left
        self._mean_s = self._window_seconds / steps
        throughput = self._window_tokens / self._window_seconds
        self.throughput_backpressure = self._throughput / throughput if throughput else 0.0
        self._throughput = throughput
        self._budget_ceiling.pass_steps(steps)
        self._running_ceiling.pass_steps(steps)
        self._probe.pass_steps(steps)
        self._update_trim(stats)
        self._update_allowance()
        self._steps_left = WINDOW_STEPS
        self._last_worst_s = self._window_worst_s
        self._waits = stats.queued_tokens > 0
        self._window_seconds, self._window_tokens, self._window_late = 0.0, 0, 0
        self._window_worst_s = 0.0
        self._bound_growth()
        if stats.decode_requests:
            kv_mean = stats.kv_tokens / stats.decode_requests
            change = SMOOTHING * (kv_mean - self._kv_mean)
            self._kv_mean += change
            self._kv_growth += SMOOTHING * (change / steps - self._kv_growth)
        self._update_needed_prompt(stats, now)

    def _update_trim(self, stats: StepStats) -> None:
        """Where A holds the engine back, move trim towards the late share wanted; upwards the faster,
        the longer no token was late."""
        tail, tokens = self._tail, self._window_tokens
        # When outliers leave the tail's window rho falls at once; what trim had made up for them, and
        # what that means for n, is taken back little by little.
        rho, self._rho = self._rho, tail.rho99
        if tail.samples < TRUSTED or not tokens:
            return
        self._trim = min(self._trim, (1.0 + MOST_RAISED) * self._trim / rho * self._rho)
        late = self._window_late / tokens
        is_full = stats.queued_tokens > 0 and stats.running + 1 >= self.limits.max_running
        if late:
            self._windows_on_time = 0
            self._trim = max(LEAST_TRIM, self._trim + max(-MOST_TRIMMED, TRIM_GAIN * (LATE_SHARE - late)))
        elif is_full or self._mean_s > BUSY * self._allowance_s:
            # Not while a ceiling, rather than A, may be what keeps steps on time.
            self._windows_on_time = 0 if self._holds_ceiling else self._windows_on_time + 1
            haste = min(MOST_HASTE, (1.0 + self._windows_on_time / WINDOWS_TO_HASTE) ** 2)
            self._trim = min(tail.rho99, self._trim + TRIM_GAIN * LATE_SHARE * haste)

    @property
    def _holds_ceiling(self) -> bool:
        return min(self._budget_ceiling.limit, self._running_ceiling.limit) < NO_CEILING

    def _bound_growth(self) -> None:
        """Beyond what was tried the model is a guess: limits grow by so much in a window."""
        prompt = max(self.limits.token_budget - self._n, FIRST_PROMPT_BLOCKS * self._capacity.block_size)
        self._most_running = 2 * self.limits.max_running
        self._most_prompt = int(PROMPT_GROWTH * prompt)

    def _update_needed_prompt(self, stats: StepStats, now: float) -> None:
        """P: prompt tokens a step with which the most urgent first token comes in time."""
        allowance = self._allowance_s
        slack = max(stats.first_token_due - now, allowance)
        needed = stats.queued_interactive_tokens * allowance / slack
        floor = self._capacity.block_size
        self._needed_prompt = max(floor, needed, NEED_KEPT * self._needed_prompt)

    # Limits.

    def _first_limits(self) -> Limits:
        capacity = self._capacity
        if self._model.is_ready:
            n, tokens = capacity.max_slots, capacity.max_step_tokens
        else:
            n, tokens = FIRST_RUNNING, FIRST_RUNNING + FIRST_PROMPT_BLOCKS * capacity.block_size
        n = min(n, capacity.max_slots)
        self.limits = Limits(n, min(tokens, capacity.max_step_tokens), self._shrink)
        self._most_running, self._most_prompt = n, capacity.max_step_tokens
        self._update_allowance()
        self._renew()
        return self.limits

    def _renew(self) -> Limits | None:
        """Limits as they should be; None where those in force are near enough."""
        if not self._model.is_ready:
            return None
        old = self.limits
        running = self._within_dead_band(self._largest_n(), old.max_running)
        running = max(running, self._proven_n(old.max_running))
        running = max(1, min(running, self._running_ceiling.limit))
        n = min(self._n, running) if self._shrink == "preempt" else self._n
        tokens = self._token_budget(n, old)
        running = max(1, min(running, tokens))
        if running == old.max_running and tokens == old.token_budget:
            return None
        self.limits = Limits(running, tokens, self._shrink)
        return self.limits

    def _largest_n(self) -> float:
        """The largest n whose step is within the allowance while it decodes, and, but for the one
        request that is then computing its prompt, with the prompt tokens needed."""
        model = self._model
        room = self._allowance_s - model.base_s
        kv = self._kv_mean + max(0.0, self._kv_growth) * GROWTH_STEPS
        each = model.per_request_s + model.per_kv_token_s * kv
        most = float(self._capacity.max_slots)
        if each * most <= room - self._needed_prompt * self._prompt_token_s:
            return most
        if each <= 0.0:
            return 1.0
        for_block = 1.0 + (room - self._capacity.block_size * self._prompt_token_s) / each
        for_needed = 1.0 + (room - self._needed_prompt * self._prompt_token_s) / each
        # Prompts cannot push out interactive requests, whose slots they wait for.
        for_prompts = max(for_needed, min(for_block, float(self._interactive_requests)))
        return max(1.0, min(for_prompts, room / each, most))

    def _proven_n(self, current: int) -> int:
        """What the model fears of a limit that was used and kept every step of a window well on time,
        it has not seen: such a limit stands, and while requests wait is raised by a little."""
        if self._n + 1 < current or not 0.0 < self._last_worst_s <= WELL_ON_TIME * self._target_s:
            return 1
        more = max(1, int(DEAD_BAND * current)) if self._steps_left == WINDOW_STEPS and self._waits else 0
        return min(current + more, self._capacity.max_slots)

    def _within_dead_band(self, wanted: float, current: int) -> int:
        wanted = min(wanted, float(self._most_running))
        band = DEAD_BAND * current
        if wanted >= current + max(1.0, band) or wanted <= current - max(0.5, band / 2):
            return int(wanted)
        return current

    def _token_budget(self, n: int, old: Limits) -> int:
        """n decodes and the prompt tokens that fill the step; the one in force where the difference is
        within the dead band."""
        model, capacity = self._model, self._capacity
        kv_tokens = (self._kv_tokens / self._n if self._n else self._kv_mean) * n + n
        allowance = self._allowance_s
        room = allowance - model.seconds(n, kv_tokens, 0.0, 0.0)
        each = self._prompt_token_s
        most = capacity.max_step_tokens - n
        prompt = most if each * most <= room else int(room / each) if each > 0.0 else 0
        in_force = old.token_budget - n
        prompt = min(prompt, self._most_prompt, self._budget_ceiling.limit - n)
        prompt = min(max(prompt, capacity.block_size), most)
        if in_force < capacity.block_size:
            return n + prompt
        # Where prompt tokens seem to cost nothing, only trying more of them shows what they cost.
        is_near = (
            (in_force - prompt) * each < OVERRUN_BAND * allowance
            if prompt <= in_force
            else (prompt - in_force) * each < DEAD_BAND * allowance and prompt < in_force * PROMPT_BAND
        )
        return old.token_budget if is_near else n + prompt
