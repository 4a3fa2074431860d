"""Global autoscalers by name."""

from __future__ import annotations

from .config import FleetConfig
from .fleet_view import GlobalAutoscaler
from .global_autoscaler import ChironAutoscaler
from .messages import InstanceSpec
from .paper_autoscaler import PaperAutoscaler, PaperLiteralAutoscaler
from .static_autoscaler import StaticAutoscaler

GLOBAL_AUTOSCALERS = ("chiron", "paper", "paper-literal", "static:N")


def make_global_autoscaler(name: str, config: FleetConfig, spec: InstanceSpec) -> GlobalAutoscaler:
    """Raises ValueError for an unknown name, or for a static number that the GPU cap forbids."""
    if name == "chiron":
        return ChironAutoscaler(config)
    if name == "paper":
        return PaperAutoscaler()
    if name == "paper-literal":
        return PaperLiteralAutoscaler()
    if name.startswith("static:"):
        return StaticAutoscaler(_static_instances(name, config, spec))
    raise ValueError(f"unknown policy {name!r}; the policies are {', '.join(GLOBAL_AUTOSCALERS)}")


def _static_instances(name: str, config: FleetConfig, spec: InstanceSpec) -> int:
    count = name.removeprefix("static:")
    most = config.max_gpus // spec.gpus
    if not (count.isascii() and count.isdigit() and 1 <= int(count) <= most):
        raise ValueError(f"{name!r}: N must be a whole number from 1 to {most}, what the GPUs hold")
    return int(count)
