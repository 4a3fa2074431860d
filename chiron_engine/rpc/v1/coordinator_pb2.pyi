from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EngineReport(_message.Message):
    __slots__ = ("register", "telemetry")
    REGISTER_FIELD_NUMBER: _ClassVar[int]
    TELEMETRY_FIELD_NUMBER: _ClassVar[int]
    register: Register
    telemetry: Telemetry
    def __init__(self, register: _Optional[_Union[Register, _Mapping]] = ..., telemetry: _Optional[_Union[Telemetry, _Mapping]] = ...) -> None: ...

class Register(_message.Message):
    __slots__ = ("boot_id", "instance_id", "version", "model", "address", "host", "pid", "block_size", "kv_capacity_tokens", "max_slots", "max_model_len", "max_step_tokens", "devices", "costs", "coordinator_id")
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    KV_CAPACITY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_SLOTS_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_STEP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    COSTS_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_ID_FIELD_NUMBER: _ClassVar[int]
    boot_id: str
    instance_id: int
    version: str
    model: str
    address: str
    host: str
    pid: int
    block_size: int
    kv_capacity_tokens: int
    max_slots: int
    max_model_len: int
    max_step_tokens: int
    devices: str
    costs: StepCosts
    coordinator_id: str
    def __init__(self, boot_id: _Optional[str] = ..., instance_id: _Optional[int] = ..., version: _Optional[str] = ..., model: _Optional[str] = ..., address: _Optional[str] = ..., host: _Optional[str] = ..., pid: _Optional[int] = ..., block_size: _Optional[int] = ..., kv_capacity_tokens: _Optional[int] = ..., max_slots: _Optional[int] = ..., max_model_len: _Optional[int] = ..., max_step_tokens: _Optional[int] = ..., devices: _Optional[str] = ..., costs: _Optional[_Union[StepCosts, _Mapping]] = ..., coordinator_id: _Optional[str] = ...) -> None: ...

class StepCosts(_message.Message):
    __slots__ = ("base_s", "per_request_s", "per_kv_token_s", "per_prompt_token_s", "per_prompt_context_s")
    BASE_S_FIELD_NUMBER: _ClassVar[int]
    PER_REQUEST_S_FIELD_NUMBER: _ClassVar[int]
    PER_KV_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    PER_PROMPT_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    PER_PROMPT_CONTEXT_S_FIELD_NUMBER: _ClassVar[int]
    base_s: float
    per_request_s: float
    per_kv_token_s: float
    per_prompt_token_s: float
    per_prompt_context_s: float
    def __init__(self, base_s: _Optional[float] = ..., per_request_s: _Optional[float] = ..., per_kv_token_s: _Optional[float] = ..., per_prompt_token_s: _Optional[float] = ..., per_prompt_context_s: _Optional[float] = ...) -> None: ...

class Telemetry(_message.Message):
    __slots__ = ("boot_id", "step", "running_interactive", "running_batch", "waiting", "kv_tokens", "max_running", "token_budget", "itl_s", "batch_tokens_total", "output_tokens_total", "preemptions_total", "last_step", "latency_backpressure", "throughput_backpressure", "free_blocks", "total_blocks", "free_host_blocks", "total_host_blocks", "prefix_hit_tokens", "prefix_query_tokens", "phase", "drafted_tokens", "accepted_tokens")
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    RUNNING_INTERACTIVE_FIELD_NUMBER: _ClassVar[int]
    RUNNING_BATCH_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_FIELD_NUMBER: _ClassVar[int]
    TOKEN_BUDGET_FIELD_NUMBER: _ClassVar[int]
    ITL_S_FIELD_NUMBER: _ClassVar[int]
    BATCH_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_FIELD_NUMBER: _ClassVar[int]
    LATENCY_BACKPRESSURE_FIELD_NUMBER: _ClassVar[int]
    THROUGHPUT_BACKPRESSURE_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FREE_HOST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_HOST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_QUERY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    DRAFTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    boot_id: str
    step: int
    running_interactive: int
    running_batch: int
    waiting: int
    kv_tokens: int
    max_running: int
    token_budget: int
    itl_s: float
    batch_tokens_total: int
    output_tokens_total: int
    preemptions_total: int
    last_step: MeasuredStep
    latency_backpressure: float
    throughput_backpressure: float
    free_blocks: int
    total_blocks: int
    free_host_blocks: int
    total_host_blocks: int
    prefix_hit_tokens: int
    prefix_query_tokens: int
    phase: str
    drafted_tokens: int
    accepted_tokens: int
    def __init__(self, boot_id: _Optional[str] = ..., step: _Optional[int] = ..., running_interactive: _Optional[int] = ..., running_batch: _Optional[int] = ..., waiting: _Optional[int] = ..., kv_tokens: _Optional[int] = ..., max_running: _Optional[int] = ..., token_budget: _Optional[int] = ..., itl_s: _Optional[float] = ..., batch_tokens_total: _Optional[int] = ..., output_tokens_total: _Optional[int] = ..., preemptions_total: _Optional[int] = ..., last_step: _Optional[_Union[MeasuredStep, _Mapping]] = ..., latency_backpressure: _Optional[float] = ..., throughput_backpressure: _Optional[float] = ..., free_blocks: _Optional[int] = ..., total_blocks: _Optional[int] = ..., free_host_blocks: _Optional[int] = ..., total_host_blocks: _Optional[int] = ..., prefix_hit_tokens: _Optional[int] = ..., prefix_query_tokens: _Optional[int] = ..., phase: _Optional[str] = ..., drafted_tokens: _Optional[int] = ..., accepted_tokens: _Optional[int] = ...) -> None: ...

