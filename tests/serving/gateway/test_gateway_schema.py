"""Schemathesis reads the gateway's OpenAPI document and tries what it says, right and wrong, before real vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from fake_upstream import Served
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from serving.gateway.app import GatewaySettings, create_app

KEY = "a-key"
HEADERS = {"Authorization": f"Bearer {KEY}"}
POSTS = ["/v1/chat/completions", "/v1/completions", "/v1/rewards"]
GETS = ["/v1/models", "/ready", "/metrics", "/openapi.json", "/health"]
CHECKS = [
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
    ignored_auth,
]


@pytest.fixture(scope="module")
def document(policy_server: Any, reward_server: Any) -> Iterator[Any]:
    limits = GatewaySettings(policy_url=policy_server.url, reward_url=reward_server.url, api_key=KEY)
    with Served.of(create_app(limits)) as served:
        yield schemathesis.openapi.from_url(f"{served.url}/openapi.json", headers=HEADERS)


def test_all_paths_are_tried(document: Any) -> None:
    assert set(document) == {*POSTS, *GETS}


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["right", "wrong"])
@pytest.mark.parametrize("path", POSTS)
def test_what_the_document_says_is_so(document: Any, path: str, mode: GenerationMode) -> None:
    attempt(document[path]["POST"], mode, 60)


@pytest.mark.parametrize("path", GETS)
def test_paths_without_a_body(document: Any, path: str) -> None:
    attempt(document[path]["GET"], GenerationMode.POSITIVE, 3)


def attempt(operation: Any, mode: GenerationMode, examples: int) -> None:
    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check(case: Any) -> None:
        case.call_and_validate(headers=HEADERS, checks=CHECKS, timeout=60)

    check()
