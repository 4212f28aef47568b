"""Policies and a reward model of transformers behind HTTP, in one process: `almost-chat` without any server.

    client -> gateway -> this: /v1/chat/completions, /v1/models, /health as vLLM's server answers them,
                               /classify as its pooling server does

The gateway before it is the toolkit's own, so best-of-N, rewards, keys, limits and errors are the same as with vLLM.
`python -m serving.cli.local` starts it and ends with the process that started it (`serving.launch.process`).

Departures from vLLM's server: `seed` makes n > 1 reproducible too; a sampling parameter that is not known is refused.
"""

from __future__ import annotations

import asyncio
import os
import socket

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from almost_eval.engines.hf import HFEngine
from almost_eval.errors import AlmostError, InputError, did_you_mean
from almost_eval.rewards.hf import HFRewardModel
from serving.door.keys import KeyGuard
from serving.door.names import served_name
from serving.gateway.errors import on_crash, on_refusal, refusal
from serving.gateway.schema import parse_json, validated
from serving.local.generation import Turnstile
from serving.local.job import ChatJob
from serving.local.policy import LocalChat, LocalClassify, Policy, conversation_of
from serving.local.rewards import RewardWorker
from serving.local.settings import KEY, MAX_BEST_OF, LocalModels


class LocalServer:
    """The routes. A request without `model` gets the first of `policies` (name -> model)."""

    def __init__(self, policies: dict[str, HFEngine], reward: tuple[str, HFRewardModel] | None) -> None:
        self._policies = {name: Policy(name, engine) for name, engine in policies.items()}
        self._turnstile = Turnstile()
        self.reward = RewardWorker(*reward, self._turnstile) if reward else None

    @classmethod
    def load(cls, models: LocalModels) -> LocalServer:
        """A server of these models, their weights loaded.

        Raises:
            ModelError: a model that does not exist, or cannot be loaded.
        """
        policies = {
            name: HFEngine(checkpoint, dtype=models.dtype, device=models.device, purpose="generate")
            for name, checkpoint in models.policies.items()
        }
        reward = HFRewardModel(models.reward, dtype=models.dtype, device=models.device) if models.reward else None
        for engine in policies.values():
            engine.model.requires_grad_(False)  # reads the weights now: a model that cannot be loaded is told at once
        if reward:
            reward.model.requires_grad_(False)
        return cls(policies, (served_name(models.reward), reward) if models.reward and reward else None)

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
        fields = validated(LocalClassify, parse_json(await request.body()))
        if self.reward is None:
            raise refusal(400, "there is no reward model here", "no_reward_server")
        if fields.model not in (None, self.reward.name):
            raise refusal(404, f"the reward model here is {self.reward.name!r}", "model_not_found", param="model")
        try:
            reward = await self.reward.score(conversation_of(fields.messages))
        except AlmostError as error:
            raise refusal(400, str(error), "invalid_value") from None
        return JSONResponse({"object": "list", "model": self.reward.name, "data": [{"index": 0, "probs": [reward]}]})

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        fields = validated(LocalChat, parse_json(await request.body()))
        policy = self._policy(fields.model)

        def read() -> tuple[str, int]:
            prompt = policy.prompt(conversation_of(fields.messages))
            return prompt, policy.prompt_tokens(prompt)

        try:
            prompt, used = await asyncio.to_thread(read)  # others' answers go on meanwhile
        except InputError as error:
            raise refusal(400, str(error), "invalid_value", param="messages") from None
        job = ChatJob(policy, prompt, used, policy.sampling(fields, used), self._turnstile)
        if fields.stream:
            usage = fields.stream_options is not None and bool(fields.stream_options.include_usage)
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


async def serve(server: LocalServer, port: int) -> None:
    """Serve until a signal comes: the models on a free port, the gateway before them on `port`."""
    import uvicorn

    from serving.door.protocol import bounded_config
    from serving.gateway.app import create_app
    from serving.gateway.settings import GatewaySettings

    key = os.environ[KEY]
    inner, outer = (socket.create_server(("127.0.0.1", number), backlog=512) for number in (0, port))
    models = f"http://127.0.0.1:{inner.getsockname()[1]}"
    settings = GatewaySettings(
        policy_url=models,
        reward_url=models if server.reward else None,
        api_key=key,
        policy_key=key,
        reward_key=key,
        max_best_of=MAX_BEST_OF,
    )

    async def run(app: ASGIApp, listening: socket.socket) -> None:
        await uvicorn.Server(bounded_config(app, timeout_graceful_shutdown=2)).serve(sockets=[listening])

    await asyncio.gather(run(server.app(key), inner), run(create_app(settings), outer))
