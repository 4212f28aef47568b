"""From the options of `almost-chat` to a page that answers: everything that can be refused is, before models load."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from almost_eval.arena.votes import VoteStore
from almost_eval.errors import InputError
from serving.chat.client import Address, Endpoint
from serving.chat.conversation import Settings
from serving.chat.launch import Models, with_transformers, with_vllm
from serving.chat.session import Desk, RateLimit, System
from serving.cli.chat import DEFAULT_MODELS
from serving.launch.process import wait_ready

NANO_QUESTIONS = 100
_KEYS = ("text", "prompt", "question", "turns", "instruction")

EXAMPLES = (
    "Explain how a vaccine works to a ten-year-old.",
    "Write a short, polite e-mail that declines an invitation.",
    "What are three good habits for a calmer morning?",
    "Compare trains and planes for a trip of 600 km.",
)


def serve(given: Mapping[str, Any], login: str | None, started: float) -> None:
    """Run the page until it is interrupted.

    Raises:
        InputError: a malformed address, a model that is none, a port in use, a question file that cannot be read.
        RunError: the models' process ended.
    """
    # 1. What can be refused at once.
    addresses = [Address.parse(url) for url in given["urls"]]
    models = list(dict.fromkeys(given["models"])) or ([] if addresses else list(DEFAULT_MODELS))
    reward = _reward(models, given["reward"])
    names = [*models, *(address.name for address in addresses)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"two systems are called {twice!r}; give one a name: --base-url NAME=URL")
    questions = _questions(given["questions"], models)
    VoteStore(given["votes"])
    listening = _listen(given["host"], given["port"])

    # 2. The models load in processes of their own, while gradio is imported in this one.
    with contextlib.ExitStack() as children, listening:
        running = [children.enter_context(child) for child in _models(models, reward, given)]
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
        from serving.chat.app import create_app

        wait_ready(running)
        systems = [
            System(shown, child.endpoint(), _served(given, name))
            for child in running
            for shown, name in zip(_shown(child.names), child.names, strict=True)
        ]
        systems += [
            System(address.name, Endpoint.with_key_of_environment(address.url), address.model) for address in addresses
        ]
        desk = Desk(
            systems,
            given["votes"],
            given["reports"],
            questions,
            _examples(models),
            RateLimit(given["rate"]),
            given["concurrency"],
            defaults=Settings(max_tokens=given["max_tokens"], temperature=given["temperature"]),
            seed=given["seed"],
        )
        _run(create_app(desk, login), listening, login, started)


def _models(models: list[str], reward: str | None, given: Mapping[str, Any]) -> list[Models]:
    if given["engine"] == "vllm":
        return [with_vllm(name, reward) for name in models]
    return [with_transformers(models, reward, {"dtype": given["dtype"], "device": given["device"]})] if models else []


def _shown(names: Sequence[str]) -> list[str]:
    """What visitors read: of a directory its last part, where that tells it from the others."""
    short = [Path(name).resolve().name if Path(name).is_dir() else name for name in names]
    return [one if short.count(one) == 1 else name for one, name in zip(short, names, strict=True)]


def _served(given: Mapping[str, Any], name: str) -> str | None:
    """Under which name a model started here is asked for: vLLM's server has one, and may shorten it."""
    return None if given["engine"] == "vllm" else name


def _reward(models: list[str], asked: str | None) -> str | None:
    from almost_eval.models.checkpoint import find_checkpoint
    from almost_eval.nano import BUILT_IN, DEFAULT_REWARD_MODEL

    if asked and not models:
        raise InputError("--reward scores the answers of --model; an endpoint of --base-url brings its own")
    reward = asked or (DEFAULT_REWARD_MODEL if models and all(name in BUILT_IN for name in models) else None)
    for name in models:
        find_checkpoint(name)
    if reward:
        find_checkpoint(reward, architectures=("SequenceClassification", "RewardModel"))
    return reward


def _nano(models: list[str], kinds: Sequence[str | None]) -> list[str]:
    """Questions of the built-in world, where all models are from it: they know nothing else."""
    from almost_eval.nano import BUILT_IN

    if not models or any(name not in BUILT_IN for name in models):
        return []
    from almost_eval.nano.world import World

    world = World()
    rng = world.generator("almost-chat")
    return list(dict.fromkeys(world.query(rng, "eval", kind).text for kind in kinds))


def _examples(models: list[str]) -> tuple[str, ...]:
    return tuple(_nano(models, ("fact", "advice", "comparison", "list"))) or EXAMPLES


def _questions(file: Path | None, models: list[str]) -> list[tuple[str, str]]:
    if file is None:
        return [(f"nano-{i}", text) for i, text in enumerate(_nano(models, [None] * NANO_QUESTIONS))] or [
            (f"example-{i}", text) for i, text in enumerate(EXAMPLES)
        ]
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--questions {file} cannot be read as UTF-8 text: {error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text = next(row[key] for key in _KEYS if row.get(key))
            text = text[0] if isinstance(text, list) else text
            found.append((str(row.get("question_id", row.get("id", number))), str(text)))
        except (ValueError, AttributeError, StopIteration, LookupError):
            raise InputError(
                f"--questions {file}, line {number} is no question: a JSON object with one of {', '.join(_KEYS)}"
            ) from None
    if not found:
        raise InputError(f"--questions {file} holds no questions")
    return found


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise InputError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; give another --port (0 takes a free one)"
        ) from None


def _run(app: Any, listening: socket.socket, login: str | None, started: float) -> None:
    import uvicorn

    host, port = listening.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    if login is None and host not in ("127.0.0.1", "::1"):
        click.echo(f"warning: there is no login (ALMOST_CHAT_AUTH): whoever reaches {address} may use it", err=True)

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            click.echo(address)
            sys.stdout.flush()
            click.echo(f"ready in {time.perf_counter() - started:.1f} s; Ctrl-C ends it", err=True)

        async def shutdown(self, sockets: Any = None) -> None:
            # Every open page holds a stream that ends with the server; uvicorn would print a traceback for each.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, ws="none", timeout_graceful_shutdown=1
    )
    # The command line's own guard ends an interrupted process within two seconds; the models need longer to end well.
    signal.set_wakeup_fd(-1)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal again once it is done
        Server(config).run(sockets=[listening])
