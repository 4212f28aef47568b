"""`almost-chat`. Imports what it needs when it runs, so that `--help` is instant."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, NoReturn

import click

from almost_eval import __version__
from almost_eval.cli.command_line import Command, run_command_line
from almost_eval.cli.options import ENGINE_FIELDS, engine_flag
from almost_eval.errors import InputError, MissingDependencyError
from serving.chat.options import ChatOptions, lines_of
from serving.cli.gateway import ALLOWED_HOST

STARTED = time.perf_counter()
LOGIN = "ALMOST_CHAT_AUTH"
PATH = click.Path(path_type=Path)


def _option(flag: str, text: str, kind: click.ParamType | None = None) -> Command:
    """A flag with the default of `ChatOptions`."""
    default = getattr(ChatOptions, flag.removeprefix("--").replace("-", "_"))
    return click.option(flag, type=kind, default=default, show_default=True, help=text)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="almost-chat")
@click.option(
    "--base-url", "urls", multiple=True, metavar="[NAME=]URL[#MODEL]", help="An OpenAI-compatible endpoint, with /v1."
)
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="CKPT",
    help="A checkpoint to load here, or smollm2; several to compare.",
)
@click.option("--reward", metavar="CKPT", help="Reward model for --model; built-in models have nano/reward.")
@_option("--engine", "What runs --model.", click.Choice(["hf", "vllm"]))
@engine_flag(ENGINE_FIELDS["dtype"])
@engine_flag(ENGINE_FIELDS["device"])
@_option("--host", "Address to listen on.")
@_option("--port", "0 takes a free one.", click.IntRange(0, 65535))
@ALLOWED_HOST
@click.option(
    "--trusted-proxy",
    "trusted_proxies",
    multiple=True,
    metavar="ADDRESS",
    help="A proxy whose X-Forwarded-For says who asks; may be repeated.",
)
@click.option("--auth", is_flag=True, help=f"Insist on a login: user:password in {LOGIN}, a line each.")
@_option("--votes", "File of the arena's votes.", PATH)
@_option("--conversations", "Where a page with a login keeps its users' conversations.", PATH)
@click.option("--questions", type=PATH, help="JSONL with the arena's questions: text, prompt, question or turns.")
@_option("--reports", "Folder whose reports are shown.", PATH)
@_option("--rate", "Questions a minute per visitor.", click.IntRange(1))
@click.option("--address-rate", type=click.IntRange(1), help="Questions a minute per address.  [default: as --rate]")
@_option("--concurrency", "Answers at a time.", click.IntRange(1))
@_option("--max-tokens", "Of an answer.", click.IntRange(1, 8192))
@_option("--temperature", "Of answers.", click.FloatRange(0, 2))
@click.option("--seed", type=int, help="Of the arena's shuffling.  [default: drawn]")
def chat(*, auth: bool, **values: Any) -> None:
    """A chat page for any model: talk to it, compare two, vote blindly.

    \b
    Example:
      almost-chat                                           built-in models, nothing to download
      almost-chat --model smollm2                           a real small chat model, Apache-2.0
      almost-chat --model ./my-checkpoint --reward ./my-reward-model
      almost-chat --base-url http://127.0.0.1:8000/v1 --base-url other=http://127.0.0.1:8001/v1

    A key for --base-url comes from ALMOST_API_KEY or OPENAI_API_KEY. Where ALMOST_CHAT_AUTH holds user:password, the
    page asks for it, and keeps each user's conversations on this machine; else every browser keeps its own.
    """
    from importlib.util import find_spec

    for package in ("gradio", "fastapi", "uvicorn", "httpx"):
        if find_spec(package) is None:
            raise MissingDependencyError(f"almost-chat needs {package}: pip install 'almost-toolkit[demo]'")
    from serving.chat.start import serve

    serve(ChatOptions(login=_login(auth), **values), STARTED)


def _login(insist: bool) -> str | None:
    login = os.environ.get(LOGIN) or None
    if insist and not login:
        raise InputError(f"--auth needs user:password in the environment variable {LOGIN}")
    if login is not None and not all(all(line.partition(":")[::2]) for line in lines_of(login) or [""]):
        raise InputError(f"{LOGIN} must hold user:password, both of them; for several users, on a line each")
    users = [line.partition(":")[0] for line in lines_of(login)]
    if len(set(users)) < len(users):
        raise InputError(f"{LOGIN} names a user twice")
    return login


def main() -> NoReturn:
    """Run the command line."""
    run_command_line(chat, "almost-chat")


if __name__ == "__main__":
    main()
