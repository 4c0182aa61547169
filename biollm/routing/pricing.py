"""Prices answers, and orders deployments of one priority by what an answer of each would cost.

Prices are yours (`costs.per_million_tokens`), nothing where a token costs nothing, else those of LiteLLM's map. A local
server counts nothing unless you name its price: its GPU hours are spent whether it answers or idles. LiteLLM's own
`completion_cost` knows no price of yours, takes a missing price for 0, and costs 3 s of import; its cost-based routing
adds the price of one token of prompt to that of one token of answer, however many there are of each. Left out are
discounts by the hour, and what is not priced per token of text (images, audio, searches, the hour that a cache lives).
"""

from __future__ import annotations

import importlib.util
import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

from biollm.config import Config
from biollm.routing.deployments import Deployment, Requirements
from biollm.types import Usage

PRICES = "model_prices_and_context_window_backup.json"  # LiteLLM's map of models, a file of its package
ANSWER = 500  # tokens that an answer is taken to have where the request sets no max_tokens
_SENT, _GOT, _THOUGHT = "input_cost_per_token", "output_cost_per_token", "output_cost_per_reasoning_token"
_READ, _WRITTEN = "cache_read_input_token_cost", "cache_creation_input_token_cost"
_ABOVE = re.compile(rf"{_SENT}(_above_(\d+)(k?)_tokens)")
_SERVICE = {"flex": "_flex", "balanced": "_balanced", "priority": "_priority", "fast": "_priority",
            "ultrafast": "_ultrafast"}  # fmt: skip

Facts = Mapping[str, Any]
Rates = tuple[float, float, float, float, float]  # sent, got, read from the cache, written to it, thought


class Price:
    """What the tokens of a deployment cost, in USD.

    Args:
        facts: A model's entry in LiteLLM's map, with a price per token of prompt and of answer.
        inclusive: Whether a prompt of exactly a threshold's length is priced as one above it.
    """

    def __init__(self, facts: Facts, *, inclusive: bool = False) -> None:
        self._facts = facts
        self._tiers = _tiers(facts)
        found = (_ABOVE.fullmatch(name) for name in facts)
        steps = sorted((int(at[2]) * (1000 if at[3] else 1) - inclusive, at[1]) for at in found if at)
        self._above = [suffix for _, suffix in steps]
        self._starts: list[float] = [tier["range"][0] for tier in self._tiers[1:]] or [at for at, _ in steps]
        self._rates: dict[tuple[int, str], Rates] = {}

    def usd(self, usage: Usage, service_tier: str | None = None) -> float:
        """Return what an answer costs; `service_tier` as the provider states it ("flex", "priority")."""
        sent, got, read, written, thought = self.rates(usage.prompt_tokens, service_tier)
        fresh = max(0, usage.prompt_tokens - usage.cached_tokens - usage.cache_write_tokens)
        said = max(0, usage.completion_tokens - usage.reasoning_tokens)
        cached = usage.cached_tokens * read + usage.cache_write_tokens * written
        return fresh * sent + cached + said * got + usage.reasoning_tokens * thought

    def rates(self, prompt_tokens: int, service_tier: str | None = None) -> Rates:
        """Return USD per token of a request whose prompt is so long."""
        key = bisect_left(self._starts, prompt_tokens), _SERVICE.get((service_tier or "").lower(), "")
        if key not in self._rates:
            self._rates[key] = self._look_up(*key)
        return self._rates[key]

    def _look_up(self, step: int, service: str) -> Rates:
        facts = self._tiers[step] if self._tiers else self._facts

        def rate(name: str, default: float) -> float:
            for suffix in ("", *(() if self._tiers else self._above[:step])):
                found = facts.get(f"{name}{suffix}{service}")
                found = facts.get(f"{name}{suffix}") if found is None else found
                default = default if found is None else float(found)
            return default

        sent, got = rate(_SENT, 0.0), rate(_GOT, 0.0)
        served = service and facts.get(_GOT + service) is not None and facts.get(_THOUGHT + service) is None
        return sent, got, rate(_READ, sent), rate(_WRITTEN, sent), got if served else rate(_THOUGHT, got)


