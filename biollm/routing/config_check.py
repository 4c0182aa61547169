"""Warns where the configuration and LiteLLM's map of models disagree, and about free tiers that may train on prompts.

LiteLLM itself does not warn about a deprecated model. Its map may be out of date, so every warning names it. Models of
this site are not in it. Pure: nothing is read or sent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from difflib import get_close_matches

from biollm.config import Config, Provider
from biollm.config.values import flag_name
from biollm.errors import Problem
from biollm.routing.deployments import models_of
from biollm.routing.pricing import listed, per_token, priced
from biollm.slurm import vllm_flags
from biollm.types import counted

NEAR = 60  # days before a model's end at which it is named
Facts = Mapping[str, object]


@dataclass(frozen=True)
class _Offer:
    """A provider's model, with its name and entry in the map; ("", {}) where it has none."""

    provider: Provider
    model: str
    name: str
    facts: Facts


def check(config: Config, today: date, prices: Mapping[str, Facts], source: str) -> list[Problem]:
    """Return what looks wrong, each with file, line and fix.

    Args:
        config: The configuration.
        today: The date that deadlines are compared with.
        prices: LiteLLM's map, model -> facts.
        source: What the warnings call the map.
    """
    offers = [
        _Offer(provider, model, *listed(prices, provider.litellm_provider, provider.model_ids.get(model, model)))
        for provider in config.providers
        if provider.type == "api"
        for model in models_of(config, provider)
    ]
    found = [*_ends(offers, today), *_contexts(config, offers), *_prices(config, offers)]
    reference = config.costs.reference_model
    if reference and not prices.get(reference):
        found.append(
            ("costs.reference_model", f"{reference} is not", "Without it `biollm usage` shows no cost avoided.")
        )
    in_map = [(key, f"{said} in {source}.", fix) for key, said, fix in found]
    return [
        config.problem(*each)
        for each in (
            *in_map, *_shares(config), *_training(config), *_capabilities(config), *_flags(config), *_seconds(config)
        )
    ]  # fmt: skip


def _seconds(config: Config) -> Iterator[tuple[str, str, str]]:
    """Yield spans of seconds where hours or days are usual: a number without a unit is taken for seconds."""
    spans = {
        "cache.ttl": config.cache.ttl,
        "store_rated": config.store_rated,
        "cluster.idle_timeout": config.cluster.idle_timeout,
        "alerts.expires": config.alerts.expires,
        "alerts.window": config.alerts.window,
    }
    for model in config.models.values():
        spans |= {f"models.{model.key}.{name}": getattr(model, name) for name in ("start_timeout", "idle_timeout")}
    for key, span in spans.items():
        if span and span < 60:  # 0 turns off
            yield key, f"is {counted(int(span), 'second')}.", "Write the unit of a longer time: 7d, 12h or 30min."


def _shares(config: Config) -> Iterator[tuple[str, str, str]]:
    """Yield providers whose accounts all have a share of the limits, and more than all of it together."""
    for provider in config.providers:
        shares = [account.share for account in provider.accounts]
        if len(shares) > 1 and max(shares) < 1 and sum(shares) > 1.001:
            said = f"the shares of the limits add up to {sum(shares):.4g}."
            yield f"providers.{provider.name}.accounts", said, "Lower them to 1 together, or leave `share` out."


def _ends(offers: Iterable[_Offer], today: date) -> Iterator[tuple[str, str, str]]:
    for offer in offers:
        try:
            left = (date.fromisoformat(str(offer.facts.get("deprecation_date"))) - today).days
        except ValueError:
            continue
        if left <= NEAR:
            when = f"ends in {counted(left, 'day')}, on" if left > 0 else "has ended on"
            said = f"{offer.model} {when} {offer.facts['deprecation_date']}: listed as {offer.name}"
            yield f"providers.{offer.provider.name}.models", said, "Replace it with its successor."


