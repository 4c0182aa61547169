"""`policy: cheapest`: who is asked first is a matter of prices and of how many tokens a request is expected to need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from behaviours import HTTP_500, OK, Behaviour
from conftest import until
from provider import Loopback

from biollm._runtime import ledger
from biollm.client import get_model_client
from biollm.config import load_config
from biollm.errors import CompletionError, ConfigError
from biollm.monitoring import metrics
from biollm.monitoring.usage import report
from biollm.routing import import_router
from biollm.routing.deployments import Deployment, build_deployments
from biollm.routing.pricing import price, price_map
from biollm.types import Usage

Write = Callable[..., Path]
CHEAPEST: dict[str, Any] = {"routing": {"policy": "cheapest"}}
# USD per million tokens of prompt and answer: gpt-4.1 2 and 8, gpt-5.1 1.25 and 10, gpt-4o-mini 0.15 and 0.6.
# With an answer of 500 tokens, gpt-5.1 is the cheaper one from 1334 tokens of prompt, of 5 characters each.
LONG = "word " * 1161  # 1.15 tokens each


NEAR: dict[str, Any] = {
    "type": "local",
    "base_url": "http://127.0.0.1:9/v1",
    "models": ["codellama-34b"],
    "priority": 1,
}


def paid(model: str, priority: int = 1, **more: Any) -> dict[str, Any]:
    """Return a provider in the cloud, whose tokens have a price."""
    return {
        "base_url": "https://api.invalid/v1",
        "litellm_provider": "openai",
        "models": [model],
        "priority": priority,
        **more,
    }


def order(**options: Any) -> list[str]:
    """Return the providers' names in the order in which they would be asked."""
    found = get_model_client(**options.pop("client", {})).explain(options.pop("prompt", "hi"), **options)
    assert [candidate.deployment.order for candidate in found] == list(range(1, len(found) + 1))
    return [candidate.deployment.provider.name for candidate in found]


def test_free_is_first_and_unknown_last_and_priorities_are_kept(waterfall: Write) -> None:
    rungs: Mapping[str, Any] = {
        "unknown": paid("odd"),
        "dear": paid("gpt-4.1"),
        "cheap": paid("gpt-4o-mini"),
        "free": paid("gpt-4.1", free_tier=True),
        "unknown2": paid("odder"),
        "near": NEAR,
        "passes_on": {"base_url": "http://127.0.0.1:9/v1", "priority": 1},
        "later": paid("gpt-4o-mini", priority=2),
        "sooner": paid("odd", priority=0),
    }
    waterfall(**rungs)
    assert order() == ["sooner", "unknown", "dear", "cheap", "free", "unknown2", "near", "passes_on", "later"]
    waterfall(CHEAPEST, **rungs)
    assert order() == ["sooner", "free", "near", "cheap", "dear", "unknown", "unknown2", "passes_on", "later"]


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({}, "cheap_answers"),
        ({"prompt": LONG}, "cheap_prompts"),
        ({"prompt": LONG[:-10]}, "cheap_answers"),
        ({"prompt": LONG, "max_tokens": 501}, "cheap_answers"),
        ({"prompt": "word " * 100, "max_tokens": 10}, "cheap_prompts"),
        ({"client": {"max_tokens": 1}}, "cheap_prompts"),
    ],
)
def test_a_long_prompt_or_a_short_answer_turns_the_order(waterfall: Write, options: dict[str, Any], first: str) -> None:
    if not options or "client" in options:
        options["prompt"] = "word " * 10
    waterfall(CHEAPEST, cheap_answers=paid("gpt-4.1"), cheap_prompts=paid("gpt-5.1"))
    assert order(**options)[0] == first


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, ["near", "mapped", "odd", "odd2"]),
        ({"odd": 0.01}, ["near", "odd", "mapped", "odd2"]),
        ({"odd2": 0}, ["odd2", "near", "mapped", "odd"]),  # equal ones stay as they stand
        ({"near": 5}, ["mapped", "near", "odd", "odd2"]),  # a server of one's own that is not to count as free
        ({"mapped": 90}, ["near", "mapped", "odd", "odd2"]),
        ({"mapped": 90, "odd": 91, "odd2": 90.5}, ["near", "mapped", "odd2", "odd"]),
    ],
)
def test_prices_of_ones_own_are_believed(waterfall: Write, own: dict[str, float], expected: list[str]) -> None:
    waterfall(
        {**CHEAPEST, "costs": {"per_million_tokens": own}},
        odd=paid("odd"),
        odd2=paid("odd"),
        mapped=paid("gpt-4o-mini"),
        near=NEAR,
    )
    assert order() == expected


