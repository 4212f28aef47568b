"""Policies and a reward model of transformers behind HTTP, in one process: `almost-chat` without any server.

    client -> gateway -> this: /v1/chat/completions, /v1/models, /health as vLLM's server answers them,
                               /classify as its pooling server does

The gateway before it is the toolkit's own, so best-of-N, rewards, keys, limits and errors are the same as with
vLLM. `python -m serving.local.server '{"policies": [...], "reward": ...}' --port N` loads the models, listens as the
gateway, and ends with the process that started it (`serving.launch.process`).

Departures from vLLM's server: `seed` makes n > 1 reproducible too; a sampling parameter that is not known is refused.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from almost_eval.engines.base import SamplingParams
from almost_eval.engines.hf import HFEngine
from almost_eval.errors import AlmostError, InputError, did_you_mean
from almost_eval.models.chat import load_template, special_tokens
from almost_eval.models.stops import stop_strings
from almost_eval.rewards.hf import HFRewardModel
from almost_eval.types import Completion, Conversation, Message
from serving.gateway.errors import error_text, on_crash, on_refusal, refusal
from serving.gateway.limits import KeyGuard
from serving.gateway.schema import StreamOptions, parse_json
from serving.local.stepping import Cancelled, Turnstile, generate_in_turns

KEY = "ALMOST_LOCAL_KEY"
"""Environment variable of the key that the parent made for its child: no other program of this machine has it."""

MAX_BEST_OF = 16


class Turn(BaseModel):
    """One message of a request."""

    model_config = ConfigDict(extra="forbid")

    role: str
    content: str


class LocalChat(BaseModel):
    """What `/v1/chat/completions` takes; anything else is refused, since it would be ignored."""

    model_config = ConfigDict(extra="forbid")

    messages: Annotated[list[Turn], Field(min_length=1)]
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None


class LocalClassify(BaseModel):
    """What `/classify` takes."""

    model_config = ConfigDict(extra="forbid")

    messages: Annotated[list[Turn], Field(min_length=1)]
    model: str | None = None
    add_generation_prompt: bool = False


@dataclass(frozen=True, slots=True)
class Policy:
    """A model that answers, under the name it is served as."""

    name: str
    engine: HFEngine

    def prompt(self, conversation: Conversation) -> str:
        """What the model reads."""
        template = load_template("auto", self.engine.tokenizer)
        assert template is not None
        tokens = special_tokens(self.engine.tokenizer)
        return template.render(conversation, add_generation_prompt=True, special_tokens=tokens)

    def stop(self) -> tuple[str, ...]:
        """The strings at which an answer is over: those of the built-in format that the model uses."""
        template = load_template("auto", self.engine.tokenizer)
        assert template is not None
        return stop_strings(template)

    def room(self, prompt: str) -> int:
        """Tokens of the context that the prompt leaves."""
        return self.engine.context_length - len(self.engine.encoder.encode_texts([prompt])[0])


class RewardWorker:
    """Scores conversations in a thread of its own: all that came in while it was at work make the next batch."""

    def __init__(self, name: str, model: HFRewardModel, turnstile: Turnstile) -> None:
        self.name = name
        self._model = model
        self._turnstile = turnstile
        self._waiting: SimpleQueue[tuple[Conversation, Callable[[float | Exception], None]]] = SimpleQueue()
        threading.Thread(target=self._work, name="rewards", daemon=True).start()

    async def score(self, conversation: Conversation) -> float:
        """The raw logit.

        Raises:
            InputError: the conversation does not fit the reward model's context.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[float | Exception] = loop.create_future()

        def settle(found: float | Exception) -> None:
            if not done.cancelled():  # the client may have left meanwhile
                done.set_result(found)

        tell = _threadsafe(loop, settle)
        self._waiting.put((conversation, tell))
        found = await done
        if isinstance(found, Exception):
            raise found
        return found

    def _work(self) -> None:
        while True:
            batch = [self._waiting.get()]
            while not self._waiting.empty():
                batch.append(self._waiting.get())
            try:
                with self._turnstile.turn():
                    rewards: Sequence[float | Exception] = self._model.score([one for one, _ in batch])
            except Exception as error:  # each of them is told to whoever asked
                rewards = [self._alone(one) for one, _ in batch] if len(batch) > 1 else [error]
            for (_, tell), reward in zip(batch, rewards, strict=True):
                tell(reward)

    def _alone(self, conversation: Conversation) -> float | Exception:
        try:
            with self._turnstile.turn():
                return self._model.score([conversation])[0]
        except Exception as error:
            return error


