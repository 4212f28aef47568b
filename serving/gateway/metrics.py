"""The gateway's own figures for Prometheus. Label values are fixed words: no client can make new series."""

from __future__ import annotations

from collections.abc import Awaitable
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from almost_eval.types import JSONObject

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """One registry for each gateway, so that two of them in a process do not share figures."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        at: JSONObject = {"registry": self.registry}
        self.requests = Counter("almost_gateway_requests", "Requests answered.", ["route", "status"], **at)
        self.seconds = Histogram(
            "almost_gateway_request_seconds", "Arrival to last byte.", ["route"], buckets=_SECONDS, **at
        )
        self.running = Gauge("almost_gateway_running", "Requests at work; at most --max-concurrent.", **at)
        self.disconnects = Counter("almost_gateway_disconnects", "Clients that left before their answer's end.", **at)
        self.upstream_failures = Counter(
            "almost_gateway_upstream_failures", "Failures of an upstream server.", ["upstream", "kind"], **at
        )
        self.candidates = Counter("almost_gateway_candidates", "Candidates drawn for best-of-N.", ["outcome"], **at)
        self.fallbacks = Counter("almost_gateway_fallbacks", "best_of requests answered without rewards.", **at)
        self.reward_seconds = Histogram(
            "almost_gateway_reward_seconds", "Scoring of one request's conversations.", buckets=_SECONDS, **at
        )

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)


class Observed:
    """ASGI middleware: counts and times every request; paths beside `routes` share the series `other`."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: frozenset[str]) -> None:
        self.app = app
        self.metrics = metrics
        self.routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and note how it went."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began = perf_counter()
        status = "none"  # the client left before there was any

        def observed(message: Message) -> Awaitable[None]:  # no coroutine of its own: it is called for every token
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            return send(message)

        try:
            await self.app(scope, receive, observed)
        finally:
            route = scope["path"] if scope["path"] in self.routes else "other"
            self.metrics.requests.labels(route, status).inc()
            self.metrics.seconds.labels(route).observe(perf_counter() - began)
        return None