def test_the_cheapest_is_asked_and_then_the_next_cheapest(
    net: Loopback, waterfall: Write, paid: Callable[..., dict[str, Any]]
) -> None:
    cloud = net.serve(then=lambda request: HTTP_500 if "broken" in request.headers["authorization"] else OK)

    def asked() -> list[str]:
        return [request.headers["authorization"].split("-")[2] for request in cloud.completions]

    def beyond(name: str, model: str) -> dict[str, Any]:
        return paid(cloud, name, model, priority=1)

    def fallback_rate() -> float:
        ledger().flush()
        return report(load_config(), ledger()).total.fallback_rate

    dear, cheap = beyond("dear", "gpt-4.1"), beyond("cheap", "gpt-4o-mini")
    waterfall(CHEAPEST, dear=dear, unknown=beyond("unknown", "odd"), cheap=cheap)
    answer = get_model_client().complete("hi")
    assert [attempt.deployment for attempt in answer.attempts] == ["cheap/gpt-4o-mini"]
    assert asked() == ["cheap"]
    assert fallback_rate() == 0.0, "the first in its order is no fallback"
    waterfall(CHEAPEST, dear=dear, cheap=cheap, broken=beyond("broken", "gpt-5-nano"))
    answer = get_model_client().complete("hi")
    assert [(attempt.deployment, attempt.outcome) for attempt in answer.attempts] == [
        ("broken/gpt-5-nano", "failed"),
        ("broken/gpt-5-nano", "failed"),
        ("cheap/gpt-4o-mini", "ok"),
    ]
    assert asked() == ["cheap", "broken", "broken", "cheap"]
    assert fallback_rate() == 0.5


def test_accounts_of_one_model_stay_one_rung(waterfall: Write) -> None:
    accounts = [{"name": name, "env_key": f"{name.upper()}_KEY"} for name in ("dear", "lab")]
    two = paid("gpt-4o-mini", accounts=accounts)
    waterfall(CHEAPEST, dear=paid("gpt-4.1"), lab=paid("gpt-5.1"), cheap=two)
    found = get_model_client().explain("hi")
    assert [(candidate.deployment.order, candidate.deployment.id) for candidate in found][:2] == [
        (1, "cheap.dear/gpt-4o-mini"),
        (1, "cheap.lab/gpt-4o-mini"),
    ]


def test_explain_shows_the_arithmetic(waterfall: Write, biollm: Callable[..., Any]) -> None:
    rungs = {
        "odd": paid("odd"),
        "mapped": paid("gpt-4o-mini"),
        "free": paid("odd", free_tier=True),
        "keyless": paid("gpt-4.1", env_key="NOT_SET"),
    }
    waterfall(CHEAPEST, **rungs)
    lines = biollm("explain", "word " * 1200, "--max-tokens", "300").out.splitlines()
    assert [" ".join(line.split()) for line in lines[1:]] == [
        "→ 1 free/odd ready 1380 x 0 + 300 x 0 USD/M = 0.000000 USD",
        "2 mapped/gpt-4o-mini ready 1380 x 0.15 + 300 x 0.6 USD/M = 0.000387 USD",
        "3 keyless/gpt-4.1 keyless no key: set NOT_SET; 1380 x 2 + 300 x 8 USD/M = 0.005160 USD",
        "4 odd/odd ready price unknown",
        "",
        "free/odd would answer.",
    ]
    facts = [fact["cost"] for fact in biollm("explain", "word " * 1200, "--json").json]
    assert facts[1] == {
        "prompt_tokens": 1380,
        "answer_tokens": 500,
        "prompt_usd_per_million": pytest.approx(0.15),
        "answer_usd_per_million": pytest.approx(0.6),
        "usd": pytest.approx(0.000507),
    }
    assert (facts[3]["usd"], facts[3]["prompt_usd_per_million"]) == (None, None)
    waterfall(**rungs)
    assert all(fact["cost"] is None for fact in biollm("explain", "--json").json)


def test_a_policy_that_does_not_exist_is_refused(waterfall: Write) -> None:
    waterfall({"routing": {"policy": "cheap"}}, one=paid("odd"))
    with pytest.raises(ConfigError, match=r"routing.policy: must be 'order' or 'cheapest', not 'cheap'"):
        load_config()


