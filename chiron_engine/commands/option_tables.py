"""Command line options shared by several commands, kept as tables and not as parameter lists."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer


@dataclass(frozen=True, slots=True)
class TableOption:
    """One option. `flag` may be `--on/--off`; `kind` is what typer makes of the text; `details` go
    to typer.Option."""

    flag: str
    kind: Any
    default: Any
    details: Mapping[str, Any]

    def parameter(self, name: str, panel: str) -> inspect.Parameter:
        option = typer.Option(self.flag, rich_help_panel=panel, **self.details)
        annotation = Annotated.__class_getitem__((self.kind, option))  # type: ignore[attr-defined]
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=self.default, annotation=annotation
        )


OptionTable = Mapping[str, TableOption]
Command = Callable[..., None]


def with_options(parameter: str, table: OptionTable, panel: str) -> Callable[[Command], Command]:
    """Give a command the options of `table`. Its parameter `parameter: dict[str, Any]` receives
    their values by name; options that the command has itself are left out."""

    def decorate(function: Command) -> Command:
        own = inspect.signature(function, eval_str=True).parameters
        names = [name for name in table if name not in own]
        kept = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own.values() if p.name != parameter]

        def command(**values: Any) -> None:
            function(**{parameter: {name: values.pop(name) for name in names}}, **values)

        added = [table[name].parameter(name, panel) for name in names]
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        command.__annotations__ = {}
        command.__signature__ = inspect.Signature([*kept, *added])  # type: ignore[attr-defined]
        return command

    return decorate


def choice(known: tuple[str, ...]) -> dict[str, Any]:
    """Details of an option that takes one of a few words."""

    def parse(text: str) -> str:
        if text not in known:
            raise typer.BadParameter(f"{text!r} is not one of {', '.join(known)}")
        return text

    return {"parser": parse, "metavar": "|".join(known)}


def refuse_given(context: typer.Context, table: OptionTable, reason: str) -> None:
    """Raises BadParameter if an option of the table was given on the command line."""
    for name, option in table.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"{option.flag} does not apply here: {reason}")