@dataclass(frozen=True)
class Cost:
    """What an answer is expected to cost; `price` is None where nobody knows it."""

    prompt_tokens: int
    answer_tokens: int
    price: Price | None

    @property
    def per_token(self) -> tuple[float, float] | None:
        """Return USD per token of prompt and of answer."""
        return self.price and self.price.rates(self.prompt_tokens)[:2]

    @property
    def usd(self) -> float | None:
        """Return it in USD."""
        return self.price and self.price.usd(Usage(self.prompt_tokens, self.answer_tokens))

    def __str__(self) -> str:
        if not self.per_token or self.usd is None:
            return "price unknown"
        sent, got = (1e6 * each for each in self.per_token)
        return f"{self.prompt_tokens} x {sent:g} + {self.answer_tokens} x {got:g} USD/M = {self.usd:.6f} USD"


def price(deployment: Deployment, config: Config) -> Price | None:
    """Return the price of a deployment; None where nobody knows it."""
    return prices([deployment], config)[deployment.id]


def prices(found: Iterable[Deployment], config: Config) -> dict[str, Price | None]:
    """Return the price of each deployment by its id; None where nobody knows it."""
    known: dict[str, Price | None] = {}
    asked: dict[str, tuple[str, str, str]] = {}
    for each in found:
        own = config.costs.per_million_tokens.get(each.provider.name)
        if own is not None or each.free:
            known[each.id] = _flat(own or 0.0)
        else:  # Copilot is asked as OpenAI is, and counted so
            counted, model = each.litellm_model.split("/", 1)
            asked[each.id] = (counted, each.provider.litellm_provider, model)
    if new := set(asked.values()) - _of_map.keys():  # the map is large, so only what is used is kept, and read at once
        facts = price_map()
        _of_map.update((key, _listed(facts, *key)) for key in new)
    return known | {name: _of_map[key] for name, key in asked.items()}


_of_map: dict[tuple[str, str, str], Price | None] = {}


def _listed(facts: Mapping[str, Facts], prefix: str, provider: str, model: str) -> Price | None:
    for name in (prefix, provider):
        entry = cast("Facts", listed(facts, name, model)[1])
        if priced(entry):
            return Price(entry, inclusive=name == "xai")
    return None


def priced(facts: Facts) -> bool:
    """Return whether a model's entry in LiteLLM's map says what its tokens cost."""
    return bool(per_token(facts) or (_tiers(facts) and all(map(per_token, _tiers(facts)))))


def _tiers(facts: Facts) -> list[Facts]:
    """Return a price list of its own for each length of prompt, shortest first; mostly there is none."""
    tiers: list[Facts] = sorted(facts.get("tiered_pricing") or (), key=lambda tier: tier["range"][0])
    return [{_GOT: facts.get(_GOT), **tier} for tier in tiers]


@cache
def _flat(usd_per_million: float) -> Price:
    return Price({_SENT: usd_per_million / 1e6, _GOT: usd_per_million / 1e6})


def cheapest(
    found: Sequence[Deployment], requirements: Requirements, config: Config
) -> list[tuple[Deployment, Cost | None]]:
    """Return deployments and costs by priority, then cost, unknown ones last, then as they stood; `order` follows."""
    prompt, answer, known = requirements.prompt, requirements.answer or ANSWER, prices(found, config)
    expected = {each.id: Cost(prompt, answer, known[each.id]) for each in found}

    def rank(each: Deployment) -> tuple[int, float, int]:
        usd = expected[each.id].usd
        return each.provider.priority, float("inf") if usd is None else usd, each.order

    places: dict[int, int] = {}
    return [
        (replace(each, order=places.setdefault(each.order, len(places) + 1)), expected[each.id])
        for each in sorted(found, key=rank)
    ]


def price_map() -> dict[str, dict[str, object]]:
    """Return LiteLLM's prices, model -> facts, from its file: importing it takes seconds."""
    found = importlib.util.find_spec("litellm")
    if found is None or not found.submodule_search_locations:
        return {}
    return json.loads(Path(found.submodule_search_locations[0], PRICES).read_bytes())


def listed(prices: Mapping[str, Mapping[str, object]], provider: str, model: str) -> tuple[str, Mapping[str, object]]:
    """Return the name and the facts under which LiteLLM's map lists a provider's model; ("", {}) where it does not."""
    for name in (f"{provider}/{model}", model):  # OpenAI's and some others' models stand there by their bare names
        facts = prices.get(name, {})
        if facts and (name != model or str(facts.get("litellm_provider")).startswith(provider)):
            return name, facts
    return "", {}


def per_token(facts: Mapping[str, object]) -> tuple[float, float] | None:
    """Return the USD per token of prompt and of answer; None unless both are known."""
    sent, got = facts.get("input_cost_per_token"), facts.get("output_cost_per_token")
    return (float(sent), float(got)) if isinstance(sent, int | float) and isinstance(got, int | float) else None
