from . import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class BatchStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BATCH_STATUS_UNSPECIFIED: _ClassVar[BatchStatus]
    BATCH_STATUS_IN_PROGRESS: _ClassVar[BatchStatus]
    BATCH_STATUS_CANCELLING: _ClassVar[BatchStatus]
    BATCH_STATUS_COMPLETED: _ClassVar[BatchStatus]
    BATCH_STATUS_EXPIRED: _ClassVar[BatchStatus]
    BATCH_STATUS_CANCELLED: _ClassVar[BatchStatus]

class LineState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LINE_STATE_UNSPECIFIED: _ClassVar[LineState]
    LINE_STATE_QUEUED: _ClassVar[LineState]
    LINE_STATE_RUNNING: _ClassVar[LineState]
    LINE_STATE_EVICTED: _ClassVar[LineState]
    LINE_STATE_DONE: _ClassVar[LineState]
    LINE_STATE_FAILED: _ClassVar[LineState]
    LINE_STATE_EXPIRED: _ClassVar[LineState]
    LINE_STATE_CANCELLED: _ClassVar[LineState]
BATCH_STATUS_UNSPECIFIED: BatchStatus
BATCH_STATUS_IN_PROGRESS: BatchStatus
BATCH_STATUS_CANCELLING: BatchStatus
BATCH_STATUS_COMPLETED: BatchStatus
BATCH_STATUS_EXPIRED: BatchStatus
BATCH_STATUS_CANCELLED: BatchStatus
LINE_STATE_UNSPECIFIED: LineState
LINE_STATE_QUEUED: LineState
LINE_STATE_RUNNING: LineState
LINE_STATE_EVICTED: LineState
LINE_STATE_DONE: LineState
LINE_STATE_FAILED: LineState
LINE_STATE_EXPIRED: LineState
LINE_STATE_CANCELLED: LineState

class SubmitBatchRequest(_message.Message):
    __slots__ = ("batch", "lines", "complete")
    BATCH_FIELD_NUMBER: _ClassVar[int]
    LINES_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    batch: BatchSpec
    lines: _containers.RepeatedCompositeFieldContainer[BatchLine]
    complete: bool
    def __init__(self, batch: _Optional[_Union[BatchSpec, _Mapping]] = ..., lines: _Optional[_Iterable[_Union[BatchLine, _Mapping]]] = ..., complete: bool = ...) -> None: ...

class BatchSpec(_message.Message):
    __slots__ = ("batch_id", "name", "metadata", "completion_window_s", "expire_after_s")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_WINDOW_S_FIELD_NUMBER: _ClassVar[int]
    EXPIRE_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    batch_id: str
    name: str
    metadata: _containers.ScalarMap[str, str]
    completion_window_s: float
    expire_after_s: float
    def __init__(self, batch_id: _Optional[str] = ..., name: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ..., completion_window_s: _Optional[float] = ..., expire_after_s: _Optional[float] = ...) -> None: ...

class BatchLine(_message.Message):
    __slots__ = ("custom_id", "request")
    CUSTOM_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    custom_id: str
    request: _inference_pb2.GenerateRequest
    def __init__(self, custom_id: _Optional[str] = ..., request: _Optional[_Union[_inference_pb2.GenerateRequest, _Mapping]] = ...) -> None: ...

class LineCounts(_message.Message):
    __slots__ = ("total", "queued", "running", "evicted", "done", "failed", "expired", "cancelled")
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    EXPIRED_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    total: int
    queued: int
    running: int
    evicted: int
    done: int
    failed: int
    expired: int
    cancelled: int
    def __init__(self, total: _Optional[int] = ..., queued: _Optional[int] = ..., running: _Optional[int] = ..., evicted: _Optional[int] = ..., done: _Optional[int] = ..., failed: _Optional[int] = ..., expired: _Optional[int] = ..., cancelled: _Optional[int] = ...) -> None: ...

class BatchInfo(_message.Message):
    __slots__ = ("batch_id", "name", "metadata", "status", "lines", "created", "deadline", "expires_at", "cancelled_at", "finished_at")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    LINES_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_AT_FIELD_NUMBER: _ClassVar[int]
    FINISHED_AT_FIELD_NUMBER: _ClassVar[int]
    batch_id: str
    name: str
    metadata: _containers.ScalarMap[str, str]
    status: BatchStatus
    lines: LineCounts
    created: float
    deadline: float
    expires_at: float
    cancelled_at: float
    finished_at: float
    def __init__(self, batch_id: _Optional[str] = ..., name: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ..., status: _Optional[_Union[BatchStatus, str]] = ..., lines: _Optional[_Union[LineCounts, _Mapping]] = ..., created: _Optional[float] = ..., deadline: _Optional[float] = ..., expires_at: _Optional[float] = ..., cancelled_at: _Optional[float] = ..., finished_at: _Optional[float] = ...) -> None: ...

class GetBatchRequest(_message.Message):
    __slots__ = ("batch_id",)
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    batch_id: str
    def __init__(self, batch_id: _Optional[str] = ...) -> None: ...

class ListBatchesRequest(_message.Message):
    __slots__ = ("limit", "after")
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    limit: int
    after: str
    def __init__(self, limit: _Optional[int] = ..., after: _Optional[str] = ...) -> None: ...

class ListBatchesResponse(_message.Message):
    __slots__ = ("batches", "has_more")
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    HAS_MORE_FIELD_NUMBER: _ClassVar[int]
    batches: _containers.RepeatedCompositeFieldContainer[BatchInfo]
    has_more: bool
    def __init__(self, batches: _Optional[_Iterable[_Union[BatchInfo, _Mapping]]] = ..., has_more: bool = ...) -> None: ...

class ListResultsRequest(_message.Message):
    __slots__ = ("batch_id", "after", "limit")
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    batch_id: str
    after: int
    limit: int
    def __init__(self, batch_id: _Optional[str] = ..., after: _Optional[int] = ..., limit: _Optional[int] = ...) -> None: ...

class ListResultsResponse(_message.Message):
    __slots__ = ("results", "next_after")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_AFTER_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[LineResult]
    next_after: int
    def __init__(self, results: _Optional[_Iterable[_Union[LineResult, _Mapping]]] = ..., next_after: _Optional[int] = ...) -> None: ...

class LineResult(_message.Message):
    __slots__ = ("line_no", "custom_id", "state", "ended_at", "output", "error")
    LINE_NO_FIELD_NUMBER: _ClassVar[int]
    CUSTOM_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ENDED_AT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    line_no: int
    custom_id: str
    state: LineState
    ended_at: float
    output: _inference_pb2.GenerateChunk
    error: LineError
    def __init__(self, line_no: _Optional[int] = ..., custom_id: _Optional[str] = ..., state: _Optional[_Union[LineState, str]] = ..., ended_at: _Optional[float] = ..., output: _Optional[_Union[_inference_pb2.GenerateChunk, _Mapping]] = ..., error: _Optional[_Union[LineError, _Mapping]] = ...) -> None: ...

class LineError(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class CancelBatchRequest(_message.Message):
    __slots__ = ("batch_id",)
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    batch_id: str
    def __init__(self, batch_id: _Optional[str] = ...) -> None: ...
