"""The drill: who answers when each rung breaks in each way, with the user's own configuration and nobody asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from provider import Loopback

from biollm.config import load_config
from biollm.drill import FAULTS, drill


def test_the_next_rung_answers_whatever_breaks_and_no_provider_is_asked(
    net: Loopback, waterfall: Callable[..., Path], biollm: Callable[..., Any], state: Path
) -> None:
    first, second = net.serve(text="first"), net.serve(text="second")
    waterfall(first=first, second=second)
    ran = biollm("drill", "--json")
    assert ran.code == 0, ran.out + ran.err
    cells = {(cell["rung"], cell["fault"]): cell for cell in ran.json["cells"]}
    assert {fault: cells["first/small", fault]["answered"] for fault in FAULTS} == dict.fromkeys(FAULTS, "second/small")
    assert {cells["second/small", fault]["answered"] for fault in FAULTS} == {None}
    assert "Error" in cells["second/small", "http_500"]["seen"]
    assert not first.requests and not second.requests
    assert not list(state.glob("*.db"))
    assert "sk-planted" not in json.dumps(ran.json)


def test_a_rest_of_the_account_passes_over_its_other_models(net: Loopback, waterfall: Callable[..., Path]) -> None:
    two = {"base_url": net.serve().url, "models": ["one", "two"]}
    waterfall(first=two, second=net.serve())
    answered = {cell.fault: cell.answered for cell in drill(load_config()).cells if cell.rung == "first/one"}
    assert answered["http_404"] == "first/two"
    assert answered["http_401"] == answered["http_429"] == answered["http_500"] == "second/small"


def test_a_missing_key_shows_and_nobody_left_is_a_failure(
    waterfall: Callable[..., Path], biollm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    waterfall(only="http://127.0.0.1:9/v1")
    monkeypatch.delenv("ONLY_KEY")
    ran = biollm("drill")
    assert (ran.code, ran.out) == (1, "only/small would not answer: no key: set ONLY_KEY\n")
