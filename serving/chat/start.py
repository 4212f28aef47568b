"""From the options of `almost-chat` to a page that answers. Wrong options are refused before any model loads."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from almost_eval.arena.votes import VoteStore
from almost_eval.errors import InputError
from almost_eval.progress import progress_for
from serving.chat import small_model
from serving.chat.client import Address, Endpoint
from serving.chat.conversation import Settings
from serving.chat.kept import ConversationStore
from serving.chat.launch import Models, SmallModelLoader, with_transformers, with_vllm
from serving.chat.options import DEFAULT_MODELS, LOOPBACK, ChatOptions
from serving.chat.questions import arena_questions, examples_for
from serving.chat.scale import RewardScale
from serving.chat.session import ChatSystem, Desk, RateLimit
from serving.chat.toyworld import is_toy
from serving.chat.visitors import Visitors
from serving.door.hosts import checked_hosts
from serving.door.names import served_names
from serving.launch.process import listen, url_of, wait_ready
from serving.launch.supervisor import show_last_lines

if TYPE_CHECKING:
    from starlette.types import ASGIApp

REWARD_ARCHITECTURES = ("SequenceClassification", "RewardModel")


def serve(options: ChatOptions, started: float) -> None:
    """Run the page until it is interrupted.

    Args:
        options: what the command line says.
        started: when the program began, on `time.perf_counter`'s clock; for the line that says how long it took.

    Raises:
        InputError: a malformed address, a model that is none, a port in use, a question file that cannot be read, an
            allowed host that is none.
        RunError: the models' process ended.
    """
    # 1. What can be refused at once.
    addresses = [Address.parse(url) for url in options.urls]
    models = list(dict.fromkeys(options.models)) or ([] if addresses else list(DEFAULT_MODELS))
    reward = _check_models(models, options.reward)
    names = [*_names(models), *(address.name for address in addresses)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"two systems are called {twice!r}; give one a name: --base-url NAME=URL")
    questions = arena_questions(options.questions, models)
    VoteStore(options.votes)
    conversations = options.conversations if options.login else None
    if conversations is not None:
        ConversationStore(conversations)
    hosts = checked_hosts(options.allowed_hosts)
    listening = listen(options.host, options.port, backlog=512)
    served, about = _served(models)

    # 2. The models load in processes of their own, while gradio is imported in this one.
    with contextlib.ExitStack() as children, listening:
        running = [children.enter_context(child) for child in _models(served, reward, options)]
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
        from serving.chat.app import create_app

        # 3. Everything to talk to, and the page.
        wait_ready(running)
        scale = _scale(models, reward, running)
        systems = [
            # vLLM's server has one model, and may shorten its name.
            ChatSystem(
                name,
                child.endpoint(),
                None if options.engine == "vllm" else name,
                scale,
                is_toy([name]),
                about.get(name, ""),
            )
            for child in running
            for name in child.names
        ]
        systems += [
            ChatSystem(address.name, Endpoint.with_key_of_environment(address.url), address.model)
            for address in addresses
        ]
        desk = Desk(
            systems,
            options.votes,
            options.reports,
            questions,
            examples_for(models),
            RateLimit(options.rate, options.address_rate),
            options.concurrency,
            defaults=Settings(max_tokens=options.max_tokens, temperature=options.temperature),
            seed=options.seed,
            visitors=Visitors(listening.getsockname()[1]),
            loader=_loader(systems, running, children, options),
            conversations=conversations,
        )
        _run(create_app(desk, options.login, options.host, hosts), listening, options, started, running, scale)


def _is_small(model: str) -> bool:
    return model == small_model.NAME and not Path(model).is_dir()


def _names(models: Sequence[str]) -> list[str]:
    """What the page calls them."""
    return list(served_names([small_model.TITLE if _is_small(model) else model for model in models]))


def _served(models: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Name -> checkpoint, and name -> whose model it is, where the page says so.

    Raises:
        ModelError: `smollm2` is not to be had here.
        RunError: it could not be made of its package.
    """
    checkpoints, about = list(models), {}
    names = _names(models)
    for place, model in enumerate(models):
        if _is_small(model):
            small = small_model.find_small_model(notice=progress_for().notice)
            checkpoints[place], about[names[place]] = str(small.path), small.about
            print(small.about, file=sys.stderr, flush=True)
    return dict(zip(names, checkpoints, strict=True)), about