class MeasuredStep(_message.Message):
    __slots__ = ("seconds", "requests", "kv_tokens", "prompt_tokens", "prompt_context")
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    requests: int
    kv_tokens: int
    prompt_tokens: int
    prompt_context: int
    def __init__(self, seconds: _Optional[float] = ..., requests: _Optional[int] = ..., kv_tokens: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., prompt_context: _Optional[int] = ...) -> None: ...

class EngineOrder(_message.Message):
    __slots__ = ("joined", "set_targets", "drain")
    JOINED_FIELD_NUMBER: _ClassVar[int]
    SET_TARGETS_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    joined: Joined
    set_targets: SetTargets
    drain: DrainOrder
    def __init__(self, joined: _Optional[_Union[Joined, _Mapping]] = ..., set_targets: _Optional[_Union[SetTargets, _Mapping]] = ..., drain: _Optional[_Union[DrainOrder, _Mapping]] = ...) -> None: ...

class Joined(_message.Message):
    __slots__ = ("instance_id", "report_every_s", "coordinator_id")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    REPORT_EVERY_S_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_ID_FIELD_NUMBER: _ClassVar[int]
    instance_id: int
    report_every_s: float
    coordinator_id: str
    def __init__(self, instance_id: _Optional[int] = ..., report_every_s: _Optional[float] = ..., coordinator_id: _Optional[str] = ...) -> None: ...

class SetTargets(_message.Message):
    __slots__ = ("role", "interactive_itl_s", "batch_itl_s")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    INTERACTIVE_ITL_S_FIELD_NUMBER: _ClassVar[int]
    BATCH_ITL_S_FIELD_NUMBER: _ClassVar[int]
    role: str
    interactive_itl_s: float
    batch_itl_s: float
    def __init__(self, role: _Optional[str] = ..., interactive_itl_s: _Optional[float] = ..., batch_itl_s: _Optional[float] = ...) -> None: ...