class LocalServer:
    """The routes.

    Args:
        policies: name -> model; the first is what a request without `model` gets.
        reward: its name and model, or None.
    """

    def __init__(self, policies: dict[str, HFEngine], reward: tuple[str, HFRewardModel] | None) -> None:
        self._policies = {name: Policy(name, engine) for name, engine in policies.items()}
        self._turnstile = Turnstile()
        self._reward = RewardWorker(*reward, self._turnstile) if reward else None

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        data = [
            {"id": one.name, "object": "model", "max_model_len": one.engine.context_length}
            for one in self._policies.values()
        ]
        return JSONResponse({"object": "list", "data": data})

    async def health(self, request: Request) -> Response:
        """GET /health."""
        return JSONResponse({"status": "ok"})

    async def classify(self, request: Request) -> Response:
        """POST /classify: the reward of one conversation, in the form of vLLM's pooling server."""
        asked = _check(LocalClassify, await request.body())
        if self._reward is None:
            raise refusal(400, "there is no reward model here", "no_reward_server")
        if asked.model not in (None, self._reward.name):
            raise refusal(404, f"the reward model here is {self._reward.name!r}", "model_not_found", param="model")
        try:
            reward = await self._reward.score(_conversation(asked.messages))
        except AlmostError as error:
            raise refusal(400, str(error), "invalid_value") from None
        return JSONResponse({"object": "list", "model": self._reward.name, "data": [{"index": 0, "probs": [reward]}]})

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        asked = _check(LocalChat, await request.body())
        policy = self._policy(asked.model)
        try:
            prompt = policy.prompt(_conversation(asked.messages))
        except InputError as error:
            raise refusal(400, str(error), "invalid_value", param="messages") from None
        job = _Job(policy, prompt, _sampling(asked, policy, prompt), self._turnstile)
        if asked.stream:
            usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
            return StreamingResponse(job.events(include_usage=usage), media_type="text/event-stream")
        return JSONResponse(await job.whole(request))

    def _policy(self, name: str | None) -> Policy:
        if name is None:
            return next(iter(self._policies.values()))
        if name not in self._policies:
            message = f"no model {name!r} is served here; {did_you_mean(name, self._policies)}"
            raise refusal(404, message, "model_not_found", param="model")
        return self._policies[name]

    def app(self, key: str) -> ASGIApp:
        """The ASGI application; `key` is what it wants of the gateway."""
        routes = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/classify", self.classify, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
        ]
        app = Starlette(routes=routes, exception_handlers={HTTPException: on_refusal, Exception: on_crash})
        return KeyGuard(app, key)


class _Job:
    """One request at work: a thread generates, the event loop tells."""

    def __init__(self, policy: Policy, prompt: str, params: SamplingParams, turnstile: Turnstile) -> None:
        self._policy = policy
        self._params = params
        self._cancelled = threading.Event()
        self._news: asyncio.Queue[tuple[int, str] | list[Completion] | Exception] = asyncio.Queue()
        self._head = {
            "id": f"chatcmpl-{random.getrandbits(64):016x}",
            "created": int(time.time()),
            "model": policy.name,
        }
        self._prompt_tokens = policy.engine.context_length - policy.room(prompt)
        tell = _threadsafe(asyncio.get_running_loop(), self._news.put_nowait)

        def work() -> None:
            try:
                tell(
                    generate_in_turns(
                        policy.engine,
                        prompt,
                        params,
                        turnstile,
                        on_text=lambda number, text, tokens: tell((number, text)),
                        cancelled=self._cancelled,
                    )
                )
            except Cancelled:
                pass
            except Exception as error:  # whatever it is, the client is waiting for it
                tell(error)

        threading.Thread(target=work, name="generate", daemon=True).start()

    async def whole(self, request: Request) -> dict[str, Any]:
        """The completion, at its end; given up as soon as the client leaves."""
        gone = asyncio.ensure_future(_gone(request))
        try:
            while True:
                news = asyncio.ensure_future(self._news.get())
                await asyncio.wait((news, gone), return_when=asyncio.FIRST_COMPLETED)
                if not news.done():
                    news.cancel()
                    raise refusal(499, "the client has left", "client_left")
                found = news.result()
                if isinstance(found, Exception):
                    raise _as_refusal(found) from found
                if isinstance(found, list):
                    return self._completion(found)
        finally:
            gone.cancel()
            self._cancelled.set()

    def _completion(self, done: list[Completion]) -> dict[str, Any]:
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": one.text},
                "finish_reason": one.finish_reason,
            }
            for i, one in enumerate(done)
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": self._usage(done)}

    def _usage(self, done: list[Completion]) -> dict[str, int]:
        new = sum(len(one.token_ids) for one in done)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self._prompt_tokens + new,
        }

    async def events(self, *, include_usage: bool) -> AsyncIterator[bytes]:
        """The stream; closing it ends the generation."""
        try:
            for i in range(self._params.n):
                yield self._event(i, {"role": "assistant", "content": ""})
            while True:
                found = await self._news.get()
                if isinstance(found, tuple):
                    yield self._event(found[0], {"content": found[1]})
                    continue
                if isinstance(found, Exception):
                    error = _as_refusal(found)
                    yield f"data: {error.detail}\n\n".encode()
                    break
                for i, one in enumerate(found):
                    yield self._event(i, {}, one.finish_reason)
                if include_usage:
                    yield self._event(None, {}, usage=self._usage(found))
                break
            yield b"data: [DONE]\n\n"
        finally:
            self._cancelled.set()

    def _event(
        self, index: int | None, delta: dict[str, str], reason: str | None = None, usage: dict[str, int] | None = None
    ) -> bytes:
        choices = [] if index is None else [{"index": index, "delta": delta, "finish_reason": reason}]
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": choices, "usage": usage}
        return f"data: {json.dumps(chunk)}\n\n".encode()