@pytest.mark.slow
def test_a_drill_plays_the_order_of_prices(net: Loopback, waterfall: Write, biollm: Callable[..., Any]) -> None:
    last, first = net.serve(), net.serve()
    waterfall(
        {**CHEAPEST, "costs": {"per_million_tokens": {"last": 2, "first": 1}}},
        last={"base_url": last.url, "priority": 1},
        first={"base_url": first.url, "priority": 1},
    )
    ran = biollm("drill", "--live", "--json")
    assert [(answer["rung"], answer["state"]) for answer in ran.json["answers"]] == [
        ("first/small", "answered"),
        ("last/small", "answered"),
    ]
    assert biollm("drill").code == 0


# --- What an answer costs -------------------------------------------------------------------------------------------


def of_map(base: Deployment, provider: str, model: str) -> Deployment:
    """Return the deployment of a model in LiteLLM's map."""
    whose = base.provider.model_copy(update={"litellm_provider": provider})
    return replace(base, provider=whose, litellm_model=f"{provider}/{model}")


@pytest.mark.slow
def test_a_price_is_litellms_with_cached_and_reasoning_tokens_and_tiers(waterfall: Write) -> None:
    """One model of each provider and set of prices; left out are prices by the hour of the day, and by feature."""
    import_router()  # which keeps LiteLLM from fetching another map
    import litellm
    from litellm.types.utils import CompletionTokensDetailsWrapper, ModelResponse, PromptTokensDetailsWrapper
    from litellm.types.utils import Usage as Theirs

    among = ("openai", "anthropic", "gemini", "deepseek", "groq", "mistral", "xai", "dashscope", "openrouter")
    kinds: dict[Any, tuple[str, str]] = {}
    for name, facts in price_map().items():
        provider = str(facts.get("litellm_provider"))
        if facts.get("mode") == "chat" and provider in among and "off_peak_pricing" not in facts:
            kind = provider, *(field for field in facts if "_cost" in field or field == "tiered_pricing")
            kinds.setdefault(kind, (provider, name.removeprefix(f"{provider}/")))
    asked = (
        Usage(1000, 200),
        Usage(1000, 200, cached_tokens=600, cache_write_tokens=100),
        Usage(200_000, 200, cached_tokens=150_000),
        Usage(200_001, 200),
        Usage(300_000, 2000, 100_000, 0, 1500),
    )
    compared = 0
    waterfall(one=paid("odd"))
    config = load_config()
    (base,) = build_deployments(config)[:1]
    for provider, model in kinds.values():
        known = price(of_map(base, provider, model), config)
        for usage in asked if known else ():
            for tier in (None, "priority"):
                response = ModelResponse(model=f"{provider}/{model}", service_tier=tier)
                prompt = PromptTokensDetailsWrapper(
                    cached_tokens=usage.cached_tokens, cache_creation_tokens=usage.cache_write_tokens
                )
                thoughts = CompletionTokensDetailsWrapper(reasoning_tokens=usage.reasoning_tokens)
                response.usage = Theirs(  # type: ignore[attr-defined] # a field that it declares nowhere
                    prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens,
                    total_tokens=usage.total_tokens, prompt_tokens_details=prompt, completion_tokens_details=thoughts,
                )  # fmt: skip
                theirs = litellm.completion_cost(response, model=f"{provider}/{model}")
                assert known.usd(usage, tier) == pytest.approx(theirs), (provider, model, usage, tier)
                compared += 1
    assert compared > 500


@pytest.mark.parametrize(
    ("provider", "model"), [("openai", "gpt-nobody-knows"), ("openai", "container"), ("groq", "gpt-4o")]
)
def test_a_price_that_nobody_knows_is_none_and_not_zero(waterfall: Write, provider: str, model: str) -> None:
    waterfall(one=paid("odd"))
    config = load_config()
    assert price(of_map(build_deployments(config)[0], provider, model), config) is None


