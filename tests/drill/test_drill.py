"""The drill: which deployment answers when each one breaks in each way, without a request to a provider."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from provider import Loopback
from test_supervisor import Job

from biollm.config import load_config
from biollm.drill.drill import FAULTS, HARMLESS, IN_PROCESS, Cell, drill
from biollm.routing.litellm_private import OWN_HANDLER

pytestmark = pytest.mark.slow  # each takes seconds


TWICE = ("reset", "http_500", "http_503", "flapping")  # asked once more: it may be a slip
ASKED = {fault: 0 if fault == "refused" else 2 if fault in TWICE else 1 for fault in FAULTS}
GOOD = Cell("a", "http_500", "b", "b", 1.0, "an answer", asked=1, next="b", recovered=True)


@pytest.mark.parametrize(
    ("change", "ok"),
    [
        ({}, True), ({"asked": 2}, True), ({"asked": 3}, False), ({"next": None}, False), ({"recovered": False}, False),
        ({"answered": None}, False), ({"expected": None, "answered": None, "next": None}, True),
    ],
)  # fmt: skip
def test_a_break_is_caught_when_the_answer_comes_and_later_calls_are_answered(change: dict[str, Any], ok: bool) -> None:
    assert replace(GOOD, **change).ok is ok


@pytest.mark.parametrize("own", ["", "True"], ids=["OpenAI's SDK", "LiteLLM's own handler"])
def test_the_next_deployment_answers_every_break_and_no_provider_gets_a_request(
    own: str,
    net: Loopback,
    waterfall: Callable[..., Path],
    biollm: Callable[..., Any],
    state: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(OWN_HANDLER, own)
    first, second = net.serve(text="first"), net.serve(text="second")
    waterfall(first=first, second=second)
    ran = biollm("drill", "--json")
    assert ran.code == 0, ran.out + ran.err
    cells = {(cell["rung"], cell["fault"]): cell for cell in ran.json["cells"]}
    expected = {fault: "first/small" if fault in HARMLESS else "second/small" for fault in FAULTS}
    assert {fault: cells["first/small", fault]["answered"] for fault in FAULTS} == expected
    assert {cells["second/small", fault]["answered"] for fault in FAULTS} == {None, "second/small"}
    assert {cells["first/small", fault]["next"] for fault in FAULTS} == {"first/small", "second/small"}
    assert all(cell["recovered"] for cell in cells.values())
    assert {fault: cells["first/small", fault]["asked"] for fault in FAULTS} == ASKED
    assert "Error" in cells["second/small", "http_500"]["seen"]
    assert not first.requests and not second.requests
    assert not list(state.glob("*.db"))
    assert "sk-planted" not in json.dumps(ran.json)


def test_a_cooldown_of_the_account_passes_over_its_other_models(net: Loopback, waterfall: Callable[..., Path]) -> None:
    two = {"base_url": net.serve().url, "models": ["one", "two"], "rate_limit": "100/min"}
    waterfall(first=two, second=net.serve())
    answered = {cell.fault: cell.answered for cell in drill(load_config()).cells if cell.deployment == "first/one"}
    assert answered["http_404"] == answered["http_500"] == "first/two"
    assert answered["http_401"] == answered["http_429"] == "second/small"


def test_a_missing_key_is_reported_and_no_deployment_is_a_failure(
    waterfall: Callable[..., Path], biollm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    waterfall(only="http://127.0.0.1:9/v1")
    monkeypatch.delenv("ONLY_KEY")
    ran = biollm("drill")
    assert (ran.code, ran.out) == (1, "only/small is not available: no key: set ONLY_KEY\n")


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    """Servers that were started as by Slurm."""
    job = Job(tmp_path)
    yield job
    job.stop()


@pytest.fixture
def lab(job: Job, waterfall: Callable[..., Path], tmp_path: Path) -> Callable[..., list[str]]:
    """Use two servers of one model, found by themselves, above an embedded model; return the deployments' ids."""

    def configure(gguf: Path, **above: Any) -> list[str]:
        job.start("")
        job.record()
        job.start("")
        while len(job.records()) < 2:
            job.record()
        folder = waterfall(**above, vllm={"type": "local", "models": ["m0"]}, small={"type": "embedded"})
        (folder / "models.yaml").write_text(
            f"inherit: false\nmodels:\n  m0: {{hf_id: a/b}}\n  small: {{type: embedded, gguf: {gguf}}}\n"
        )
        (folder / "cluster.yaml").write_text(f"cluster: {{name: lab, run_dir: {job.run.parent}}}\n")
        starts = sorted(record["start"][:8] for record in job.records())
        return [f"{name}/small" for name in above] + [f"vllm/m0#{start}" for start in starts] + ["small/small"]

    return configure


def test_discovered_servers_and_the_embedded_model_keep_their_properties(
    lab: Callable[..., list[str]], tmp_path: Path
) -> None:
    (tmp_path / "x.gguf").touch()
    one, other, embedded = lab(tmp_path / "x.gguf")
    found = drill(load_config())
    assert found.deployments == (one, other, embedded) and found.ok
    cells = {(cell.deployment, cell.fault): cell for cell in found.cells}
    # a queue, a key and an address of its own for each server: a fault of one does not touch the other
    assert {cells[one, fault].answered for fault in FAULTS if fault not in HARMLESS} == {other}
    assert {cells[other, fault].answered for fault in FAULTS if fault not in HARMLESS} == {embedded}
    assert all(cells[each, fault].answered == each for each in (one, other) for fault in HARMLESS)
    assert cells[other, "refused"].seen == "a degraded answer, where allow_degraded permits it"
    assert [cell.fault for cell in found.cells if cell.deployment == embedded] == list(IN_PROCESS)


def test_a_local_address_without_a_server_is_reported(
    net: Loopback, waterfall: Callable[..., Path], biollm: Callable[..., Any]
) -> None:
    away = net.refusing()
    waterfall(vllm={"type": "local", "base_url": away, "models": ["qwen-coder-32b"]})
    ran = biollm("drill")
    assert (ran.code, ran.out) == (1, f"vllm/qwen-coder-32b is not available: no server listens at {away}\n")


def test_a_likely_mistake_in_the_order_is_reported(
    net: Loopback, waterfall: Callable[..., Path], biollm: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    paid, gift = "https://paid.invalid/v1", {"base_url": "https://gift.invalid/v1", "free_tier": True}
    waterfall(paid=paid, gift=gift, last={"base_url": net.serve().url, "priority": 2, "models": ["gemini-3.8-flash"]})
    with caplog.at_level(logging.WARNING):
        ran = biollm("drill", "--all")
    assert ran.code == 0
    caught, timeouts, odd, same, *_ = ran.out.splitlines()
    assert timeouts == "Silent servers had 3 s here; your own timeouts are longer (`biollm config`)."
    assert "no fallback left" not in biollm("drill").out.partition("--all lists every failover.")[2]
    assert odd == "paid/small may cost money (its price is unknown), and comes before gift/small, which is free"
    assert same == "gift and last have the same priority, 2: the order in the file decides"
    assert caught == "40 failovers succeeded, 0 failed; 17 had no fallback left."
    assert ran.out.count("no fallback left") - 1 == 17
    warned = [record.getMessage() for record in caplog.records if record.name.startswith("LiteLLM")]
    assert warned == []  # it warns of models without a price
