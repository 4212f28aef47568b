"""`--config FILE.yaml`: a command's options in a file, under the names of its flags.

What stands on the command line wins. The file is read as text, value by value, and each value goes through the same
check as a flag's: YAML's own ideas (`no` is false, `007` is 7) do not come into it. A run records the flags that a
file stood for, not the file's name, as the file may change.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

import click

from almost_eval.cli.command_line import comma_list
from almost_eval.errors import InputError, did_you_mean

NAME = "config"


class ConfigFile(click.ParamType):
    """A file of options: reading it sets the defaults of the command's other options."""

    name = "file"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Read the file, where the command line names one."""
        if ctx is not None and not ctx.resilient_parsing:
            _apply(ctx, Path(value))
        return value


CONFIG = click.Option(
    [f"--{NAME}"],
    type=ConfigFile(),
    metavar="FILE.yaml",
    is_eager=True,  # the other options take their values from it
    expose_value=False,
    help="Options from a file, named as here (limit: 10); a flag on the command line wins.",
)
"""The option `--config` of every command."""


def add_config(group: click.Group, leave_out: Collection[str] = ()) -> None:
    """Give every command below a group the option `--config`, but for those named, which have it already."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            add_config(command)
        elif name not in leave_out:
            command.params.append(CONFIG)


def _apply(context: click.Context, file: Path) -> None:
    from almost_eval.run.provenance import recording_command

    values = read_config(file, context)
    context.default_map = {**(context.default_map or {}), **{str(o.name): value for o, value in values.items()}}
    context.with_resource(recording_command(spelled_out(sys.argv, context, values)))


def read_config(file: Path, context: click.Context) -> dict[click.Option, Any]:
    """The options that a file sets, with values as the command line would hold them.

    It is YAML: one mapping from names of flags, without the dashes in front, to values.

    Raises:
        InputError: no such file, not a mapping, an unknown name, one option twice, or a value that it does not take.
    """
    known = {
        name.removeprefix("--"): param
        for param in context.command.params
        if isinstance(param, click.Option) and param.name != NAME
        for name in param.opts
        if name.startswith("--")
    }
    values: dict[click.Option, Any] = {}
    for key, value in _read(file).items():
        option = known.get(key.replace("_", "-"))
        if option is None:
            raise InputError(f"{file}: {context.info_name} has no option {key!r}; {did_you_mean(key, known)}")
        if option in values:  # in two spellings, or by two names of one flag
            raise InputError(f"{file}: {key!r} and another key set one option; keep one")
        values[option] = _value(option, value, context, f"{file}: {key}")
    return values


def spelled_out(argv: list[str], context: click.Context, values: dict[click.Option, Any]) -> list[str]:
    """`argv` with a file's options as flags in place of `--config`; as it was where it is another program's.

    They stand before the other flags, so that those still win; of an option that may be repeated, which would add up,
    they stand only where no other flag names it.
    """
    command = context.command_path.split()[1:]
    if argv[1 : 1 + len(command)] != command:
        return argv
    rest, words = [], iter(argv[1 + len(command) :])
    for word in words:
        if word == f"--{NAME}":
            next(words, None)
        elif not word.startswith(f"--{NAME}="):
            rest.append(word)
    flags: list[str] = []
    for option, value in values.items():
        name = next(name for name in option.opts if name.startswith("--"))
        if option.is_flag:
            flags += [name] if value else [no for no in option.secondary_opts[:1] if no]
        elif not option.multiple:
            flags += [name, value]
        elif not any(word == own or word.startswith(f"{own}=") for word in rest for own in option.opts):
            flags += [word for one in value for word in (name, one)]
    return [argv[0], *command, *flags, *rest]


def _read(file: Path) -> dict[str, Any]:
    import yaml

    try:
        text = file.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.BaseLoader)
        options = yaml.load(text, Loader=yaml.BaseLoader)  # every value as it is written; makes no objects
    except OSError as error:
        raise InputError(f"--{NAME} {file} cannot be read ({error.strerror}); give a YAML file of options") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"--{NAME} {file} is not YAML: {error}") from None
    if root is None:
        return {}
    if not isinstance(options, dict):
        raise InputError(f"--{NAME} {file} holds no options; write one a line, as in limit: 10")
    count = Counter(str(key.value) for key, _ in root.value)  # a dict has forgotten which of two it dropped
    if twice := [name for name in count if count[name] > 1]:
        raise InputError(f"{file}: {twice[0]} stands there twice; keep one")
    return {str(key): value for key, value in options.items()}


def _value(option: click.Option, value: Any, context: click.Context, where: str) -> Any:
    def refuse(message: str) -> NoReturn:
        raise InputError(f"{where}: {message}")

    items = value if isinstance(value, list) else [value]
    if any(not isinstance(item, str) for item in items):
        refuse("is nested, and an option has a plain value")
    if any(item == "" for item in items):
        refuse("has no value; leave it out, or give one")
    if option.callback is comma_list:
        value = ",".join(items)
    elif option.multiple:
        value = tuple(items)
    elif isinstance(value, list):
        refuse("takes one value, not a list")
    try:
        checked = option.type_cast_value(context, value)
    except click.BadParameter as error:
        refuse(f"{error.message} (see --help)")
    except ValueError as error:  # a NUL in the name of a file
        refuse(str(error))
    return checked if option.is_flag else value
