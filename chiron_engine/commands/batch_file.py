"""A batch as people write it: a JSON object on each line, to messages of the Batch service and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chiron_engine.policy.iteration.sampling_params import GUIDE_KINDS
from chiron_engine.rpc.v1 import batch_pb2, inference_pb2, types_pb2

URLS = ("/v1/chat/completions", "/v1/completions")
ONLY_VALUES: Mapping[str, object] = {"n": 1, "stream": False, "echo": False, "best_of": 1}
"""Fields of which one value is what is done anyway."""
RESPONSE_FORMATS: Mapping[str, Sequence[str]] = {
    "text": ("type",),
    "json_object": ("type",),
    "json_schema": ("type", "json_schema"),
}
"""By type, the fields each has."""
ALIASES = {"max_completion_tokens": "max_tokens", "tpot_slo_ms": "itl_slo_ms"}


class BatchFileError(ValueError):
    """A line is no request; the message names the line, the field and what would be right."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a field must hold, in words, and how to tell."""

    words: str
    holds: Callable[[Any], bool]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list_of(value: object, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(holds, value))


def _is_biases(value: object) -> bool:
    """JSON's keys are strings."""
    return isinstance(value, dict) and all(key.isdecimal() and _is_number(value[key]) for key in value)


NUMBER = Kind("a number", _is_number)
INTEGER = Kind("a whole number", _is_integer)
TEXT = Kind("a string", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
INTEGERS = Kind("a list of whole numbers", lambda value: _is_list_of(value, _is_integer))

SCHEMA = Kind("a JSON schema, as an object or as text", lambda value: isinstance(value, dict | str))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
BIASES = Kind("an object of token ids and numbers", _is_biases)

SAMPLING_FIELDS = {
    "temperature": NUMBER,
    "top_p": NUMBER,
    "top_k": INTEGER,
    "seed": INTEGER,
    "max_tokens": INTEGER,
    "stop_token_ids": INTEGERS,
    "ignore_eos": FLAG,
    "min_p": NUMBER,
    "min_tokens": INTEGER,
    "repetition_penalty": NUMBER,
    "presence_penalty": NUMBER,
    "frequency_penalty": NUMBER,
    "logit_bias": BIASES,
    "json_schema": SCHEMA,
    "regex": TEXT,
    "grammar": TEXT,
}
SLO_FIELDS = {"ttft_slo_ms": NUMBER, "itl_slo_ms": NUMBER, "deadline_s": NUMBER}
PROMPT_FIELDS = ("prompt", "messages", "token_ids")


def read_lines(lines: Iterable[str]) -> Iterator[batch_pb2.BatchLine]:
    """Empty lines are left out. Raises BatchFileError."""
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            yield batch_line(text)
        except BatchFileError as error:
            raise BatchFileError(f"line {number}: {error}") from None


def batch_line(text: str) -> batch_pb2.BatchLine:
    """`{"custom_id": ..., "body": {...}}` as OpenAI's batch files have it (with or without method and
    url), or the fields of the body beside custom_id. Raises BatchFileError."""
    try:
        fields = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise BatchFileError(f"no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise BatchFileError(f"holds {_shown(fields)}; it must be a JSON object")
    custom_id = fields.pop("custom_id", None)
    if not isinstance(custom_id, str) or not custom_id:
        raise BatchFileError(f"custom_id is {_shown(custom_id)}; it must be a string of its own")
    body = _body(fields)
    try:
        return batch_pb2.BatchLine(custom_id=custom_id, request=_request(body))
    except RecursionError:
        raise BatchFileError("is nested too deeply") from None
    except ValueError as error:  # out of the range of the message's field, or no Unicode text
        raise error if isinstance(error, BatchFileError) else BatchFileError(str(error)) from None


def _body(fields: dict[str, Any]) -> dict[str, Any]:
    if "body" not in fields:
        return fields
    body = fields.pop("body")
    if not isinstance(body, dict):
        raise BatchFileError(f"body is {_shown(body)}; it must be a JSON object")
    if fields.pop("method", "POST") != "POST":
        raise BatchFileError("method must be POST")
    url = fields.pop("url", URLS[0])
    if url not in URLS:
        raise BatchFileError(f"url is {_shown(url)}; it must be one of {', '.join(URLS)}")
    if fields:
        raise BatchFileError(f"has the field {_shown(next(iter(fields)))} beside body; it belongs inside")
    return body


def _request(body: dict[str, Any]) -> inference_pb2.GenerateRequest:
    for alias, name in ALIASES.items():
        if alias in body:
            if name in body:
                raise BatchFileError(f"has both {alias} and {name}; give one")
            body[name] = body.pop(alias)
    for name, value in ONLY_VALUES.items():
        if name in body and body.pop(name) != value:
            raise BatchFileError(f"{name} must be {json.dumps(value)}")
    request = inference_pb2.GenerateRequest(
        sampling=_sampling(body),
        slo=types_pb2.Slo(slo_class=types_pb2.SLO_CLASS_BATCH, **_taken(body, SLO_FIELDS)),
        stop=_stops(body.pop("stop", None)),
        model=_checked("model", body.pop("model", ""), TEXT),
    )
    _set_prompt(request, body)
    if body:
        known = (*PROMPT_FIELDS, *SAMPLING_FIELDS, *SLO_FIELDS, "response_format", "stop", "model")
        raise BatchFileError(
            f"has the unknown field {_shown(next(iter(body)))}; known are {', '.join(known)}"
        )
    return request


def _sampling(body: dict[str, Any]) -> types_pb2.SamplingParams:
    fields = _taken(body, SAMPLING_FIELDS)
    if "logit_bias" in fields:
        fields["logit_bias"] = {int(token): bias for token, bias in fields["logit_bias"].items()}
    _set_guide(fields, body.pop("response_format", None))
    return types_pb2.SamplingParams(**fields)


def _set_guide(fields: dict[str, Any], response_format: object) -> None:
    """Whether an output can follow it, the engine tells: that is an error of this line alone."""
    if response_format is not None:
        schema = _response_schema(_checked("response_format", response_format, OBJECT))
        if schema is not None:
            if "json_schema" in fields:
                raise BatchFileError("has both response_format and json_schema; give one")
            fields["json_schema"] = schema
    if isinstance(fields.get("json_schema"), dict):
        fields["json_schema"] = json.dumps(fields["json_schema"])
    given = [kind for kind in GUIDE_KINDS if kind in fields]
    if len(given) > 1:
        raise BatchFileError(f"has {given[0]} and {given[1]}; an output follows one of them")


def _response_schema(response_format: dict[str, Any]) -> dict[str, Any] | None:
    """As OpenAI has it; None for any text."""
    kind = response_format.get("type")
    if not isinstance(kind, str) or kind not in RESPONSE_FORMATS:
        names = ", ".join(RESPONSE_FORMATS)
        raise BatchFileError(f"response_format.type is {_shown(kind)}; it must be one of {names}")
    _check_known("response_format", response_format, RESPONSE_FORMATS[kind])
    if kind != "json_schema":
        return {"type": "object"} if kind == "json_object" else None
    described = _checked("response_format.json_schema", response_format.get("json_schema"), OBJECT)
    _check_known("response_format.json_schema", described, ("name", "description", "schema", "strict"))
    schema: dict[str, Any] = _checked("response_format.json_schema.schema", described.get("schema"), OBJECT)
    return schema


def _check_known(name: str, found: Mapping[str, object], known: Sequence[str]) -> None:
    for field in found:
        if field not in known:
            raise BatchFileError(
                f"{name} has the unknown field {_shown(field)}; known are {', '.join(known)}"
            )


def _set_prompt(request: inference_pb2.GenerateRequest, body: dict[str, Any]) -> None:
    given = [name for name in PROMPT_FIELDS if name in body]
    if len(given) != 1:
        found = " and ".join(given) or "no prompt"
        raise BatchFileError(f"has {found}; give one of {', '.join(PROMPT_FIELDS)}")
    value = body.pop(given[0])
    if given[0] == "messages":
        request.chat.messages.extend(_messages(value))
    elif isinstance(value, str) and given[0] == "prompt":
        request.text = value
    else:
        words = "a string or a list of token ids" if given[0] == "prompt" else INTEGERS.words
        request.token_ids.ids.extend(_checked(given[0], value, Kind(words, INTEGERS.holds)))


def _messages(value: object) -> Iterator[inference_pb2.ChatMessage]:
    if not isinstance(value, list):
        raise BatchFileError(f"messages is {_shown(value)}; it must be a list of messages")
    for place, message in enumerate(value):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise BatchFileError(f"messages[{place}] must hold role and content, and nothing else")
        role = _checked(f"messages[{place}].role", message["role"], TEXT)
        yield inference_pb2.ChatMessage(role=role, content=_content(place, message["content"]))


def _content(place: int, content: Any) -> str:
    """Text, or parts of text as OpenAI has them."""
    if not isinstance(content, list):
        text: str = _checked(f"messages[{place}].content", content, TEXT)
        return text
    pieces = []
    for part in content:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise BatchFileError(f"messages[{place}].content holds {_shown(part)}; only text is taken")
        pieces.append(part["text"])
    return "".join(pieces)


def _stops(value: object) -> list[str]:
    if value is None:
        return []
    stops = [value] if isinstance(value, str) else value
    kind = Kind("a string or a list of strings", lambda found: _is_list_of(found, TEXT.holds))
    found: list[str] = _checked("stop", stops, kind)
    return found


def _taken(body: dict[str, Any], kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """Fields of the body by these names, taken out of it; null is as good as absent."""
    found = {name: body.pop(name) for name in kinds if name in body}
    return {name: _checked(name, value, kinds[name]) for name, value in found.items() if value is not None}


def _checked(name: str, value: Any, kind: Kind) -> Any:
    if not kind.holds(value):
        raise BatchFileError(f"{name} is {_shown(value)}; it must be {kind.words}")
    return value


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:40] + "..."


def result_fields(result: batch_pb2.LineResult) -> dict[str, object]:
    """What `fetch` prints of a line."""
    state = batch_pb2.LineState.Name(result.state).removeprefix("LINE_STATE_").lower()
    fields: dict[str, object] = {"custom_id": result.custom_id, "state": state}
    if not result.HasField("output"):
        return {**fields, "error": {"code": result.error.code, "message": result.error.message}}
    output = result.output
    reason = types_pb2.FinishReason.Name(output.finish_reason).removeprefix("FINISH_REASON_").lower()
    usage = {name: getattr(output.usage, name) for name in output.usage.DESCRIPTOR.fields_by_name}
    return {
        **fields,
        "text": output.text,
        "token_ids": list(output.token_ids),
        "finish_reason": reason,
        "usage": usage,
    }