def _sampling(asked: LocalChat, policy: Policy, prompt: str) -> SamplingParams:
    room = policy.room(prompt)
    most = asked.max_completion_tokens or asked.max_tokens
    if room < (most or 1):
        context = policy.engine.context_length
        new = f"{most} new ones" if most else "an answer"
        raise refusal(
            400,
            f"the context of {context} tokens is full: the conversation has {context - room} and leaves no room for "
            f"{new}; shorten it, or ask for less",
            "context_length_exceeded",
            param="messages",
        )
    stop = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())
    return SamplingParams(
        max_new_tokens=most or room,
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        n=asked.n or 1,
        stop=tuple(dict.fromkeys((*(text for text in stop if text), *policy.stop()))),
        seed=random.getrandbits(31) if asked.seed is None else asked.seed,
    )


def _check(kind: Any, body: bytes) -> Any:
    try:
        return kind.model_validate(parse_json(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise refusal(400, f"{place}: {first['msg']}", "invalid_value", param=place) from None


def _conversation(turns: Sequence[Turn]) -> Conversation:
    return tuple(Message(turn.role, turn.content) for turn in turns)


def _as_refusal(error: Exception) -> HTTPException:
    if isinstance(error, InputError):
        return refusal(400, str(error), "invalid_value")
    words = str(error) if isinstance(error, AlmostError) else f"generation failed ({type(error).__name__})"
    return HTTPException(500, error_text(500, words, "generation_failed"))


async def _gone(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)


def _threadsafe(loop: asyncio.AbstractEventLoop, function: Callable[..., Any]) -> Callable[..., None]:
    def call(*arguments: Any) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(function, *arguments)

    return call


# --- the child process ---


def main() -> None:
    """Load what the first argument names, and serve it."""
    from almost_eval.cli.startup import import_transformers
    from serving.launch.process import watch_parent

    watch_parent(grace_s=3.0)
    asked, port = json.loads(sys.argv[1]), int(sys.argv[3])
    try:
        import_transformers()
        options = asked.get("options", {})
        policies = {name: HFEngine(name, **options) for name in asked["policies"]}
        reward = (asked["reward"], HFRewardModel(asked["reward"], **options)) if asked.get("reward") else None
        for engine in policies.values():
            engine.model.requires_grad_(False)  # reads the weights now: a model that cannot be loaded is told at once
        if reward:
            reward[1].model.requires_grad_(False)
    except AlmostError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    asyncio.run(_serve(LocalServer(policies, reward), port, has_reward=reward is not None))


async def _serve(server: LocalServer, port: int, *, has_reward: bool) -> None:
    import uvicorn

    from serving.gateway.app import create_app
    from serving.gateway.settings import GatewaySettings

    key = os.environ[KEY]
    inner, outer = (socket.create_server(("127.0.0.1", number), backlog=512) for number in (0, port))
    models = f"http://127.0.0.1:{inner.getsockname()[1]}"
    settings = GatewaySettings(
        policy_url=models,
        reward_url=models if has_reward else None,
        api_key=key,
        policy_key=key,
        reward_key=key,
        max_best_of=MAX_BEST_OF,
    )

    async def run(app: ASGIApp, listening: socket.socket) -> None:
        config = uvicorn.Config(app, log_level="warning", access_log=False, ws="none", timeout_graceful_shutdown=2)
        await uvicorn.Server(config).serve(sockets=[listening])

    await asyncio.gather(run(server.app(key), inner), run(create_app(settings), outer))


if __name__ == "__main__":
    main()