def _models(served: Mapping[str, str], reward: str | None, options: ChatOptions) -> list[Models]:
    if options.engine == "vllm":
        return [with_vllm(name, model, reward) for name, model in served.items()]
    return [with_transformers(served, reward, dtype=options.dtype, device=options.device)] if served else []


def _scale(models: Sequence[str], reward: str | None, running: Sequence[Models]) -> RewardScale | None:
    """The scale of a reward model that knows the built-in world: its own, or any that scores built-in models."""
    from almost_eval.models.checkpoint import find_checkpoint
    from almost_eval.nano import DEFAULT_REWARD_MODEL

    if reward is None or not (reward == DEFAULT_REWARD_MODEL or is_toy(models)):
        return None
    checkpoint = find_checkpoint(reward, architectures=REWARD_ARCHITECTURES)
    return RewardScale(running[0].endpoint(), checkpoint.weight_digest())


def _loader(
    systems: list[ChatSystem], running: list[Models], children: contextlib.ExitStack, options: ChatOptions
) -> SmallModelLoader | None:
    """Offered on the page that nobody chose models for, and to nobody but who started it: a load costs a gigabyte."""
    if options.models or options.urls or options.host not in LOOPBACK:
        return None
    return SmallModelLoader(systems, running, children, dtype=options.dtype, device=options.device)


def _check_models(models: list[str], named: str | None) -> str | None:
    """Check that all models exist, and return the reward model: the one that is named, or that of the built-in ones."""
    from almost_eval.models.checkpoint import find_checkpoint
    from almost_eval.nano import BUILT_IN, DEFAULT_REWARD_MODEL

    if named and not models:
        raise InputError("--reward scores the answers of --model; an endpoint of --base-url brings its own")
    reward = named or (DEFAULT_REWARD_MODEL if models and all(name in BUILT_IN for name in models) else None)
    for name in models:
        if not _is_small(name):
            find_checkpoint(name)
    if reward:
        find_checkpoint(reward, architectures=REWARD_ARCHITECTURES)
    return reward


def _run(
    app: ASGIApp,
    listening: socket.socket,
    options: ChatOptions,
    started: float,
    models: Sequence[Models],
    scale: RewardScale | None,
) -> None:
    """Serve until a signal comes. `models` may grow meanwhile.

    Raises:
        RunError: the process of a model ended; its last lines are on stderr.
    """
    import uvicorn

    from serving.door.protocol import bounded_config

    host, port = listening.getsockname()[:2]
    address = url_of(host, port)
    if options.login is None and host not in ("127.0.0.1", "::1"):
        warning = f"warning: there is no login (ALMOST_CHAT_AUTH): whoever reaches {address} may use it"
        print(warning, file=sys.stderr)

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            print(address, flush=True)
            print(f"ready in {time.perf_counter() - started:.1f} s; Ctrl-C ends it", file=sys.stderr, flush=True)
            if scale is not None:
                await scale.begin()

        async def on_tick(self, counter: int) -> bool:
            # uvicorn asks ten times a second whether to end: a page whose models are gone is none.
            return await super().on_tick(counter) or any(child.exit_code is not None for child in models)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # Every open page holds a stream that ends with the server; uvicorn would print a traceback for each.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            await super().shutdown(sockets)

    proxies = list(options.trusted_proxies)
    config = bounded_config(
        app, timeout_graceful_shutdown=1, proxy_headers=bool(proxies), forwarded_allow_ips=proxies or None
    )
    # The command line's own guard ends an interrupted process within two seconds; the models need longer to end well.
    signal.set_wakeup_fd(-1)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal again once it is done
        Server(config).run(sockets=[listening])
        if gone := next((child for child in models if child.exit_code is not None), None):
            show_last_lines([gone])
            raise gone.failure()
