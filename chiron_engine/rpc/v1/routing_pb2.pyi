from . import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GatewayReports(_message.Message):
    __slots__ = ("reports",)
    REPORTS_FIELD_NUMBER: _ClassVar[int]
    reports: _containers.RepeatedCompositeFieldContainer[GatewayReport]
    def __init__(self, reports: _Optional[_Iterable[_Union[GatewayReport, _Mapping]]] = ...) -> None: ...

class GatewayReport(_message.Message):
    __slots__ = ("attach", "arrival", "departure", "ending")
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    ARRIVAL_FIELD_NUMBER: _ClassVar[int]
    DEPARTURE_FIELD_NUMBER: _ClassVar[int]
    ENDING_FIELD_NUMBER: _ClassVar[int]
    attach: AttachGateway
    arrival: Arrival
    departure: Departure
    ending: Ending
    def __init__(self, attach: _Optional[_Union[AttachGateway, _Mapping]] = ..., arrival: _Optional[_Union[Arrival, _Mapping]] = ..., departure: _Optional[_Union[Departure, _Mapping]] = ..., ending: _Optional[_Union[Ending, _Mapping]] = ...) -> None: ...

class AttachGateway(_message.Message):
    __slots__ = ("version", "model")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    version: str
    model: str
    def __init__(self, version: _Optional[str] = ..., model: _Optional[str] = ...) -> None: ...

class Arrival(_message.Message):
    __slots__ = ("id", "slo", "prompt_tokens", "max_tokens", "prefix", "waited_s", "output_tokens")
    ID_FIELD_NUMBER: _ClassVar[int]
    SLO_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    WAITED_S_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    id: int
    slo: _types_pb2.Slo
    prompt_tokens: int
    max_tokens: int
    prefix: str
    waited_s: float
    output_tokens: int
    def __init__(self, id: _Optional[int] = ..., slo: _Optional[_Union[_types_pb2.Slo, _Mapping]] = ..., prompt_tokens: _Optional[int] = ..., max_tokens: _Optional[int] = ..., prefix: _Optional[str] = ..., waited_s: _Optional[float] = ..., output_tokens: _Optional[int] = ...) -> None: ...

class Departure(_message.Message):
    __slots__ = ("id", "attempt", "output_tokens", "saved_tokens")
    ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAVED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    id: int
    attempt: int
    output_tokens: int
    saved_tokens: int
    def __init__(self, id: _Optional[int] = ..., attempt: _Optional[int] = ..., output_tokens: _Optional[int] = ..., saved_tokens: _Optional[int] = ...) -> None: ...

class Ending(_message.Message):
    __slots__ = ("id", "reason", "output_tokens", "first_token_s", "last_token_s", "gaps_s")
    ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    LAST_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    GAPS_S_FIELD_NUMBER: _ClassVar[int]
    id: int
    reason: _types_pb2.FinishReason
    output_tokens: int
    first_token_s: float
    last_token_s: float
    gaps_s: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, id: _Optional[int] = ..., reason: _Optional[_Union[_types_pb2.FinishReason, str]] = ..., output_tokens: _Optional[int] = ..., first_token_s: _Optional[float] = ..., last_token_s: _Optional[float] = ..., gaps_s: _Optional[_Iterable[float]] = ...) -> None: ...

class GatewayOrders(_message.Message):
    __slots__ = ("orders",)
    ORDERS_FIELD_NUMBER: _ClassVar[int]
    orders: _containers.RepeatedCompositeFieldContainer[GatewayOrder]
    def __init__(self, orders: _Optional[_Iterable[_Union[GatewayOrder, _Mapping]]] = ...) -> None: ...

class GatewayOrder(_message.Message):
    __slots__ = ("welcome", "engine_up", "engine_gone", "placement", "move", "refusal", "forget")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    ENGINE_UP_FIELD_NUMBER: _ClassVar[int]
    ENGINE_GONE_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    MOVE_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    FORGET_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    engine_up: EngineUp
    engine_gone: EngineGone
    placement: Placement
    move: Move
    refusal: Refusal
    forget: ForgetSaved
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., engine_up: _Optional[_Union[EngineUp, _Mapping]] = ..., engine_gone: _Optional[_Union[EngineGone, _Mapping]] = ..., placement: _Optional[_Union[Placement, _Mapping]] = ..., move: _Optional[_Union[Move, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., forget: _Optional[_Union[ForgetSaved, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class EngineUp(_message.Message):
    __slots__ = ("instance_id", "address", "boot_id")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    instance_id: int
    address: str
    boot_id: str
    def __init__(self, instance_id: _Optional[int] = ..., address: _Optional[str] = ..., boot_id: _Optional[str] = ...) -> None: ...

class EngineGone(_message.Message):
    __slots__ = ("instance_id", "was_killed")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    WAS_KILLED_FIELD_NUMBER: _ClassVar[int]
    instance_id: int
    was_killed: bool
    def __init__(self, instance_id: _Optional[int] = ..., was_killed: bool = ...) -> None: ...

class Placement(_message.Message):
    __slots__ = ("id", "key", "attempt", "instance_id", "evictions")
    ID_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    id: int
    key: int
    attempt: int
    instance_id: int
    evictions: int
    def __init__(self, id: _Optional[int] = ..., key: _Optional[int] = ..., attempt: _Optional[int] = ..., instance_id: _Optional[int] = ..., evictions: _Optional[int] = ...) -> None: ...

class Move(_message.Message):
    __slots__ = ("id", "attempt")
    ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    id: int
    attempt: int
    def __init__(self, id: _Optional[int] = ..., attempt: _Optional[int] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("id", "code", "message", "error_code", "retry_after_ms")
    ID_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    id: int
    code: int
    message: str
    error_code: str
    retry_after_ms: int
    def __init__(self, id: _Optional[int] = ..., code: _Optional[int] = ..., message: _Optional[str] = ..., error_code: _Optional[str] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class ForgetSaved(_message.Message):
    __slots__ = ("instance_id", "key")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    instance_id: int
    key: int
    def __init__(self, instance_id: _Optional[int] = ..., key: _Optional[int] = ...) -> None: ...
