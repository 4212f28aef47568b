"""`almost-serve` and `almost-chat`: the command lines of serving. Imports what a command needs when it runs."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import IO, Any, NoReturn

import click

from almost_eval import __version__
from almost_eval.cli.command_line import Command, Commands, options, run_command_line
from almost_eval.errors import InputError
from almost_eval.nano import DEFAULT_MODEL, DEFAULT_REWARD_MODEL
from serving.cli.gateway import DOOR, LIMIT_HELP, LIMITS, gateway
from serving.gateway.settings import KEY, GatewayLimits

_PASSED_ON = {"ignore_unknown_options": True, "help_option_names": ["--help"]}  # -h is part of an option of vLLM's
_EPILOG = (
    f"Every other option is vLLM's and is passed on as it is. The key that clients must send is read from {KEY}. "
    "Exit codes: 0 ended by a signal, 1 the server failed, 2 bad usage or input."
)


def _model(default: str, what: str) -> Command:
    return click.option("--model", default=default, show_default=True, help=what)


_ALLOW_UNUSED = click.option(
    "--allow-unused-weights", is_flag=True, help="Go on without tensors that the model does not take."
)
_SERVER: list[Command] = [
    click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on."),
    click.option("--port", type=int, default=8000, show_default=True, help="0 takes a free one."),
    click.option("--served-model-name", help="What clients call it; default the name, of a directory its last part."),
    click.option(
        "--template", default="auto", show_default=True, help="Chat template: auto, almost, vicuna, ..., or a file."
    ),
    click.option("--allow-pickle", is_flag=True, help="Accept pickled weights, which can run code when loaded."),
    click.option("--trust-remote-code", is_flag=True, help="Run Python code that the checkpoint ships."),
    _ALLOW_UNUSED,
]
_RUN: list[Command] = [
    click.option("--log", metavar="FILE", help="Append the servers' output to this file; - for stderr."),
    click.option("--start-timeout", type=float, default=1800.0, show_default=True, help="Seconds the start may take."),
    click.option("--dry-run", is_flag=True, help="Print the vLLM command and end."),
]
_STOP = click.option(
    "--stop", multiple=True, help='Default stop string of chats, may be repeated; default the template\'s; "" for none.'
)
_REST = click.argument("vllm_options", nargs=-1, type=click.UNPROCESSED, metavar="[VLLM OPTIONS]...")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="almost-serve")
def cli() -> None:
    """Serve a policy and a reward model through vLLM, and best-of-N before them."""


@cli.command(context_settings=_PASSED_ON, epilog=_EPILOG)
@_model(DEFAULT_MODEL, "Checkpoint directory, hub id or built-in name.")
@options(_SERVER, [_STOP], DOOR, _RUN, [_REST])
def policy(**values: Any) -> None:
    """Serve a causal language model: vLLM's OpenAI-compatible server.

    On a CPU, top-p and seeds cost little here: the sampler's last step is ours, with vLLM's own tokens.
    With --worker-cls auto it is vLLM's own, and top-p with a seed takes twice the time of greedy or more.
    """
    _serve_one("policy", **values)


@cli.command(context_settings=_PASSED_ON, epilog=_EPILOG)
@_model(DEFAULT_REWARD_MODEL, "Checkpoint directory, hub id or built-in name.")
@options(_SERVER, DOOR, _RUN, [_REST])
def reward(**values: Any) -> None:
    """Serve a reward model: raw logits at /classify, for conversations, texts or token ids."""
    _serve_one("reward", **values)


cli.add_command(gateway)


@cli.command(name="all")
@_model(DEFAULT_MODEL, "The policy.")
@click.option("--reward", "reward_model", default=DEFAULT_REWARD_MODEL, show_default=True, help="The reward model.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address of the gateway.")
@click.option("--port", type=int, default=8000, show_default=True, help="Port of the gateway; 0 takes a free one.")
@click.option("--policy-options", default="", help="vLLM's options for the policy, in one string.")
@click.option("--reward-options", default="", help="vLLM's options for the reward model, in one string.")
@options([_ALLOW_UNUSED], DOOR, LIMITS, _RUN)
def everything(*, log: str | None, **values: Any) -> None:
    """Serve a policy, a reward model and the gateway before them, supervised: if one ends, all end."""
    from serving.all import serve_everything

    limits = GatewayLimits(**{option: values.pop(option) for option in LIMIT_HELP})
    with _log(log) as stream:
        serve_everything(log=stream, limits=limits, **values)


def _serve_one(
    kind: str,
    *,
    model: str,
    vllm_options: Sequence[str],
    log: str | None,
    start_timeout: float,
    dry_run: bool,
    stop: Sequence[str] = (),
    **settings: Any,
) -> None:
    from serving.launch.supervisor import run_servers
    from serving.vllm.launch import VLLMServer

    _refuse_words(vllm_options)
    key = os.environ.get(KEY) or None
    with _log(log) as stream:
        server = VLLMServer(kind, model, stop=stop or None, options=vllm_options, api_key=key, log=stream, **settings)
        if dry_run:
            click.echo(server.vllm.shown(f'"${KEY}"' if key else ""))
            return
        if server.vllm.note:
            click.echo(server.vllm.note, err=True)
        if server.served.warning:
            click.echo(f"warning: {server.served.warning}", err=True)
        if not server.has_key and settings["host"] not in ("127.0.0.1", "::1", "localhost"):
            click.echo(f"warning: no key is set ({KEY}): whoever reaches {settings['host']} may use it", err=True)

        def ready() -> None:
            where = "as a node without an address" if server.vllm.headless else f"at {server.url}"
            click.echo(f"{server.name} {where}, ready after {server.age_s:.0f} s")

        run_servers([server], ready, timeout_s=start_timeout)


def _refuse_words(words: Sequence[str]) -> None:
    """A word before the first option is no option's value: most likely the model, without `--model`."""
    if words and not words[0].startswith("-"):
        raise InputError(f"unexpected argument {words[0]!r}; give the checkpoint with --model")


@contextlib.contextmanager
def _log(path: str | None) -> Iterator[IO[str] | None]:
    if path is None or path == "-":
        yield sys.stderr if path else None
        return
    try:
        stream = open(path, "a", encoding="utf-8")  # noqa: SIM115  (closed below)
    except OSError as error:
        raise InputError(f"--log {path} cannot be written: {error.strerror}") from None
    with stream:
        yield stream


def serve() -> NoReturn:
    """`almost-serve`."""
    from serving.launch.process import watch_parent

    watch_parent()
    run_command_line(cli, "almost-serve")


if __name__ == "__main__":
    serve()
