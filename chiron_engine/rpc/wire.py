"""Plain values out of wire messages, with the defaults that the .proto files promise.

The dictionaries name the fields of the policy layer's `SamplingParams` and `Slo`, whose own checks
then apply: both the gateway and the engine build them from here.
"""

from __future__ import annotations

import math
from typing import TypedDict

from .v1 import types_pb2

MILLISECONDS = 1e-3
MAX_TARGET_S = 1e9


class SamplingFields(TypedDict):
    temperature: float
    top_k: int
    top_p: float
    seed: int | None
    max_tokens: int | None
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    min_p: float
    min_tokens: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: dict[int, float]
    logprobs: int | None
    prompt_logprobs: int | None
    json_schema: str | None
    regex: str | None
    grammar: str | None


class SloFields(TypedDict):
    """`deadline_s` counts from receipt; None is none."""

    batch: bool
    ttft_s: float
    itl_s: float
    deadline_s: float | None


TTFT_DEFAULT_S = {False: 10.0, True: 3600.0}  # by `batch`
ITL_DEFAULT_S = {False: 0.2, True: 2.0}


def sampling_fields(message: types_pb2.SamplingParams) -> SamplingFields:
    return {
        "temperature": message.temperature if message.HasField("temperature") else 1.0,
        "top_k": message.top_k,
        "top_p": message.top_p if message.HasField("top_p") else 1.0,
        "seed": message.seed if message.HasField("seed") else None,
        "max_tokens": message.max_tokens if message.HasField("max_tokens") else None,
        "stop_token_ids": tuple(message.stop_token_ids),
        "ignore_eos": message.ignore_eos,
        "min_p": message.min_p,
        "min_tokens": message.min_tokens,
        "repetition_penalty": message.repetition_penalty if message.HasField("repetition_penalty") else 1.0,
        "presence_penalty": message.presence_penalty,
        "frequency_penalty": message.frequency_penalty,
        "logit_bias": dict(message.logit_bias),
        "logprobs": message.logprobs if message.HasField("logprobs") else None,
        "prompt_logprobs": message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        "json_schema": message.json_schema if message.HasField("json_schema") else None,
        "regex": message.regex if message.HasField("regex") else None,
        "grammar": message.grammar if message.HasField("grammar") else None,
    }


def slo_fields(message: types_pb2.Slo) -> SloFields:
    """Raises ValueError for an unknown class and for targets that are not positive and finite."""
    if message.slo_class not in types_pb2.SloClass.values():
        raise ValueError(f"slo_class is {message.slo_class}; it must be 1 (interactive) or 2 (batch)")
    batch = message.slo_class == types_pb2.SLO_CLASS_BATCH
    ttft, itl = TTFT_DEFAULT_S[batch], ITL_DEFAULT_S[batch]
    if message.HasField("ttft_slo_ms"):
        ttft = _positive("ttft_slo_ms", message.ttft_slo_ms) * MILLISECONDS
    if message.HasField("itl_slo_ms"):
        itl = _positive("itl_slo_ms", message.itl_slo_ms) * MILLISECONDS
    deadline = _positive("deadline_s", message.deadline_s) if message.HasField("deadline_s") else None
    return {"batch": batch, "ttft_s": ttft, "itl_s": itl, "deadline_s": deadline}


def _positive(name: str, value: float) -> float:
    if not (math.isfinite(value) and 0.0 < value <= MAX_TARGET_S):
        raise ValueError(f"{name} is {value}; it must be a positive finite number")
    return value
