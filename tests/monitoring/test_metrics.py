"""Prometheus text: its parser takes it, figures are the ledger's, and the Grafana dashboard asks for what exists."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from biollm.config import load_config
from biollm.ledger import Ledger, Record, history
from biollm.monitoring import metrics

DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana_dashboard.json"
ODD = 'a "b" \\ c\nd'


@pytest.fixture
def families(state: Path, waterfall: Callable[..., Path]) -> dict[str, Any]:
    waterfall(first={"base_url": "https://x.test/v1", "rate_limit": "10/min", "token_budget": "1M/month"})
    at = time.time() - 60
    ok = Record(at, "a", "first/m", "first", "default", ODD, "ok", ms=700.0, ttft_ms=80.0, prompt_tokens=10, cost_usd=0.1,
                order=1)  # fmt: skip
    bad = replace(ok, request="b", outcome="failed", reason="HTTP 500: no", status=500)
    late = replace(ok, request="b", provider="second", order=2, ms=7000.0, ttft_ms=None, completion_tokens=3)
    ledger = Ledger(state)
    for record in (ok, bad, late):
        ledger.finish(None, "", record)
    ledger.flush()
    text = metrics.text(load_config(), ledger)
    history.roll(ledger)
    assert metrics.text(load_config(), ledger) == text  # counters do not jump when records are rolled up
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(family: Any, suffix: str = "", **labels: str) -> float:
    found = [s.value for s in family.samples if s.name.endswith(suffix) and labels.items() <= s.labels.items()]
    return sum(found)


def test_the_figures_are_the_ledgers(families: dict[str, Any]) -> None:
    assert value(families["biollm_requests"], provider="first", outcome="ok") == 1
    assert value(families["biollm_requests"], provider="first", outcome="failed", model=ODD) == 1
    assert value(families["biollm_failures"], reason="HTTP 500") == 1
    assert value(families["biollm_fallbacks"], provider="second", reason="HTTP 500") == 1
    assert value(families["biollm_tokens"], type="output", provider="second") == 3
    assert value(families["biollm_quota_limit"], scope="first/default", unit="tokens") == 1e6


def test_durations_are_a_histogram_in_seconds(families: dict[str, Any]) -> None:
    duration = families["biollm_request_duration_seconds"]
    assert duration.type == "histogram"
    assert [value(duration, "_bucket", provider="first", le=le) for le in ("0.5", "1", "+Inf")] == [0, 1, 1]
    assert value(duration, "_sum", provider="second") == pytest.approx(7, rel=0.02)
    assert value(duration, "_count") == 2
    assert value(families["biollm_time_to_first_token_seconds"], "_count") == 1


def test_names_and_units_are_prometheus_own(families: dict[str, Any]) -> None:
    for name, family in families.items():
        assert re.fullmatch(r"biollm_[a-z_]+", name) and family.documentation.endswith(".")
        assert not name.endswith(("_ms", "_milliseconds")) and family.type in ("counter", "gauge", "histogram")
        if family.type == "counter":
            assert all(sample.name == f"{name}_total" for sample in family.samples)


def test_an_empty_ledger_has_every_metric(families: dict[str, Any], tmp_path: Path) -> None:
    text = metrics.text(load_config(), Ledger(tmp_path / "new"))
    assert {family.name for family in text_string_to_metric_families(text)} == set(families)


def test_the_command_prints_them(families: dict[str, Any], biollm: Callable[..., Any]) -> None:
    ran = biollm("usage", "--prometheus")
    assert {family.name for family in text_string_to_metric_families(ran.out)} == set(families)


def test_the_dashboard_asks_only_for_metrics_that_exist(families: dict[str, Any]) -> None:
    board = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"\bbiollm_\w+", query)}
    exist = {sample.name for family in families.values() for sample in family.samples}
    assert queries and asked <= exist
    labels = {label for family in families.values() for sample in family.samples for label in sample.labels}
    grouped = {
        name for query in queries for names in re.findall(r"by \(([^)]*)\)", query) for name in names.split(", ")
    }
    assert grouped <= labels
