"""Settings of a stage: one frozen dataclass each, the same names in a recipe's YAML and as command-line flags.

A field is made by `option`, which holds its help and its bounds. `settings_from` reads a mapping (a recipe's section),
and `settings_of` lists the fields as data, from which the command line makes its flags. An unknown name is an error,
and no value is turned into another type without need.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from almost_eval.errors import InputError, did_you_mean
from almost_eval.types import JSONObject

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")


MOST_SEED = 2**32 - 1
"""The largest seed: numpy's global generator, which trainers of transformers seed, takes no larger one."""
MOST_RATE = 1e30
"""The largest learning rate: ten times as much, the first step of Adam, must be a float32."""


def option(
    default: T,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
) -> T:
    """A dataclass field with its help text and bounds (`least` and `most` are allowed, `above` is not)."""
    metadata = {"help": help, "choices": choices, "least": least, "most": most, "above": above}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class SettingField:
    """One field of a settings dataclass, as data."""

    name: str
    kind: type
    """Type of one value: int, float, str, bool or Path."""
    many: bool
    """Whether it takes several values."""
    optional: bool
    """Whether it may be None."""
    default: object
    help: str
    choices: tuple[str, ...] | None = None
    least: float | None = None
    """The smallest value allowed."""
    most: float | None = None
    """The largest value allowed."""
    above: float | None = None
    """A value must be larger than this."""


def settings_of(cls: type[DataclassInstance]) -> dict[str, SettingField]:
    """Name -> setting, in the order of the dataclass, whose fields are made by `option`."""
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)
    return {f.name: SettingField(f.name, *_kind(hints[f.name]), f.default, **f.metadata) for f in fields}


def settings_from(cls: type[T], values: Mapping[str, object], where: str) -> T:
    """A settings object with the values of a mapping, the rest at their defaults. Hyphens and underscores are the same.

    Args:
        cls: a dataclass whose fields are made by `option`.
        values: by name.
        where: what to call the mapping in an error: `recipe.yaml, reward`.

    Raises:
        InputError: an unknown name, a value of another kind, or one out of bounds.
    """
    settings = settings_of(cls)  # type: ignore[arg-type]
    checked: JSONObject = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in settings:
            raise InputError(f"{where}: unknown setting {str(key)!r}; {did_you_mean(name, settings, limit=30)}")
        if name in checked:
            raise InputError(f"{where}: {name} stands there twice, with - and with _; keep one")
        checked[name] = _checked(value, settings[name], f"{where}: {name}")
    return cls(**checked)


def settings_to_dict(settings: DataclassInstance) -> JSONObject:
    """The settings as JSON, every default spelled out: goes into `stage.json`."""
    return {f.name: _plain(getattr(settings, f.name)) for f in dataclasses.fields(settings)}


def _kind(hint: object) -> tuple[type, bool, bool]:
    """(type of one value, whether many are taken, whether None is)."""
    optional = False
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        optional, hint = True, next(arg for arg in typing.get_args(hint) if arg is not type(None))
    many = typing.get_origin(hint) is tuple
    kind = typing.get_args(hint)[0] if many else hint
    assert isinstance(kind, type)
    return kind, many, optional


def _checked(value: object, setting: SettingField, where: str) -> object:
    if value is None:
        if setting.optional:
            return None
        raise InputError(f"{where} is empty; it must be {'a list' if setting.many else _named(setting.kind)}")
    if setting.many:
        if not isinstance(value, list | tuple):
            raise InputError(f"{where} is {value!r}; it must be a list")
        return tuple(_one(item, setting, where) for item in value)
    return _one(value, setting, where)


def _one(value: object, setting: SettingField, where: str) -> object:
    # 1. The type. Two texts are converted, as YAML has no other way to write them.
    kind = setting.kind
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
        # Without quotes YAML reads `no` as false, 3 as a number and 2020-01-01 as a date.
        cure = ": put quotes around it" if kind is str and isinstance(value, bool | int | float | date) else ""
        raise InputError(f"{where} is {value!r}; it must be {_named(kind)}{cure}")
    # 2. The bounds.
    if setting.choices and value not in setting.choices:
        raise InputError(f"{where} is {value!r}; {did_you_mean(str(value), setting.choices)}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise InputError(f"{where} is {value}; it must be finite")
        for word, bound, kept in (
            ("at least", setting.least, setting.least is None or value >= setting.least),
            ("at most", setting.most, setting.most is None or value <= setting.most),
            ("above", setting.above, setting.above is None or value > setting.above),
        ):
            if not kept:
                raise InputError(f"{where} is {value}; it must be {word} {bound:.15g}")
    return value


def _named(kind: type) -> str:
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false", Path: "a path"}[kind]


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
