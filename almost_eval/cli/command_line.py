"""What the commands of all three packages share: names suggested, errors as one line, a console, the start, the end.

The first seconds go to imports without what no run needs, and a Ctrl-C is always prompt.
"""

from __future__ import annotations

import errno
import gc
import io
import itertools
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from almost_eval.errors import AlmostError, InputError, ModelError, RunError, did_you_mean, printable

Command = Callable[..., Any]
INTERRUPTED = "interrupted; what was done is kept, and the same command goes on from there"
_OF_THE_SYSTEM = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EISDIR,
    errno.ENOTDIR, errno.ELOOP,
}  # fmt: skip
"""What a disk or its rights refuse: no fault of the program, whose traceback would say nothing more."""
PATIENCE = 1.2
"""Seconds that an interrupted process has to end by itself."""


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
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None and not ctx.resilient_parsing:
            _refuse_empty_values(command, rest)
        return name, command, rest

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


_MAY_BE_EMPTY = {"--tasks", "--system-instruction"}
"""Options of which an empty text says something: none of them."""


def _refuse_empty_values(command: click.Command, args: Sequence[str]) -> None:
    """`--model "$UNSET"` would be the built-in model, whose numbers nobody asked for, and `--output "$UNSET"` the
    current folder: Python takes an empty path for it.
    """
    empty = {a for a, value in itertools.pairwise(args) if not value} | {a[:-1] for a in args if a.endswith("=")}
    for param in command.params:
        names = empty.intersection(param.opts) - _MAY_BE_EMPTY
        if names and isinstance(param.type, click.Path):
            raise InputError(
                f"{names.pop()} is empty; name a path, `.` for the current folder (is a variable not set?)"
            )
        if names and isinstance(param.type, click.types.StringParamType) and param.default != "":
            raise InputError(f"{names.pop()} is empty; give a value, or leave it out (is a variable not set?)")


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


class FiniteRange(click.FloatRange):
    """A number in a range. For click, `nan` is in every range, and infinity in one without an end."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """See `click.ParamType.convert`."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number", param, ctx)
        return number


SEED = click.IntRange(min=0)
"""What every generator takes as a seed."""


def comma_list(context: click.Context, param: click.Parameter, value: str | None) -> list[str]:
    """A click callback: the names of an option such as `mc1,mc2`."""
    return [name.strip() for name in (value or "").split(",") if name.strip()]


def print_json(value: Any) -> None:
    """A result on stdout, for a program to read."""
    click.echo(json.dumps(value, indent=1, ensure_ascii=False))


def open_console() -> Any:
    """A rich console on stdout."""
    from rich.console import Console

    # A pipe has no width: give the table room instead of wrapping its cells at 80.
    width = None if sys.stdout.isatty() else 110
    return Console(width=width, emoji=False, highlight=False)  # a name such as ":a:" is no picture


def run_command_line(cli: click.Command, name: str) -> NoReturn:
    """Run a command line and exit: see `run_program`."""
    run_program(lambda: cli.main(standalone_mode=False, prog_name=name))


def run_program(main: Callable[[], int | None]) -> NoReturn:
    """Run and exit: every foreseen failure is one line on stderr and its exit code."""
    code = 1
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the name of a folder may be no text in any encoding
    with prompt_interrupt():
        try:
            code = main() or 0
            sys.stdout.flush()
        except AlmostError as error:
            code = _fail(str(error), error.exit_code)
        except click.UsageError as error:
            where = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
            code = _fail(f"{error.format_message()}{where}", 2)
        except click.ClickException as error:
            code = _fail(error.format_message(), 2)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                code = _fail(f"{str(error.filename)[:60]}...: {error.strerror}; give a shorter one", 2)
            elif error.errno in _OF_THE_SYSTEM and error.filename:
                code = _fail(f"{error.filename}: {error.strerror}; what was done is kept: the same command goes on", 1)
            else:
                raise
        except (KeyboardInterrupt, click.Abort):
            code = _fail(INTERRUPTED, 1)
        except BrokenPipeError:  # the reader has gone (`| head`): what is left to say goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _fail(message: str, code: int) -> int:
    click.echo(f"error: {printable(' '.join(message.split()))}", err=True)
    return code


# --- the first seconds, and the last two ---


def import_transformers() -> None:
    """Import transformers in about 60 % of the time it takes otherwise.

    It imports scikit-learn (and so pandas and scipy.stats) for assisted generation, and scipy.optimize for the losses
    of object detection. Nothing here uses either, so its own switches say while it is imported that they are absent.
    And the garbage collector need not walk half a million new objects, again and again, that are all there to stay.
    """
    if "transformers.modeling_utils" in sys.modules:
        return
    collecting = gc.isenabled()
    gc.disable()
    try:
        from transformers import utils

        switches = {name: getattr(utils, name) for name in ("is_sklearn_available", "is_scipy_available")}
        for name in switches:
            setattr(utils, name, lambda: False)
        try:
            import transformers.modeling_utils
            import transformers.models.auto.auto_factory  # noqa: F401

            utils.logging.set_verbosity_error()  # a command says itself what there is to say
            if not sys.stderr.isatty():  # a pipe gets errors and nothing else
                utils.logging.disable_progress_bar()
        finally:
            for name, own in switches.items():
                setattr(utils, name, own)
    finally:
        gc.freeze()
        if collecting:
            gc.enable()


@contextmanager
def prompt_interrupt() -> Iterator[None]:
    """Inside, Ctrl-C ends the process within two seconds, wherever it is.

    Python hands an interrupt to the main thread, and only between two of its instructions: not while that thread
    waits for a long matrix product or reads a large file. So a thread of its own is told as well, through the wake-up
    pipe of the signal handler, and where the process is still there after `PATIENCE` seconds, it ends it. Nothing is
    lost: what was scored is on disk, and a line that was cut short is mended on resume.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    earlier = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    over = threading.Event()

    def watch() -> None:
        while signals := os.read(reader, 64):
            if signal.SIGINT in signals and not over.wait(PATIENCE):
                own_line = "\x1b[?25h\n" if sys.stderr.isatty() else ""  # and the cursor, which a progress bar hides
                os.write(2, f"{own_line}error: {INTERRUPTED}\n".encode())
                os._exit(1)

    watcher = threading.Thread(target=watch, name="interrupt", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(earlier)
        os.close(writer)  # the watcher reads the end of the pipe and is done
        watcher.join()
        os.close(reader)
