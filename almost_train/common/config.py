"""Settings of a stage: one frozen dataclass each, the same names in a recipe's YAML and as command-line flags.

A field is made by `option`, which holds its help and its bounds; `settings_from` reads a mapping (a recipe's section)
and `with_options` gives a click command one flag a field. Nothing unknown is dropped and nothing is coerced in silence.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from almost_eval.errors import InputError, did_you_mean

T = TypeVar("T")


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
) -> Any:
    """A dataclass field with its help text and bounds (`least` and `most` are allowed, `above` is not)."""
    metadata = {"help": help, "choices": choices, "least": least, "most": most, "above": above}
    return dataclasses.field(default=default, metadata=metadata)


def settings_from(cls: type[T], given: Mapping[str, Any], where: str) -> T:
    """The settings that a mapping gives, the rest at their defaults. Hyphens and underscores are the same.

    Args:
        cls: a dataclass whose fields are made by `option`.
        given: names and values.
        where: what to call the mapping in an error: `recipe.yaml, reward`.

    Raises:
        InputError: an unknown name, a value of another kind, or one out of bounds.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in given.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            raise InputError(f"{where}: unknown setting {str(key)!r}; {did_you_mean(name, fields, limit=30)}")
        values[name] = _checked(value, hints[name], fields[name], f"{where}: {name}")
    return cls(**values)


def settings_to_dict(settings: Any) -> dict[str, Any]:
    """The settings as JSON, every default spelled out: goes into `stage.json`."""
    return {f.name: _plain(getattr(settings, f.name)) for f in dataclasses.fields(settings)}


def with_options(cls: type[Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a click command with one flag for each field; it receives them as keyword arguments."""
    hints = typing.get_type_hints(cls)

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for field in reversed(dataclasses.fields(cls)):
            command = _flag(field, hints[field.name])(command)
        return command

    return decorate


def _flag(field: dataclasses.Field[Any], hint: Any) -> Callable[[Any], Any]:
    name = field.name.replace("_", "-")
    kind, many, _ = _kind(hint)
    help = field.metadata["help"]
    if kind is bool:
        return click.option(f"--{name}/--no-{name}", default=field.default, show_default=True, help=help)
    choices = field.metadata["choices"]
    click_type: Any = click.Choice(choices) if choices else click.Path(path_type=Path) if kind is Path else kind
    shown = field.default not in (None, ())
    return click.option(
        f"--{name}", type=click_type, multiple=many, default=field.default, show_default=shown, help=help
    )


def _kind(hint: Any) -> tuple[type, bool, bool]:
    """(type of one value, whether many are taken, whether None is)."""
    optional = False
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        optional, hint = True, inner[0]
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True, optional
    return hint, False, optional


def _checked(value: Any, hint: Any, field: dataclasses.Field[Any], where: str) -> Any:
    kind, many, optional = _kind(hint)
    if value is None:
        if optional:
            return None
        raise InputError(f"{where} is empty; it must be {_named(kind)}")
    if many:
        if not isinstance(value, list | tuple):
            raise InputError(f"{where} is {value!r}; it must be a list")
        return tuple(_one(item, kind, field, where) for item in value)
    return _one(value, kind, field, where)


def _one(value: Any, kind: type, field: dataclasses.Field[Any], where: str) -> Any:
    if kind is Path and isinstance(value, str):
        value = Path(value)
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 2e-5 as a text: it wants 2.0e-5
        try:
            value = float(value)
        except ValueError:
            raise InputError(f"{where} is {value!r}; it must be a number") from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise InputError(f"{where} is {value!r}; it must be {_named(kind)}")
    bounds = field.metadata
    if bounds["choices"] and value not in bounds["choices"]:
        raise InputError(f"{where} is {value!r}; {did_you_mean(str(value), bounds['choices'])}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise InputError(f"{where} is {value}; it must be finite")
        for bound, broken, word in (
            ("least", lambda limit: value < limit, "at least"),
            ("most", lambda limit: value > limit, "at most"),
            ("above", lambda limit: value <= limit, "above"),
        ):
            if bounds[bound] is not None and broken(bounds[bound]):
                raise InputError(f"{where} is {value}; it must be {word} {bounds[bound]:g}")
    return value


def _named(kind: type) -> str:
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false", Path: "a path"}[kind]


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
