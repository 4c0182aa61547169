"""The live drill: each real deployment answers one short prompt; limits and cooldowns hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from behaviours import HTTP_429, HTTP_500
from provider import Loopback
from test_drill import job, lab

from biollm._runtime import ledger
from biollm.config import load_config
from biollm.drill.live import MAX_TOKENS, PROMPT_TOKENS, live_drill
from biollm.monitoring.usage import report

__all__ = ["job", "lab"]
Paid = Callable[..., dict[str, Any]]


def free(server: Any) -> dict[str, Any]:
    """Return a provider whose tokens cost nothing."""
    url = server if isinstance(server, str) else server.url
    return {"base_url": url, "free_tier": True, "trains_on_prompts": False}


MOST = PROMPT_TOKENS * 0.15e-6 + MAX_TOKENS * 0.6e-6  # USD; what an answer of gpt-4o-mini may cost


def states(ran: Any) -> dict[str, str]:
    return {answer["rung"].split("/")[0]: answer["state"] for answer in ran.json["answers"]}


def test_each_deployment_is_called_once_and_recorded(
    net: Loopback, paid: Paid, waterfall: Callable[..., Path], biollm: Callable[..., Any]
) -> None:
    servers = [net.serve(), net.serve(text="one two"), net.serve()]
    waterfall(first=free(servers[0]), second=paid(servers[1], "second"), third=free(servers[2]))
    ran = biollm("drill", "--live", "--json")
    assert ran.code == 0, ran.out + ran.err
    assert [len(server.completions) for server in servers] == [1, 1, 1]
    assert servers[1].completions[0].body["max_tokens"] == MAX_TOKENS
    answers = ran.json["answers"]
    assert [(a["rung"], a["state"]) for a in answers] == [
        ("first/small", "answered"), ("second/gpt-4o-mini", "answered"), ("third/small", "answered"),
    ]  # fmt: skip
    assert all(a["ms"] > 0 for a in answers)
    assert 0 < answers[1]["cost_usd"] == ran.json["spent_usd"] < MOST
    assert "Requests to send: 3, for at most 0.0003 USD (the limit is 0.05).\n" in ran.err
    assert "  second/second: 1\n" in ran.err and "  third/default: 1, free\n" in ran.err
    records = list(ledger().history())
    assert [(r.deployment, r.outcome, dict(r.tags)) for r in records] == [
        (a["rung"], "ok", {"drill": "live"}) for a in answers
    ]
    assert report(load_config(), ledger()).total.fallback_rate == 0.0
    assert ledger().blocked() == {}
    assert "sk-planted" not in ran.out + ran.err


def test_a_server_of_ones_own_with_a_price_is_not_called_free(
    net: Loopback, waterfall: Callable[..., Path], biollm: Callable[..., Any]
) -> None:
    waterfall({"costs": {"per_million_tokens": {"priced": 2}}}, priced=net.serve(), unpriced=free(net.serve()))
    said = biollm("drill", "--live").err
    assert "  priced/default: 1\n" in said and "  unpriced/default: 1, free\n" in said


def test_a_deployment_that_fails_is_reported_and_cools_down(
    net: Loopback, waterfall: Callable[..., Path], biollm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rungs = {"good": net.serve(), "bad": net.serve(then=HTTP_500), "away": net.refusing(), "keyless": net.serve()}
    waterfall(**{name: free(server) for name, server in rungs.items()})
    monkeypatch.delenv("KEYLESS_KEY")
    ran = biollm("drill", "--live")
    assert ran.code == 1
    table = {line.split("/")[0]: line for line in ran.out.splitlines()}
    assert "answered" in table["good"] and "an answer" in table["good"]
    assert "FAILED" in table["bad"] and "HTTP 500: Internal server error." in table["bad"]
    assert "FAILED" in table["away"] and "the connection was refused" in table["away"]
    assert table["keyless"] == "keyless/small is not available: no key: set KEYLESS_KEY"
    assert sorted(key.partition(":")[0] for key in ledger().blocked()) == ["deployment", "endpoint"]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (MOST * 0.99, {"one": "not asked", "two": "not asked", "free": "answered"}),
        (MOST, {"one": "answered", "two": "not asked", "free": "answered"}),
        (MOST * 2, {"one": "answered", "two": "answered", "free": "answered"}),
    ],
)
def test_the_spend_limit_is_never_exceeded(
    net: Loopback,
    paid: Paid,
    waterfall: Callable[..., Path],
    biollm: Callable[..., Any],
    limit: float,
    expected: dict[str, str],
) -> None:
    cloud = net.serve(text="one two")
    waterfall(one=paid(cloud, "one"), two=paid(cloud, "two"), free=free(net.serve()))
    ran = biollm("drill", "--live", "--spend-limit", str(limit), "--json")
    assert states(ran) == expected
    asked = [request.headers["authorization"].split("-")[2] for request in cloud.completions]
    assert asked == [name for name in ("one", "two") if expected[name] == "answered"]
    assert ran.json["spent_usd"] <= limit


def test_a_deployment_of_unknown_price_is_not_called_until_its_price_is_set(
    net: Loopback, paid: Paid, waterfall: Callable[..., Path]
) -> None:
    cloud = net.serve(text="one two")
    waterfall(odd=paid(cloud, "odd", "small"))
    (answer,) = live_drill(load_config(), 1.0, print).answers
    assert answer.state == "not asked" and "price is unknown" in answer.why and not cloud.requests
    waterfall({"costs": {"per_million_tokens": {"odd": 10}}}, odd=paid(cloud, "odd", "small"))
    found = live_drill(load_config(), 1.0, print)
    assert found.answers[0].cost_usd == pytest.approx(8 * 10e-6)  # six words sent, two came
    assert found.spent_usd == found.answers[0].cost_usd


def test_limits_and_cooldowns_of_the_user_hold(
    net: Loopback, waterfall: Callable[..., Path], biollm: Callable[..., Any]
) -> None:
    one, two = net.serve(), net.serve(then=HTTP_429)
    tier = {"base_url": one.url, "models": ["a", "b"], "free_tier": True, "rate_limit": "1/day"}
    waterfall(tier=tier, limited=free(two), last=free(net.serve()))
    ran = biollm("drill", "--live", "--json")
    assert [a["state"] for a in ran.json["answers"]] == ["answered", "not asked", "failed", "answered"]
    assert "1/day" in ran.json["answers"][1]["why"]
    assert "  tier/default: 2 of 1/day, free\n" in ran.err
    again = biollm("drill", "--live", "--json")
    assert [a["state"] for a in again.json["answers"]] == ["not asked", "not asked", "not asked", "answered"]
    assert all(a["why"].startswith("unavailable until 20") for a in again.json["answers"][:3])
    assert "Requests to send: 1," in again.err
    assert (len(one.requests), len(two.requests)) == (1, 1)


@pytest.mark.slow
def test_discovered_servers_and_the_embedded_model_answer(
    lab: Callable[..., list[str]], net: Loopback, weights: Path, biollm: Callable[..., Any]
) -> None:
    deployments = lab(weights, first=free(net.serve()))
    ran = biollm("drill", "--live", "--json")
    assert ran.code == 0, json.dumps(ran.json, indent=1)
    assert [(a["rung"], a["state"], a["degraded"]) for a in ran.json["answers"]] == [
        (each, "answered", each == deployments[-1]) for each in deployments
    ]
    assert ran.json["spent_usd"] == 0


def test_a_spend_limit_without_live_is_a_mistake(biollm: Callable[..., Any]) -> None:
    assert biollm("drill", "--spend-limit", "1").code == 2
