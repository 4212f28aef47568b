"""`almost-chat`. Imports what it needs when it runs, so that `--help` is instant."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, NoReturn

import click

from almost_eval import __version__
from almost_eval.cli.command_line import run_command_line
from almost_eval.errors import InputError, MissingDependencyError

STARTED = time.perf_counter()
LOGIN = "ALMOST_CHAT_AUTH"
PATH = click.Path(path_type=Path)
DEFAULT_MODELS = ("nano/almost", "nano/sft", "nano/vanilla-large")


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="almost-chat")
@click.option(
    "--base-url", "urls", multiple=True, metavar="[NAME=]URL[#MODEL]", help="An OpenAI-compatible endpoint, with /v1."
)
@click.option("--model", "models", multiple=True, metavar="CKPT", help="A checkpoint to load here; several to compare.")
@click.option("--reward", metavar="CKPT", help="Reward model for --model; built-in models have nano/reward.")
@click.option("--engine", type=click.Choice(["hf", "vllm"]), default="hf", show_default=True, help="What runs --model.")
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16.")
@click.option("--device", default="auto", show_default=True, help="hf: auto, cpu, cuda, cuda:1, mps.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=7860, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--auth", is_flag=True, help=f"Insist on a login: user:password in {LOGIN}.")
@click.option("--votes", type=PATH, default=Path("runs/arena.db"), show_default=True, help="File of the arena's votes.")
@click.option("--questions", type=PATH, help="JSONL with the arena's questions: text, prompt, question or turns.")
@click.option("--reports", type=PATH, default=Path("runs"), show_default=True, help="Folder whose reports are shown.")
@click.option("--rate", default=30, show_default=True, type=click.IntRange(1), help="Questions a minute per visitor.")
@click.option("--concurrency", default=8, show_default=True, type=click.IntRange(1), help="Answers at a time.")
@click.option("--max-tokens", default=256, show_default=True, type=click.IntRange(1, 8192), help="Of an answer.")
@click.option("--temperature", default=0.7, show_default=True, type=click.FloatRange(0, 2), help="Of answers.")
@click.option("--seed", type=int, help="Of the arena's shuffling.  [default: drawn]")
def chat(**given: Any) -> None:
    """A chat page for any model: talk to it, compare two, vote blindly.

    \b
    Example:
      almost-chat                                           built-in models, nothing to download
      almost-chat --model ./my-checkpoint --reward ./my-reward-model
      almost-chat --base-url http://127.0.0.1:8000/v1 --base-url other=http://127.0.0.1:8001/v1

    A key for --base-url comes from ALMOST_API_KEY or OPENAI_API_KEY. Where ALMOST_CHAT_AUTH holds user:password, the
    page asks for it.
    """
    from importlib.util import find_spec

    for package in ("gradio", "fastapi", "uvicorn", "httpx"):
        if find_spec(package) is None:
            raise MissingDependencyError(f"almost-chat needs {package}: pip install 'almost-toolkit[demo]'")
    from serving.chat.start import serve

    serve(given, _login(given), STARTED)


def _login(given: dict[str, Any]) -> str | None:
    login = os.environ.get(LOGIN) or None
    if given["auth"] and not login:
        raise InputError(f"--auth needs user:password in the environment variable {LOGIN}")
    if login is not None and not all(login.partition(":")[::2]):
        raise InputError(f"{LOGIN} must hold user:password, both of them")
    return login


def main() -> NoReturn:
    """Run the command line."""
    run_command_line(chat, "almost-chat")


if __name__ == "__main__":
    main()
