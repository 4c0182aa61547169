"""The id of each answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from behaviours import HTTP_500, limited
from provider import Loopback
from starlette.testclient import TestClient

from biollm.client import Client
from biollm.gateway import app as gateway
from biollm.gateway.auth import Admission, Key
from biollm.gateway.request_id import RequestId

HI = {"messages": [{"role": "user", "content": "hi"}]}
KEY = "k" * 16


@pytest.fixture
def client(net: Loopback, waterfall: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> TestClient:
    """A gateway behind a key; its first model answers, `broken` fails, `full` is at a limit."""
    monkeypatch.setenv("BIOLLM_SENDER", "direct")
    broken, full = ({"base_url": net.serve(then=how).url, "models": [name]} for name, how in (("broken", HTTP_500), ("full", limited("9"))))  # fmt: skip
    waterfall(first=net.serve(), second=broken, third=full)
    inside = Admission(gateway.app(Client()), [Key("ann", KEY)], "testserver")
    return TestClient(RequestId(inside), headers={"authorization": f"Bearer {KEY}"}, raise_server_exceptions=False)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/chat/completions", HI, 200),
        ("POST", "/v1/chat/completions", {**HI, "stream": True}, 200),
        ("POST", "/v1/chat/completions", {}, 400),
        ("POST", "/v1/chat/completions", {**HI, "model": "nobody"}, 404),
        ("POST", "/v1/chat/completions", {**HI, "model": "full"}, 429),
        ("POST", "/v1/chat/completions", {**HI, "model": "broken", "stream": True}, 503),
        ("POST", "/v1/messages", {**HI, "max_tokens": 5}, 200),
        ("POST", "/v1/messages/count_tokens", HI, 200),
        ("POST", "/v1/responses", {"input": "hi"}, 200),
        ("POST", "/v1/embeddings", {}, 404),
        ("GET", "/v1/chat/completions", None, 405),
        ("GET", "/v1/models", None, 200),
        ("GET", "/v1/models/nobody", None, 404),
        ("GET", "/health", None, 200),
    ],
)
def test_each_answer_has_one_id(client: TestClient, method: str, path: str, body: Any, status: int) -> None:
    answers = [client.request(method, path, json=body) for _ in range(2)]
    assert answers[0].status_code == status
    ids = [answer.headers.get_list("x-request-id") for answer in answers]
    assert all(len(each) == 1 and each[0].startswith("req_") for each in ids)
    assert ids[0] != ids[1]


@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions"])
def test_so_has_the_refusal_of_a_key(client: TestClient, path: str) -> None:
    answer = client.get(path, headers={"authorization": "Bearer wrong"})
    assert (answer.status_code, bool(answer.headers["x-request-id"])) == (401, True)


@pytest.mark.parametrize(
    ("given", "taken"),
    [(b"run-7:3.a_B", True), (b"x" * 64, True), (b"x" * 65, False), (b"", False), (b"a b", False), ("ä".encode(), False), (b"<script>", False), (b"a\tb", False)],
)  # fmt: skip
def test_a_callers_own_id_comes_back_where_it_is_short_and_plain(client: TestClient, given: bytes, taken: bool) -> None:
    answer = client.get("/v1/models", headers=[(b"x-request-id", given)])
    assert (answer.headers["x-request-id"] == given.decode()) == taken
    assert answer.headers["x-request-id"].isascii()


def test_an_unexpected_error_has_an_id_too(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Client, "explain", lambda *_: 1 / 0)
    answer = client.get("/v1/models")
    assert (answer.status_code, bool(answer.headers["x-request-id"])) == (500, True)
