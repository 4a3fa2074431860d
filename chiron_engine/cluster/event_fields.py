"""Events and effects of the fleet policy as what JSON can hold, and back, with nothing lost.

The fields of a message become a list in the order of its class; a schema says which class has which.
Enums go by value, dicts as pairs in their order, and numbers that are not finite as strings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from operator import attrgetter
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from chiron_engine.policy.fleet.messages import FleetEffect, FleetEvent

Convert = Callable[[Any], Any]
Schema = Mapping[str, Sequence[str]]

EVENTS: dict[str, type] = {kind.__name__: kind for kind in get_args(FleetEvent)}
EFFECTS: dict[str, type] = {kind.__name__: kind for kind in get_args(FleetEffect)}
SCALARS = (int, float, str, bool, NoneType, object)


def schema(*kinds: type) -> dict[str, list[str]]:
    """Field names of these dataclasses, and of those inside them, by class name."""
    found: dict[str, list[str]] = {}
    for kind in kinds:
        found[kind.__name__] = [field.name for field in fields(kind)]
        for hint in get_type_hints(kind).values():
            for inner in _parts(hint):
                if isinstance(inner, type) and is_dataclass(inner):
                    found |= schema(inner)
    return found


def encoder(kind: type) -> Convert:
    """Of the messages of a dataclass."""
    if (made := _encoders.get(kind)) is None:
        made = _encoders[kind] = _make_encoder(kind)
    return made


_encoders: dict[type, Convert] = {}


def _make_encoder(kind: type) -> Convert:
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind)]
    if not names:
        return lambda message: ()
    read: Callable[[Any], Any] = attrgetter(*names)
    converts = [(index, convert) for index, name in enumerate(names) if (convert := _encode(hints[name]))]
    if len(names) == 1:
        (name,) = names
        only = converts[0][1] if converts else (lambda value: value)
        return lambda message: (only(getattr(message, name)),)
    if not converts:
        return read

    def encode(message: Any) -> list[Any]:
        values = list(read(message))
        for index, convert in converts:
            values[index] = convert(values[index])
        return values

    return encode


def finite(value: Any) -> Any:
    """The same with strings for infinities and NaN, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def decoder(kind: type, names_by_class: Schema) -> Convert:
    """From a list to a message of the dataclass `kind`, whose fields were written in the order that
    the schema says; what was not written takes its default. Raises ValueError where the schema has
    fields that `kind` does not know, or lacks one without a default."""
    names = names_by_class.get(kind.__name__)
    if names is None:
        raise ValueError(f"it does not say which fields {kind.__name__} has")
    known = {field.name: field for field in fields(kind)}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{kind.__name__} has {', '.join(unknown)}, which this version does not know")
    for name, field in known.items():
        if name not in names and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{kind.__name__} lacks {name}")
    hints = get_type_hints(kind)
    converts = [_decode(hints[name], names_by_class) for name in names]

    def decode(values: Any) -> Any:
        if not isinstance(values, list):
            raise ValueError(f"{kind.__name__} is {values!r}; it must be a list of {len(names)} fields")
        pairs = zip(names, converts, values, strict=True)
        return kind(**{name: convert(value) for name, convert, value in pairs})

    return decode


def _parts(hint: Any) -> tuple[Any, ...]:
    """Of a union, its members but None; any other type is the only part."""
    if get_origin(hint) in (Union, UnionType):
        return tuple(part for part in get_args(hint) if part is not NoneType)
    return (hint,)


def _encode(hint: Any) -> Convert | None:
    """None where values go as they are."""
    parts = _parts(hint)
    if all(part in SCALARS for part in parts):
        return None
    (part,) = parts
    convert = _encode_part(part)
    return convert if part is hint else (lambda value: None if value is None else convert(value))


def _encode_part(part: Any) -> Convert:
    if is_dataclass(part):
        assert isinstance(part, type)
        return encoder(part)
    if isinstance(part, type) and issubclass(part, Enum):
        return lambda value: value.value
    if get_origin(part) is dict:
        return lambda value: list(value.items())
    if get_origin(part) is tuple:
        return list
    raise TypeError(f"no way to write a {part}")


def _decode(hint: Any, names_by_class: Schema) -> Convert:
    parts = _parts(hint)
    if float in parts:
        return lambda value: float(value) if isinstance(value, str) else value
    if all(part in SCALARS for part in parts):
        return lambda value: value
    (part,) = parts
    convert = _decode_part(part, names_by_class)
    return convert if part is hint else (lambda value: None if value is None else convert(value))


def _decode_part(part: Any, names_by_class: Schema) -> Convert:
    if is_dataclass(part):
        assert isinstance(part, type)
        return decoder(part, names_by_class)
    if get_origin(part) in (dict, tuple):
        kind: type = get_origin(part)
        return lambda value: kind(tuple(item) if kind is dict else item for item in value)
    convert: Convert = part  # an enum, called with a value
    return convert