def _contexts(config: Config, offers: Iterable[_Offer]) -> Iterator[tuple[str, str, str]]:
    """Yield context lengths beyond what prompt and answer may have together, or below what the prompt alone may have."""
    shortest: dict[str, tuple[int, int, str]] = {}  # of a model's providers
    for offer in offers:
        prompt, answer = offer.facts.get("max_input_tokens"), offer.facts.get("max_output_tokens")
        if isinstance(prompt, int):
            size = (prompt, answer if isinstance(answer, int) else 0, offer.name)
            shortest[offer.model] = min(size, shortest.get(offer.model, size))
    for model, (prompt, answer, name) in shortest.items():
        own = config.models[model].context_length if model in config.models else None
        if own and not prompt <= own <= prompt + answer:
            why = "Requests that it could serve are skipped" if own < prompt else "Requests are sent that it rejects"
            said = f"is {own}; {name} takes {prompt} tokens and answers with {answer}"
            yield f"models.{model}.context_length", said, f"{why}: write {prompt}."


def _prices(config: Config, offers: Iterable[_Offer]) -> Iterator[tuple[str, str, str]]:
    """Yield the user's prices outside the range of the map, and budgets that do not apply to a model without a price."""
    known: dict[str, list[tuple[float, float]]] = {}
    own_prices = config.costs.per_million_tokens
    for offer in offers:
        price = per_token(offer.facts)
        if price:
            known.setdefault(offer.provider.name, []).append(price)
        elif not (priced(offer.facts) or offer.provider.free_tier or offer.provider.name in own_prices) and any(
            x.kind == "usd" for a in offer.provider.accounts for x in a.limits
        ):
            said = f"does not hold for {offer.model}: no price of it is"
            fix = f"Write costs.per_million_tokens.{offer.provider.name}, or a token_budget beside it."
            yield f"providers.{offer.provider.name}.budget", said, fix
    free = {provider.name for provider in config.providers if provider.free_tier}
    for provider, prices in known.items():
        own = own_prices.get(provider)
        low, high = min(1e6 * min(each) for each in prices), max(1e6 * max(each) for each in prices)
        if own is not None and provider not in free and not 0.99 * low <= own <= 1.01 * high:
            said = f"is {own:g} USD per million tokens; its models stand at {low:.4g} to {high:.4g}"
            fix = "Take it out to count by the map, or write `free_tier: true` if tokens cost you nothing."
            yield f"costs.per_million_tokens.{provider}", said, fix


def _capabilities(config: Config) -> Iterator[tuple[str, str, str]]:
    """Yield capabilities of one model that look like a common one."""
    uses = Counter(each for model in config.models.values() for each in model.capabilities or ())
    common = [each for each, count in uses.items() if count > 1]
    for model in config.models.values():
        for each in sorted(model.capabilities or ()):
            if uses[each] == 1 and (near := get_close_matches(each, common, n=1, cutoff=0.8)):
                yield f"models.{model.key}.capabilities", f"no other model has {each!r}.", f"Did you mean {near[0]}?"


def _flags(config: Config) -> Iterator[tuple[str, str]]:
    """Yield what vLLM would refuse."""
    for model in config.models.values():
        block = f"models.{model.key}.vllm_args."
        spelt = {flag_name(at.removeprefix(block)): at for at in config.sources if at.startswith(block)}
        for key, problem in vllm_flags.problems({} if model.base else model.vllm_args):
            yield spelt.get(key, block + key), problem


def _training(config: Config) -> Iterator[tuple[str, str, str]]:
    if config.data_policy == "local_only":
        return
    for provider in config.providers:
        key = f"providers.{provider.name}.trains_on_prompts"
        if provider.trains_on_prompts and config.data_policy == "any":
            fix = "`data_policy: no_training` excludes it; if your plan does not train on prompts, write false."
            yield key, "prompts may be used for training.", fix
        elif provider.free_tier and provider.type == "api" and "trains_on_prompts" not in provider.model_fields_set:
            asked = ", and no_training does not exclude it" if config.data_policy == "no_training" else ""
            yield (
                key,
                f"it is not stated whether this free tier trains on prompts{asked}.",
                "Write true or false.",
            )
