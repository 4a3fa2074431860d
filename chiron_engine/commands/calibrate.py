"""`chiron calibrate`: a latency profile for the simulator from an engine's step log."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from .exits import CommandError, usage_errors

if TYPE_CHECKING:
    from chiron_engine.sim.calibration import Calibration
    from chiron_engine.sim.profile import Profile


def calibrate(
    log: Annotated[Path, Argument(metavar="LOG", help="Written by `chiron engine --step-log`.")],
    out: Annotated[Path, Option("--out", metavar="FILE", help="Where the profile goes.")],
    name: Annotated[
        str, Option(metavar="GPU/MODEL/tpN/PRECISION", help="What the profile is called.")
    ] = "local/engine/tp1/measured",
    kv_tokens: Annotated[
        int | None, Option(min=1, help="KV the engine holds, in tokens. [default: most seen in the log]")
    ] = None,
    max_num_seqs: Annotated[
        int | None, Option(min=1, help="Requests that can run at once. [default: largest limit in the log]")
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None, Option(min=1, help="Tokens of one step. [default: largest budget in the log]")
    ] = None,
    max_model_len: Annotated[
        int | None, Option(min=1, help="Tokens of one request. [default: all the KV]")
    ] = None,
    kv_bytes_per_token: Annotated[int, Option(min=1, help="Over all GPUs of the engine.")] = 131072,
    host_gb_per_s: Annotated[float, Option(min=0.001, help="Assumed between each GPU and the host.")] = 25.0,
) -> None:
    """Fit a latency profile to the step log of an engine.

    The log needs some variety: few and many requests at once, short and long ones, prompts of
    several sizes. `chiron simulate --profile FILE` takes the result.
    """
    from chiron_engine.sim.calibration import calibrate as fit
    from chiron_engine.sim.calibration import read_step_log
    from chiron_engine.sim.linear_step_times import LinearStepTimes
    from chiron_engine.sim.profile import Profile
    from chiron_engine.sim.profile_file import check_name, write_linear_profile

    with usage_errors():
        gpus = int(check_name(name).split("/")[2].removeprefix("tp"))
        try:
            found = fit(read_step_log(log))
        except OSError as error:
            raise CommandError(f"the step log {log} cannot be read: {error.strerror}") from error
        capacity = kv_tokens or found.measured.kv_tokens
        profile = Profile(
            name=name,
            gpus=gpus,
            kv_capacity_tokens=capacity,
            kv_bytes_per_token=kv_bytes_per_token,
            max_slots=max_num_seqs or found.max_slots,
            max_step_tokens=max_num_batched_tokens or found.max_step_tokens,
            max_model_len=min(max_model_len or capacity, capacity),
            step_times=LinearStepTimes(found.costs, found.measured),
            fit=found.costs,
            envelope=found.costs,
            copy_s_per_kv_token=kv_bytes_per_token / gpus / (host_gb_per_s * 1e9),
            source=f"fitted to {found.used} steps of {log.name}",
        )
    try:
        with usage_errors():
            write_linear_profile(out, profile, found.measured)
    except OSError as error:
        raise CommandError(f"the profile cannot be written to {out}: {error.strerror}") from error
    _report(out, profile, found)


def _report(out: Path, profile: Profile, found: Calibration) -> None:
    costs, seen = found.costs, found.measured
    print(f"{profile.name} -> {out}")
    print(f"  {found.used} of {found.steps} steps used, {found.outliers} outliers left out")
    print(
        f"  step = {costs.base_s * 1e3:.3f} ms + {costs.per_request_s * 1e6:.2f} us a request + "
        f"{costs.per_kv_token_s * 1e9:.2f} ns a KV token + {costs.per_prompt_token_s * 1e6:.2f} us a prompt "
        f"token + {costs.per_prompt_context_s * 1e9:.3f} ns a prompt token and token of its context"
    )
    print(f"  off by {found.mean_error:.1%} in the mean; 99 % of steps take at most {found.tail_p99:.2f}x")
    print(
        f"  seen up to {seen.requests} requests, {seen.kv_tokens} KV tokens and {seen.prompt_tokens} prompt "
        "tokens in a step; beyond, a simulation counts its steps as extrapolated"
    )
