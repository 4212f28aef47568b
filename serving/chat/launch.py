"""Starts models in processes of their own, which load while the page is imported. If one fails, its last line says why.

The small chat model is loaded while the page runs, for the first visitor who asks for it; it then serves everybody.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import TypeVar

from almost_eval.errors import InputError, RunError
from almost_eval.progress import Progress
from serving.chat.client import Endpoint
from serving.chat.session import ChatSystem
from serving.chat.small_model import TITLE, find_small_model
from serving.gateway.settings import KEY
from serving.launch.process import ServerProcess, free_port
from serving.local.settings import KEY as LOCAL_KEY
from serving.local.settings import LocalModels

_ERROR = "error: "
_READY_S = 300.0
_T = TypeVar("_T")


class Models(ServerProcess):
    """A child process with models and the gateway before them; a context manager, as every `ServerProcess`.

    Args:
        names: the models it serves.
        command: without the port.
        variable: the environment variable that its key goes into.
        ready: the path that answers 200 once the models do; a gateway's `/health` speaks of itself alone.
    """

    def __init__(self, names: Sequence[str], command: Sequence[str], variable: str, ready: str = "/ready") -> None:
        port = free_port()
        key = secrets.token_urlsafe(32)
        self.names = tuple(names)
        super().__init__(
            " and ".join(names),
            [sys.executable, "-m", *command, "--port", str(port)],
            ("127.0.0.1", port),
            environment={variable: key},
            health=ready,
            key=key,
        )

    def endpoint(self) -> Endpoint:
        """Where it answers."""
        return Endpoint(f"{self.url}/v1", self._key, local=True)

    def failure(self) -> RunError | InputError:
        """The line that the child itself ended with, where there is one."""
        told = super().failure()  # waits for the last lines
        words = next((line for line in reversed(self.last_lines()) if line.startswith(_ERROR)), None)
        if words is None:
            return told
        kind = InputError if self.exit_code == InputError.exit_code else RunError
        return kind(words.removeprefix(_ERROR))


def with_transformers(
    models: Mapping[str, str], reward: str | None, *, dtype: str = "auto", device: str = "auto"
) -> Models:
    """All models (served name -> checkpoint) and the reward model in one process (`serving.local`)."""
    settings = LocalModels(dict(models), reward, dtype, device)
    return Models(list(settings.policies), ["serving.cli.local", json.dumps(asdict(settings))], LOCAL_KEY)


def with_vllm(name: str, model: str, reward: str | None) -> Models:
    """One model, with vLLM: `almost-serve all`, or `almost-serve policy` without a reward model."""
    if reward:
        return Models([name], ["serving.cli", "all", "--model", model, "--reward", reward], KEY)
    return Models([name], ["serving.cli", "policy", "--model", model], KEY, "/health")


class SmallModelLoader:
    """One for a server. What it loads joins the systems that the page serves and the processes that run, and ends with
    the `children`.
    """

    def __init__(
        self,
        systems: list[ChatSystem],
        running: list[Models],
        children: ExitStack,
        *,
        dtype: str = "auto",
        device: str = "auto",
    ) -> None:
        self.phase = ""
        """What is being done, for those who wait."""
        self._systems = systems
        self._running = running
        self._children = children
        self._options = {"dtype": dtype, "device": device}
        self._task: asyncio.Task[ChatSystem] | None = None

    async def load(self) -> ChatSystem:
        """The model, ready to answer. All who wait for it share one load; after a failure the next one tries again.

        Raises:
            ModelError: it is not to be had here; the message says what to do.
            RunError: it could not be made or started.
        """
        if self._task is None or (self._task.done() and (self._task.cancelled() or self._task.exception())):
            self._task = asyncio.create_task(self._load())
        return await asyncio.shield(self._task)

    async def _load(self) -> ChatSystem:
        self.phase = f"Looking for {TITLE}; where its checkpoint has to be made first, this takes a minute"
        model = await _in_thread(find_small_model)
        self.phase = f"Loading {TITLE}"
        child = with_transformers({TITLE: str(model.path)}, None, **self._options)
        self._children.callback(child.stop)
        child.start()
        try:
            await _in_thread(lambda: child.wait_ready(Progress(), _READY_S))
        except BaseException:
            child.stop()
            raise
        system = ChatSystem(TITLE, child.endpoint(), TITLE, about=model.about)
        self._running.append(child)
        self._systems.append(system)
        return system


async def _in_thread(work: Callable[[], _T]) -> _T:
    """`work()` in a daemon thread: unlike one of asyncio's pool it does not hold up the end of the program."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[_T] = loop.create_future()

    def settle(value: _T | None, error: BaseException | None) -> None:
        if result.done():
            return
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(value)  # type: ignore[arg-type]

    def run() -> None:
        value, failure = None, None
        try:
            value = work()
        except BaseException as error:  # handed to whoever waits
            failure = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, value, failure)

    threading.Thread(target=run, name="small model", daemon=True).start()
    return await result
