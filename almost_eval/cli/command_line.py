"""What the commands of all three packages share: a group that suggests names, errors as one line, a console."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import click

from almost_eval.cli.startup import INTERRUPTED, prompt_interrupt
from almost_eval.errors import AlmostError, InputError, ModelError, RunError, did_you_mean, printable

Command = Callable[..., Any]


class Commands(click.Group):
    """A group that suggests the nearest command, and lists them in the order they are defined."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Commands as defined, not by alphabet."""
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """click's, with a suggestion."""
        known = not args or args[0].startswith("-") or args[0] in self.commands
        if not known and not ctx.resilient_parsing:  # a shell that completes a line wants no error
            raise InputError(f"unknown command or task {args[0]!r}; {did_you_mean(args[0], self.commands)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """click's, which would say a bare line of its own when interrupted."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            if sys.stderr.isatty():
                click.echo(err=True)  # the terminal has shown ^C
            raise RunError(INTERRUPTED) from None
        except ModelError as error:
            command = self.get_command(ctx, ctx.invoked_subcommand or "")
            if not error.consent or command is None or isinstance(command, Commands):
                raise
            if error.consent not in {param.name for param in command.get_params(ctx)}:
                raise
            raise ModelError(f"{error} (--{error.consent.replace('_', '-')})") from None


def options(*groups: list[Any]) -> Callable[[Command], Command]:
    """Groups of options as one decorator."""

    def decorate(command: Command) -> Command:
        for option in reversed([option for group in groups for option in group]):
            command = option(command)
        return command

    return decorate


def options_of(group: list[Any]) -> list[click.Option]:
    """The options of a group as click's own."""
    return [param for param in click.command(options(group)(lambda: None)).params if isinstance(param, click.Option)]


def comma_list(context: click.Context, param: click.Parameter, value: str | None) -> list[str]:
    """A click callback: the names of an option such as `mc1,mc2`."""
    return [name.strip() for name in (value or "").split(",") if name.strip()]


def open_console() -> Any:
    """A rich console on stdout."""
    from rich.console import Console

    # A pipe has no width: give the table room instead of wrapping its cells at 80.
    width = None if sys.stdout.isatty() else 110
    return Console(width=width, emoji=False, highlight=False)  # a name such as ":a:" is no picture


def run_command_line(cli: click.Command, name: str) -> NoReturn:
    """Run a command line and exit: every foreseen failure is one line on stderr and its exit code."""
    code = 1
    with prompt_interrupt():
        try:
            code = cli.main(standalone_mode=False, prog_name=name) or 0
            sys.stdout.flush()
        except AlmostError as error:
            code = _fail(str(error), error.exit_code)
        except click.UsageError as error:
            where = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
            code = _fail(f"{error.format_message()}{where}", 2)
        except click.ClickException as error:
            code = _fail(error.format_message(), 2)
        except (KeyboardInterrupt, click.Abort):
            code = _fail(INTERRUPTED, 1)
        except BrokenPipeError:  # the reader has gone (`| head`): what is left to say goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _fail(message: str, code: int) -> int:
    click.echo(f"error: {printable(' '.join(message.split()))}", err=True)
    return code
