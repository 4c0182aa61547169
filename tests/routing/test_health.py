"""Every provider is asked at once, without a completion, and it is over within its timeout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from behaviours import HANG, HTML, HTTP_401_ECHO, HTTP_500, Behaviour
from conftest import Ran
from provider import Loopback

from biollm.client import check_all_providers
from biollm.config import load_config
from biollm.routing.health import check

Write = Callable[..., Path]


def test_the_answer_has_the_shape_that_programs_know(net: Loopback, waterfall: Write) -> None:
    up = net.serve()
    waterfall(up=up, down=net.refusing())
    status = check_all_providers()
    assert status["up"]["available"] is True
    assert isinstance(status["up"]["latency_ms"], int)
    assert status["down"]["available"] is False
    assert "ConnectError" in status["down"]["error"]
    assert [request.path for request in up.requests] == ["/v1/models"], "nothing billable"


@pytest.mark.slow
def test_whatever_hangs_all_are_told_within_the_timeout(net: Loopback, waterfall: Write) -> None:
    waterfall(
        hangs=net.serve(then=HANG),
        drops=net.dropping(),
        refuses=net.serve(then=HTTP_401_ECHO),
        breaks=net.serve(then=HTTP_500),
        portal=net.serve(then=HTML),
        other=net.serve(then=Behaviour(body="[1]")),
        keyless={"base_url": net.serve().url, "env_key": "NOT_SET"},
        fine=net.serve(),
    )
    found = {each.provider: each for each in check(load_config(), timeout=1.0)}
    assert [name for name, each in found.items() if each.available] == ["fine"]
    assert found["hangs"].error == "no answer within 1 s"
    assert "Timeout" in found["drops"].error or found["drops"].error == "no answer within 1 s"
    assert (found["refuses"].error, found["breaks"].error) == ("HTTP 401 (key: REFUSES_KEY)", "HTTP 500")
    assert "not a JSON list" in found["portal"].error
    assert "not a JSON list" in found["other"].error
    assert found["keyless"].error == "no key: set NOT_SET"
    assert "sk-planted" not in repr(found)


def test_a_provider_with_one_living_account_is_available(net: Loopback, waterfall: Write) -> None:
    accounts = [{"name": "a", "env_key": "NOT_SET"}, {"name": "b", "env_key": "TWO_KEY"}]
    waterfall(two={"base_url": net.serve().url, "accounts": accounts})
    assert check_all_providers()["two"]["available"] is True
    assert [(each.who, each.available) for each in check(load_config())] == [("two.a", False), ("two.b", True)]


@pytest.mark.parametrize(
    ("rungs", "available", "code"),
    [
        ({"groq": {}}, {"groq": None}, 0),
        ({"groq": {}, "down": "refusing"}, {"groq": None, "down": False}, 0),
        ({"groq": {"env_key": "NOT_SET"}}, {"groq": False}, 69),
        ({"groq": {"accounts": [{"name": "a", "env_key": "NOT_SET"}, {"name": "b", "env_key": "GROQ_KEY"}]}},
         {"groq": None}, 0),
    ],
)  # fmt: skip
def test_who_has_no_address_here_is_neither_up_nor_down(
    net: Loopback, waterfall: Write, biollm: Callable[..., Ran], rungs: dict[str, Any], available: Any, code: int
) -> None:
    waterfall(**{name: net.refusing() if candidate == "refusing" else candidate for name, candidate in rungs.items()})
    status = check_all_providers()
    assert {name: each["available"] for name, each in status.items()} == available
    assert available["groq"] is False or "only LiteLLM knows" in status["groq"]["error"]
    ran = biollm("health")
    assert ran.code == code
    assert ("unknown" in ran.out) is (None in available.values())


def test_models_that_the_provider_does_not_list_are_named(net: Loopback, waterfall: Write) -> None:
    waterfall(first={"base_url": net.serve(models=("small",)).url, "models": ["small", "retired"]})
    assert check(load_config())[0].missing == ("retired",)


@pytest.mark.parametrize("kind", ["local", "embedded"])
def test_what_runs_nowhere_says_what_to_do(waterfall: Write, kind: str) -> None:
    model = {"local": {"hf_id": "lab/x"}, "embedded": {"gguf": "/nowhere/x.gguf"}}[kind]
    waterfall({"models": {"small": {"type": kind, **model}}}, own={"type": kind})
    (health,) = check(load_config())
    assert not health.available
    assert health.error
