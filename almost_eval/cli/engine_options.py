"""The options that say how a model is run: the flags are made of the fields of `EngineOptions`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from functools import partial
from typing import Any

import click

from almost_eval.engines.build import EngineOptions, Flag


def engine_flag(option: Field[Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The flag of a field of `EngineOptions`."""
    flag: Flag = option.metadata["flag"]
    name = f"--{option.name.replace('_', '-')}"
    make = partial(click.option, help=flag.help, show_default=flag.is_shown)
    if flag.kind is bool:
        return make(f"{name}/--no-{name[2:]}", default=True) if option.default else make(name, is_flag=True)
    if flag.is_auto:
        return make(name, default="auto", callback=_count_or_auto)
    return make(name, default=option.default if flag.is_shown else None, type=_type(flag))


def _type(flag: Flag) -> click.ParamType | None:
    if flag.kind is str:
        return None
    if flag.kind is int:
        return click.IntRange(min=flag.least)
    return click.FloatRange(flag.above, flag.most, min_open=flag.above is not None)


def _count_or_auto(ctx: click.Context, param: click.Parameter, value: str) -> int | None:
    if value == "auto":
        return None
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"{value!r} is neither auto nor a number of at least 1")
    return int(value)


ENGINE_OPTIONS = [engine_flag(option) for option in fields(EngineOptions) if option.metadata["flag"].help]
"""Everything but the model itself."""


def engine_options(values: Mapping[str, Any]) -> EngineOptions:
    """The options that a command's flags describe; what is None is the engine's own choice."""
    names = {field.name for field in fields(EngineOptions)}
    return EngineOptions(**{name: value for name, value in values.items() if name in names and value is not None})
