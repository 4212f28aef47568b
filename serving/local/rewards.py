"""Scores conversations in a thread of its own. All that arrive while it works make the next batch."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from queue import SimpleQueue

from almost_eval.rewards.hf import HFRewardModel
from almost_eval.types import Conversation
from serving.local.generation import Turnstile
from serving.local.policy import refuse_endless

_Waiting = tuple[Conversation, "Future[float]"]


class RewardWorker:
    """A reward model and its thread; all threads that use the device share the turnstile."""

    def __init__(self, name: str, model: HFRewardModel, turnstile: Turnstile) -> None:
        self.name = name
        self._model = model
        self._turnstile = turnstile
        self._waiting: SimpleQueue[_Waiting] = SimpleQueue()
        threading.Thread(target=self._work, name="rewards", daemon=True).start()

    async def score(self, conversation: Conversation) -> float:
        """The raw logit.

        Raises:
            InputError: the conversation does not fit the reward model's context.
            HTTPException: it is longer than whatever fits.
        """
        for message in conversation:
            refuse_endless(message.content, self._model.tokenizer, self._model.context_length)
        reward: Future[float] = Future()
        self._waiting.put((conversation, reward))
        return await asyncio.wrap_future(reward)

    def _work(self) -> None:
        while True:
            batch = [self._waiting.get()]
            while not self._waiting.empty():
                batch.append(self._waiting.get())
            # Without those whose client has left meanwhile.
            self._score([one for one in batch if one[1].set_running_or_notify_cancel()])

    def _score(self, batch: list[_Waiting]) -> None:
        try:
            with self._turnstile:
                rewards = self._model.score([conversation for conversation, _ in batch])
        except Exception as error:  # told to whoever waits; of several, one may be at fault, so each is tried alone
            if len(batch) == 1:
                batch[0][1].set_exception(error)
            else:
                for one in batch:
                    self._score([one])
        else:
            for (_, future), reward in zip(batch, rewards, strict=True):
                future.set_result(reward)
