"""What `config --check` warns of: models that end, numbers that differ from LiteLLM's map, tiers that may train."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from biollm.config import load_config
from biollm.routing.config_check import check
from biollm.routing.pricing import price_map

TODAY = date(2026, 11, 24)
PRICES = {
    "gpt-9": {"litellm_provider": "openai", "max_input_tokens": 900, "max_output_tokens": 100,
              "input_cost_per_token": 1e-6, "output_cost_per_token": 4e-6, "deprecation_date": "2027-01-20"},
    "github_copilot/gpt-9": {"max_input_tokens": 400, "max_output_tokens": 50, "deprecation_date": "2026-11-24"},
    "gemini-x": {"litellm_provider": "vertex_ai-language-models", "deprecation_date": "2020-01-01"},
    "gemini/gemini-x": {"litellm_provider": "gemini", "deprecation_date": "2027-01-24"},
    "gemini-y": {"litellm_provider": "vertex_ai-language-models", "deprecation_date": "2020-01-01"},
    "hosted_vllm/gpt-9": {"litellm_provider": "hosted_vllm", "max_input_tokens": 9, "deprecation_date": "2020-01-01"},
    "gpt-odd": {"litellm_provider": "openai", "deprecation_date": "soon"},
}  # fmt: skip
Check = Callable[..., list[str]]


@pytest.fixture
def warn(waterfall: Callable[..., Path], tmp_path: Path) -> Check:
    """Return what is said of these providers, models and further keys of the file."""

    def check_it(
        providers: Mapping[str, Mapping[str, Any]], models: Mapping[str, Any] | None = None, **top: Any
    ) -> list[str]:
        folder = waterfall({"costs": {}, **top}, **providers)
        (folder / "models.yaml").write_text(yaml.safe_dump({"inherit": False, "models": models or {}}))
        return [str(each).removeprefix(f"{folder}/") for each in check(load_config(), TODAY, PRICES, "the map")]

    return check_it


@pytest.mark.parametrize(
    ("provider", "model", "said"),
    [
        ("openai", "gpt-9", "ends in 57 days, on 2027-01-20: listed as gpt-9 in the map"),
        ("github_copilot", "gpt-9", "has ended on 2026-11-24: listed as github_copilot/gpt-9 in the map"),
        ("gemini", "gemini-x", ""),  # 61 days; the bare name is another company's offer
        ("gemini", "gemini-y", ""),
        ("openai", "gpt-odd", ""),
        ("openai", "gpt-unknown", ""),
    ],
)
def test_a_model_past_its_end_or_near_it_is_named(warn: Check, provider: str, model: str, said: str) -> None:
    entry = {"models": [model], "env_key": None if provider == "github_copilot" else "SOME_KEY"}
    found = warn({provider: {key: value for key, value in entry.items() if value}})
    assert bool(found) == bool(said)
    assert not said or (said in found[0] and found[0].startswith("providers.yaml:") and "successor" in found[0])


def test_a_models_own_id_is_looked_up(warn: Check) -> None:
    (said,) = warn({"openai": {"models": ["nine"], "model_ids": {"nine": "gpt-9"}}})
    assert ": providers.openai.models: nine ends in 57 days" in said


@pytest.mark.parametrize(
    ("length", "providers", "said"),
    [
        (900, ["openai"], ""),
        (1000, ["openai"], ""),
        (1001, ["openai"], "is 1001; gpt-9 takes 900 tokens and answers with 100 in the map. Requests are sent that it rejects: write 900."),
        (899, ["openai"], "Requests that it could serve are skipped: write 900."),
        (900, ["openai", "github_copilot"], "github_copilot/gpt-9 takes 400 tokens and answers with 50"),
        (400, ["openai", "github_copilot"], ""),
    ],
)  # fmt: skip
def test_a_context_length_is_what_the_least_of_its_providers_takes(
    warn: Check, length: int, providers: list[str], said: str
) -> None:
    entries = {name: {"models": ["gpt-9"]} for name in providers}
    found = [each for each in warn(entries, {"gpt-9": {"type": "api", "context_length": length}}) if "_length" in each]
    assert bool(found) == bool(said)
    assert not said or (said in found[0] and found[0].startswith("models.yaml:"))


@pytest.mark.parametrize(
    ("own", "more", "said"),
    [
        (2.0, {}, ""),
        (5.0, {}, "is 5 USD per million tokens; its models stand at 1 to 4 in the map."),
        (0.0, {}, "is 0 USD per million tokens"),
        (0.0, {"free_tier": True, "trains_on_prompts": False}, ""),
    ],
)
def test_a_price_of_ones_own_lies_between_those_of_prompt_and_answer(
    warn: Check, own: float, more: dict[str, Any], said: str
) -> None:
    found = warn({"openai": {"models": ["gpt-9"], **more}}, costs={"per_million_tokens": {"openai": own}})
    found = [each for each in found if "per_million" in each]
    assert bool(found) == bool(said)
    assert not said or (said in found[0] and ": costs.per_million_tokens.openai:" in found[0])


def test_a_budget_that_no_price_uses_up_and_an_unknown_reference_are_named(warn: Check) -> None:
    entry = {"models": ["gpt-unknown"], "budget": "1 USD/day", "base_url": "https://campus.invalid/v1"}
    assert not [said for said in warn({"campus": entry}, costs={"per_million_tokens": {"campus": 3}}) if "hold" in said]
    budget, reference = warn({"campus": entry}, costs={"reference_model": "gpt-8"})
    assert "does not hold for gpt-unknown: no price of it is in the map" in budget and "token_budget" in budget
    assert "costs.reference_model: gpt-8 is not in the map" in reference


@pytest.mark.parametrize(
    ("tier", "policy", "said"),
    [
        ({"trains_on_prompts": True}, "any", "may be used for training. `data_policy: no_training` excludes it"),
        ({"trains_on_prompts": True}, "no_training", ""),
        ({"trains_on_prompts": False}, "any", ""),
        ({}, "any", "it is not stated whether this free tier trains on prompts. Write true or false"),
        ({}, "no_training", "and no_training does not exclude it"),
        ({}, "local_only", ""),
    ],
)
def test_a_free_tier_that_may_train_is_named_unless_the_policy_passes_over_it(
    warn: Check, tier: dict[str, bool], policy: str, said: str
) -> None:
    found = warn({"campus": {"base_url": "https://campus.invalid/v1", "free_tier": True, **tier}}, data_policy=policy)
    assert bool(found) == bool(said)
    assert not said or (said in found[0] and found[0].startswith("providers.yaml:"))


def test_models_of_this_site_are_not_looked_up(warn: Check) -> None:
    assert (
        warn({"vllm": {"type": "local", "models": ["gpt-9"]}}, {"gpt-9": {"hf_id": "a/b", "context_length": 7}}) == []
    )


def test_what_is_shipped_agrees_with_litellms_map() -> None:
    """But for what its free tiers do with prompts, and for what time will bring."""
    found = check(load_config(), TODAY, price_map(), "the map")
    assert [each.key for each in found] == [
        "providers.lightning.trains_on_prompts",
        "providers.gemini.trains_on_prompts",
    ]
    later = check(load_config(), date(2027, 4, 1), price_map(), "the map")
    assert any("gemini-3.1-flash-lite ends in 36 days" in each.message for each in later)


def test_config_check_warns_names_the_file_and_stays_right(waterfall: Callable[..., Path], biollm: Any) -> None:
    waterfall(openai={"models": ["gpt-4-turbo"]})
    ran = biollm("config", "--check", "--json")
    (warning,) = ran.json["warnings"]
    assert ran.code == 0 and warning["key"] == "providers.openai.models"
    assert "gpt-4-turbo has ended on 2026-10-23: listed as gpt-4-turbo in litellm 1." in warning["message"]
    assert "model_prices_and_context_window_backup.json" in ran.err
    assert biollm("config", "--json").err == ""


def test_flags_that_vllm_would_refuse_are_named_at_their_line(warn: Check) -> None:
    args = {"max_modle_len": 1000, "tensor-parallel-size": 0, "dtype": "auto"}
    found = warn({}, {"mine": {"hf_id": "lab/mine", "vllm_args": args}})
    assert [each.partition(" models.")[2] for each in found] == [
        "mine.vllm_args.max_modle_len: is not a flag of vLLM 0.32.0. Did you mean 'max_model_len'?",
        "mine.vllm_args.tensor-parallel-size: is 0; the minimum is 1.",
    ]


def test_a_capability_that_looks_like_a_common_one_is_named(warn: Check) -> None:
    models = {name: {"type": "api", "capabilities": ["reasoning", "code"]} for name in ("a", "b")}
    found = warn({}, {**models, "c": {"type": "api", "capabilities": ["reasonning", "proteins"]}})
    assert [each.partition(": ")[2] for each in found] == [
        "models.c.capabilities: no other model has 'reasonning'. Did you mean reasoning?"
    ]


@pytest.mark.parametrize(
    ("shares", "total"),
    [([0.75, 0.5], "1.25"), ([0.5, 0.5], ""), ([1, 0.2], ""), ([0.5], ""), ([0.5, 0.4, 0.3], "1.2")],
)
def test_shares_that_are_more_than_the_whole_are_named(warn: Check, shares: list[float], total: str) -> None:
    accounts = [{"name": f"a{at}", "env_key": f"KEY_{at}", "share": share} for at, share in enumerate(shares)]
    found = warn({"openai": {"models": ["gpt-odd"], "accounts": accounts}})
    assert [f"the shares of the limits add up to {total}." in said for said in found] == ([True] if total else [])


@pytest.mark.parametrize("span", [7, "7d", 0])
def test_a_few_seconds_where_days_are_usual_are_named(warn: Check, span: int | str) -> None:
    models = {"mine": {"path": "/weights", "start_timeout": span}}
    found = [each for each in warn({}, models, cache={"ttl": span}, store_rated=span) if "seconds" in each]
    keys = ("cache.ttl", "store_rated", "models.mine.start_timeout") if span == 7 else ()
    message = "is 7 seconds. Write the unit of a longer time: 7d, 12h or 30min."
    assert [each.partition(" ")[2] for each in found] == [f"{key}: {message}" for key in keys]
