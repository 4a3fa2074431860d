"""Bad input over real sockets: the right status, a clean message, and an engine that serves on."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import grpc.aio
import pytest

from chiron_engine.rpc.client import INFERENCE_SERVICE, chat, sampling
from chiron_engine.rpc.errors import error_code
from chiron_engine.rpc.v1 import engine_pb2, inference_pb2, types_pb2
from tests.gateway.serving_stack import DESCRIPTION, SHAPE, Background, serving_in_background
from tests.gateway.tiny_model import write_tiny_model

Code = grpc.StatusCode
Request = inference_pb2.GenerateRequest
NAN, INFINITY = float("nan"), float("inf")
VOCAB, CONTEXT = SHAPE.vocab_size, SHAPE.max_model_len
MAX_MESSAGE = 1 << 20
UNCLEAN = re.compile(r"Traceback|File \"|\.py|0x[0-9a-f]|/[a-z]+/|Error:|Exception|chiron_engine")
BAD_PROTOBUF = "does not parse as the protobuf message"


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    request: Request | bytes
    code: grpc.StatusCode
    says: str
    method: str = "Generate"
    error_code: str | None = None


def text(prompt: str = "hi", **fields: object) -> Request:
    return Request(text=prompt, **fields)  # type: ignore[arg-type]


def ids(*token_ids: int, **fields: object) -> Request:
    return Request(token_ids=inference_pb2.TokenIds(ids=token_ids), **fields)  # type: ignore[arg-type]


def params(**fields: object) -> Request:
    return text(sampling=types_pb2.SamplingParams(**fields))  # type: ignore[arg-type]


def slo(**fields: object) -> Request:
    return text(slo=types_pb2.Slo(**fields))  # type: ignore[arg-type]


def string_field(number: int, value: bytes) -> bytes:
    """One length-delimited field, whatever its bytes."""
    assert len(value) < 128
    return bytes([number << 3 | 2, len(value)]) + value


BAD = Code.INVALID_ARGUMENT
TOO_LONG = "context_length_exceeded"
GENERATE_CASES = [
    Case("no prompt", Request(), BAD, "prompt is not set"),
    Case("empty text", text(""), BAD, "the prompt is empty"),
    Case("empty ids", ids(), BAD, "the prompt is empty"),
    Case("no messages", Request(chat=chat([])), BAD, "chat has 0 messages"),
    Case("2,049 messages", Request(chat=chat([("user", "")] * 2049)), BAD, "chat has 2049 messages"),
    Case("no role", Request(chat=chat([("", "hi")])), BAD, "chat.messages[0].role is empty"),
    Case("role the template refuses", Request(chat=chat([("tool", "hi")])), BAD, "roles are system"),
    Case("context filled", ids(*[1] * CONTEXT), BAD, f"has {CONTEXT} tokens", error_code=TOO_LONG),
    Case("context + 1", ids(*[1] * (CONTEXT + 1)), BAD, f"has {CONTEXT + 1} tokens", error_code=TOO_LONG),
    Case("text over context", text("a" * (CONTEXT + 1)), BAD, "tokens", error_code=TOO_LONG),
    Case("text far over context", text("a" * 900_000), BAD, "900000 characters", error_code=TOO_LONG),
    Case("chat over context", Request(chat=chat([("user", "a" * 2000)])), BAD, "tokens", error_code=TOO_LONG),
    Case(
        "max_tokens over what is left",
        text("ab", sampling=sampling(max_tokens=CONTEXT - 1)),
        BAD,
        f"max_tokens is {CONTEXT - 1}",
        error_code=TOO_LONG,
    ),
    Case("max_tokens 2**63 - 1", params(max_tokens=2**63 - 1), BAD, "max_tokens", error_code=TOO_LONG),
    Case("id V", ids(1, VOCAB), BAD, f"token_ids[1] is {VOCAB}"),
    Case("id 2**32 - 1", ids(2**32 - 1), BAD, "outside|vocabulary"),
    Case("temperature NaN", params(temperature=NAN), BAD, "temperature is nan"),
    Case("temperature inf", params(temperature=INFINITY), BAD, "temperature is inf"),
    Case("temperature -1", params(temperature=-1.0), BAD, "temperature is -1.0"),
    Case("top_p NaN", params(top_p=NAN), BAD, "top_p is nan"),
    Case("top_p 0", params(top_p=0.0), BAD, "top_p is 0.0"),
    Case("top_p -inf", params(top_p=-INFINITY), BAD, "top_p is -inf"),
    Case("top_p 1.01", params(top_p=1.01), BAD, "top_p is 1.01"),
    Case("top_k -1", params(top_k=-1), BAD, "top_k is -1"),
    Case("top_k 2**40", params(top_k=2**40), BAD, "top_k is"),
    Case("min_p -0.1", params(min_p=-0.1), BAD, "min_p is -0.1"),
    Case("min_p NaN", params(min_p=NAN), BAD, "min_p is nan"),
    Case("repetition_penalty 0", params(repetition_penalty=0.0), BAD, "repetition_penalty is 0.0"),
    Case("presence_penalty 2.1", params(presence_penalty=2.1), BAD, "presence_penalty is 2.1"),
    Case("frequency_penalty -3", params(frequency_penalty=-3.0), BAD, "frequency_penalty is -3.0"),
    Case("bias NaN", params(logit_bias={3: NAN}), BAD, "logit_bias[3] is nan"),
    Case("bias 101", params(logit_bias={3: 101.0}), BAD, "logit_bias[3] is 101.0"),
    Case("bias of id V", params(logit_bias={VOCAB: 1.0}), BAD, f"logit_bias has {VOCAB}"),
    Case("min_tokens -1", params(min_tokens=-1), BAD, "min_tokens is -1"),
    Case("min_tokens over max_tokens", params(min_tokens=5, max_tokens=4), BAD, "at most max_tokens"),
    Case("min_tokens over context", params(min_tokens=2**62), BAD, "min_tokens is", error_code=TOO_LONG),
    Case("max_tokens 0", params(max_tokens=0), BAD, "max_tokens is 0"),
    Case("max_tokens -5", params(max_tokens=-5), BAD, "max_tokens is -5"),
    Case("129 stop ids", params(stop_token_ids=[1] * 129), BAD, "129 stop_token_ids"),
    *(
        Case(f"stop id {token}", params(stop_token_ids=[token]), BAD, f"stop_token_ids has {token}")
        for token in (-1, VOCAB, 2**31, 2**63 - 1)
    ),
    Case("17 outputs", text(n=17), BAD, "n is 17; it must be between 1 and 16"),
    Case("equal outputs", text(n=2, sampling=sampling(temperature=0.0)), BAD, "n is 2 and temperature 0"),
    Case("21 logprobs", params(logprobs=21), BAD, "logprobs is 21"),
    Case("logprobs -1", params(logprobs=-1), BAD, "logprobs is -1"),
    Case("logprobs without a model", params(logprobs=2), BAD, "this engine computes no model"),
    Case("21 of prompts", params(prompt_logprobs=21), BAD, "prompt_logprobs is 21"),
    Case("-1 of prompts", params(prompt_logprobs=-1), BAD, "prompt_logprobs is -1"),
    Case("of prompts without a model", params(prompt_logprobs=2), BAD, "this engine computes no model"),
    Case("5 stops", text(stop=["a"] * 5), BAD, "stop has 5 strings"),
    Case("stop of 257 bytes", text(stop=["a" * 257]), BAD, "stop[0] has 257 bytes"),
    Case("stop of 129 two-byte characters", text(stop=["x", "é" * 129]), BAD, "stop[1] has 258 bytes"),
    Case("empty stop", text(stop=[""]), BAD, "stop[0] has 0 bytes"),
    Case("ttft NaN", slo(ttft_slo_ms=NAN), BAD, "ttft_slo_ms is nan"),
    Case("itl 0", slo(itl_slo_ms=0.0), BAD, "itl_slo_ms is 0.0"),
    Case("itl inf", slo(itl_slo_ms=INFINITY), BAD, "itl_slo_ms is inf"),
    Case("deadline -1", slo(deadline_s=-1.0), BAD, "deadline_s is -1.0"),
    Case("SLO class 7", slo(slo_class=7), BAD, "slo_class is 7"),
    Case("request id with a space", text(request_id="a b"), BAD, "request_id is 'a b'"),
    Case("request id of 129", text(request_id="a" * 129), BAD, "request_id is"),
    Case("request id with control characters", text(request_id="\x1b[31m\n"), BAD, "request_id is"),
    Case("another model", text(model="gpt-5"), Code.NOT_FOUND, "names another model"),
    Case("lone surrogate in the text", string_field(2, b"a\xed\xa0\x80"), BAD, BAD_PROTOBUF),
    Case("lone surrogate in a stop", string_field(7, b"\xed\xbf\xbf"), BAD, BAD_PROTOBUF),
    Case("invalid UTF-8", string_field(2, b"\xff\xfe"), BAD, BAD_PROTOBUF),
    Case("truncated", text("hello").SerializeToString()[:-2], BAD, BAD_PROTOBUF),
    Case("length of 2 GiB", b"\x12\xff\xff\xff\xff\x07a", BAD, BAD_PROTOBUF),
    Case("wrong wire type", b"\x2b\x2b\x2b", BAD, BAD_PROTOBUF),
    Case("nested 100,000 deep", b"\x53" * 100_000, BAD, BAD_PROTOBUF),
    Case("not protobuf", b'{"text": "hello"}', BAD, BAD_PROTOBUF),
    Case("message over the limit", text("a" * MAX_MESSAGE), Code.RESOURCE_EXHAUSTED, "larger than max"),
    Case("no such method", text(), Code.UNIMPLEMENTED, "", method="Generat"),
]
OTHER_CASES = [
    Case("abort of nothing", b"", BAD, "request_id is empty", method="Abort"),
    Case("abort of a bad id", string_field(1, b"a/b"), BAD, "request_id is", method="Abort"),
    Case("abort of an unknown id", string_field(1, b"a"), Code.NOT_FOUND, "no request", method="Abort"),
    Case("tokenize nothing", b"", BAD, "input is not set", method="Tokenize"),
    Case("tokenize a surrogate", string_field(1, b"\xed\xa0\x80"), BAD, BAD_PROTOBUF, method="Tokenize"),
    Case(
        "tokenize a chat with text's option",
        inference_pb2.TokenizeRequest(chat=chat([]), add_special_tokens=True).SerializeToString(),
        BAD,
        "add_special_tokens applies to text only",
        method="Tokenize",
    ),
    Case(
        "detokenize V",
        inference_pb2.DetokenizeRequest(token_ids=[0, VOCAB]).SerializeToString(),
        BAD,
        f"token id {VOCAB}",
        method="Detokenize",
    ),
    Case("info of garbage", b"\xff\xff", BAD, BAD_PROTOBUF, method="GetModelInfo"),
]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Background]:
    model = write_tiny_model(tmp_path_factory.mktemp("model"))
    with serving_in_background(model, max_message_bytes=MAX_MESSAGE) as running:
        yield running


async def call(
    channel: grpc.aio.Channel, service: str, method: str, raw: bytes
) -> grpc.aio.AioRpcError | None:
    """Send bytes as they are. Reading a unary method as a stream is the same on the wire."""
    try:
        async for _ in channel.unary_stream(f"/{service}/{method}")(raw, timeout=10):
            pass
    except grpc.aio.AioRpcError as error:
        return error
    return None


async def good_request_works(stack: Background) -> None:
    request = ids(5, 6, sampling=sampling(max_tokens=3, seed=2))
    chunks = await stack.client.generate_all(request, timeout=10)
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    assert tokens == [(2 * 31 + 5 * 7 + index * 13 + 1) % VOCAB for index in range(3)]
    assert chunks[-1].finish_reason == types_pb2.FINISH_REASON_LENGTH


@pytest.mark.parametrize("case", [*GENERATE_CASES, *OTHER_CASES], ids=lambda case: case.name)
def test_bad_input_is_refused_and_harms_nothing(stack: Background, case: Case) -> None:
    async def check() -> None:
        boot_id = (await stack.engine.status()).boot_id
        raw = case.request if isinstance(case.request, bytes) else case.request.SerializeToString()
        error = await call(stack.client.channel, INFERENCE_SERVICE, case.method, raw)
        assert error is not None, "the request was served"
        assert error.code() is case.code, error.details()
        assert any(part in (error.details() or "") for part in case.says.split("|")), error.details()
        assert not UNCLEAN.search(error.details() or ""), error.details()
        if case.error_code is not None:
            assert error_code(error) == case.error_code
        await good_request_works(stack)
        await stack.engine.wait_idle()
        assert (await stack.engine.status()).boot_id == boot_id

    stack.run(check())


ENGINE_CASES = {
    "empty prompt": (engine_pb2.Submit(), "empty"),
    "id V": (engine_pb2.Submit(prompt_token_ids=[VOCAB]), "outside the vocabulary"),
    "context filled": (engine_pb2.Submit(prompt_token_ids=[1] * CONTEXT), "context"),
    "max_tokens over what is left": (
        engine_pb2.Submit(prompt_token_ids=[1, 2], sampling=sampling(max_tokens=CONTEXT)),
        "exceed the context",
    ),
    "NaN": (
        engine_pb2.Submit(prompt_token_ids=[1], sampling=sampling(temperature=NAN)),
        "temperature is nan",
    ),
    "stop id -1": (
        engine_pb2.Submit(prompt_token_ids=[1], sampling=sampling(stop_token_ids=[-1])),
        "stop token id",
    ),
    "stop id 2**63 - 1": (
        engine_pb2.Submit(prompt_token_ids=[1], sampling=sampling(stop_token_ids=[2**63 - 1])),
        "stop token id",
    ),
    "SLO class 9": (
        engine_pb2.Submit(prompt_token_ids=[1], slo=types_pb2.Slo(slo_class=9)),  # type: ignore[arg-type]
        "slo_class is 9",
    ),
}


@pytest.mark.parametrize("name", ENGINE_CASES)
def test_the_engine_checks_again(stack: Background, name: str) -> None:
    """gRPC reaches the engine without the gateway."""
    submit, says = ENGINE_CASES[name]

    async def check() -> None:
        connection = stack.engine.client.connect()
        assert (await connection.read()).hello.model == DESCRIPTION.model
        good = engine_pb2.Submit(handle=8, prompt_token_ids=[1], sampling=sampling(max_tokens=2))
        bad = engine_pb2.Submit()
        bad.CopyFrom(submit)
        bad.handle = 7
        await connection.write(engine_pb2.EngineCommand(submits=[bad, good]))
        rejected, finished = [], []
        while not (rejected and finished):
            output = (await connection.read()).output
            rejected += output.rejected
            finished += output.finished
        connection.cancel()
        assert [(r.handle, r.code) for r in rejected] == [(7, Code.INVALID_ARGUMENT.value[0])]
        assert says in rejected[0].message
        assert not UNCLEAN.search(rejected[0].message)
        assert [f.handle for f in finished] == [8]
        await stack.engine.wait_idle()

    stack.run(check())


METHODS = {
    INFERENCE_SERVICE: ("Generate", "Abort", "Tokenize", "Detokenize", "GetModelInfo"),
    "chiron.v1.Engine": ("Connect", "GetStatus"),
    "grpc.health.v1.Health": ("Check",),
}
ALLOWED = {None, BAD, Code.NOT_FOUND, Code.RESOURCE_EXHAUSTED, Code.ALREADY_EXISTS}


def test_random_bytes_to_every_method_harm_nothing(stack: Background) -> None:
    """Pure noise, and valid messages with a few bytes changed, which get further."""
    rng = random.Random(20)
    valid = text("hello", stop=["x"], sampling=sampling(max_tokens=2, seed=1)).SerializeToString()

    def noise() -> bytes:
        if rng.random() < 0.5:
            return rng.randbytes(rng.randrange(64))
        mutated = bytearray(valid)
        for _ in range(rng.randint(1, 3)):
            mutated[rng.randrange(len(mutated))] = rng.randrange(256)
        return bytes(mutated)

    async def fuzz() -> None:
        boot_id = (await stack.engine.status()).boot_id
        for service, methods in METHODS.items():
            of_engine = service == "chiron.v1.Engine"
            channel = stack.engine.client.channel if of_engine else stack.client.channel
            for method in methods:
                for _ in range(150):
                    raw = noise()
                    error = await call(channel, service, method, raw)
                    code = None if error is None else error.code()
                    assert code in ALLOWED, (service, method, raw, error)
                    assert error is None or not UNCLEAN.search(error.details() or ""), error.details()
        await good_request_works(stack)
        assert (await stack.engine.status()).boot_id == boot_id

    stack.run(fuzz())
