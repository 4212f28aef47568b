"""`--config FILE.yaml`: the flags of a command from a file. Flags on the command line win."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from almost_eval.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

NOT_IN_A_FILE = ("config", "json", "help")
"""Flags that say how the command is called, and not what it makes."""


def read_yaml(file: Path) -> object:
    """What a YAML file holds.

    Raises:
        InputError: it cannot be read.
    """
    import yaml

    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{file} cannot be read as YAML ({' '.join(str(error).split())[:160]})") from None


def config_option() -> click.Option:
    """`--config`, read before every other flag, whose defaults it sets."""

    def read(context: click.Context, _: click.Parameter, file: Path | None) -> Path | None:
        if file is not None:
            cls = context.command.settings_class()  # type: ignore[attr-defined]  # a SettingsCommand
            context.default_map = flags_of(read_yaml(file), str(file), context.command.get_params(context), cls)
        return file

    return click.Option(
        ["--config"],
        type=click.Path(path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=read,
        help="YAML with flags of this command (`learning_rate: 1.0e-5`); flags beside it win.",
    )


def flags_of(
    content: object, where: str, params: list[click.Parameter], cls: type[DataclassInstance]
) -> dict[str, object]:
    """Parameter -> value, of what a file says.

    Args:
        content: of the file.
        where: what to call it in an error.
        params: of the command.
        cls: the command's settings, which are checked as strictly as a recipe's.

    Raises:
        InputError: not a mapping, an unknown key, or a value of another kind.
    """
    from almost_train.common.config import settings_of

    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{where} holds {type(content).__name__}, not a mapping of flags: `learning_rate: 1.0e-5`")
    known = {max(param.opts, key=len).lstrip("-").replace("-", "_"): param for param in params}
    for name in NOT_IN_A_FILE:
        known.pop(name, None)
    own = settings_of(cls)
    values: dict[str, object] = {}
    for key, value in content.items():
        name = str(key).lstrip("-").replace("-", "_")
        if name not in known:
            raise InputError(f"{where}: unknown key {str(key)!r}; {did_you_mean(name, known, limit=40)}")
        param = known[name]
        assert param.name is not None
        if param.name in values:
            raise InputError(f"{where}: {name} is there twice")
        values[param.name] = value if param.name in own else _checked(value, param, f"{where}: {name}")
    return values | _settings(cls, {name: value for name, value in values.items() if name in own}, where)


def _settings(cls: type[DataclassInstance], values: Mapping[str, object], where: str) -> dict[str, object]:
    from almost_train.common.config import settings_from

    checked = settings_from(cls, values, where)
    return {name: getattr(checked, name) for name in values}


def _checked(value: object, param: click.Parameter, where: str) -> object:
    """The value of a flag that is no setting; click turns texts into paths and choices."""
    if param.multiple:
        if not isinstance(value, list):
            raise InputError(f"{where} is {value!r}; it must be a list")
        return [_one(item, param.type, where) for item in value]
    if param.default == "auto" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # a flag that takes `auto` or a count
    return _one(value, param.type, where)


def _one(value: object, kind: click.ParamType, where: str) -> object:
    wanted: tuple[type, ...] = (str,)
    words = "a text"
    if isinstance(kind, click.types.BoolParamType):
        wanted, words = (bool,), "true or false"
    elif isinstance(kind, click.types.IntParamType):
        wanted, words = (int,), "a whole number"
    elif isinstance(kind, click.types.FloatParamType):
        wanted, words = (int, float), "a number"
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        raise InputError(f"{where} is {value!r}; it must be {words}")
    return value
