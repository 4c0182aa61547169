"""Computes the price of an answer, and sorts deployments of one priority by it.

A price is the user's own (`costs.per_million_tokens`), 0 where tokens are free, else the one in LiteLLM's map of models.
A local model is free unless it has a price of its own: its GPU hours are spent whether it answers or idles. LiteLLM's
`completion_cost` takes no such price, counts an unknown price as 0 and needs a 3 s import; its cost-based routing
ignores how many tokens a request has. Not covered: discounts by the hour, and what is not priced per token of text
(images, audio, searches, the storage of a cache).
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
from typing import Any

from biollm.config import Config
from biollm.routing import litellm_private
from biollm.routing.deployments import Deployment, Requirements, central, excerpt_size, informed
from biollm.types import Usage

ANSWER = 500  # expected tokens of an answer where the request sets no max_tokens
_SENT, _GOT, _THOUGHT = "input_cost_per_token", "output_cost_per_token", "output_cost_per_reasoning_token"
_READ, _WRITTEN = "cache_read_input_token_cost", "cache_creation_input_token_cost"
_ABOVE = re.compile(rf"{_SENT}(_above_(\d+)(k?)_tokens)")
_SERVICE = {"flex": "_flex", "balanced": "_balanced", "priority": "_priority", "fast": "_priority",
            "ultrafast": "_ultrafast"}  # fmt: skip

Facts = Mapping[str, Any]
Rates = tuple[float, float, float, float, float]  # USD per token: prompt, answer, cache read, cache write, reasoning


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
    """The expected cost of an answer; `price` is None where it is unknown."""

    prompt_tokens: int
    answer_tokens: int
    price: Price | None

    @property
    def per_token(self) -> tuple[float, float] | None:
        """Return USD per token of prompt and of answer."""
        return self.price and self.price.rates(self.prompt_tokens)[:2]

    @property
    def usd(self) -> float | None:
        """Return the cost in USD."""
        return self.price and self.price.usd(Usage(self.prompt_tokens, self.answer_tokens))

    def __str__(self) -> str:
        if not self.per_token or self.usd is None:
            return "price unknown"
        sent, got = (1e6 * each for each in self.per_token)
        return f"{self.prompt_tokens} x {sent:g} + {self.answer_tokens} x {got:g} USD/M = {self.usd:.6f} USD"


def price(deployment: Deployment, config: Config) -> Price | None:
    """Return the price of a deployment; None where it is unknown."""
    return prices([deployment], config)[deployment.id]


def prices(found: Sequence[Deployment], config: Config) -> dict[str, Price | None]:
    """Return the price of each deployment by its id; None where it is unknown."""
    own = {each.id: config.costs.per_million_tokens.get(each.provider.name) for each in found}
    free = {each.id for each in found if each.free}
    open_ = [each for each in found if own[each.id] is None and each.id not in free]
    in_map = _entries([each for each in open_ if not each.local])  # what a local address passes on has another price
    unknown = {each.id: None for each in open_}
    known = {ident: _flat(usd or 0.0) for ident, usd in own.items() if ident not in unknown}
    return {**unknown, **{ident: entry.price for ident, entry in in_map.items()}, **known}


def with_facts(found: Sequence[Deployment]) -> list[Deployment]:
    """Return the deployments with what LiteLLM's map says of them: the longest answer, and whether it takes images."""
    in_map = _entries([each for each in found if each.provider.type == "api"])
    return [informed(each, in_map[each.id].facts if each.id in in_map else {}) for each in found]


@dataclass(frozen=True)
class _Entry:
    """A provider's model in LiteLLM's map."""

    facts: Facts
    price: Price | None


_Name = tuple[str, str, str]  # LiteLLM's prefix, its name of the provider (of Copilot these two differ), the model
_known: dict[_Name, _Entry] = {}  # the map is large, so only what is used is kept


def _entries(found: Iterable[Deployment]) -> dict[str, _Entry]:
    """Return each deployment's entry by its id; the map is read once for all that are new."""
    names: dict[str, _Name] = {}
    for each in found:
        prefix, _, model = each.litellm_model.partition("/")
        names[each.id] = prefix, each.provider.litellm_provider, model
    if new := set(names.values()) - _known.keys():
        whole = price_map()
        _known.update({name: _entry(whole, *name) for name in new})
    return {ident: _known[name] for ident, name in names.items()}


def _entry(whole: Mapping[str, Facts], prefix: str, provider: str, model: str) -> _Entry:
    """Return the facts that stand under the provider's name, and the price under LiteLLM's prefix, if they do."""
    entries = {name: listed(whole, name, model)[1] for name in (prefix, provider)}
    name = next((name for name, facts in entries.items() if priced(facts)), None)
    return _Entry(entries[provider] or entries[prefix], Price(entries[name], inclusive=name == "xai") if name else None)


def priced(facts: Facts) -> bool:
    """Return whether a model's entry in LiteLLM's map says what its tokens cost."""
    return bool(per_token(facts) or (_tiers(facts) and all(map(per_token, _tiers(facts)))))


def _tiers(facts: Facts) -> list[Facts]:
    """Return the price lists by length of the prompt, shortest first; most models have none."""
    tiers: list[Facts] = sorted(facts.get("tiered_pricing") or (), key=lambda tier: tier["range"][0])
    return [{_GOT: facts.get(_GOT), **tier} for tier in tiers]


@cache
def _flat(usd_per_million: float) -> Price:
    return Price({_SENT: usd_per_million / 1e6, _GOT: usd_per_million / 1e6})


def cheapest(
    found: Sequence[Deployment], requirements: Requirements, config: Config
) -> list[tuple[Deployment, Cost | None]]:
    """Return deployments and costs by priority, then cost (unknown last), then their old order; `order` is renumbered."""
    answer, known = requirements.answer or ANSWER, prices(found, config)
    sent = {each.id: central(requirements) + excerpt_size(each, requirements) for each in found}
    expected = {each.id: Cost(sent[each.id], answer, known[each.id]) for each in found}

    def rank(each: Deployment) -> tuple[int, float, int]:
        usd = expected[each.id].usd
        return each.provider.priority, float("inf") if usd is None else usd, each.order

    ranked = sorted(found, key=rank)
    orders = {order: place for place, order in enumerate(dict.fromkeys(each.order for each in ranked), 1)}
    return [(replace(each, order=orders[each.order]), expected[each.id]) for each in ranked]


def price_map() -> dict[str, dict[str, Any]]:
    """Return LiteLLM's prices, model -> facts, from its file: importing it takes seconds."""
    found = importlib.util.find_spec("litellm")
    if found is None or not found.submodule_search_locations:
        return {}
    return json.loads(Path(found.submodule_search_locations[0], litellm_private.PRICES).read_bytes())


def listed(prices: Mapping[str, Facts], provider: str, model: str) -> tuple[str, Facts]:
    """Return the name and the facts of a provider's model in LiteLLM's map; ("", {}) where it is not in there."""
    for name in (f"{provider}/{model}", model):  # OpenAI's models and some others have no prefix
        facts = prices.get(name, {})
        if facts and (name != model or str(facts.get("litellm_provider")).startswith(provider)):
            return name, facts
    return "", {}


def per_token(facts: Facts) -> tuple[float, float] | None:
    """Return the USD per token of prompt and of answer; None unless both are known."""
    sent, got = facts.get(_SENT), facts.get(_GOT)
    return (float(sent), float(got)) if isinstance(sent, int | float) and isinstance(got, int | float) else None