DETAILS = {
    "prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100,
    "prompt_tokens_details": {"cached_tokens": 800}, "completion_tokens_details": {"reasoning_tokens": 60},
}  # fmt: skip


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("own", "tier", "usd"),
    [
        (None, None, (200 * 2.5 + 800 * 1.25 + 100 * 10) / 1e6),  # gpt-4o, cached prompts for half
        (None, "priority", (200 * 4.25 + 800 * 2.125 + 100 * 17) / 1e6),
        (7, None, 1100 * 7 / 1e6),
    ],
)
def test_every_place_gives_an_answer_the_same_price(
    net: Loopback, waterfall: Write, paid: Any, streamed: bool, own: float | None, tier: str | None, usd: float
) -> None:
    costs = {"costs": {"per_million_tokens": {"first": own}}} if own else {}
    server = net.serve(then=Behaviour(usage=DETAILS, service_tier=tier))
    waterfall(costs, first=paid(server, "first", "gpt-4o", budget="1 USD/month"))
    client = get_model_client()
    answer = list(client.stream("hi"))[-1].completion if streamed else client.complete("hi")
    assert answer is not None
    assert answer.usage == Usage(1000, 100, cached_tokens=800, reasoning_tokens=60)
    assert answer.cost_usd == pytest.approx(usd)
    ledger().flush()
    told = report(load_config(), ledger())
    assert (told.total.cost_usd, told.budgets[0].used) == (pytest.approx(usd), pytest.approx(usd))
    (line,) = [each for each in metrics.text(load_config(), ledger()).splitlines() if each.startswith("biollm_cost")]
    assert float(line.split()[-1]) == pytest.approx(usd)


# --- What was paid and thrown away ----------------------------------------------------------------------------------

STATED = {"prompt_tokens": 40, "completion_tokens": 7, "total_tokens": 47}
JSON_WANTED = {"type": "object", "properties": {"fix": {"type": "string"}}, "required": ["fix"]}
TWELVE = "one two three four five six seven eight nine ten eleven twelve"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("behaviour", "options", "expected"),  # (outcome, prompt, answer, estimated) of each attempt
    [
        # Stated by the provider.
        (Behaviour(text="no JSON", usage=STATED), {"response_model": JSON_WANTED}, [("failed", 40, 7, False)] * 2),
        (Behaviour(text="", usage=STATED), {}, [("failed", 40, 7, False)]),
        (Behaviour(text="", usage=STATED), {"stream": True}, [("failed", 40, 7, False)]),
        (Behaviour(choices=False, usage=STATED), {}, [("failed", 40, 7, False)]),
        # Not stated: 400 characters are sent, and 4 are taken for a token.
        (Behaviour(text=TWELVE, usage={}), {}, [("ok", 49, 15, True)]),
        (Behaviour(text=TWELVE, usage={}), {"stream": True}, [("ok", 49, 15, True)]),
        (Behaviour(text="no JSON", usage={}), {"response_model": JSON_WANTED}, [("failed", 49, 1, True)] * 2),
        (Behaviour(text=TWELVE, cut=9), {"stream": True}, [("failed", 49, 8, True)]),
        (Behaviour(text=TWELVE, fail=9), {"stream": True}, [("failed", 49, 8, True)]),
        (Behaviour(text=TWELVE, hang=9), {"stream": True, "timeout": 3}, [("failed", 49, 8, True)]),
        (Behaviour(text=TWELVE, hang=9), {"stream": True, "leave": 7}, [("cancelled", 49, 8, True)]),
        # Nothing came, so nothing was paid.
        (HTTP_500, {}, [("failed", 0, 0, False)] * 2),
        (Behaviour(hang=1), {"stream": True, "timeout": 3}, [("failed", 0, 0, False)]),
    ],
)
def test_what_was_paid_and_thrown_away_counts(
    net: Loopback, waterfall: Write, behaviour: Behaviour, options: dict[str, Any], expected: list[Any]
) -> None:
    costs = {"costs": {"per_million_tokens": {"first": 1e6}}}  # a dollar a token
    url = net.serve(then=behaviour).url
    waterfall(costs, first={"base_url": url, "token_budget": "1M/month", "budget": "100000 USD/month"})
    client, options = get_model_client(), dict(options)
    leave = options.pop("leave", None)
    with suppress(CompletionError):
        if options.pop("stream", False):
            for at, _ in enumerate(pieces := client.stream("x" * 400, **options), 1):
                if at == leave:
                    pieces.close()
                    break
        else:
            client.complete("x" * 400, **options)
    until(lambda: [ledger().flush(), *ledger().history()][len(expected) :])  # leaving a stream does not wait
    ledger().flush()  # quotas have a file of their own
    records = list(ledger().history())
    found = [(each.outcome, each.prompt_tokens, each.completion_tokens, each.estimated) for each in records]
    assert found == expected
    tokens = sum(each[1] + each[2] for each in expected)
    told = report(load_config(), ledger())
    assert {quota.unit: quota.used for quota in told.quotas} == {"tokens": tokens, "usd": tokens}
    assert (told.total.cost_usd, told.total.estimated) == (tokens, sum(each[3] for each in expected))