class DrainOrder(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetFleetRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Fleet(_message.Message):
    __slots__ = ("model", "uptime_s", "instances", "busy", "theta", "interactive_backpressure", "batch_backpressure", "target", "batch_target", "held_interactive", "queued_batch", "max_devices", "min_instances", "trouble", "failed_launches", "batch_itl_s")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    INSTANCES_FIELD_NUMBER: _ClassVar[int]
    BUSY_FIELD_NUMBER: _ClassVar[int]
    THETA_FIELD_NUMBER: _ClassVar[int]
    INTERACTIVE_BACKPRESSURE_FIELD_NUMBER: _ClassVar[int]
    BATCH_BACKPRESSURE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    BATCH_TARGET_FIELD_NUMBER: _ClassVar[int]
    HELD_INTERACTIVE_FIELD_NUMBER: _ClassVar[int]
    QUEUED_BATCH_FIELD_NUMBER: _ClassVar[int]
    MAX_DEVICES_FIELD_NUMBER: _ClassVar[int]
    MIN_INSTANCES_FIELD_NUMBER: _ClassVar[int]
    TROUBLE_FIELD_NUMBER: _ClassVar[int]
    FAILED_LAUNCHES_FIELD_NUMBER: _ClassVar[int]
    BATCH_ITL_S_FIELD_NUMBER: _ClassVar[int]
    model: str
    uptime_s: float
    instances: _containers.RepeatedCompositeFieldContainer[Instance]
    busy: float
    theta: float
    interactive_backpressure: float
    batch_backpressure: int
    target: int
    batch_target: int
    held_interactive: int
    queued_batch: int
    max_devices: int
    min_instances: int
    trouble: str
    failed_launches: int
    batch_itl_s: float
    def __init__(self, model: _Optional[str] = ..., uptime_s: _Optional[float] = ..., instances: _Optional[_Iterable[_Union[Instance, _Mapping]]] = ..., busy: _Optional[float] = ..., theta: _Optional[float] = ..., interactive_backpressure: _Optional[float] = ..., batch_backpressure: _Optional[int] = ..., target: _Optional[int] = ..., batch_target: _Optional[int] = ..., held_interactive: _Optional[int] = ..., queued_batch: _Optional[int] = ..., max_devices: _Optional[int] = ..., min_instances: _Optional[int] = ..., trouble: _Optional[str] = ..., failed_launches: _Optional[int] = ..., batch_itl_s: _Optional[float] = ...) -> None: ...

class Instance(_message.Message):
    __slots__ = ("instance_id", "role", "state", "address", "host", "pid", "devices", "boot_id", "itl_target_s", "load", "age_s", "silent_s", "telemetry")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    ITL_TARGET_S_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    SILENT_S_FIELD_NUMBER: _ClassVar[int]
    TELEMETRY_FIELD_NUMBER: _ClassVar[int]
    instance_id: int
    role: str
    state: str
    address: str
    host: str
    pid: int
    devices: str
    boot_id: str
    itl_target_s: float
    load: float
    age_s: float
    silent_s: float
    telemetry: Telemetry
    def __init__(self, instance_id: _Optional[int] = ..., role: _Optional[str] = ..., state: _Optional[str] = ..., address: _Optional[str] = ..., host: _Optional[str] = ..., pid: _Optional[int] = ..., devices: _Optional[str] = ..., boot_id: _Optional[str] = ..., itl_target_s: _Optional[float] = ..., load: _Optional[float] = ..., age_s: _Optional[float] = ..., silent_s: _Optional[float] = ..., telemetry: _Optional[_Union[Telemetry, _Mapping]] = ...) -> None: ...

class DrainInstanceRequest(_message.Message):
    __slots__ = ("instance_id",)
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    instance_id: int
    def __init__(self, instance_id: _Optional[int] = ...) -> None: ...

class DrainInstanceResponse(_message.Message):
    __slots__ = ("gone",)
    GONE_FIELD_NUMBER: _ClassVar[int]
    gone: bool
    def __init__(self, gone: bool = ...) -> None: ...

class RetireInstanceRequest(_message.Message):
    __slots__ = ("instance_id",)
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    instance_id: int
    def __init__(self, instance_id: _Optional[int] = ...) -> None: ...

class RetireInstanceResponse(_message.Message):
    __slots__ = ("gone",)
    GONE_FIELD_NUMBER: _ClassVar[int]
    gone: bool
    def __init__(self, gone: bool = ...) -> None: ...

class ScaleFleetRequest(_message.Message):
    __slots__ = ("min_instances", "max_devices")
    MIN_INSTANCES_FIELD_NUMBER: _ClassVar[int]
    MAX_DEVICES_FIELD_NUMBER: _ClassVar[int]
    min_instances: int
    max_devices: int
    def __init__(self, min_instances: _Optional[int] = ..., max_devices: _Optional[int] = ...) -> None: ...

class ScaleFleetResponse(_message.Message):
    __slots__ = ("min_instances", "max_devices")
    MIN_INSTANCES_FIELD_NUMBER: _ClassVar[int]
    MAX_DEVICES_FIELD_NUMBER: _ClassVar[int]
    min_instances: int
    max_devices: int
    def __init__(self, min_instances: _Optional[int] = ..., max_devices: _Optional[int] = ...) -> None: ...
