"""Loads the small chat model while the page runs, for the first visitor who asks for it; it then serves everybody."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeVar

from almost_eval.progress import Progress
from serving.chat.launch import Models, with_transformers
from serving.chat.session import ChatSystem
from serving.chat.small_model import TITLE, find_small_model

_READY_S = 300.0
_T = TypeVar("_T")


class SmallModelLoader:
    """One for a server.

    Args:
        systems: what the page serves; the model joins them.
        running: the processes of models; its own joins them.
        children: ends its process with the page.
        dtype: see `with_transformers`.
        device: see `with_transformers`.
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
