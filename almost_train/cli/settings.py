"""Commands whose flags are made from a stage's settings dataclass and from the engine's options."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from almost_eval.cli.command_line import import_transformers, options_of
from almost_eval.cli.config_file import CONFIG
from almost_eval.cli.options import GENERATION_FIELDS, engine_flag, engine_options
from almost_eval.run.trackers import logging_to
from almost_eval.types import JSONObject
from almost_train.cli.options import UserPath, show

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from almost_train.common.config import SettingField

GENERATION_OPTIONS = [engine_flag(option) for option in GENERATION_FIELDS.values()]
"""The flags of every command that generates."""


class SettingsCommand(click.Command):
    """A command with a flag for each field of a settings dataclass, made on first use: the class is slow to import.

    `--config` reads flags from a file.

    The command's function gets `settings` and `progress`, and with `engine` also `engine_for`. It returns the stage's
    result, which is shown as a table, or with `--json` as it is.

    Args:
        settings: the dataclass, as `module:name`.
        engine: whether it takes the engine's flags too.
        check: gets the result once it is shown; what it raises is the command's error.
        command: what click takes.
    """

    def __init__(
        self,
        *args: Any,
        settings: str,
        engine: bool = False,
        check: Callable[[JSONObject], None] | None = None,
        **command: Any,
    ) -> None:
        super().__init__(*args, **command)
        self._settings = settings
        self._engine = engine
        self._check = check
        json = click.Option(["--json", "as_json"], is_flag=True, help="Print result.json instead of the table.")
        self._own = [*self.params, json, CONFIG]
        self._made = False

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """click's, with the settings' flags."""
        if not self._made:
            own = {param.name for param in self._own}
            self.params = [*self._own, *(flag for flag in self._flags() if flag.name not in own)]
            self._made = True
        return super().get_params(ctx)

    def settings_class(self) -> type[DataclassInstance]:
        """The dataclass."""
        module, _, name = self._settings.partition(":")
        cls: type[DataclassInstance] = getattr(import_module(module), name)
        return cls

    def _flags(self) -> list[click.Option]:
        from almost_train.common.config import settings_of

        settings = settings_of(self.settings_class())
        flags = [settings_flag(setting) for setting in settings.values()]
        if self._engine:
            flags += [flag for flag in options_of(GENERATION_OPTIONS) if flag.name not in settings]
        return flags

    def invoke(self, ctx: click.Context) -> int:
        """click's, with the flags gathered into `settings` and `engine_for`; shows the result."""
        from almost_eval.progress import progress_for
        from almost_train.common.config import settings_from, settings_of
        from almost_train.common.hub import open_repository, push
        from almost_train.common.processes import is_main

        cls = self.settings_class()
        values = {name: ctx.params.pop(name) for name in settings_of(cls) if name in ctx.params}
        ctx.params["settings"] = settings_from(cls, values, str(self.name))
        if self._engine:
            from almost_eval.engines.build import generation_engine

            options = engine_options({name: ctx.params.pop(name, None) for name in GENERATION_FIELDS})
            ctx.params["engine_for"] = lambda model: generation_engine(model, options)
        ctx.params["progress"] = progress_for()
        import_transformers()
        as_json = ctx.params.pop("as_json")
        repository = ctx.params.pop("push_to_hub", None)
        if repository and is_main():
            open_repository(repository)
        with logging_to(ctx.params.pop("log_to", ())):
            result: JSONObject = super().invoke(ctx)
        show(result, as_json)
        if self._check:
            self._check(result)
        if repository and is_main():
            outputs = result["outputs"]
            folder: Path = ctx.params["output"] / outputs.get("policy", outputs.get("model"))["path"]
            click.echo(f"pushed: {push(folder, repository, f'almost-train {self.name}')}", err=True)
        return 0


def settings_command(
    settings: str,
    *,
    engine: bool = False,
    check: Callable[[JSONObject], None] | None = None,
    name: str | None = None,
) -> Callable[[Callable[..., JSONObject]], SettingsCommand]:
    """Decorate the function of a `SettingsCommand`; see there."""
    return click.command(name, cls=SettingsCommand, settings=settings, engine=engine, check=check)


def settings_flag(setting: SettingField) -> click.Option:
    """The flag of one setting."""
    name = setting.name.replace("_", "-")
    if setting.kind is bool:
        return click.Option([f"--{name}/--no-{name}"], default=setting.default, show_default=True, help=setting.help)
    kind: type | click.ParamType = setting.kind
    if setting.choices:
        kind = click.Choice(setting.choices)
    elif setting.kind is Path:
        kind = UserPath()
    return click.Option(
        [f"--{name}"],
        type=kind,
        multiple=setting.many,
        default=setting.default,
        show_default=setting.default not in (None, ()),
        help=setting.help,
    )
