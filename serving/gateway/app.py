"""An OpenAI-compatible gateway before a policy and a reward model. It adds best-of-N, keys and limits.

    client -> gateway -> policy server (vLLM)
                     \\-> reward server (vLLM, pooling)

A request that needs the policy alone is passed through: its body goes there, and the answer comes back byte for byte,
a stream as it is written. A refusal is written anew (`errors`), since its bytes may be anything. Only the paths below
exist. No path, query or header of a client is forwarded, so no key either. `best_of` does best-of-N, `limits` decides
who is let in, `schema` says what is accepted.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.door.hosts import HostGuard
from serving.door.keys import KeyGuard
from serving.door.names import names_alone
from serving.gateway.best_of import BestOf
from serving.gateway.errors import on_crash, on_refusal, refusal
from serving.gateway.limits import Limited, Slots
from serving.gateway.metrics import Metrics, Observed
from serving.gateway.openapi import openapi
from serving.gateway.rewards import Rewards, answer_rewards, renderer_of
from serving.gateway.schema import ChatRequest, CompletionRequest, RewardRequest, check, parse_json
from serving.gateway.settings import KEY, GatewaySettings
from serving.gateway.streaming import EVENTS, ReplyWriter, notes_of, relay_events
from serving.gateway.upstream import Upstream
from serving.launch.process import listen, url_of
from serving.launch.supervisor import signals_handled_by

__all__ = ["GatewaySettings", "create_app", "run"]

_REWARD_CONNECTIONS = 128
"""Conversations at the reward server at a time; more wait here."""
_LIST_S = 10.0
"""Seconds that the policy server has for its list of models."""
_GRACE_S = 10
"""Seconds that requests at work have once the gateway is told to stop."""


class Gateway:
    """The routes of one gateway.

    Raises:
        InputError: `reward_model` is no reward model.
    """

    def __init__(self, settings: GatewaySettings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.policy = Upstream(
            "policy", settings.policy_url, settings.policy_key, status=502, connections=0, metrics=self.metrics
        )
        self.rewards: Rewards | None = None
        if settings.reward_url is not None:
            upstream = Upstream(
                "reward",
                settings.reward_url,
                settings.reward_key,
                status=503,
                connections=_REWARD_CONNECTIONS,
                metrics=self.metrics,
            )
            render = renderer_of(settings.reward_model) if settings.reward_model is not None else None
            self.rewards = Rewards(upstream, settings.reward_timeout_s, self.metrics, render)
        self.best_of = BestOf(self.policy, self.rewards, self.metrics)

    # --- what is work: within all limits ---

    async def chat(self, body: bytes, reply: ReplyWriter) -> None:
        """POST /v1/chat/completions."""
        fields = parse_json(body)
        request = check(ChatRequest, fields, self.settings)
        if request.best_of is None:
            await self._pass("/v1/chat/completions", body, reply)
        else:
            await self.best_of.answer(request, fields, reply)

    async def complete(self, body: bytes, reply: ReplyWriter) -> None:
        """POST /v1/completions."""
        check(CompletionRequest, parse_json(body), self.settings)
        await self._pass("/v1/completions", body, reply)

    async def reward(self, body: bytes, reply: ReplyWriter) -> None:
        """POST /v1/rewards."""
        request = check(RewardRequest, parse_json(body), self.settings)
        if self.rewards is None:
            raise refusal(400, "this gateway has no reward server: there are no rewards", "no_reward_server")
        await answer_rewards(self.rewards, request, reply)

    async def _pass(self, path: str, body: bytes, reply: ReplyWriter) -> None:
        async with self.policy.request("POST", path, body) as response:
            if response.status >= 400:
                raise await self.policy.refused(response)
            if response.header(b"content-type").startswith(EVENTS.encode()):
                await relay_events(response, reply, self.policy.error_in_stream)
                return
            whole = await response.read()
            self.policy.parsed(whole)  # an answer that is no JSON is told as a failure
            await reply.whole(response.status, whole, notes_of(response))

    # --- what is quick ---

    async def models(self, request: Request) -> Response:
        """GET /v1/models: the policy's, by the names that they are served under."""
        try:
            async with asyncio.timeout(_LIST_S), self.policy.request("GET", "/v1/models") as response:
                if response.status >= 400:
                    raise await self.policy.refused(response)
                whole = await response.read()
                self.policy.parsed(whole)
                return Response(names_alone(whole), response.status, media_type="application/json")
        except TimeoutError:
            raise refusal(504, f"the policy server named no models within {_LIST_S:g} s", "timeout") from None

    async def health(self, request: Request) -> Response:
        """GET /health: the gateway runs; says nothing of the servers behind."""
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """GET /ready: 200 where both servers answer, else 503 and which does not."""
        servers = {"policy": await self.policy.ready()}
        if self.rewards is not None:
            servers["reward"] = await self.rewards.upstream.ready()
        return JSONResponse({"ready": all(servers.values()), **servers}, 200 if all(servers.values()) else 503)

    async def figures(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def document(self, request: Request) -> Response:
        """GET /openapi.json."""
        return JSONResponse(openapi(self.settings))

    async def close(self) -> None:
        """Close the connections to both servers."""
        await self.policy.close()
        if self.rewards is not None:
            await self.rewards.upstream.close()


def create_app(settings: GatewaySettings) -> ASGIApp:
    """The gateway as an ASGI application.

    Raises:
        InputError: `reward_model` cannot be found, or is no reward model.
    """
    gateway = Gateway(settings)
    slots = Slots(settings.max_concurrent, gateway.metrics)
    work = {
        "/v1/chat/completions": gateway.chat,
        "/v1/completions": gateway.complete,
        "/v1/rewards": gateway.reward,
    }
    quick = {
        "/v1/models": gateway.models,
        "/health": gateway.health,
        "/ready": gateway.ready,
        "/metrics": gateway.figures,
        "/openapi.json": gateway.document,
    }

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await gateway.close()

    limited = {path: Limited(handler, settings, slots, gateway.metrics) for path, handler in work.items()}
    rest = Starlette(
        routes=[
            *(Route(path, handler, methods=["POST"]) for path, handler in limited.items()),  # here for their 405
            *(Route(path, handler, methods=["GET"]) for path, handler in quick.items()),
        ],
        exception_handlers={HTTPException: on_refusal, Exception: on_crash},
        lifespan=lifespan,
    )
    rest.router.redirect_slashes = False  # a path with a slash too many is another path

    async def front(scope: Scope, receive: Receive, send: Send) -> None:
        # Work does not go through Starlette: a tenth of the gateway's own time was routing it (benchmarks/LOG.md).
        at_work = limited.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        await (at_work or rest)(scope, receive, send)

    keyed = KeyGuard(front, settings.api_key, open_metrics=settings.open_metrics)
    guarded = HostGuard(keyed, settings.host, settings.allowed_hosts)
    return Observed(guarded, gateway.metrics, frozenset((*work, *quick)))


def run(settings: GatewaySettings) -> None:
    """Serve until SIGINT or SIGTERM; requests at work then have 10 s to end.

    Raises:
        InputError: the address cannot be listened on; or see `create_app`.
    """
    import uvicorn

    from serving.door.protocol import bounded_config

    listening = listen(settings.host, settings.port, backlog=2048)
    config = bounded_config(create_app(settings), timeout_graceful_shutdown=_GRACE_S)
    host, port = listening.getsockname()[:2]
    address = url_of(host, port)
    reward = settings.reward_url or "none, hence no best_of"
    print(f"gateway on {address}/v1; policy {settings.policy_url}; reward {reward}", file=sys.stderr, flush=True)
    if settings.api_key is None and host not in ("127.0.0.1", "::1"):
        print(f"warning: no key is set ({KEY}): whoever reaches {address} may use it", file=sys.stderr, flush=True)
    _give_way()
    # What the shutdown cancels has been told to its client; uvicorn would print a traceback for each.
    logging.getLogger("uvicorn.error").addFilter(lambda record: not _is_cancellation(record))
    # Both signals are uvicorn's, which raises them once more when it is done: no failure, for us.
    with signals_handled_by(lambda *_: None), listening:
        uvicorn.Server(config).run(sockets=[listening])


def _is_cancellation(record: logging.LogRecord) -> bool:
    return record.exc_info is not None and isinstance(record.exc_info[1], asyncio.CancelledError)


def _give_way() -> None:
    """Let what comes in wait until a core is free or its turn has come, rather than take the model's at each token.

    On a CPU that the model computes on, each wake-up would else interrupt it; so several tokens are passed on at once
    (benchmarks/LOG.md). Nothing waits where a core is idle.
    """
    if hasattr(os, "SCHED_BATCH"):  # Linux
        with suppress(OSError):  # a sandbox may forbid it
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
