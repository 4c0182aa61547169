"""Says what an answer of each deployment would cost, and orders those of one priority by it.

LiteLLM's cost-based routing adds the price of one token of prompt to that of one token of answer, however many there
are of each, and knows no price of your own for a provider. Prices are yours (`costs.per_million_tokens`), nothing
where a token costs nothing, else those of LiteLLM's map. A local server counts nothing unless you name its price: its
GPU hours are spent whether it answers or idles.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from biollm.config import Config
from biollm.routing import Deployment, Wants
from biollm.usage import listed, per_token, price_map

Price = tuple[float, float]  # USD per token of prompt, and of answer
ANSWER = 500  # tokens that an answer is taken to have where the request sets no max_tokens


@dataclass(frozen=True)
class Cost:
    """What an answer is expected to cost; `price` is in USD per token, None where nobody knows it."""

    prompt_tokens: int
    answer_tokens: int
    price: Price | None

    @property
    def usd(self) -> float | None:
        """Return it in USD."""
        return self.price and self.prompt_tokens * self.price[0] + self.answer_tokens * self.price[1]

    def __str__(self) -> str:
        if not self.price or self.usd is None:
            return "price unknown"
        sent, got = (1e6 * each for each in self.price)
        return f"{self.prompt_tokens} x {sent:g} + {self.answer_tokens} x {got:g} USD/M = {self.usd:.6f} USD"


def prices(found: Iterable[Deployment], config: Config) -> dict[str, Price | None]:
    """Return the price of each deployment by its id; None where nobody knows it."""
    known: dict[str, Price | None] = {}
    asked: dict[str, tuple[str, str, str]] = {}
    for each in found:
        own = config.costs.per_million_tokens.get(each.provider.name)
        if each.provider.free_tier or (each.free and own is None):
            known[each.id] = (0.0, 0.0)
        elif own is not None:
            known[each.id] = (own / 1e6, own / 1e6)
        else:  # Copilot is asked as OpenAI is, and counted so
            counted, model = each.litellm_model.split("/", 1)
            asked[each.id] = (counted, each.provider.litellm_provider, model)
    of_map = _of_map(frozenset(asked.values())) if asked else {}
    return known | {name: of_map[key] for name, key in asked.items()}


@cache
def _of_map(asked: frozenset[tuple[str, str, str]]) -> dict[tuple[str, str, str], Price | None]:
    """Return LiteLLM's prices of (prefix, provider, model); its map is large, so only they are kept."""
    facts = price_map()
    return {
        key: next((price for name in key[:2] if (price := per_token(listed(facts, name, key[2])[1]))), None)
        for key in asked
    }


def cheapest(found: Sequence[Deployment], wants: Wants, config: Config) -> list[tuple[Deployment, Cost | None]]:
    """Return deployments and costs by priority, then cost, unknown ones last, then as they stood; `order` follows."""
    prompt, answer, known = wants.prompt, wants.answer or ANSWER, prices(found, config)
    expected = {each.id: Cost(prompt, answer, known[each.id]) for each in found}

    def rank(each: Deployment) -> tuple[int, float, int]:
        usd = expected[each.id].usd
        return each.provider.priority, float("inf") if usd is None else usd, each.order

    places: dict[int, int] = {}
    return [
        (replace(each, order=places.setdefault(each.order, len(places) + 1)), expected[each.id])
        for each in sorted(found, key=rank)
    ]
