"""The key, on an application with routes wherever vLLM has them: FastAPI, mounted apps, websockets."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI, WebSocket
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from serving.door.keys import KeyGuard
from serving.door.names import names_alone, served_names
from serving.vllm import front
from serving.vllm.front import Front, front_settings

KEY = "sésame ouvre-toi"
BEARER = {b"Authorization": f"Bearer {KEY}".encode()}
ROUTES = (
    "/invocations /classify /pooling /score /v1/score /rerank /tokenize /detokenize /load /version /ping /server_info "
    "/scale_elastic_ep /is_scaling_elastic_ep /reset_prefix_cache /sleep /wake_up /collective_rpc /v1/messages "
    "/v1/models /generate /health/ //health /Health /healthz /metrics/ /metrics /docs /openapi.json /nowhere"
).split()


@pytest.fixture
def app() -> FastAPI:
    """Every route answers 200, whatever the method; `/metrics` is mounted, as in vLLM."""
    app = FastAPI()
    methods = ["GET", "POST", "PUT", "DELETE", "OPTIONS"]

    async def answer() -> dict[str, str]:
        return {"status": "open"}

    for path in ("/health", *ROUTES):
        if path not in ("/metrics", "/metrics/", "/docs", "/openapi.json", "/nowhere", "/v1/models"):
            app.add_api_route(path, answer, methods=methods, include_in_schema=False)
    app.mount("/metrics", PlainTextResponse("figures"))
    app.routes[-1].path_regex = re.compile("^/metrics(?P<path>.*)$")  # type: ignore[attr-defined]  # as vLLM does

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [{"id": "name", "root": "/home/secret/checkpoint", "max_model_len": 8}]}

    @app.websocket("/v1/realtime")
    async def realtime(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text("open")
        await socket.close()

    return app


@pytest.fixture
def vllm(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TestClient]:
    """The application behind the middleware as vLLM adds it."""

    def make(key: str | None = KEY, *, open_metrics: bool = False) -> TestClient:
        monkeypatch.setenv(front.SETTINGS, front_settings("127.0.0.1", ("testserver",), open_metrics=open_metrics))
        monkeypatch.setenv(front.KEY, key) if key else monkeypatch.delenv(front.KEY, raising=False)
        app.add_middleware(Front)
        return TestClient(app)

    return make


@pytest.mark.parametrize("path", ROUTES)
def test_no_path_but_health_answers_without_the_key(vllm: Callable[..., TestClient], path: str) -> None:
    client = vllm()
    for method in ("GET", "POST", "OPTIONS", "HEAD", "PUT", "DELETE"):
        answer = client.request(method, path, follow_redirects=False)
        assert (method, answer.status_code) == (method, 401)
        assert answer.headers["www-authenticate"] == "Bearer"
    assert client.get("/v1/models").json()["error"]["code"] == "invalid_api_key"
    assert client.get("/health").status_code == 200
    assert client.get(path, headers=BEARER).status_code in (200, 404)
    assert client.post("/health").status_code == 401  # no request that does more than look


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Authorization", "Bearer wrong")],
        [("Authorization", KEY)],
        [("Authorization", f"Basic {KEY}")],
        [("Authorization", "Bearer ")],
        [("x-api-key", "")],
        [("x-api-key", "wrong")],
        [("Authorization", f"Bearer {KEY}"), ("Authorization", f"Bearer {KEY}")],
        [("Authorization", f"Bearer {KEY}"), ("x-api-key", "wrong")],
        [("Authorization", "Bearer wrong"), ("x-api-key", KEY)],
        [("x-api-key", KEY), ("x-api-key", KEY)],
        [("api-key", KEY)],
        [("Cookie", f"key={KEY}")],
    ],
)
def test_what_is_no_key(vllm: Callable[..., TestClient], headers: list[tuple[str, str]]) -> None:
    sent = [(name.encode(), value.encode()) for name, value in headers]
    assert vllm().get("/tokenize", headers=sent).status_code == 401


def test_openai_and_anthropic_clients_are_let_in(vllm: Callable[..., TestClient]) -> None:
    client = vllm()
    for headers in (BEARER, {b"x-api-key": KEY.encode()}, {**BEARER, b"x-api-key": KEY.encode()}):
        assert client.post("/v1/messages", headers=headers).json() == {"status": "open"}


def test_vllms_own_check_sees_the_key_of_anthropics_header(app: FastAPI, vllm: Callable[..., TestClient]) -> None:
    seen = []

    @app.middleware("http")
    async def own(request: Any, call_next: Any) -> Any:
        seen.append(request.headers.get("authorization"))
        return await call_next(request)

    vllm("plain").post("/v1/messages", headers={"x-api-key": "plain"})
    assert seen == ["Bearer plain"]


def test_websockets_need_the_key_too(vllm: Callable[..., TestClient]) -> None:
    client = vllm("plain")
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v1/realtime"):
        pass
    with client.websocket_connect("/v1/realtime", headers={"Authorization": "Bearer plain"}) as socket:
        assert socket.receive_text() == "open"
    foreign = {"Authorization": "Bearer plain", "Origin": "http://evil.lan"}
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v1/realtime", headers=foreign):
        pass


def test_open_metrics_opens_the_metrics_alone(vllm: Callable[..., TestClient]) -> None:
    client = vllm(open_metrics=True)
    assert client.get("/metrics").text == "figures"
    for path in ("/load", "/v1/models", "/docs"):
        assert client.get(path).status_code == 401
    assert client.post("/metrics").status_code == 401


def test_without_a_key_everybody_is_let_in(vllm: Callable[..., TestClient]) -> None:
    assert vllm(None).get("/load").json() == {"status": "open"}


def test_models_are_listed_by_name(vllm: Callable[..., TestClient]) -> None:
    answer = vllm(None).get("/v1/models")
    assert answer.json() == {"object": "list", "data": [{"id": "name", "root": "name", "max_model_len": 8}]}
    assert "secret" not in answer.text


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"data": 3}', b'{"data": [3]}', b'{"data": [{"root": "x"}]}'])
def test_what_is_no_list_of_models_stays_as_it_is(body: bytes) -> None:
    assert names_alone(body) == body


def test_two_folders_with_one_name_have_two(tmp_path: Any) -> None:
    folders = [tmp_path / "a" / "ckpt", tmp_path / "b" / "ckpt"]
    for folder in folders:
        folder.mkdir(parents=True)
    assert served_names(["nano/sft", *map(str, folders)]) == {
        "nano/sft": "nano/sft",
        "ckpt": str(folders[0]),
        "ckpt-2": str(folders[1]),
    }


def test_all_credentials_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time must not say which of two is wrong."""
    compared: list[int] = []

    def compare(sent: bytes, key: bytes) -> bool:
        compared.append(len(sent))
        return False

    monkeypatch.setattr("serving.door.keys.hmac.compare_digest", compare)
    guard = KeyGuard(None, "k")  # type: ignore[arg-type]
    headers = [(b"authorization", b"Bearer short"), (b"x-api-key", b"a much longer one" * 9)]
    assert not guard._admits({"headers": headers})
    assert compared == [32, 32]  # digests: of one length, whatever is sent


def test_the_settings_are_json() -> None:
    settings = json.loads(front_settings("0.0.0.0", ("a", "b"), open_metrics=True))
    assert settings == {"host": "0.0.0.0", "allowed_hosts": ["a", "b"], "open_metrics": True}
